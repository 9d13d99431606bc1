"""The folder of predictions for a data set: whose it is, what is missing, and its card."""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch

from ..data.schema import stores_numbers
from ..files import check_writable, locked, remove_unfinished, write_whole
from ..tasks import IGNORE_INDEX, format_fields
from .shards import FAILED, VERSION, ShardPredictor


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
        own = ("data/*.parquet", "fingerprint.json", "errors.csv", "README.md")
        with locked(self.path):
            remove_unfinished(self.path, *own)  # of a run that was killed
            self._write_file("fingerprint.json", f"{json.dumps(fingerprints, indent=2)}\n")
            (self.path / "data").mkdir(exist_ok=True)
            yield
            remove_unfinished(self.path, *own)  # of workers that were killed

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
            name: {"ignore": [IGNORE_INDEX]} for name, kind in kinds.items() if thresholds[name] and kind.has_class_ids
        }
        if ignored:
            notes.append(
                f"A recipe should say `columns: {{{format_fields(ignored)}}}`. Otherwise, maps of only 0 and 255 can "
                "be taken for two classes."
            )
        notes.append("`datasets.load_dataset` and `degmix train` take this folder.")
        paragraphs = "\n\n".join(notes)
        return f"""---
pretty_name: {json.dumps(title, ensure_ascii=False)}
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
