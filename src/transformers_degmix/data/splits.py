"""Splits of data sets, from the Hub, folders or rendered."""

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, Value, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetGenerationError

from .columns import MappedDataset, map_columns
from .rooms import load_rooms


# What `num_images` is called by users
NUM_IMAGES = "`--num-images`, in a recipe `num_train_images` or `num_eval_images`,"


@dataclass(frozen=True)
class DataSplit:
    """Which samples of which data set, and where in them the labels are.

    Attributes:
        dataset: `"rooms"` (rendered here), or what `datasets.load_dataset` takes: a folder or Hub id.
        name: of the split.
        num_images: the first so many; all by default. Rooms must know how many to render.
        image_size: height and width of rooms, by default those of [`load_rooms`].
        columns: `"image"` or task -> name of its column, or the fields of [`~data.columns.Column`].
        streaming: whether samples are read while they arrive rather than downloaded before.
    """

    dataset: str
    name: str
    num_images: int | None = None
    image_size: Sequence[int] | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    streaming: bool = False

    def open(self) -> Dataset | IterableDataset:
        """The samples as they are.

        Raises:
            ValueError: there is no such data set or split, it is smaller than it should be, or a file is damaged.
        """
        if self.dataset == "rooms":
            if self.num_images is None:
                raise ValueError(f"{NUM_IMAGES} must say how many rooms to render")
            size: dict[str, Any] = {"image_size": tuple(self.image_size)} if self.image_size else {}
            return load_rooms(self.name, self.num_images, **size, num_proc=os.cpu_count())
        try:
            data = self._load()
        except (ValueError, FileNotFoundError, DatasetGenerationError) as error:
            # There is no such data set or split, nothing is in it, or a file is damaged.
            raise ValueError(f"{self}: {error.__cause__ or error}") from error
        # Of a column that is null throughout, `datasets` does not see that it is of files.
        files = {
            name: name.removesuffix("_file_name")
            for name, feature in (data.features or {}).items()
            if feature == Value("null") and name.endswith("_file_name")
        }
        if files:  # streams decode their images when they are renamed
            data = data.rename_columns(files)
        if self.num_images is None:
            return data
        if not self.streaming and self.num_images > len(data):
            raise ValueError(f"{self}: {NUM_IMAGES} is {self.num_images}, but there are {len(data)}")
        return data.take(self.num_images)

    def _load(self) -> Dataset | IterableDataset:
        try:
            return load_dataset(self.dataset, split=self.name, streaming=self.streaming)
        except (ValueError, OSError):
            # By itself: another split may have other types of columns, such as null. Nor does `datasets` follow links
            # to folders, or take brackets in their names.
            folder = Path(self.dataset, self.name)
            if not any(folder.glob("metadata.*")):
                raise
            files = {self.name: glob.escape(str(folder.resolve())) + "/**"}
            return load_dataset("imagefolder", data_files=files, split=self.name, streaming=self.streaming)

    def load(
        self, tasks: dict[str, dict], shuffle_buffer_size: int = 0, seed: int = 0, may_lack_columns: bool = False
    ) -> MappedDataset | IterableDataset:
        """The samples with the columns `image` and one per task; labels are `None` where a sample has none.

        Args:
            tasks: `DeGMixConfig.tasks`.
            shuffle_buffer_size, seed, may_lack_columns: of [`map_columns`].

        Raises:
            ValueError: as [`open`], or it is empty or lacks a column.
        """
        data = self.open()
        try:
            return map_columns(data, tasks, self.columns, shuffle_buffer_size, seed, may_lack_columns)
        except ValueError as error:
            raise ValueError(f"{self}: {error}") from error

    def fingerprint(self, data: Dataset | IterableDataset) -> str:
        """What tells the samples from others, if no file of theirs is changed: the one that `datasets` has of them, or
        for a stream the hash of its files' names, and of their revision on the Hub or the times of local ones.

        Args:
            data: from [`open`], or made from that.
        """
        if isinstance(data, Dataset):
            return data._fingerprint
        return load_dataset_builder(self.dataset).hash

    def __str__(self) -> str:
        return f"{self.dataset!r}, split {self.name!r}"
