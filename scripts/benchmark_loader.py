"""Measures how many samples one process on one core reads, augments as published, and batches in a second.

    python scripts/benchmark_loader.py [--num-images 32] [--size 425 560]

The samples are Rooms with NYUD-v2's tasks, stored as all data sets are: PNG, and TIFF for depth. Times are CPU times,
which other processes disturb least.
"""

import argparse
import sys
from collections import defaultdict
from contextlib import ExitStack
from time import process_time
from unittest.mock import patch

import torch
from torch.utils.data import DataLoader

from transformers_degmix import DeGMixConfig, DeGMixImageProcessorPil
from transformers_degmix.configuration_degmix import NYUD_TASKS
from transformers_degmix.data import augmentation
from transformers_degmix.data.columns import MappedDataset, map_columns
from transformers_degmix.data.rooms import ROOMS_TASKS, load_rooms
from transformers_degmix.training.collator import DeGMixDataCollator


NUM_EPOCHS = 4
# What is timed, in order; none of them calls another.
STAGES = {
    "decoding the files": (MappedDataset, "__getitem__"),
    "reading and checking image and labels": (DeGMixDataCollator, "_read"),
    "choosing the crop": (augmentation, "draw_window"),
    "resizing and cropping the labels": (augmentation, "transform_label"),
    "resizing and cropping the image": (augmentation.Window, "of_image"),
    "photometric distortion": (augmentation.Augmentation, "distort"),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-images", type=int, default=32, help="number of rooms (default 32)")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(425, 560), metavar=("H", "W"), help="of images and crops"
    )
    return parser.parse_args()


def timed(function, seconds: dict[str, float], stage: str):
    """The function, which adds the CPU time of each call to `seconds[stage]`."""

    def call(*args, **kwargs):
        start = process_time()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[stage] += process_time() - start

    return call


def main():
    args = parse_args()
    torch.set_num_threads(1)
    try:
        rooms = load_rooms("train", args.num_images, tuple(args.size))
    except ValueError as error:
        sys.exit(f"error: {error}")
    tasks = DeGMixConfig(tasks={name: ROOMS_TASKS[name] for name in NYUD_TASKS}).tasks
    collator = DeGMixDataCollator(
        DeGMixImageProcessorPil(tasks=tasks), augmentation.Augmentation(tuple(args.size)), tasks=tasks
    )
    loader = DataLoader(map_columns(rooms.select_columns(["image", *tasks]), tasks), 8, collate_fn=collator)
    next(iter(loader))  # what is only done once

    seconds = defaultdict(float)
    with ExitStack() as stack:
        for stage, (owner, name) in STAGES.items():
            stack.enter_context(patch.object(owner, name, timed(getattr(owner, name), seconds, stage)))
        start = process_time()
        for epoch in range(NUM_EPOCHS):
            collator.set_epoch(epoch)
            for _ in loader:
                pass
        total = process_time() - start
    seconds["normalising, padding, batching"] = total - sum(seconds.values())

    num_samples, size = NUM_EPOCHS * args.num_images, " x ".join(map(str, args.size))
    print(f"{num_samples / total:.1f} samples per second on one core: {size}, {', '.join(tasks)}")
    for stage, spent in seconds.items():
        print(f"{spent / num_samples * 1e3:8.2f} ms {spent / total:5.0%}  {stage}")


if __name__ == "__main__":
    main()
