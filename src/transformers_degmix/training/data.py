"""The data of a training run: splits of its data set, and the batches of this process."""

import os
import signal
import threading
from collections.abc import Iterator
from itertools import islice
from multiprocessing import parent_process

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, Sampler, Subset
from transformers.utils import logging

from ..data.augmentation import Augmentation
from ..data.collator import DeGMixDataCollator
from ..data.columns import MappedDataset
from ..data.inspection import find_unreadable
from ..data.splits import DataSplit
from .arguments import TrainingArguments


logger = logging.get_logger(__name__)


def describe_split(args: TrainingArguments, part: str) -> DataSplit:
    """The `"train"` or `"eval"` part of the run's data set."""
    split, num_images = getattr(args, f"{part}_split"), getattr(args, f"num_{part}_images")
    return DataSplit(args.dataset, split, num_images, args.image_size, args.columns, args.streaming)


def load_split(
    args: TrainingArguments, part: str, tasks: dict[str, dict], may_lack_columns: bool = False
) -> MappedDataset | IterableDataset:
    """The samples of a part; see [`DataSplit.load`]. A training stream comes in another random order in each epoch.

    Raises:
        ValueError: it cannot be used.
    """
    split, buffer_size = describe_split(args, part), args.shuffle_buffer_size if part == "train" else 0
    data = split.load(tasks, buffer_size, args.seed, may_lack_columns)
    if not args.skip_unreadable:
        return data
    try:
        return leave_out_unreadable(data, args)
    except ValueError as error:
        raise ValueError(f"{split}: {error}") from error


def leave_out_unreadable(data: MappedDataset, args: TrainingArguments) -> MappedDataset:
    """The samples that can be used; the others are listed.

    Raises:
        ValueError: they are more than `args.max_unreadable` of all.
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
        logger.warning("\n".join([f"{len(unreadable)} of {len(data)} samples are left out:", *listed]))
    kept = data.data.select([index for index in range(len(data)) if index not in unreadable])
    return MappedDataset(kept, data.reader, data.warnings)


class ShardedBatchSampler(Sampler):
    """Batches of one process: each epoch in an order of its own, which does not depend on the number of processes.

    The images of a batch of all processes follow each other in that order, and what does not fill one is left out.

    Attributes:
        epoch: whose order it is.
        start: how many batches to leave out.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, rank: int, num_processes: int):
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.num_processes = num_processes
        self.epoch = self.start = 0

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_images).tolist()
        for batch in range(self.start, len(self)):
            first = (batch * self.num_processes + self.rank) * self.batch_size
            yield order[first : first + self.batch_size]

    def __len__(self) -> int:
        return self.num_images // (self.batch_size * self.num_processes)


class TrainBatches:
    """The training batches of this process without end, from any position.

    Of a stream every process reads its own part; the batches before the position are read and dropped.

    Attributes:
        epoch: of the last batch.
        position: how many batches of that epoch were taken.
    """

    def __init__(self, args: TrainingArguments, processor, tasks: dict[str, dict], accelerator: Accelerator):
        augmentation = None
        if args.augmentation is not None:
            augmentation = Augmentation(**{"size": tuple(args.image_size), **args.augmentation})
        self.collator = DeGMixDataCollator(processor, augmentation, args.seed, tasks)
        self.accelerator = accelerator
        rank, num_processes = accelerator.process_index, accelerator.num_processes
        data = load_split(args, "train", tasks)
        num_images = args.batch_size * num_processes
        # Streams have no length.
        found = sum(1 for _ in describe_split(args, "train").open().take(num_images)) if args.streaming else len(data)
        if found < num_images:
            raise ValueError(
                f"{found} training images do not fill one batch: `batch_size` is {args.batch_size}, "
                f"processes are {num_processes}"
            )
        if args.streaming:
            data = split_dataset_by_node(data, rank, num_processes)
            self.sampler, batching = None, {"batch_size": args.batch_size, "drop_last": True}
        else:
            self.sampler = ShardedBatchSampler(len(data), args.batch_size, args.seed, rank, num_processes)
            batching = {"batch_sampler": self.sampler}
        self.loader = build_loader(data, self.collator, args, **batching)
        self.epoch = self.position = 0

    def __iter__(self) -> Iterator[dict]:
        while True:
            self.collator.set_epoch(self.epoch)
            if self.sampler:
                self.sampler.epoch, self.sampler.start = self.epoch, self.position
                batches = self.loader
            else:
                self.loader.dataset.set_epoch(self.epoch)
                batches = islice(self.loader, self.position, None)
            try:
                for batch in batches:
                    self.position += 1
                    yield send_to_device(batch, self.accelerator.device)
            except ValueError as error:
                if not self.sampler:
                    raise
                reason = str(error).strip()  # a loader process adds its traceback
                raise ValueError(f"{reason}; `skip_unreadable: true` leaves out such samples") from error
            if self.position == 0:
                raise ValueError(
                    f"no process's or worker's part of the stream has the {self.loader.batch_size} images of a batch"
                )
            self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]):
        self.epoch, self.position = state["epoch"], state["position"]


def build_eval_loader(
    args: TrainingArguments, processor, tasks: dict[str, dict], accelerator: Accelerator
) -> DataLoader:
    """Batches of this process's part of the evaluation split: every sample is in one part, once."""
    data = load_split(args, "eval", tasks, may_lack_columns=True)
    rank, num_processes = accelerator.process_index, accelerator.num_processes
    if args.streaming:
        data = split_dataset_by_node(data, rank, num_processes)
    else:
        data = Subset(data, range(rank, len(data), num_processes))
    return build_loader(data, DeGMixDataCollator(processor, tasks=tasks), args, batch_size=args.batch_size)


def build_loader(data, collator: DeGMixDataCollator, args: TrainingArguments, **batching) -> DataLoader:
    return DataLoader(
        data,
        num_workers=args.num_workers,
        persistent_workers=args.num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        # Iterating draws a seed: not from the generator on whose state the model's own draws depend.
        generator=torch.Generator(),
        collate_fn=collator,
        worker_init_fn=leave_sigterm_to_the_main_process,
        **batching,
    )


def leave_sigterm_to_the_main_process(_):
    """Lets no other process than the main one end this loader.

    Slurm and `timeout` send SIGTERM to all processes of a run. The main one then ends its step, for which it may need
    another batch. A loader that ends before it would be an error in the middle of the step, and no checkpoint.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS and Windows do not say who sends a signal
        return

    def wait():
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent_process().pid:
            pass
        os._exit(128 + signal.SIGTERM)

    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=wait, daemon=True).start()
