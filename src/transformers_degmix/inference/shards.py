"""Predicts shards of a data set, each into one Parquet file."""

import json
import re
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from datasets import Dataset, Features, IterableDataset
from datasets import Image as ImageFeature
from transformers.utils import logging

from ..data.columns import RowReader
from ..data.mapping import select_columns
from ..data.schema import (
    encode_confidence,
    encode_maps,
    encode_png,
    features_for,
    lacks_unknown,
    stored_prediction,
)
from ..data.splits import DataSplit
from ..files import write_whole
from ..hub.model_directory import load_model_directory
from ..images_degmix import DOUBT
from ..sliding_windows import DEFAULT_OVERLAP, check_window
from ..tasks import TASK_KINDS
from .predictor import Predictor, Result, is_photos_fault


logger = logging.get_logger(__name__)

# Rows of a shard by default: an interruption costs each process at most this many.
SHARD_SIZE = 256
# `datasets` recognises file names with shard numbers of five digits.
MAX_SHARDS = 99_999
# Rows that wait in memory to be written together.
ROW_GROUP_SIZE = 32
# For PNG. The default level takes three times as long and makes rows smaller by a twentieth.
COMPRESS_LEVEL = 1
NORMALS_FORMATS = ("png", "float16")
# Raise it with every change that alters a row, so that old and new shards are not mixed.
VERSION = 1
# Key in the metadata of a Parquet file: the rows that could not be predicted.
FAILED = b"failed"


@dataclass(frozen=True)
class Job:
    """What to predict, how, and where to write it.

    Attributes:
        model: for [`load_model_directory`].
        split: the rows. Its `columns` may name the column of the `"image"`; others are not used.
        output: folder to create or to continue. Jobs that differ only in the split can share a folder.
        return_confidence: whether rows have the confidences too.
        confidence_thresholds: task, or `None` for all others -> confidence below which pixels become unknown.
        normals_format: "png", of 8 bits, or "float16".
        num_shards: number of files; by default one per 256 rows. For a stream, each is made of whole files of the
            input, by default of one.
        dtype: of the model.
        do_resize: whether images are resized as the processor says.
        window_size, window_overlap: see [`Predictor`].
        batch_size, num_workers: see [`Predictor`]; they change only the speed.
    """

    model: str
    split: DataSplit
    output: Path
    return_confidence: bool = False
    confidence_thresholds: dict[str | None, float] = field(default_factory=dict)
    normals_format: str = "png"
    num_shards: int | None = None
    dtype: str = "float32"
    do_resize: bool = True
    window_size: tuple[int, int] | None = None
    window_overlap: float = DEFAULT_OVERLAP
    batch_size: int = 1
    num_workers: int = 2


@dataclass
class Row:
    """A row of the input.

    Attributes:
        image_id: its own, or the number of the row; in a stream, the numbers of shard and row, as "0-1".
        content: its columns.
        file: once read, `bytes` and `path` of the image, if it is a file.
    """

    image_id: str
    content: dict[str, Any]
    file: dict[str, Any] | None = None


class ShardPredictor:
    """Predicts shards of a job.

    Raises:
        ValueError: the model or the data set cannot be used, or the job asks for what they do not have.
    """

    def __init__(self, job: Job, device: str | torch.device = "cpu"):
        self.job = job
        if job.window_size:
            check_window(job.window_size, job.window_overlap)
        if job.normals_format not in NORMALS_FORMATS:
            raise ValueError(f"`normals_format` must be one of {NORMALS_FORMATS}, got {job.normals_format!r}")
        model: Any
        model, processor = load_model_directory(job.model, device, getattr(torch, job.dtype))
        processor.do_resize &= job.do_resize
        self.model, self.processor = model, processor
        self.tasks: dict[str, dict[str, Any]] = model.config.tasks
        self.kinds = {name: TASK_KINDS[task["kind"]] for name, task in self.tasks.items()}
        self.thresholds = choose_thresholds(job.confidence_thresholds, self.tasks)
        # Maps that 8 bits cannot hold are stored as arrays.
        self.arrays = {
            name
            for name, kind in self.kinds.items()
            if (job.normals_format == "float16" and kind.label_channels > 1)
            or (self.thresholds[name] and lacks_unknown(kind))
        }
        self.reader, self.data = open_rows(job.split)
        self.num_shards = choose_num_shards(job, self.data)
        self.has_warned = False
        self.predictor = Predictor(
            model,
            processor,
            job.batch_size,
            job.num_workers,
            window_size=job.window_size,
            window_overlap=job.window_overlap,
            return_confidence=job.return_confidence or any(self.thresholds.values()),
        )

    @property
    def features(self) -> Features:
        """Columns of the output."""
        features = features_for(self.tasks, self.arrays)
        confidences = {f"{name}_confidence": ImageFeature() for name in self.tasks if self.job.return_confidence}
        return Features({**features, **confidences})

    def path(self, shard: int) -> Path:
        """Where the file of a shard is, or will be."""
        return self.job.output / "data" / f"{self.job.split.name}-{shard:05d}-of-{self.num_shards:05d}.parquet"

    def __call__(self, shard: int, on_row: Callable[[], Any] = lambda: None):
        """Writes a shard, unless it is there.

        Args:
            shard: its number, from 0.
            on_row: called after each row.

        Raises:
            OSError: it cannot be written, or the rows cannot be read, or the device fails. Nothing is written.
        """
        path = self.path(shard)
        if path.exists():
            return
        try:
            write_whole(path, lambda file: self._write(file, shard, on_row))
        except OSError as error:
            raise OSError(f"cannot make {path}: {error}") from error

    def _write(self, file: BinaryIO, shard: int, on_row: Callable[[], Any]):
        failed = []

        def predicted() -> Generator[dict[str, Any], None, None]:
            for row, outcome in self.predictor(self.rows(shard), self._load, self._encode):
                if isinstance(outcome, Exception):
                    if not is_photos_fault(outcome):
                        raise OSError(f"image {row.image_id}: {outcome}") from outcome
                    failed.append({"image_id": row.image_id, "reason": " ".join(str(outcome).split())})
                else:
                    yield outcome
                on_row()

        schema, rows = self.features.arrow_schema, predicted()
        with closing(rows), pyarrow.parquet.ParquetWriter(file, schema) as writer:
            while group := list(islice(rows, ROW_GROUP_SIZE)):
                writer.write_table(pyarrow.Table.from_pylist(group, schema))
            writer.add_key_value_metadata({FAILED: json.dumps(failed)})

    def rows(self, shard: int) -> Iterator[Row]:
        """The rows of a shard."""
        contents: Iterable[dict[str, Any]]
        names: Iterable[str]
        if isinstance(self.data, Dataset):
            numbers = self._range(shard)
            names, contents = map(str, numbers), self.data.select(numbers)
        else:
            # A stream of one shard can be cut off after some rows; `shard` would split this number.
            shared_out = self.num_shards > 1
            contents = self.data.shard(self.num_shards, shard, contiguous=True) if shared_out else self.data
            names = (f"{shard}-{index}" for index in count())
        for content, name in zip(contents, names):
            image_id = content.get("image_id")
            yield Row(name if image_id is None else str(image_id), content)

    def count(self, shards: list[int]) -> int | None:
        """The number of rows, or `None` for a stream."""
        return sum(len(self._range(shard)) for shard in shards) if isinstance(self.data, Dataset) else None

    def _range(self, shard: int) -> range:
        return range(*(len(self.data) * number // self.num_shards for number in (shard, shard + 1)))

    def _load(self, row: Row) -> Any:
        row.file = self.reader.read_file(row.content)
        # So that the file is not fetched twice.
        fetched = {} if row.file is None else {self.reader.columns["image"].column: row.file}
        image = self.reader.read_image({**row.content, **fetched})
        doubt = getattr(image, "info", {}).get(DOUBT)
        if doubt and not self.has_warned:  # others are probably alike
            logger.warning(f"image {row.image_id}: {doubt}")
            self.has_warned = True
        return image

    def _encode(self, row: Row, result: Result) -> dict[str, Any] | ValueError:
        """The row of the output, or why there cannot be one."""
        size = result.photo.height, result.photo.width
        maps, confidences = {}, result.confidences or {}
        try:
            for name, prediction in result.predictions.items():
                unknown = np.zeros(size, bool)
                if self.thresholds[name]:
                    unknown = (confidences[name] < self.thresholds[name]).numpy()
                maps[name] = stored_prediction(prediction.numpy(), self.kinds[name], unknown, name in self.arrays)
            encoded = encode_maps(maps, size, self.tasks, COMPRESS_LEVEL)
        except ValueError as error:
            return error
        if row.file and not self.reader.columns["image"].changes_values:
            image = {**row.file, "path": None}
        else:
            image = encode_png(result.photo, COMPRESS_LEVEL)
        encoded |= {"image_id": row.image_id, "image": image}
        if self.job.return_confidence:
            encoded |= {
                f"{name}_confidence": encode_confidence(confidence.numpy(), COMPRESS_LEVEL)
                for name, confidence in confidences.items()
            }
        return encoded


def choose_thresholds(given: dict[str | None, float], tasks: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The threshold of each task, 0 where there is none.

    Raises:
        ValueError: there is no such task, or a number is not in [0, 1].
    """
    unknown = [name for name in given if name not in (None, *tasks)]
    if unknown:
        raise ValueError(f"confidence thresholds name the tasks {unknown}; the model has {list(tasks)}")
    wrong = [number for number in given.values() if not 0 <= number <= 1]
    if wrong:
        raise ValueError(f"confidence thresholds must be from 0 to 1, got {wrong[0]:g}")
    return {name: given.get(name, given.get(None, 0.0)) for name in tasks}


def open_rows(split: DataSplit) -> tuple[RowReader, Dataset | IterableDataset]:
    """The reader of the images, and the rows of a split as they are stored, with only the image and its id.

    Raises:
        ValueError: there is no such split, it is a part of one, it is empty, or it lacks the column of the images.
    """
    if not re.fullmatch(r"\w+(\.\w+)*", split.name):
        raise ValueError(f"files are named after the split: it must be a plain name, got {split.name!r}")
    data = split.open()
    reader = RowReader({}, {name: column for name, column in split.columns.items() if name == "image"}, data.features)
    try:
        return reader, select_columns(data, reader)
    except ValueError as error:
        raise ValueError(f"{split}: {error}") from error


def choose_num_shards(job: Job, data: Dataset | IterableDataset) -> int:
    """The number of files.

    Raises:
        ValueError: the job asks for more files than are possible, or for less than one.
    """
    if isinstance(data, Dataset):
        limit, of, default = len(data), "rows", -(-len(data) // SHARD_SIZE)
    elif job.split.num_images is None:
        limit, of, default = data.num_shards, "files that the stream has", data.num_shards
    else:
        limit, of, default = 1, "the first rows of a stream", 1
    limit = min(limit, MAX_SHARDS)
    num_shards = min(default, limit) if job.num_shards is None else job.num_shards
    if not 1 <= num_shards <= limit:
        raise ValueError(f"`num_shards` must be from 1 to {limit} for {of}, got {num_shards}")
    return num_shards
