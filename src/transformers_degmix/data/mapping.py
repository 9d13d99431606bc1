"""Data sets for training and evaluation: columns are selected, and some rows are examined before all are read."""

import os
from typing import Any

import torch
from datasets import Array2D, Array3D, ClassLabel, Dataset, Features, IterableDataset
from datasets import Image as ImageFeature
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.utils import logging

from ..tasks import TASK_KINDS
from .columns import Column, RowReader, describe_column, leaf_feature
from .inspection import check_columns, inspect_row


logger = logging.get_logger(__name__)


class MappedDataset(torch.utils.data.Dataset):
    """A `datasets.Dataset` whose rows are read by a [`RowReader`]. Rows without `image_id` get their index as one.

    Attributes:
        warnings: what looks wrong about the columns, see [`check_columns`].

    Raises:
        ValueError: on reading a bad row; the message has its index.
    """

    def __init__(self, data: Dataset, reader: RowReader, warnings: list[str]):
        self.data = data
        self.reader = reader
        self.warnings = warnings

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return {"image_id": str(index), **self.reader(self.data[index])}
        except ValueError as error:
            raise ValueError(f"sample {index}: {error}") from error


def map_columns(
    data: Dataset | IterableDataset,
    tasks: dict[str, dict[str, Any]],
    columns: dict[str, Any] | None = None,
    shuffle_buffer_size: int = 0,
    seed: int = 0,
    may_lack_columns: bool = False,
    title: str = "",
) -> MappedDataset | IterableDataset:
    """The data set with the columns `image` and one per task, each row read by a [`RowReader`] on demand.

    Some rows are examined before. What looks wrong about them is logged; see [`check_columns`].

    Args:
        data: the data set as it is.
        tasks: `DeGMixConfig.tasks`.
        columns: `TrainingArguments.columns`.
        shuffle_buffer_size: for a stream, from how many samples the next one is drawn; 0 keeps their order.
        seed: of the draws, together with the epoch (`set_epoch`).
        may_lack_columns: whether tasks can have no labels because their column is missing. `columns` must not name it,
            and at least one task must have its column.
        title: prefix of what is logged.

    Raises:
        ValueError: `columns` is not allowed, or the data set is empty or lacks one of the columns.
    """
    reader = RowReader(tasks, columns, data.features)
    data = select_columns(data, reader, may_lack_columns)
    warnings = check_columns(data, reader).warnings()
    if os.environ.get("RANK", "0") == "0":  # all processes find the same
        for warning in warnings:
            logger.warning(title + warning)
    if not isinstance(data, IterableDataset):
        return MappedDataset(data, reader, warnings)
    if shuffle_buffer_size:
        # Before rows are read, so that the buffer holds image files rather than pixels.
        data = data.shuffle(seed, buffer_size=shuffle_buffer_size)
    names = [column.column for column in reader.columns.values()]
    mapped = data.map(reader, remove_columns=[*names, "image_id"])  # which comes back unless it is null
    return mapped.with_format(None)  # the reader's own types rather than NumPy's


def select_columns(
    data: Dataset | IterableDataset, reader: RowReader, may_lack_columns: bool = False
) -> Dataset | IterableDataset:
    """The data set with only the columns that the reader needs. Images are not decoded, arrays are NumPy's.

    See [`map_columns`].

    Raises:
        ValueError: there is no sample, or a column is missing.
    """
    for name, feature in reader.features.items():
        if isinstance(feature, ImageFeature):
            data = data.cast_column(name, ImageFeature(decode=False))
    # A stream may not know its length and columns before it is read.
    first: Any = next(iter(data.take(1)), None) if isinstance(data, IterableDataset) else len(data) or None
    if first is None:
        raise ValueError("the data set has no samples in this split")
    available = data.column_names or list(first)
    missing = {name: column for name, column in reader.columns.items() if column.column not in available}
    optional = [name for name, column in missing.items() if name in reader.tasks and column == Column(name)]
    if may_lack_columns and len(optional) == len(missing) < len(reader.tasks):
        missing = {}
    if missing:
        wanted = ", ".join(describe_column(name, column) for name, column in missing.items())
        raise ValueError(f"the data set lacks {wanted}; it has {available}{layout_hint(available)}")
    needed = {column.column for column in reader.columns.values()} | {"image_id"} & set(available)
    data = data.select_columns([name for name in available if name in needed])
    # Arrays take an order of magnitude longer as lists.
    has_arrays = any(isinstance(reader.features.get(name), Array2D | Array3D) for name in needed)
    return data.with_format("numpy") if has_arrays else data


def layout_hint(available: list[str]) -> str:
    """What to do about a folder in which, according to its columns, only images were found; "" for others."""
    if not set(available) <= {"image", "label"}:
        return ""
    return (
        ". Each split needs a metadata.jsonl that says which labels belong to which image, in lines such as "
        '{"file_name": "images/0.jpg", "semseg_file_name": "masks/0.png"}, with paths relative to its folder: '
        "FOLDER/train/metadata.jsonl, FOLDER/train/images/0.jpg, FOLDER/train/masks/0.png, FOLDER/validation/..."
    )


def name_classes(
    tasks: dict[str, dict[str, Any]], features: Features | None, columns: dict[str, Any] | None = None
) -> dict[str, dict[str, Any]]:
    """The tasks with `num_labels` and `id2label` from the data set, where they are not given.

    Class names come from the `ClassLabel` in the feature `<task>_classes`, `<column>_classes` or the column itself,
    also inside lists.

    Args:
        tasks: name -> fields, as for `DeGMixConfig`, which checks them later.
        features: of the data set.
        columns: `TrainingArguments.columns`.

    Raises:
        ValueError: the data set names another number of classes than `num_labels`, and there is no `id2label`.
    """
    named = {}
    for name, task in tasks.items():
        given = (columns or {}).get(name, name)
        column = given.get("column", name) if isinstance(given, dict) else given
        labels = _class_label(features or {}, (f"{name}_classes", f"{column}_classes", column))
        kind = TASK_KINDS.get(task.get("kind", ""))
        takes_names = kind is not None and "id2label" in kind.defaults and not task.get("id2label")
        named[name] = _with_names(name, task, labels.names) if labels and takes_names else task
    return named


def _class_label(features: Features | dict, names: tuple[str, ...]) -> ClassLabel | None:
    leaves = (leaf_feature(features.get(name)) for name in names)
    return next((leaf for leaf in leaves if isinstance(leaf, ClassLabel)), None)


def _with_names(name: str, task: dict[str, Any], names: list[str]) -> dict[str, Any]:
    if task.get("num_labels", len(names)) != len(names):
        raise ValueError(
            f"`tasks[{name!r}]['num_labels']` is {task['num_labels']}, but the data set names {len(names)} classes; "
            "leave it out to use these, or give `id2label`"
        )
    return {**task, "num_labels": len(names), "id2label": dict(enumerate(names))}


class _Refusals(torch.utils.data.Dataset):
    """Why training would refuse each row, or ""."""

    def __init__(self, data: MappedDataset):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> str:
        try:
            return "; ".join(inspect_row(self.data.data[index], self.data.reader)[-1])
        except ValueError as error:
            return str(error)


def find_unreadable(data: MappedDataset, num_workers: int = 0) -> dict[int, str]:
    """Reads all rows: index -> reason for rows that are unreadable or that training would refuse."""
    loader = DataLoader(_Refusals(data), batch_size=None, num_workers=num_workers)
    return {index: reason for index, reason in enumerate(tqdm(loader, "check", leave=False)) if reason}
