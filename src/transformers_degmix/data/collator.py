"""From rows of a data set to a batch for the model."""

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate
from transformers import BatchFeature

from ..image_processing_pil_degmix import resized_size
from ..images_degmix import LabelMap, Size, necessary_channels, to_coded_label, to_pixels
from ..layers_degmix import crop_centred
from ..tasks import IGNORE_INDEX, JPEG_IDS, TASK_KINDS, TaskKind, format_fields, format_number
from .augmentation import Augmentation


class DeGMixDataCollator:
    """Turns rows (`image` and one column per task) into `pixel_values` and `labels`.

    Without augmentation the processor does everything. With augmentation, scale 1 is the size to which the processor
    would resize an image, and images and labels are padded to the size of the crops.

    The augmentation of a sample depends only on the seed, the epoch, a checksum of the image, and `repetition` in the
    row (0 by default), which differs if an image comes several times in an epoch. The number of workers or processes
    and earlier draws make no difference. Call [`set_epoch`] before each epoch, as for a `DistributedSampler`;
    otherwise all epochs are augmented alike.

    Args:
        processor: a `DeGMixImageProcessor`; its `tasks` are the columns that are read. A task ignores rows that lack
            its column or have `None` in it.
        augmentation: random changes; by default none.
        seed: of the augmentation, 0 or more.
        tasks: `DeGMixConfig.tasks`, or those whose labels are read. `num_labels` and `ignore_empty` are used. By
            default, class ids up to 254 are accepted and no image is ignored.

    Raises:
        ValueError: on a call, if an image or a label cannot be used; the message names the row and the task.
    """

    def __init__(
        self,
        processor,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        tasks: dict[str, dict[str, Any]] | None = None,
    ):
        self.processor = processor
        self.augmentation = augmentation
        self.seed = seed
        self.kinds = {name: kind for name, kind in processor.tasks.items() if tasks is None or name in tasks}
        self.tasks = tasks or {name: {} for name in self.kinds}
        # Shared memory, because workers that live for several epochs have their own copy of everything else.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int):
        """Sets the epoch, 0 or more, of the batches to come, in running workers too."""
        self._epoch.fill_(epoch)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> BatchFeature:
        """A batch of rows.

        Args:
            rows: `image` and a label per task, or finished `pixel_values` and `labels`, all of one size.

        Returns:
            `pixel_values`, float32 `(batch, 3, height, width)`, and `labels`: for each task that is read
            `(batch, height, width)`, or `(batch, 3, height, width)` for normals, of dtype `TaskKind.label_dtype`.
            Padding, unknown pixels, and samples without the label are 255.
        """
        if "pixel_values" in rows[0]:
            return BatchFeature(default_collate(list(rows)))
        samples = [self._read(row, _row_name(row, index)) for index, row in enumerate(rows)]
        if self.augmentation is None:
            batch = self.processor(
                images=[pixels for pixels, _ in samples],
                labels={task: [labels[task] for _, labels in samples] for task in self.kinds},
                return_tensors="pt",
            )
        else:
            batch = self._augment(samples, [row.get("repetition", 0) for row in rows], self.augmentation)
        for task, label in batch["labels"].items():
            if self.tasks[task].get("ignore_empty"):
                label[((label == 0) | (label == IGNORE_INDEX)).flatten(1).all(dim=1)] = IGNORE_INDEX
        return batch

    def _read(self, row: dict[str, Any], name: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """A row -> its image `(3, height, width)`, and task -> map `(channels, height, width)`."""
        try:
            pixels = to_pixels(row["image"], self.processor.do_convert_rgb)
        except (TypeError, ValueError) as error:
            raise ValueError(f"`image` of {name}: {error}") from error
        labels = {}
        for task, kind in self.kinds.items():
            try:
                labels[task] = read_label(row.get(task), kind, pixels.shape[-2:], self.tasks[task].get("num_labels"))
            except (TypeError, ValueError) as error:
                raise ValueError(f"`{task}` of {name}: {error}") from error
        return pixels, labels

    def _augment(
        self,
        samples: list[tuple[np.ndarray, dict[str, np.ndarray]]],
        repetitions: list[int],
        augmentation: Augmentation,
    ) -> BatchFeature:
        height, width = augmentation.size
        samples = [self._augment_sample(*sample, number, augmentation) for sample, number in zip(samples, repetitions)]
        batch = self.processor(
            images=[pixels for pixels, _ in samples],
            do_resize=False,
            do_pad=True,
            pad_size={"height": height, "width": width},
            return_tensors="pt",
        )
        # The processor would read, check and resize labels again, which takes as long as the whole augmentation.
        batch["labels"] = {
            task: _pad_labels([labels[task] for _, labels in samples], TASK_KINDS[kind], (height, width))
            for task, kind in self.kinds.items()
        }
        return batch

    def _augment_sample(
        self, pixels: np.ndarray, labels: dict[str, np.ndarray], repetition: int, augmentation: Augmentation
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        rng = np.random.default_rng([self.seed, self._epoch.item(), zlib.crc32(pixels.data), repetition])
        size = pixels.shape[-2:]
        if self.processor.do_resize:
            size = resized_size(size, self.processor.size)
        return augmentation(pixels, labels, self.kinds, rng, size)


def read_label(
    label: LabelMap | None,
    kind: str,
    size: Size,
    num_labels: int | None = None,
    describe: Callable[[dict[str, Any]], str] = format_fields,
) -> np.ndarray:
    """Label map as stored in data sets -> array `(channels, height, width)`, checked but not decoded.

    See [`to_coded_label`].

    Args:
        label: a map, or `None` for one that is ignored everywhere.
        kind: of the task.
        size: (height, width) of the image.
        num_labels: number of classes; by default, ids up to 254 are accepted.
        describe: the setting of a [`~tasks.Suspicion`] -> what to write into `columns`.

    Raises:
        ValueError: the map has another size, or its mode or values are not allowed for this kind.
    """
    task_kind = TASK_KINDS[kind]
    if label is None:
        return np.full((task_kind.label_channels, *size), IGNORE_INDEX, task_kind.array_dtype)
    is_jpeg = getattr(label, "format", None) == "JPEG"
    if isinstance(label, Image.Image):
        label = necessary_channels(label, task_kind)
        # Class ids mean the same in more bits.
        is_known = label.mode in task_kind.image_modes or (task_kind.has_class_ids and label.mode[0] in "FI")
        if not is_known:
            hint = "alpha must be opaque" if label.mode in ("LA", "RGBA") else task_kind.mode_hint
            message = f"expected an image of mode {' or '.join(task_kind.image_modes)}, got {label.mode}"
            raise ValueError(f"{message}: {hint}" if hint else message)
    label = to_coded_label(label, task_kind, size)
    num_labels = num_labels or IGNORE_INDEX
    offences = task_kind.offences(label, num_labels)
    if len(offences):
        found = format_number(offences[0].item())
        message = f"expected {task_kind.expected.format(highest=num_labels - 1)}, got {found}"
        if is_jpeg and task_kind.has_class_ids and (task_kind.num_logits or num_labels) > 2:
            raise ValueError(f"{message} ({JPEG_IDS.what}: {JPEG_IDS.detail})")
        for suspicion in task_kind.find_suspicions([label], num_labels)[:1]:
            mended = f"; `{describe(suspicion.setting)}` in `columns` fixes it" if suspicion.setting else ""
            message += f" ({suspicion.what}, {suspicion.detail}, in {suspicion.shares[0]:.1%} of the pixels{mended})"
        raise ValueError(message)
    return label


def _pad_labels(labels: list[np.ndarray], kind: TaskKind, size: Size) -> Tensor:
    """Maps `(channels, height, width)` -> one batch of `size`, padded with 255."""
    batch = np.full((len(labels), kind.label_channels, *size), IGNORE_INDEX, kind.array_dtype)
    for index, label in enumerate(labels):
        crop_centred(batch[index], label.shape[-2:])[...] = label
    return torch.from_numpy(batch if kind.label_channels == 3 else batch[:, 0])


def _row_name(row: dict[str, Any], index: int) -> str:
    return f"row {index} of the batch" + ("" if row.get("image_id") is None else f", {row['image_id']!r}")
