"""Predictions for data sets: the output is a data set that training reads, made by many processes and machines.

The rows are cut into shards. Each shard becomes one Parquet file, which appears whole or not at all and is never made
again. A run that was killed goes on where it was, with any number of processes. [`predict_dataset`] shares the shards
among the processes of Accelerate's launchers by position. With [`predict_dataset_with_ray`], Ray gives them to free
workers.
"""

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from io import StringIO
from itertools import count, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset, Features, IterableDataset
from datasets import Image as ImageFeature
from filelock import FileLock, Timeout
from PIL import Image
from tqdm import tqdm

from ..data.columns import RowReader
from ..data.mapping import select_columns
from ..data.schema import (
    encode_confidence,
    encode_maps,
    encode_png,
    features_for,
    lacks_unknown,
    stored_prediction,
    stores_numbers,
)
from ..data.splits import DataSplit
from ..files import check_writable, remove_unfinished, write_whole
from ..hub.model_directory import load_model_directory
from ..sliding_windows import DEFAULT_OVERLAP, check_window
from ..tasks import IGNORE_INDEX, TASK_KINDS, format_fields
from .predictor import Predictor, Result


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


@dataclass(frozen=True)
class Summary:
    """What was done.

    Attributes:
        num_rows: rows of the split, with those that could not be predicted.
        num_failed: rows that could not be predicted.
        seconds: as [`Predictor`]'s, summed over all processes, for the shards that this run made.
    """

    num_rows: int
    num_failed: int
    seconds: dict[str, float]


def predict_dataset(job: Job, device: str | torch.device = "cpu") -> Summary | None:
    """Predicts a split, or what is left of it. Processes that one of Accelerate's launchers started share the shards.

    Args:
        job: what to predict.
        device: of the model. With "cuda", each of several processes has its own GPU.

    Returns:
        What was done, in the main process; `None` in others.

    Raises:
        ValueError: the job cannot be done; nothing was written.
        OSError: a file cannot be written, or rows cannot be read. What is done stays.
    """
    # Processes finish at different times, and the first may wait long for the last.
    state = PartialState(cpu=torch.device(device).type == "cpu", timeout=timedelta(days=365))
    with state.main_process_first():  # it downloads and renders
        predictor = ShardPredictor(job, state.device if state.num_processes > 1 else device)
    folder = OutputFolder(predictor)
    with folder.claimed() if state.is_main_process else nullcontext():
        # One list for all: in their own, files that others have just written would be missing.
        missing = broadcast_object_list([folder.missing()])[0]
        mine = missing[state.process_index :: state.num_processes]
        with tqdm(total=predictor.count(mine), unit="image", disable=not state.is_main_process) as bar:
            for shard in mine:
                predictor(shard, bar.update)
        seconds = add_up(gather_object([predictor.predictor.seconds]))  # waits for all
        return folder.finish(seconds) if state.is_main_process else None


def predict_dataset_with_ray(job: Job, num_workers: int = 1, device: str = "cpu") -> Summary:
    """[`predict_dataset`] by workers of Ray Data, on this machine or on the cluster that Ray is connected to.

    Ray starts the workers, gives each one shard at a time, and restarts workers that die; their shard is made again.
    Workers read the input and write the output themselves: all machines must see both under the same names.

    Args:
        job: what to predict.
        num_workers: number of models; each has a CPU, or a GPU if `device` is "cuda".
        device: of the models.

    Raises:
        ImportError: the extra `ray` is not installed.
        ValueError, OSError: as [`predict_dataset`].
    """
    import ray

    kind = torch.device(device).type
    folder = OutputFolder(ShardPredictor(job))
    with folder.claimed():
        missing = folder.missing()
        seconds = []
        if missing:
            shards = ray.data.from_items(missing, override_num_blocks=len(missing))
            spent = shards.map_batches(
                RayWorker,
                batch_size=1,
                fn_constructor_args=(job, kind, Image.MAX_IMAGE_PIXELS),
                # No shard waits for a slow or dead worker while another is free.
                compute=ray.data.ActorPoolStrategy(
                    size=min(num_workers, len(missing)), max_tasks_in_flight_per_actor=1
                ),
                **({"num_gpus": 1} if kind == "cuda" else {"num_cpus": 1}),
            )
            for row in spent.iter_rows():
                if failure := row.pop("failure"):
                    raise OSError(failure)
                seconds.append(row)
        return folder.finish(add_up(seconds))


class RayWorker:
    """Ray's actor for [`predict_dataset_with_ray`]: one model, which predicts the shards that it is given.

    Args:
        job, device: as for [`ShardPredictor`].
        max_image_pixels: `PIL.Image.MAX_IMAGE_PIXELS` of the process that started Ray.
    """

    def __init__(self, job: Job, device: str, max_image_pixels: int | None):
        Image.MAX_IMAGE_PIXELS = max_image_pixels
        self.predictor = ShardPredictor(job, device)

    def __call__(self, shards: dict[str, Any]) -> dict[str, list[Any]]:
        before, failure = dict(self.predictor.predictor.seconds), ""
        try:
            for shard in shards["item"]:
                self.predictor(int(shard))
        except OSError as error:  # Ray would raise another error, without the message
            failure = str(error)
        seconds = self.predictor.predictor.seconds
        return {"failure": [failure], **{name: [seconds[name] - before[name]] for name in seconds}}


def add_up(seconds: list[dict[str, float]]) -> dict[str, float]:
    """The sums of the seconds of several [`Predictor`]s."""
    return {name: sum(spent[name] for spent in seconds) for name in ("all", "model", "input")}


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
        many = [name for name, task in self.tasks.items() if task.get("num_labels", 0) > IGNORE_INDEX]
        if many:
            raise ValueError(f"8-bit maps hold at most {IGNORE_INDEX} classes, and {many} have more")
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
            OSError: it cannot be written, or the rows cannot be read.
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
        return self.reader.read_image({**row.content, **fetched})

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


def hash_model(model: Any, processor: Any, name: str) -> str:
    """The hash of what predictions depend on: weights, configuration and image processor, or the ONNX file."""
    digest = hashlib.sha256()
    if str(name).endswith(".onnx"):
        digest.update(Path(name).read_bytes())
    else:
        volatile = ("_name_or_path", "transformers_version", "dtype")
        config = {key: value for key, value in model.config.to_dict().items() if key not in volatile}
        digest.update(json.dumps([config, processor.to_dict()], sort_keys=True, default=str).encode())
        for key, tensor in sorted(model.state_dict().items()):
            digest.update(key.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


class OutputFolder:
    """The data set that the shards of a job are part of. Only the main process claims and finishes it."""

    def __init__(self, predictor: ShardPredictor):
        self.predictor = predictor
        self.job = predictor.job
        self.path = predictor.job.output

    @cached_property
    def model_hash(self) -> str:
        return hash_model(self.predictor.model, self.predictor.processor, self.job.model)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Creates the folder if it is missing, and locks it against other runs.

        Raises:
            ValueError: another run is writing there, or one with another model, other data or other options did.
            OSError: the folder cannot be written, or has something else in it.
        """
        fingerprints = self._check_fingerprint()
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout as error:
            raise ValueError(f"another process is writing {self.path}") from error
        except OSError as error:
            raise OSError(f"cannot write to {self.path}: {error}") from error
        try:
            remove_unfinished(self.path)  # of a run that was killed
            self._write_file("fingerprint.json", f"{json.dumps(fingerprints, indent=2)}\n")
            (self.path / "data").mkdir(exist_ok=True)
            yield
            remove_unfinished(self.path)  # of workers that were killed
        finally:
            Path(lock.lock_file).unlink()
            lock.release()

    def _write_file(self, name: str, text: str):
        try:
            write_whole(self.path / name, lambda file: file.write(text.encode()))
        except OSError as error:
            raise OSError(f"cannot write {self.path / name}: {error}") from error

    def _check_fingerprint(self) -> dict[str, Any]:
        """The record of what the shards depend on. Raises ValueError if the folder's record is another."""
        job, predictor = self.job, self.predictor
        fingerprint = {
            "version": VERSION,
            "model_hash": self.model_hash,
            "dtype": job.dtype,
            "do_resize": job.do_resize,
            "window_size": job.window_size and list(job.window_size),
            "window_overlap": job.window_overlap,
            "return_confidence": job.return_confidence,
            "confidence_thresholds": predictor.thresholds,
            "normals_format": job.normals_format,
        }
        of_split = {
            "dataset_fingerprint": job.split.fingerprint(predictor.data),
            "num_images": job.split.num_images,
            "image_column": predictor.reader.columns["image"].given("image"),
            "num_shards": predictor.num_shards,
        }
        of_split = json.loads(json.dumps(of_split))  # lists for tuples
        record = self.path / "fingerprint.json"
        if not record.exists():
            # Hidden files were left by a run that was killed before it wrote the record.
            if not self.path.is_dir() or any(path.name[0] != "." for path in self.path.iterdir()):
                check_writable(self.path)
            return {**fingerprint, "splits": {job.split.name: of_split}}
        recorded = json.loads(record.read_text())
        splits = recorded.pop("splits")
        before = {**recorded, **splits.get(job.split.name, of_split)}
        differences = [
            f"`{name}` was {before.get(name)!r} and is {value!r}"
            for name, value in {**fingerprint, **of_split}.items()
            if before.get(name) != value
        ]
        if differences:
            raise ValueError(
                f"{self.path} has predictions of another run: {', '.join(differences)}; choose another folder, or "
                "remove this one"
            )
        return {**fingerprint, "splits": {**splits, job.split.name: of_split}}

    def missing(self) -> list[int]:
        """The shards that are still to be made."""
        return [shard for shard in range(self.predictor.num_shards) if not self.predictor.path(shard).exists()]

    def finish(self, seconds: dict[str, float]) -> Summary:
        """Writes the card and the table of rows that could not be predicted, for all splits.

        Raises:
            OSError: they cannot be written, or there are shards that nobody made.
        """
        missing = self.missing()
        if missing:
            raise OSError(f"{len(missing)} shards of {self.path} are missing; the same command makes them")
        counts: Counter[str] = Counter()
        failed = []
        for path in sorted((self.path / "data").glob("*.parquet")):
            metadata = pyarrow.parquet.read_metadata(path)
            split = path.name.rpartition("-of-")[0].rpartition("-")[0]
            counts[split] += metadata.num_rows
            failed += [{"split": split, **row} for row in json.loads(metadata.metadata[FAILED])]
        if failed:
            table = StringIO()
            writer = csv.DictWriter(table, failed[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(failed)
            self._write_file("errors.csv", table.getvalue())
        self._write_file("README.md", self._describe(counts, len(failed)))
        name = self.job.split.name
        num_failed = sum(row["split"] == name for row in failed)
        return Summary(counts[name] + num_failed, num_failed, seconds)

    def _describe(self, counts: dict[str, int], num_failed: int) -> str:
        """The data set card.

        Args:
            counts: rows of each split.
            num_failed: rows of the input that are not among them.
        """
        tasks, kinds, thresholds = self.predictor.tasks, self.predictor.kinds, self.predictor.thresholds
        title = f"Predictions for {Path(self.job.split.dataset).name}"
        tags = "\n".join(f"- {tag}" for tag in sorted({kind.pipeline_tag for kind in kinds.values()}))
        rows = "\n".join(f"| {split} | {count} |" for split, count in sorted(counts.items()))
        formats = {name: "TIFF, 32-bit" if stores_numbers(kind) else "PNG, 8-bit" for name, kind in kinds.items()}
        formats |= dict.fromkeys(self.predictor.arrays, "array, float16")
        columns = "\n".join(
            f"| `{name}` | {task['kind']} | {formats[name]} | {thresholds[name]:g} |" for name, task in tasks.items()
        )
        notes = [f"{num_failed} images could not be predicted: see `errors.csv`."] if num_failed else []
        if self.job.return_confidence:
            notes.append("`<task>_confidence` is the confidence times 255, as 8-bit PNG.")
        ignored = {
            name: {"ignore": [IGNORE_INDEX]}
            for name, kind in kinds.items()
            if thresholds[name] and not kind.label_dtype.is_floating_point
        }
        if ignored:
            notes.append(
                f"A recipe should say `columns: {{{format_fields(ignored)}}}`. Otherwise, maps of only 0 and 255 can "
                "be taken for two classes."
            )
        notes.append("`datasets.load_dataset` and `degmix train` take this folder.")
        paragraphs = "\n\n".join(notes)
        return f"""---
pretty_name: {title}
license: other
task_categories:
{tags}
---
# {title}

The maps are predictions of the model {Path(self.job.model).name} (hash {self.model_hash}), not ground truth. The
images are those of the data set, under its terms. Files are unchanged; arrays, and images whose values a setting of
`columns` changes, have become PNG files.

| split | images |
| --- | --- |
{rows}

## Columns

`image_id`, `image`, and one map per task in the size of the upright image. Class ids are 8-bit, and 255 is ignored.
Depth is in metres and 0 unknown. Normals are unit vectors: in 8 bits (n + 1) / 2 * 255 with (0, 0, 0) as unknown, in
float16 with the zero vector as unknown. Boundaries are strengths: in 8 bits times 255, in float16 with 255 as unknown.
Pixels with less confidence than the threshold are unknown.

| column | kind | stored as | threshold |
| --- | --- | --- | --- |
{columns}

{paragraphs}
"""
