"""Makes data sets of Parquet files from the original archives of the benchmarks.

All files are checked before the first is converted. The output appears when everything is done. Until then the work is
in `.OUTPUT.partial` beside it, from which the same job continues after an interruption.
"""

import hashlib
import json
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet
from filelock import FileLock, Timeout
from huggingface_hub import create_repo, upload_folder
from tqdm import tqdm

from ..files import check_writable, hub_errors
from .archives import check_header, find_root, unpack
from .cityscapes import FOLDERS, PACKAGES, Cityscapes
from .nyud import NYUD
from .pascal_context import PASCALContext
from .rooms import ROOMS_TASKS, render_room
from .rooms.dataset import RENDERER_VERSION, encode_room
from .schema import Source, encode_row, features_for


# Images per Parquet file, the most that an interruption costs each process; about 300 MB of Cityscapes.
SHARD_SIZE = 32
# Raise this with every change that alters a row, so that old shards are not used.
VERSION = 1
MAX_LISTED = 20

ARCHIVES: dict[str, type[Any]] = {"nyud": NYUD, "pascal_context": PASCALContext, "cityscapes": Cityscapes}


@dataclass(frozen=True)
class Job:
    """What to convert.

    Attributes:
        dataset: one of `ARCHIVES`, or "rooms".
        source: the archive (.tar.gz or .zip), the unpacked folder, or a folder with the packages of Cityscapes; for
            rooms, the numbers of training and validation rooms, such as "2000,200".
        output: folder to create.
        num_classes: for Cityscapes, 19 classes (default) or 7 categories.
        num_proc: number of processes.
        skip_bad: whether images with bad files are listed and left out. Otherwise they are an error.
    """

    dataset: str
    source: str
    output: Path
    num_classes: int | None = None
    num_proc: int = 1
    skip_bad: bool = False


class Rooms:
    """A [`~data.schema.Source`] without files.

    Args:
        counts: numbers of training and validation rooms, such as "2000,200".
    """

    title = "Rooms"
    terms = "Images rendered by transformers-degmix, free of the rights of others (Apache-2.0, like the renderer)."
    columns = {
        "sal": "1 on people, else on the most prominent object",
        "depth": "metres along the optical axis",
        "normals": "camera frame: x to the right, y down, z towards the camera",
        "edge": "255 on boundaries, 0 elsewhere",
    }
    tasks = ROOMS_TASKS

    def __init__(self, counts: str):
        try:
            train, validation = map(int, counts.split(","))
        except ValueError:
            raise ValueError(
                f"expected the numbers of training and validation rooms, such as 2000,200, got {counts!r}"
            ) from None
        if min(train, validation) < 1:
            raise ValueError(f"expected 1 room or more in each split, got {counts!r}")
        self.ids = {
            split: [f"{split}_{index:06d}" for index in range(count)]
            for split, count in (("train", train), ("validation", validation))
        }

    def files(self, split: str, image_id: str) -> dict[str, Path]:
        return {}

    def read(self, split: str, image_id: str) -> tuple[bytes, dict[str, np.ndarray]]:
        return encode_room(render_room(split, int(image_id.rpartition("_")[2])))


@dataclass(frozen=True)
class Shard:
    """Some images of a split, and the Parquet file for them."""

    split: str
    ids: tuple[str, ...]
    path: Path


def prepare(job: Job) -> dict[str, int]:
    """Writes `job.output`.

    Returns:
        Number of images per split.

    Raises:
        OSError: `job.output` cannot be written.
        ValueError: the source cannot be used; the message lists what is wrong.
    """
    output = job.output.absolute()
    check_writable(output)
    work = output.with_name(f".{output.name}.partial")
    work.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(work / "lock", timeout=0):
            counts = convert(job, work)
            (work / "dataset").rename(output)
    except Timeout as error:
        raise ValueError(f"another process is writing {output}") from error
    shutil.rmtree(work)
    return counts


def convert(job: Job, work: Path) -> dict[str, int]:
    """Writes `work / "dataset"`, and keeps in `work` what a second call can reuse."""
    forget_other_job(work / "source.json", source_state(job), work / "source", work / "dataset")
    source = open_source(job, work / "source")
    forget_other_job(
        work / "rows.json", [VERSION, RENDERER_VERSION, SHARD_SIZE, source.ids, source.tasks], work / "dataset"
    )

    data = work / "dataset" / "data"
    data.mkdir(parents=True, exist_ok=True)
    shards = list(divide(source.ids, data))
    if not job.skip_bad:
        refuse(run(check_shard, source, shards, job.num_proc, "checking"))
    problems = run(write_shard, source, shards, job.num_proc, "converting")
    if not job.skip_bad:
        refuse(problems)
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)

    counts = dict.fromkeys(source.ids, 0)
    for shard in shards:
        counts[shard.split] += pyarrow.parquet.read_metadata(shard.path).num_rows
    for split, count in counts.items():
        if count == 0:
            raise ValueError(f"no image of the {split} split can be used")
    card = describe(source, counts, problems, command_line(job))
    (work / "dataset" / "README.md").write_text(card, encoding="utf-8")
    return counts


def source_state(job: Job) -> list:
    """What distinguishes this source from others, and its archives from others of the same path."""
    path = job.source if job.dataset == "rooms" else str(Path(job.source).absolute())
    archives = [[archive.name, archive.stat().st_size, archive.stat().st_mtime_ns] for archive in find_archives(job)]
    return [job.dataset, job.num_classes, path, archives]


def find_archives(job: Job) -> list[Path]:
    """The archives to unpack: the source, or the packages of Cityscapes in it unless they are unpacked there."""
    source = Path(job.source).absolute()
    if source.is_file():
        return [source]
    if job.dataset != "cityscapes":
        return []
    with suppress(ValueError):
        find_root(source, *FOLDERS)
        return []
    return [source / name for name in PACKAGES if (source / name).exists()]


def forget_other_job(record: Path, key: list, *results: Path):
    """Removes `results` unless `record` says that they belong to this job."""
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    if not record.exists() or record.read_text() != digest:
        for path in results:
            shutil.rmtree(path, ignore_errors=True)
        record.write_text(digest)


def open_source(job: Job, unpacked: Path) -> Source:
    if job.dataset == "rooms":
        return Rooms(job.source)
    folder, archives = Path(job.source).absolute(), find_archives(job)
    if archives:
        if not unpacked.exists():
            print(f"unpacking {', '.join(map(str, archives))}", file=sys.stderr)
            unpack(archives, unpacked)
        folder = unpacked
    return ARCHIVES[job.dataset](folder, **({"num_classes": job.num_classes} if job.num_classes else {}))


def divide(ids: dict[str, list[str]], folder: Path) -> Iterator[Shard]:
    for split, split_ids in ids.items():
        count = -(-len(split_ids) // SHARD_SIZE)
        for k in range(count):
            name = f"{split}-{k:05d}-of-{count:05d}.parquet"
            yield Shard(split, tuple(split_ids[k * SHARD_SIZE : (k + 1) * SHARD_SIZE]), folder / name)


def run(
    function: Callable[[Source, Shard], list[str]], source: Source, shards: list[Shard], num_proc: int, title: str
) -> list[str]:
    """All problems that `function` finds in the shards, in order. A bar shows the progress."""
    problems = {}
    with tqdm(total=sum(len(shard.ids) for shard in shards), desc=title, unit="image") as bar:
        if num_proc == 1:
            for shard in shards:
                problems[shard] = function(source, shard)
                bar.update(len(shard.ids))
        else:
            with ProcessPoolExecutor(num_proc) as pool:
                jobs = {pool.submit(function, source, shard): shard for shard in shards}
                try:
                    for job in as_completed(jobs):
                        problems[jobs[job]] = job.result()
                        bar.update(len(jobs[job].ids))
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
    return [problem for shard in shards for problem in problems[shard]]


def check_shard(source: Source, shard: Shard) -> list[str]:
    """Problems that show in the existence and the headers of the files."""
    problems = []
    for image_id in shard.ids:
        for path in source.files(shard.split, image_id).values():
            try:
                check_header(path)
            except ValueError as error:
                problems.append(f"{shard.split} {image_id}: {error}")
    return problems


def write_shard(source: Source, shard: Shard) -> list[str]:
    """Writes the usable images, unless this is already done. Returns the problems of the others."""
    if is_done(source, shard):
        return []
    rows, problems = [], []
    for image_id in shard.ids:
        try:
            image, maps = source.read(shard.split, image_id)
            rows.append(encode_row(image_id, image, maps, source.tasks))
        except (OSError, ValueError) as error:
            problems.append(f"{shard.split} {image_id}: {error}")
    features = features_for(source.tasks)
    columns = {name: [row[name] for row in rows] for name in features}
    unfinished = shard.path.with_suffix(".unfinished")
    datasets.Dataset.from_dict(columns, features=features).to_parquet(unfinished)
    unfinished.replace(shard.path)
    return problems


def is_done(source: Source, shard: Shard) -> bool:
    """Whether the shard has been written with all of its images, from the files as they are now."""
    if not shard.path.exists() or pyarrow.parquet.read_metadata(shard.path).num_rows < len(shard.ids):
        return False
    files = (path for image_id in shard.ids for path in source.files(shard.split, image_id).values())
    return all(path.exists() and path.stat().st_mtime_ns < shard.path.stat().st_mtime_ns for path in files)


def refuse(problems: list[str]):
    """Raises ValueError if there are problems."""
    if not problems:
        return
    more = [f"... and {len(problems) - MAX_LISTED} more"] if len(problems) > MAX_LISTED else []
    listed = "\n  ".join([*problems[:MAX_LISTED], *more])
    raise ValueError(f"bad files; --skip-bad leaves their images out\n  {listed}")


def describe(source: Source, counts: dict[str, int], problems: list[str], command: str) -> str:
    """The data set card.

    It has no `configs`: `datasets` finds the splits by the file names, and with `configs` it would keep reading its
    cache after the files have changed.
    """
    kinds = "\n".join(
        f"| `{name}` | {task['kind']} | {source.columns.get(name, '')} |" for name, task in source.tasks.items()
    )
    classes = "\n".join(
        f"- `{name}`: {', '.join(task['id2label'].values())}"
        for name, task in source.tasks.items()
        if "id2label" in task
    )
    rows = "\n".join(f"| {split} | {count} |" for split, count in counts.items())
    bad = dict.fromkeys(problem.partition(":")[0] for problem in problems)
    left_out = "\nLeft out because of bad files:\n\n" + "".join(f"- {name}\n" for name in bad) if bad else ""
    return f"""---
pretty_name: {source.title}
license: {"apache-2.0" if isinstance(source, Rooms) else "other"}
---
# {source.title}

{source.terms}

| split | images |
| --- | --- |
{rows}

## Columns

`image_id`; `image` (RGB); and a map of the image's size per task. Class ids are 8-bit and 255 is ignored. Depth is
32-bit float and 0 is unknown. Normals are 8-bit, (n + 1) / 2 * 255, and (0, 0, 0) is unknown. Boundaries are 8-bit,
strength times 255.

| column | kind | content |
| --- | --- | --- |
{kinds}

`<task>_classes` lists the classes present; all names are in `features["<task>_classes"].feature.names`:

{classes}

## Made with

```bash
{command}
```
{left_out}"""


def command_line(job: Job) -> str:
    """The command that makes this data set, without the folders of this machine."""
    words = ["degmix", "prepare", job.dataset, Path(job.source).name, job.output.name]
    words += ["--classes", str(job.num_classes)] if job.num_classes else []
    words += ["--skip-bad"] if job.skip_bad else []
    return shlex.join(words)


def push(output: Path, repository: str) -> str:
    """Uploads a data set to a repository on the Hub, in place of its old data. A new repository is private.

    Returns:
        Address of the repository.

    Raises:
        OSError: the upload failed; the message is one line.
    """
    with hub_errors():
        url = create_repo(repository, repo_type="dataset", private=True, exist_ok=True)
        # Otherwise shards of an earlier push, if their number was different, would count too.
        upload_folder(repo_id=url.repo_id, repo_type="dataset", folder_path=output, delete_patterns="data/*")
    return url


def push_command(output: Path, repository: str) -> str:
    """The shell command that does the same as [`push`]."""
    words = ["hf", "upload", repository, str(output), ".", "--repo-type", "dataset", "--private", "--delete", "data/*"]
    return shlex.join(words)
