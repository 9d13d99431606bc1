"""Statistics of a data set's labels, and warnings about labels that can be read but look wrong."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from PIL import Image
from torch import Tensor

from ..images_degmix import DOUBT, image_size, to_coded_label, to_pixels
from ..tasks import IGNORE_INDEX, JPEG_IDS, TASK_KINDS, TWO_LEVELS, Suspicion, format_fields
from .columns import RowReader, describe_column


# Samples that are examined together: enough to tell a rare class from one that does not occur.
NUM_SAMPLES = 16


class LabelInspector:
    """Collects what looks wrong about the labels of a data set, by examining `NUM_SAMPLES` maps of a task at a time.

    Args:
        reader: of the rows that the labels come from.
    """

    def __init__(self, reader: RowReader):
        self.reader = reader
        self.waiting: dict[str, dict[int, np.ndarray]] = {name: {} for name in reader.tasks}
        # (task or "image", `Suspicion.what`) -> the first such suspicion, and sample -> share of its pixels.
        self.found: dict[tuple[str, str], tuple[Suspicion, dict[int, float]]] = {}
        # Tasks of which a map has a value that is neither 0 nor 255.
        self.varied: set[str] = set()

    def add(
        self,
        index: int,
        row: dict[str, Any],
        image: Image.Image | np.ndarray,
        labels: dict[str, np.ndarray | None],
    ):
        """Adds a sample: its index, row, image, and labels from [`read_label`]."""
        column, (_, orientation) = self.reader.columns["image"], self.reader.file_facts(row, "image")
        height, width = image_size(image)
        # If a rectangle is turned by 90 degrees, the labels' size shows it.
        keeps_size = orientation in (2, 3, 4) or (orientation > 4 and height == width)
        labelled = (name for name, label in labels.items() if label is not None)
        if (
            keeps_size
            and not column.ignore_orientation
            and any(self.reader.file_facts(row, name)[1] == 1 for name in labelled)
        ):
            what = "EXIF data turns images, but not their labels"
            setting = {"ignore_orientation": True}
            detail = f"orientation {orientation}; ignore this if labels are upright"
            self.note("image", Suspicion(what, [1.0], setting, detail), [index])
        if isinstance(image, Image.Image):
            if DOUBT in image.info:
                self.note("image", Suspicion("dark?", [1.0], detail=image.info[DOUBT]), [index])
        elif to_pixels(image, do_convert_rgb=True).max() <= 1:
            self.note("image", Suspicion("black?", [1.0], {"scale": 255}, "no value is above 1"), [index])
        for name, label in labels.items():
            kind, column = self.reader.kinds[name], self.reader.columns[name]
            if kind.has_class_ids and not column.rounds and self.reader.file_facts(row, name)[0] == "JPEG":
                self.note(name, JPEG_IDS, [index])
            if label is not None:
                self.waiting[name][index] = label
                if len(self.waiting[name]) == NUM_SAMPLES:
                    self._examine(name)

    def note(self, name: str, suspicion: Suspicion, samples: Iterable[int]):
        """Notes a suspicion about a task's column, or about `"image"`, in these samples."""
        shares = {index: share for index, share in zip(samples, suspicion.shares) if share}
        if shares:
            self.found.setdefault((name, suspicion.what), (suspicion, {}))[1].update(shares)

    def _examine(self, name: str):
        labels, self.waiting[name] = self.waiting[name], {}
        column = self.reader.columns[name]
        if any(((label != 0) & (label != IGNORE_INDEX)).any() for label in labels.values()):
            self.varied.add(name)
        for dtype in {label.dtype for label in labels.values()}:  # 8-bit maps are coded differently
            alike = {index: label for index, label in labels.items() if label.dtype == dtype}
            for suspicion in find_suspicions(list(alike.values()), self.reader.tasks[name]):
                # The user may have said what is unlabelled.
                if suspicion.what != TWO_LEVELS or not (column.ignore or column.invalid or column.classes):
                    self.note(name, suspicion, alike)

    def conclude(self):
        """Changes the reader's columns whose values can have only one meaning and are not explained by the user."""
        for name in self.waiting:
            self._examine(name)
        for (name, _), (suspicion, _) in self.found.items():
            if suspicion.only and name not in self.reader.explained:
                column = self.reader.columns[name]
                self.reader.columns[name] = replace(column.mended(suspicion.setting), expected=suspicion.only)
        for name, kind in self.reader.kinds.items():
            has_two_classes = (kind.num_logits or self.reader.tasks[name].get("num_labels")) == 2
            is_clear = name in self.varied | self.reader.explained or self.reader.columns[name].expected
            if has_two_classes and not is_clear:
                self.reader.ambiguous.add(name)

    def warnings(self) -> list[str]:
        """One line per suspicion: column, what, share of the pixels, samples, and the setting that fixes it."""
        for name in self.waiting:
            self._examine(name)
        lines = []
        for (name, what), (suspicion, shares) in self.found.items():
            column, (first, *others) = self.reader.columns[name], shares
            share, more = sum(shares.values()) / len(shares), f" and {len(others)} more" if others else ""
            line = f"{describe_column(name, column)}: {what}, in {share:.1%} of the pixels of sample {first}{more}"
            line += f": {suspicion.detail}" if suspicion.detail else ""
            concluded = suspicion.only and suspicion.only == column.expected
            if suspicion.setting:
                fields = format_fields((column if concluded else column.mended(suspicion.setting)).given(name))
                line += f"; {'read with' if concluded else 'fixed by'} `columns: {{{name}: {{{fields}}}}}`"
            lines.append(line)
        return lines


def find_suspicions(labels: list[np.ndarray], task: dict[str, Any]) -> list[Suspicion]:
    """What looks wrong about maps that are examined together.

    Args:
        labels: as [`read_label`] gives them.
        task: its fields, as in `DeGMixConfig.tasks`; `num_labels` may be missing.
    """
    return TASK_KINDS[task["kind"]].find_suspicions(labels, task.get("num_labels") or IGNORE_INDEX)


def check_columns(data: Dataset | IterableDataset, reader: RowReader) -> LabelInspector:
    """Examines some rows before all are read, and changes the reader's columns; see [`LabelInspector.conclude`].

    Rows that cannot be read are skipped; reading all rows finds them.

    Args:
        data: what [`select_columns`] gives.
        reader: of its rows.
    """
    inspector = LabelInspector(reader)
    for index, row in choose_rows(data, NUM_SAMPLES):
        with suppress(ValueError):
            image, labels, *_ = inspect_row(row, reader)
            inspector.add(index, row, image, labels)
    inspector.conclude()
    return inspector


def inspect_row(
    row: dict[str, Any], reader: RowReader
) -> tuple[Image.Image | np.ndarray, dict[str, np.ndarray | None], dict[str, np.ndarray | None], list[str]]:
    """The image, the labels that training would accept, all readable labels, and why training would stop.

    Raises:
        ValueError: there is no readable image.
    """
    image = reader.read_image(row)
    size = to_pixels(image, do_convert_rgb=True).shape[-2:]
    good, readable = (dict.fromkeys(reader.tasks) for _ in range(2))
    refused = []
    for name, kind in reader.kinds.items():
        try:
            good[name] = readable[name] = reader.read_checked(row, name, size)
        except ValueError as error:
            refused.append(f"training would stop: {error}")
            with suppress(TypeError, ValueError):
                label = reader.read_label(row, name, size)
                readable[name] = None if label is None else to_coded_label(label, kind, size)
    return image, good, readable, refused


def choose_rows(data: Dataset | IterableDataset, num: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Indices and rows, evenly spaced; of a stream, the first ones."""
    if isinstance(data, IterableDataset):
        yield from enumerate(data.take(num))
    else:
        for index in evenly_spaced(len(data), num):
            yield index, data[index]


def evenly_spaced(length: int, num: int) -> list[int]:
    """`num` indices, or all if there are fewer."""
    return np.linspace(0, length - 1, min(num, length)).round().astype(int).tolist()


def summarize(labels: list[Tensor | None], task: dict[str, Any]) -> list[str]:
    """Lines about a task: how much is labelled, and the share of each class or the distribution of the values.

    Args:
        labels: per sample a map `(height, width)`, or `(3, height, width)` for normals, or `None`.
        task: its fields, as in `DeGMixConfig.tasks`; `num_labels` may be missing.
    """
    kind = TASK_KINDS[task["kind"]]
    maps = [label for label in labels if label is not None]
    lines = [f"labelled: {len(maps)} of {len(labels)} samples"]
    if not maps:
        return lines
    known = torch.cat([known_values(label, task) for label in maps], dim=-1)
    num_pixels = sum(label.shape[-2] * label.shape[-1] for label in maps)
    lines[0] += f", {known.shape[-1] / num_pixels:.1%} of their pixels"
    if not known.numel():
        return lines
    if kind.has_class_ids:
        return lines + _describe_classes(known, task)
    return [*lines, _describe_distribution(known, kind.unit)]


def known_values(label: Tensor, task: dict[str, Any]) -> Tensor:
    """The values of all labelled pixels: `(n,)`, or `(3, n)` for normals."""
    unknown = TASK_KINDS[task["kind"]].unknown(label)
    return label[..., ~unknown.reshape(label.shape[-2:])]


def _describe_distribution(known: Tensor, unit: str) -> str:
    """Quantiles of values `(n,)`, or of the lengths of vectors `(3, n)`."""
    name, values = ("value", known) if known.ndim == 1 else ("length", torch.linalg.vector_norm(known, dim=0))
    # torch.quantile refuses more than 2 ** 24 values.
    numbers = np.quantile(values.numpy(), [0, 0.01, 0.5, 0.99, 1])
    titles = ("min", "1%", "median", "99%", "max")
    return f"{name}: " + ", ".join(f"{title} {number:.4g} {unit}".rstrip() for title, number in zip(titles, numbers))


def _describe_classes(known: Tensor, task: dict[str, Any]) -> list[str]:
    """A line per class that occurs, and one with all classes that do not."""
    names = task.get("id2label") or {}
    ids, counts = (values.tolist() for values in known.unique(return_counts=True))
    lines = [
        f"{index:4}  {count / len(known):6.1%}  {names.get(index, '')}".rstrip() for index, count in zip(ids, counts)
    ]
    absent = sorted(set(range(task.get("num_labels") or 0)) - set(ids))
    if absent:
        lines.append(f"classes that do not occur: {', '.join(str(names.get(index, index)) for index in absent)}")
    return lines
