"""The data of a training run: splits of its data sets, and the batches of this process."""

import os
import signal
import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import accumulate, islice
from multiprocessing import parent_process
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, Sampler, Subset, get_worker_info
from transformers.utils import logging

from ..data.collator import DeGMixDataCollator
from ..data.mapping import MappedDataset, find_unreadable
from ..data.splits import DataSplit
from .arguments import TrainingArguments
from .sources import Source


logger = logging.get_logger(__name__)


def describe_split(args: TrainingArguments, source: Source, part: str) -> DataSplit:
    """The `"train"` or `"eval"` part of a source."""
    split, num_images = getattr(source, f"{part}_split"), getattr(source, f"num_{part}_images")
    return DataSplit(source.dataset, split, num_images, args.image_size, source.columns, args.streaming)


def find_sources(args: TrainingArguments, tasks: dict[str, dict]) -> list[Source]:
    """The sources of a run, each with the names of the tasks that it labels.

    These are the tasks that it names, by default all with a column. The only data set of a run must label all tasks.

    Raises:
        ValueError: a source labels none of the tasks, or no source labels a task.
    """
    found = []
    for source in args.sources:
        with source.naming():
            if source.name is None or source.tasks is not None:
                names, reason = list(source.choose(tasks)), f"`tasks` are {source.tasks}"
            else:
                available = describe_split(args, source, "train").column_names()
                names = [name for name in tasks if name in source.columns or name in available]
                reason = f"the columns are {available}, and `columns` names no other"
            if not names:
                raise ValueError(f"it labels none of the run's tasks {list(tasks)}: {reason}")
        found.append(replace(source, tasks=names))
    unlabelled = [name for name in tasks if not any(name in source.choose(tasks) for source in found)]
    if unlabelled:
        raise ValueError(f"none of the sources {[source.name for source in found]} labels the tasks {unlabelled}")
    return found


def load_split(
    args: TrainingArguments, source: Source, part: str, tasks: dict[str, dict], may_lack_columns: bool = False
) -> MappedDataset | IterableDataset:
    """The samples of a part of a source, with its labels of the tasks; see [`DataSplit.load`].

    A training stream has a new random order in each epoch.

    Raises:
        ValueError: as [`DataSplit.load`], or too many samples are unreadable.
    """
    split, buffer_size = describe_split(args, source, part), args.shuffle_buffer_size if part == "train" else 0
    with source.naming():
        data = split.load(source.choose(tasks), buffer_size, args.seed, may_lack_columns, source.title)
        if not args.skip_unreadable:
            return data
        try:
            return leave_out_unreadable(data, args, source.title)
        except ValueError as error:
            raise ValueError(f"{split}: {error}") from error


def leave_out_unreadable(data: MappedDataset, args: TrainingArguments, title: str) -> MappedDataset:
    """The samples that can be used. A warning, which begins with the title, lists the others.

    Raises:
        ValueError: the others are a larger share than `args.max_unreadable`.
    """
    unreadable = find_unreadable(data, args.num_workers)
    listed = [f"sample {index}: {reason}" for index, reason in unreadable.items()]
    if len(unreadable) > args.max_unreadable * len(data):
        raise ValueError(
            f"{len(unreadable)} of {len(data)} samples cannot be used, more than `max_unreadable` "
            f"({args.max_unreadable:.1%}) allows: {'; '.join(listed)}"
        )
    if not unreadable:
        return data
    if os.environ.get("RANK", "0") == "0":
        logger.warning("\n".join([f"{title}{len(unreadable)} of {len(data)} samples are left out:", *listed]))
    kept = data.data.select([index for index in range(len(data)) if index not in unreadable])
    return MappedDataset(kept, data.reader, data.warnings)


def share_epoch(sizes: list[int], weights: list[float]) -> list[int]:
    """How many images of an epoch are from each source: in proportion to the weights, `sum(sizes)` in total."""
    quotas = [sum(sizes) * weight / sum(weights) for weight in weights]
    shares = [int(quota) for quota in quotas]
    # The largest remainders are rounded up.
    for source in sorted(range(len(sizes)), key=lambda i: shares[i] - quotas[i])[: sum(sizes) - sum(shares)]:
        shares[source] += 1
    return shares


def draw_epoch(sizes: list[int], shares: list[int], seed: int, epoch: int) -> np.ndarray:
    """The images of an epoch in their order, as indices into the concatenated sources.

    Each pass through a source has a new random order. An epoch continues where the previous one ended, so that the
    images of a source come equally often. For each further pass within an epoch, `sum(sizes)` is added to the indices.
    """
    drawn, start = [], 0
    for source, (size, share) in enumerate(zip(sizes, shares)):
        first, end = epoch * share, (epoch + 1) * share
        for repetition, turn in enumerate(range(first // size, -(-end // size))):
            rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(source, turn)))
            images = rng.permutation(size)[max(0, first - turn * size) : end - turn * size]
            # Sorted, because all are shuffled below: a single source then has the order of one shuffle.
            drawn.append(np.sort(images) + start + repetition * sum(sizes))
        start += size
    return np.random.default_rng([seed, epoch]).permutation(np.concatenate(drawn))


class ShardedBatchSampler(Sampler):
    """Batches of one process. Each epoch has a new order, which does not depend on the number of processes.

    Successive images of that order form a batch of all processes. Images that do not fill one are left out.

    Args:
        sizes, shares: of the sources, see [`draw_epoch`].

    Attributes:
        epoch: the epoch to draw.
        start: how many of its batches to skip.
    """

    def __init__(self, sizes: list[int], shares: list[int], batch_size: int, seed: int, rank: int, num_processes: int):
        self.sizes = sizes
        self.shares = shares
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.num_processes = num_processes
        self.epoch = self.start = 0

    def __iter__(self) -> Iterator[list[int]]:
        order = draw_epoch(self.sizes, self.shares, self.seed, self.epoch).tolist()
        for batch in range(self.start, len(self)):
            first = (batch * self.num_processes + self.rank) * self.batch_size
            yield order[first : first + self.batch_size]

    def __len__(self) -> int:
        return sum(self.sizes) // (self.batch_size * self.num_processes)


class MixedDataset(torch.utils.data.Dataset):
    """The rows of all sources, concatenated. Indices beyond the end repeat rows; see [`draw_epoch`]."""

    def __init__(self, sources: list[Source], parts: list[MappedDataset]):
        self.sources = sources
        self.parts = parts
        self.starts = [0, *accumulate(map(len, parts))]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        repetition, index = divmod(index, len(self))
        number = bisect_right(self.starts, index) - 1
        with self.sources[number].naming():
            row = self.parts[number][index - self.starts[number]]
        return mark_row(row, self.sources[number], repetition)


class EveryNth(torch.utils.data.IterableDataset):
    """The rows of a stream at `start`, `start + step` and so on."""

    def __init__(self, stream: IterableDataset, start: int, step: int):
        self.stream = stream
        self.start = start
        self.step = step

    def set_epoch(self, epoch: int):
        self.stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return islice(self.stream, self.start, None, self.step)


class MixedStream(torch.utils.data.IterableDataset):
    """An epoch of several streams: each row comes from a random stream, until all have ended at least once.

    Streams that end earlier begin again. (`datasets.interleave_datasets` needs streams with the same columns, reads a
    part of them to know the columns, and has the same order in each epoch.)

    Args:
        sources, streams: one stream for each source, with the part that this process reads.
        weights: of the streams, to draw them by.
        seed, rank: of the draws, together with the epoch and the number of the loader process.
    """

    def __init__(
        self,
        sources: list[Source],
        streams: list[IterableDataset | EveryNth],
        weights: list[float],
        seed: int,
        rank: int,
    ):
        self.sources = sources
        self.streams = streams
        self.weights = weights
        self.seed = seed
        self.rank = rank
        # Persistent loader processes have a copy of everything except shared memory.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int):
        """Sets the next epoch, in running loader processes too."""
        self._epoch.fill_(epoch)
        for stream in self.streams:
            stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        rng = np.random.default_rng([self.seed, self._epoch.item(), self.rank, worker.id if worker else 0])
        weights = np.array(self.weights, float)
        rows, repetitions = [iter(stream) for stream in self.streams], [0] * len(weights)
        while True:
            number = rng.choice(len(weights), p=weights / weights.sum())
            with self.sources[number].naming():
                row = next(rows[number], None)
                if row is None:
                    repetitions[number] += 1
                    if all(repetitions):
                        return
                    rows[number] = iter(self.streams[number])
                    row = next(rows[number], None)
            if row is None:  # other loaders read all of this stream
                weights[number] = 0
            else:
                yield mark_row(row, self.sources[number], repetitions[number])


def split_stream(
    stream: IterableDataset, num_images: int | None, accelerator: Accelerator
) -> IterableDataset | EveryNth:
    """The part of a stream that this process reads: whole files if possible, or single rows of a counted stream.

    `datasets` would divide the number by the files, whatever their lengths.
    """
    rank, num_processes = accelerator.process_index, accelerator.num_processes
    if num_images is None:
        return split_dataset_by_node(stream, rank, num_processes)
    return EveryNth(stream, rank, num_processes)


def mark_row(row: dict[str, Any], source: Source, repetition: int) -> dict[str, Any]:
    """The row for the collator, with its repetition in the epoch, and its source in the `image_id`."""
    named = {"image_id": f"{source.name}: {row['image_id']}"} if source.name and "image_id" in row else {}
    return {**row, **named, "repetition": repetition}


class TrainBatches:
    """Endless training batches of this process, from any position.

    Every process reads its own part of a stream. It reads and drops the batches before the position.

    Args:
        args, sources, processor, accelerator: of the run.
        tasks: `DeGMixConfig.tasks`, or only the tasks whose labels are read.

    Attributes:
        epoch: of the last batch.
        position: how many batches of that epoch were taken.
        sources: with the columns as training reads them, if it was concluded what their values mean (not of streams).
    """

    def __init__(
        self,
        args: TrainingArguments,
        sources: list[Source],
        processor,
        tasks: dict[str, dict],
        accelerator: Accelerator,
    ):
        self.collator = DeGMixDataCollator(processor, args.build_augmentation(), args.seed, tasks)
        self.accelerator, self.sources = accelerator, sources
        rank, num_processes = accelerator.process_index, accelerator.num_processes
        parts = [load_split(args, source, "train", tasks) for source in sources]
        num_images = args.batch_size * num_processes
        if args.streaming:  # streams have no length
            splits = [describe_split(args, source, "train") for source in sources]
            sizes = [sum(1 for _ in split.open().take(num_images)) for split in splits]
        else:
            sizes = [len(part) for part in parts]
        if sum(sizes) < num_images:
            raise ValueError(
                f"{sum(sizes)} training images do not fill one batch: `batch_size` is {args.batch_size}, "
                f"the number of processes is {num_processes}"
            )
        self.data: MixedDataset | MixedStream
        self.sampler: Any  # None for streams
        batching: dict[str, Any]
        if args.streaming:
            self.sampler, batching = None, {"batch_size": args.batch_size, "drop_last": True}
            streams = [
                split_stream(part, source.num_train_images, accelerator) for source, part in zip(sources, parts)
            ]
            weights = [source.weight or 1 for source in sources]
            self.data = MixedStream(sources, streams, weights, args.seed, rank)
        else:
            self.data = MixedDataset(sources, parts)
            self.sources = [
                replace(source, columns=source.columns | {n: c for n, c in part.reader.columns.items() if c.expected})
                for source, part in zip(sources, parts)
            ]
            shares = share_epoch(sizes, [source.weight or size for source, size in zip(sources, sizes)])
            for source, share in zip(sources, shares):
                if not share:
                    reason = f"`weight` {source.weight} gives it none of the {sum(sizes)} images of an epoch"
                    raise ValueError(source.title + reason)
            self.sampler = ShardedBatchSampler(sizes, shares, args.batch_size, args.seed, rank, num_processes)
            batching = {"batch_sampler": self.sampler}
        self.loader = build_loader(args, sources, "train", self.data, self.collator, **batching)
        self.epoch = self.position = 0

    def __iter__(self) -> Iterator[dict]:
        while True:
            self.collator.set_epoch(self.epoch)
            batches: Iterable[dict] = self.loader
            if isinstance(self.data, MixedStream):
                self.data.set_epoch(self.epoch)
                batches = islice(self.loader, self.position, None)
            else:
                self.sampler.epoch, self.sampler.start = self.epoch, self.position
            for batch in batches:
                self.position += 1
                yield send_to_device(batch, self.accelerator.device)
            if self.position == 0:
                raise ValueError(
                    f"`batch_size` is {self.loader.batch_size}, but no process or worker reads so many images"
                )
            self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]):
        self.epoch, self.position = state["epoch"], state["position"]


def build_eval_loader(
    args: TrainingArguments, source: Source, processor, tasks: dict[str, dict], accelerator: Accelerator
) -> DataLoader:
    """Batches of this process's part of a source's evaluation split. Every sample is in exactly one part."""
    data = load_split(args, source, "eval", tasks, may_lack_columns=True)
    if args.streaming:
        data = split_stream(data, source.num_eval_images, accelerator)
    else:
        data = Subset(data, range(accelerator.process_index, len(data), accelerator.num_processes))
    collator = DeGMixDataCollator(processor, tasks=source.choose(tasks))
    return build_loader(args, [source], "eval", data, collator, batch_size=args.batch_size)


class SplitLoader(DataLoader):
    """A loader whose errors about samples name the split, and the setting that helps if there is one."""

    def __init__(self, split: str, setting: str, *args, **options):
        super().__init__(*args, **options)
        self.hint = f"; this is the {split} split" + (f", and `{setting}` leaves out such samples" if setting else "")

    def __iter__(self):
        try:
            yield from super().__iter__()
        except ValueError as error:
            raise ValueError(str(error).strip() + self.hint) from error  # a loader process adds its traceback


def build_loader(
    args: TrainingArguments, sources: list[Source], part: str, data, collator: DeGMixDataCollator, **batching
) -> DataLoader:
    """Batches of the `"train"` or `"eval"` part of the sources, whose rows are `data`."""
    num_workers = args.num_workers
    if args.streaming and any(getattr(source, f"num_{part}_images") for source in sources):
        num_workers = min(num_workers, 1)  # each would count on its own
    return SplitLoader(
        {"train": "training", "eval": "evaluation"}[part],
        "" if args.streaming else "skip_unreadable: true",
        data,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        # Each iteration draws a seed. It must not advance the generator that the model draws from.
        generator=torch.Generator(),
        collate_fn=collator,
        worker_init_fn=leave_sigterm_to_the_main_process,
        **batching,
    )


def leave_sigterm_to_the_main_process(_):
    """Makes this loader process ignore SIGTERM from any process except the main one.

    Slurm and `timeout` send SIGTERM to all processes of a run. The main one then ends its step, for which it can need
    another batch. If the loader had ended first, the step would fail, without a checkpoint.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS and Windows do not say who sends a signal
        return

    def wait():
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent_process().pid:
            pass
        os._exit(128 + signal.SIGTERM)

    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=wait, daemon=True).start()
