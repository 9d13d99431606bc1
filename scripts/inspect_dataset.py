"""Shows samples of a data set with all labels in one picture, counts, and warns of what looks wrong.

Tasks are the `model.tasks` of the training run's YAML file, with its `columns`; without, all columns that have the
name of a known task (semseg, human_parts, sal, depth, normals, edge).
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from PIL import Image
from torch import Tensor

from transformers_degmix.data.benchmarks import BENCHMARKS, TASKS
from transformers_degmix.data.columns import RowReader, layout_hint, name_classes, select_columns
from transformers_degmix.data.inspection import find_suspicions, summarize
from transformers_degmix.image_processing_pil_degmix import DOUBT, decode_label, to_label, to_pixels
from transformers_degmix.interruption import run_script
from transformers_degmix.tasks import TASK_KINDS
from transformers_degmix.training.arguments import TrainingArguments, parse_arguments
from transformers_degmix.training.build import complete_tasks
from transformers_degmix.training.collator import read_label
from transformers_degmix.training.data import open_split
from transformers_degmix.visualization import draw_overview, stack_overviews


Tasks = dict[str, dict[str, Any]]
Labels = dict[str, Tensor | None]


class Warnings:
    """What looks wrong: column and suspicion -> samples, and for the first of them what it is based on."""

    def __init__(self):
        self.found: dict[tuple[str, str], list[tuple[int, str]]] = defaultdict(list)

    def add(self, column: str, suspicion: str, sample: int, reason: str):
        self.found[column, suspicion].append((sample, reason))

    def lines(self) -> list[str]:
        lines = []
        for (column, suspicion), samples in self.found.items():
            sample, reason = samples[0]
            others = f"; {len(samples) - 1} more samples" if len(samples) > 1 else ""
            lines.append(f"warning: column {column!r}: {suspicion} (sample {sample}: {reason}{others})")
        return lines


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="folder or name on the Hugging Face Hub, or `rooms`")
    parser.add_argument("--split", help="default: the run's `train_split`, or train")
    parser.add_argument("--num", type=int, default=8, help="samples, evenly spaced, the first of a stream (default 8)")
    parser.add_argument("--output", type=Path, default=Path("outputs/inspection"), help="directory for the picture")
    parser.add_argument("--config", type=Path, help="YAML file of a training run, for its tasks and columns")
    args = parser.parse_args()
    if args.num < 1:
        parser.error(f"--num must be at least 1, got {args.num}")
    return args


def read_run(args: argparse.Namespace) -> TrainingArguments:
    """The training run whose data is inspected."""
    if args.config:
        run = parse_arguments([str(args.config), "--dataset", args.dataset])
    else:
        run = TrainingArguments(output_dir=str(args.output), dataset=args.dataset)
    num_images = args.num if args.dataset == "rooms" else None
    return replace(run, train_split=args.split or run.train_split, num_train_images=num_images)


def find_tasks(run: TrainingArguments, data: Dataset | IterableDataset) -> Tasks:
    """The run's tasks, or those known by the names of their columns, with the class names of the data set.

    Raises:
        ValueError: there are none, or one is of an unknown kind.
    """
    known = [name for name in TASKS if name in run.columns or name in (data.column_names or ())]
    tasks = run.model.get("tasks") or {name: TASKS[name] for name in known}
    if run.benchmark:
        tasks = complete_tasks(BENCHMARKS[run.benchmark].task_fields(), run.model.get("tasks"), run.benchmark)
    if not tasks:
        hint = layout_hint(data.column_names or [])
        raise ValueError(f"none of the columns {data.column_names} is a known task: name them in `model.tasks`{hint}")
    for name, task in tasks.items():
        if task.get("kind") not in TASK_KINDS:
            raise ValueError(
                f"`tasks[{name!r}]['kind']` must be one of {sorted(TASK_KINDS)}, got {task.get('kind')!r}"
            )
    return name_classes(tasks, data.features, run.columns)


def choose_rows(data: Dataset | IterableDataset, num: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Indices and rows."""
    if isinstance(data, IterableDataset):
        yield from enumerate(data.take(num))
    else:
        for index in np.linspace(0, len(data) - 1, min(num, len(data))).round().astype(int).tolist():
            yield index, data[index]


def inspect_row(
    row: dict[str, Any], index: int, reader: RowReader, tasks: Tasks, warnings: Warnings
) -> tuple[Image.Image, Labels, Labels]:
    """The image, and its labels: all that can be read, and those of them that training would take.

    Raises:
        ValueError: there is no image that can be read.
    """
    try:
        image = reader.read_image(row)
    except ValueError as error:
        raise ValueError(f"sample {index}: {error}") from error
    pixels = to_pixels(image, do_convert_rgb=True)
    size = pixels.shape[-2:]
    doubt = image.info.get(DOUBT) if isinstance(image, Image.Image) else None
    if doubt or pixels.max() <= 1:
        reason = doubt or "no value is above 1"
        warnings.add(reader.columns["image"].column, "black? (`scale: 255` for 0..1)", index, reason)
    readable, good = dict.fromkeys(tasks), dict.fromkeys(tasks)
    for name, task in tasks.items():
        column, stored = reader.columns[name].column, None
        try:
            stored = reader.read_label(row, name, size)
            if stored is None:
                continue
            label = read_label(stored, task["kind"], size, task.get("num_labels"))
            label = _without_single_channel(torch.from_numpy(decode_label(label, TASK_KINDS[task["kind"]])))
        except (TypeError, ValueError) as error:
            warnings.add(column, "training would stop", index, str(error))
            with suppress(TypeError, ValueError):
                readable[name] = _without_single_channel(to_label(stored, TASK_KINDS[task["kind"]], size))
            continue
        readable[name] = good[name] = label
        for suspicion, reason in find_suspicions(label, task).items():
            warnings.add(column, suspicion, index, reason)
    return Image.fromarray(np.moveaxis(pixels, 0, -1).round().clip(0, 255).astype(np.uint8)), readable, good


def _without_single_channel(label: Tensor) -> Tensor:
    return label if len(label) > 1 else label[0]


def draw(image: Image.Image, labels: Labels, tasks: Tasks) -> Image.Image:
    """The image and its labels; what there is no label for is drawn as unknown."""
    maps = {}
    for name, task in tasks.items():
        kind, label = TASK_KINDS[task["kind"]], labels[name]
        if label is None:
            channels = () if kind.label_channels == 1 else (kind.label_channels,)
            label = torch.full((*channels, image.height, image.width), kind.label_padding, dtype=kind.label_dtype)
        maps[name] = label
    return draw_overview(image, maps, tasks)


def main():
    args = parse_args()
    try:
        run = read_run(args)
        data = open_split(run, "train")
        tasks = find_tasks(run, data)
        reader = RowReader(tasks, run.columns, data.features)
        data = select_columns(data, reader)
        warnings, overviews, labels = Warnings(), [], []
        for index, row in choose_rows(data, args.num):
            image, readable, good = inspect_row(row, index, reader, tasks, warnings)
            labels.append(readable)
            overviews.append(draw(image, good, tasks))
        args.output.mkdir(parents=True, exist_ok=True)
        stack_overviews(overviews).save(args.output / "inspection.png")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for name, task in tasks.items():
        print(f"{name} ({task['kind']}, column {reader.columns[name].column!r})")
        for line in summarize([sample[name] for sample in labels], task):
            print(f"  {line}")
    print(*warnings.lines(), sep="\n", end="\n" if warnings.found else "")
    print(f"{len(labels)} samples: {args.output / 'inspection.png'}")


if __name__ == "__main__":
    run_script(main)
