"""From rows of a data set to a batch for the model."""

from collections.abc import Sequence
from typing import Any

from transformers import BatchFeature

from ..data.augmentation import random_horizontal_flip


class DeGMixDataCollator:
    """Turns rows, `image` and one column per task, into `pixel_values` and `labels`.

    Args:
        processor: a `DeGMixImageProcessor`; its `tasks` are the columns that are read.
        augment: whether to mirror images at random.
    """

    def __init__(self, processor, augment: bool = False):
        self.processor = processor
        self.augment = augment

    def __call__(self, rows: Sequence[dict[str, Any]]) -> BatchFeature:
        batch = self.processor(
            images=[row["image"] for row in rows],
            labels={task: [row[task] for row in rows] for task in self.processor.tasks},
            return_tensors="pt",
        )
        return random_horizontal_flip(batch, self.processor.tasks) if self.augment else batch
