"""Splits of data sets, from the Hub, folders or rendered."""

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset, Value, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetGenerationError
from datasets.utils.file_utils import xopen
from pyarrow import parquet

from .mapping import MappedDataset, map_columns
from .rooms import ROOMS_TASKS, load_rooms
from .schema import features_for


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

    def features(self) -> Features | None:
        """Those of its columns, as far as they are known before it is read; rooms need not be rendered."""
        return features_for(ROOMS_TASKS) if self.dataset == "rooms" else self.open().features

    def column_names(self) -> list[str]:
        """The names of its columns; of a stream that does not know them, those of its first sample."""
        return list(self.features() or next(iter(self.open()), ()))

    def _load(self) -> Dataset | IterableDataset:
        try:
            data = load_dataset(self.dataset, split=self.name, streaming=self.streaming)
            if self.streaming and Value("null") in (data.features or {}).values():  # it would fail at a later file
                return self._load_joined() or data
            return data
        except DatasetGenerationError:
            if (data := self._load_joined()) is None:
                raise
            return data
        except (ValueError, OSError):
            # By itself: another split may have other types of columns, such as null. Nor does `datasets` follow links
            # to folders, or take brackets in their names.
            folder = Path(self.dataset, self.name)
            if not any(folder.glob("metadata.*")):
                raise
            files = {self.name: glob.escape(str(folder.resolve())) + "/**"}
            return load_dataset("imagefolder", data_files=files, split=self.name, streaming=self.streaming)

    def _load_joined(self) -> Dataset | IterableDataset | None:
        """The same with the types of all files: `datasets` takes those of the first, in which a column may be null.

        `None` if some are not Parquet.
        """
        joined = None
        for path in chain.from_iterable((load_dataset_builder(self.dataset).config.data_files or {}).values()):
            if not path.endswith(".parquet"):
                return None
            with xopen(path, "rb") as file:
                joined = _join(joined, dict(Features.from_arrow_schema(parquet.read_schema(file))))
        features = Features(joined)
        return load_dataset(self.dataset, split=self.name, streaming=self.streaming, features=features)

    def load(
        self,
        tasks: dict[str, dict],
        shuffle_buffer_size: int = 0,
        seed: int = 0,
        may_lack_columns: bool = False,
        title: str = "",
    ) -> MappedDataset | IterableDataset:
        """The samples with the columns `image` and one per task; labels are `None` where a sample has none.

        Args:
            tasks: `DeGMixConfig.tasks`.
            shuffle_buffer_size, seed, may_lack_columns, title: of [`map_columns`].

        Raises:
            ValueError: as [`open`], or it is empty or lacks a column.
        """
        data = self.open()
        try:
            return map_columns(data, tasks, self.columns, shuffle_buffer_size, seed, may_lack_columns, title)
        except ValueError as error:
            raise ValueError(f"{self}: {error}") from error

    def fingerprint(self, data: Dataset | IterableDataset) -> str:
        """What tells the samples from others.

        It is the one that `datasets` has of them. For a stream, it is the hash of its files' names, and of their
        revision on the Hub or the times of local ones.

        Args:
            data: from [`open`], or made from that.
        """
        if isinstance(data, Dataset):
            return data._fingerprint
        return load_dataset_builder(self.dataset).hash

    def __str__(self) -> str:
        return f"{self.dataset!r}, split {self.name!r}"


def _join(first: Any, second: Any) -> Any:
    """Two features of a column -> that which is not null, as far as one is."""
    if isinstance(first, dict) and isinstance(second, dict):
        return {name: _join(first.get(name), second.get(name)) for name in first | second}
    return second if first in (None, Value("null")) and second is not None else first
