"""Augmentation of a batch, images and labels together, driven by the table of task kinds."""

import torch
from transformers import BatchFeature

from ..tasks import IGNORE_INDEX, TASK_KINDS


def random_horizontal_flip(batch: BatchFeature, kinds: dict[str, str], probability: float = 0.5) -> BatchFeature:
    """Mirrors each image and its labels left to right with a probability; normals change the sign of x.

    Args:
        batch: `pixel_values` `(B, 3, H, W)` and `labels` `{task: (B, H, W) or (B, 3, H, W)}`.
        kinds: kind of each task.
        probability: of each image alone, from torch's random numbers.
    """
    mirrored = torch.rand(len(batch["pixel_values"])) < probability
    batch["pixel_values"][mirrored] = batch["pixel_values"][mirrored].flip(-1)
    for task, label in batch["labels"].items():
        flipped = label[mirrored].flip(-1)
        label[mirrored] = torch.where(flipped == IGNORE_INDEX, flipped, TASK_KINDS[kinds[task]].flip(flipped))
    return batch
