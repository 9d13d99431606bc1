"""Measures how many samples one process on one core reads, augments as published, and batches in a second.

    python scripts/benchmarks/loader.py [--num-images 32] [--size 425 560]

The samples are Rooms with NYUD-v2's tasks, stored as all data sets are: PNG, and TIFF for depth. Times are CPU times,
which other processes disturb least.

    python scripts/benchmarks/loader.py --processors [--size 425 560]

compares the image processors instead: milliseconds for a photo of that size, and for larger ones resized to it.
"""

import argparse
import sys
from collections import defaultdict
from contextlib import ExitStack
from time import process_time
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from transformers_degmix import DeGMixConfig, DeGMixImageProcessor, DeGMixImageProcessorPil
from transformers_degmix.cli import run_script
from transformers_degmix.configuration_degmix import NYUD_TASKS
from transformers_degmix.data import augmentation
from transformers_degmix.data.collator import DeGMixDataCollator
from transformers_degmix.data.mapping import MappedDataset, map_columns
from transformers_degmix.data.rooms import ROOMS_TASKS, load_rooms


NUM_EPOCHS = 4
# Of each image processor and photo; the quickest counts.
NUM_CALLS = 10
# What is timed, in order; none of them calls another.
STAGES = {
    "decoding the files": (MappedDataset, "__getitem__"),
    "reading and checking image and labels": (DeGMixDataCollator, "_read"),
    "choosing the crop": (augmentation, "draw_window"),
    "resizing and cropping the labels": (augmentation, "transform_label"),
    "resizing and cropping the image": (augmentation.Window, "of_image"),
    "photometric distortion": (augmentation.Augmentation, "distort"),
}


# only one if torchvision is not installed
PROCESSORS = {cls().backend: cls for cls in (DeGMixImageProcessorPil, DeGMixImageProcessor)}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-images", type=int, default=32, help="number of rooms (default 32)")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(425, 560), metavar=("H", "W"), help="of images and crops"
    )
    parser.add_argument("--processors", action="store_true", help="compare the image processors instead")
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


def compare_processors(size: tuple[int, int]):
    """Prints the shortest CPU time of each image processor, called in turns, for photos of several sizes."""
    height, width = size
    rng = np.random.default_rng(0)
    print("photo         resized with  " + "".join(f"{name:>14}" for name in PROCESSORS))
    for factor in (1, 2, 4):
        photo = Image.fromarray(rng.integers(0, 256, (factor * height, factor * width, 3), np.uint8))
        for resample in (None,) if factor == 1 else Image.Resampling:
            options = {} if resample is None else {"size": {"height": height, "width": width}, "resample": resample}
            seconds = {name: float("inf") for name in PROCESSORS}
            for _ in range(NUM_CALLS):
                for name, processor_class in PROCESSORS.items():
                    processor = processor_class(do_resize=bool(options), **options)
                    start = process_time()
                    processor(photo, return_tensors="pt")
                    seconds[name] = min(seconds[name], process_time() - start)
            times = "".join(f"{seconds[name] * 1e3:11.1f} ms" for name in PROCESSORS)
            print(f"{photo.height:4} x {photo.width:4}   {resample.name if options else '-':12}  {times}")


def main():
    args = parse_args()
    torch.set_num_threads(1)
    if args.processors:
        return compare_processors(tuple(args.size))
    try:
        rooms = load_rooms("train", args.num_images, tuple(args.size))
    except ValueError as error:
        sys.exit(f"error: {error}")
    tasks = DeGMixConfig(tasks={name: ROOMS_TASKS[name] for name in NYUD_TASKS}).tasks
    collator = DeGMixDataCollator(
        DeGMixImageProcessorPil(tasks=tasks), augmentation.Augmentation(tuple(args.size)), tasks=tasks
    )
    loader = DataLoader(map_columns(rooms.select_columns(["image", *tasks]), tasks), 8, collate_fn=collator)
    next(iter(loader))  # warms up

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
    run_script(main)
