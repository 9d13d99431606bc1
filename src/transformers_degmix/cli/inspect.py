"""Draws samples of a data set with all labels in one picture, counts, and warns of what looks wrong.

With --config, the tasks are the run's `model.tasks` or `new_tasks`, with its `columns`. Without, they are all columns
that have the name of a known task (semseg, human_parts, sal, depth, normals, edge).

    degmix inspect my_data --all  # also reads every row, and lists those that training would refuse
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..data.benchmarks import TASKS
from ..data.columns import RowReader
from ..data.inspection import check_columns, choose_rows, evenly_spaced, inspect_row, known_values, summarize
from ..data.mapping import layout_hint, name_classes, select_columns
from ..data.splits import DataSplit
from ..files import write_whole
from ..images_degmix import decode_label, to_photo
from ..tasks import TASK_KINDS, Suspicion, TaskKind
from ..training.arguments import TrainingArguments
from ..training.build import complete_tasks, known_tasks
from ..training.data import describe_split
from ..training.sources import Source, check_tasks
from ..visualization import draw_overview, stack
from .splits import read_source


Tasks = dict[str, dict[str, Any]]
NOTHING_LABELLED = Suspicion("nothing is labelled", [1.0], detail="every value means unknown")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="folder, name on the Hugging Face Hub, `rooms`, or a source of `--config`")
    parser.add_argument("--split", help="default: the run's `train_split`, or train")
    parser.add_argument("--num", type=int, default=8, help="samples, evenly spaced; the first of a stream (default 8)")
    parser.add_argument("--all", action="store_true", help="read every row; the exit code is 1 if some are bad")
    parser.add_argument("--output", type=Path, default=Path("outputs/inspection"), help="directory for the picture")
    parser.add_argument("--config", type=Path, help="YAML file of a training run, for its tasks and columns")
    args = parser.parse_args()
    if args.num < 1:
        parser.error(f"--num must be at least 1, got {args.num}")
    return args


def find_tasks(run: TrainingArguments | None, source: Source | None, data: Dataset | IterableDataset) -> Tasks:
    """The run's tasks that it reads from this source. Without a run: the known tasks that have a column of their name.

    They get the class names of the data set.

    Raises:
        ValueError: there are none, or one is of an unknown kind.
    """
    columns, available = source.columns if source else {}, data.column_names or ()
    tasks = {name: task for name, task in TASKS.items() if name in columns or name in available}
    if run and source:
        known, owner = known_tasks(run)
        given = run.model.get("tasks")
        if run.new_tasks:
            given = run.new_tasks if run.train_only_new else {**tasks, **run.new_tasks}
        tasks = complete_tasks(known, given, owner) if known else given or tasks
        if not run.pretrained:  # which has tasks of its own
            check_tasks([source], tasks)
        tasks = source.choose(tasks)
        if source.name and source.tasks is None:
            tasks = {name: task for name, task in tasks.items() if name in columns or name in available}
    if not tasks:
        hint = layout_hint(data.column_names or [])
        raise ValueError(f"none of the columns {data.column_names} is a known task: give `model.tasks`{hint}")
    for name, task in tasks.items():
        if task.get("kind") not in TASK_KINDS:
            raise ValueError(
                f"`tasks[{name!r}]['kind']` must be one of {sorted(TASK_KINDS)}, got {task.get('kind')!r}"
            )
    return name_classes(tasks, data.features, columns)


def decode(label: np.ndarray | None, kind: TaskKind) -> Tensor | None:
    """`(height, width)` or `(3, height, width)`."""
    if label is None:
        return None
    values = torch.from_numpy(decode_label(label, kind))
    return values if kind.label_channels > 1 else values[0]


def draw(image: Image.Image | np.ndarray, labels: dict[str, np.ndarray | None], tasks: Tasks) -> Image.Image:
    """The image and its labels. A missing label is drawn as unknown."""
    photo = to_photo(image)
    maps = {}
    for name, task in tasks.items():
        kind = TASK_KINDS[task["kind"]]
        label = decode(labels[name], kind)
        if label is None:
            channels = () if kind.label_channels == 1 else (kind.label_channels,)
            label = torch.full((*channels, photo.height, photo.width), kind.label_padding, dtype=kind.label_dtype)
        maps[name] = label
    return draw_overview(photo, maps, tasks)


def main():
    args = parse_args()
    run, source = read_source(args.config, args.dataset) if args.config else (None, None)
    split = describe_split(run, source, "train") if run else DataSplit(args.dataset, "train")
    num_images = args.num if split.dataset == "rooms" else None
    split = replace(split, name=args.split or split.name, num_images=num_images)
    data = split.open()
    tasks = find_tasks(run, source, data)
    reader = RowReader(tasks, split.columns, data.features)
    data = select_columns(data, reader)
    inspector, overviews, labels, bad = check_columns(data, reader), [], [], []
    shown = range(args.num) if split.streaming else evenly_spaced(len(data), args.num)
    rows = enumerate(data) if args.all else choose_rows(data, args.num)
    for index, row in tqdm(rows, "read", None if split.streaming else len(data), leave=False, disable=not args.all):
        try:
            image, good, readable, refused = inspect_row(row, reader)
        except ValueError as error:
            bad.append(f"sample {index}: {error}")
            continue
        bad += [f"sample {index}: {reason}" for reason in refused]
        inspector.add(index, row, image, good)
        if index in shown:
            labels.append({name: decode(label, reader.kinds[name]) for name, label in readable.items()})
            overviews.append(draw(image, good, tasks))
            for name, label in labels[-1].items():
                if label is not None and not known_values(label, tasks[name]).numel():
                    inspector.note(name, NOTHING_LABELLED, [index])
    if not overviews:
        raise ValueError("; ".join(bad))
    args.output.mkdir(parents=True, exist_ok=True)
    write_whole(args.output / "inspection.png", lambda file: stack(overviews).save(file, "PNG"))
    for name, task in tasks.items():
        print(f"{name} ({task['kind']}, column {reader.columns[name].column!r})")
        for line in summarize([sample[name] for sample in labels], task):
            print(f"  {line}")
    for warning in inspector.warnings() + bad:
        print(f"warning: {warning}")
    print(f"{len(labels)} samples: {args.output / 'inspection.png'}")
    if args.all:
        print(f"{index + 1} samples read, {len(bad)} of their images and labels refused")
        sys.exit(1 if bad else 0)
