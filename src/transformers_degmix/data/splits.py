"""Splits of data sets: from the Hub, from folders, or rendered."""

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
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


# How long processes wait for the first one, which downloads or renders a split, and may examine all of it. By default,
# it would be 10 or 30 minutes.
PROCESS_TIMEOUT = timedelta(days=365)
# What users call `num_images`
NUM_IMAGES = "`--num-images`, in a recipe `num_train_images` or `num_eval_images`,"


@dataclass(frozen=True)
class DataSplit:
    """Which samples of which data set to read, and which of its columns hold the labels.

    Attributes:
        dataset: `"rooms"` (rendered here), or what `datasets.load_dataset` takes: a folder or Hub id.
        name: of the split.
        num_images: how many samples from the start; by default all. Required for rooms.
        image_size: height and width of rooms, by default those of [`load_rooms`].
        columns: `"image"` or task -> name of its column, or the fields of [`~data.columns.Column`].
        streaming: whether samples are read during the download rather than after it.
    """

    dataset: str
    name: str
    num_images: int | None = None
    image_size: Sequence[int] | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    streaming: bool = False

    def open(self) -> Dataset | IterableDataset:
        """The samples as they are stored.

        Raises:
            ValueError: there is no such data set or split, a file is damaged, or there are fewer than `num_images`. A
                stream, whose length is not known, then has all there are.
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
        # `datasets` does not recognise columns of files in which everything is null.
        files = {
            name: name.removesuffix("_file_name")
            for name, feature in (data.features or {}).items()
            if feature == Value("null") and name.endswith("_file_name")
        }
        if files:  # renaming makes streams decode their images
            data = data.rename_columns(files)
        if self.num_images is None:
            return data
        if not self.streaming and self.num_images > len(data):
            raise ValueError(f"{self}: {NUM_IMAGES} is {self.num_images}, but there are {len(data)}")
        return data.take(self.num_images)

    def features(self) -> Features | None:
        """The features, if they are known before samples are read. Rooms are not rendered."""
        return features_for(ROOMS_TASKS) if self.dataset == "rooms" else self.open().features

    def column_names(self) -> list[str]:
        """The names of the columns. A stream that does not know them takes them from its first sample."""
        return list(self.features() or next(iter(self.open()), ()))

    def _load(self) -> Dataset | IterableDataset:
        try:
            data = load_dataset(self.dataset, split=self.name, streaming=self.streaming)
            if self.streaming and Value("null") in (data.features or {}).values():  # a later file would fail
                return self._load_joined() or data
            return data
        except DatasetGenerationError:
            if (data := self._load_joined()) is None:
                raise
            return data
        except (ValueError, OSError) as error:
            if not (alone := self._alone()):
                raise
            if "+" in self.name:
                raise ValueError(f"{error}; the splits of this folder can only be read one by one") from None
            return load_dataset(**alone, split=self.name, streaming=self.streaming)

    def _alone(self) -> dict[str, Any]:
        """What `datasets` takes for the split without the others, or {} if it has no metadata and is not saved.

        Others may have other types of columns, such as null. Also, `datasets` by itself does not follow links to
        folders, accept brackets in their names, or read what `Dataset.save_to_disk` has made, which has no splits.
        """
        name = re.split(r"[\[+]", self.name)[0]  # "train[:100]" is a part of it
        for folder, split in ((Path(self.dataset, name), name), (Path(self.dataset), "train")):
            files = glob.escape(str(folder.resolve()))
            if any(folder.glob("metadata.*")):
                return {"path": "imagefolder", "data_files": {split: files + "/**"}}
            if (folder / "state.json").exists():
                return {"path": "arrow", "data_files": {split: files + "/*.arrow"}}
        return {}

    def _load_joined(self) -> Dataset | IterableDataset | None:
        """The split with types that fit all files: `datasets` takes those of the first, whose columns may be null.

        `None` if some files are not Parquet.
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
            ValueError: as for [`open`], or the split is empty or lacks a column.
        """
        data = self.open()
        try:
            return map_columns(data, tasks, self.columns, shuffle_buffer_size, seed, may_lack_columns, title)
        except ValueError as error:
            raise ValueError(f"{self}: {error}") from error

    def fingerprint(self, data: Dataset | IterableDataset) -> str:
        """Identifies the samples.

        It is the fingerprint of `datasets`. For a stream, it is the hash of the file names, and of the revision on the
        Hub or the times of local files.

        Args:
            data: from [`open`], or made from its result.
        """
        if isinstance(data, Dataset):
            return data._fingerprint
        try:
            return load_dataset_builder(self.dataset).hash
        except (ValueError, OSError):
            return load_dataset_builder(**self._alone()).config_id  # here, `hash` does not depend on the files

    def __str__(self) -> str:
        return f"{self.dataset!r}, split {self.name!r}"


def _join(first: Any, second: Any) -> Any:
    """Two features of a column -> the one that is not null; for dictionaries, key by key."""
    if isinstance(first, dict) and isinstance(second, dict):
        return {name: _join(first.get(name), second.get(name)) for name in first | second}
    return second if first in (None, Value("null")) and second is not None else first
