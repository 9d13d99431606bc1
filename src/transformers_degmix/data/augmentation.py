"""Augmentation of one image and its label maps together, driven by the table of task kinds.

Random scale, random crop, horizontal flip and photometric distortion, in this order, before normalisation and padding:
the recipe of the field since ATRC (Bruggemann et al. 2021), with which DeGMix is trained. What becomes of a label's
values, its kind says (`TaskKind.flip`, `TaskKind.rescale`); pixels that its kind calls unknown keep their numbers.

Images are float32 arrays `(3, height, width)` in 0..255, label maps tensors `(channels, height, width)` as
[`to_label`] makes them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..image_processing_pil_degmix import Size, resize_nearest
from ..tasks import IGNORE_INDEX, TASK_KINDS, TaskKind


# Crops are drawn until no class covers more than this part of the labelled pixels; the last one is taken anyway.
MAX_CLASS_FRACTION = 0.75
NUM_CROPS = 10
# Of each of the four photometric adjustments.
DISTORTION_PROBABILITY = 0.5


@dataclass(frozen=True)
class Augmentation:
    """The published augmentation of one sample.

    Attributes:
        size: (height, width) of crops; a scaled image that is smaller stays as it is, for the collator to pad.
        scale: range of the factor of height and width, drawn uniformly. Depth is divided by it.
        flip_probability: of mirroring left to right.
        brightness: largest summand, of 255.
        contrast: range of the factor.
        saturation: range of the factor.
        hue: largest turn of the colour circle, of 180 as in OpenCV's 8-bit HSV: a unit is 2 degrees.

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    size: Size
    scale: tuple[float, float] = (0.5, 2.0)
    flip_probability: float = 0.5
    brightness: float = 32.0
    contrast: tuple[float, float] = (0.5, 1.5)
    saturation: tuple[float, float] = (0.5, 1.5)
    hue: float = 18.0

    def __post_init__(self):
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"`size` must be a height and a width of at least 1, got {self.size}")
        for name, lowest in (("scale", 1e-2), ("contrast", 0), ("saturation", 0)):
            value = getattr(self, name)
            if len(value) != 2 or not lowest <= value[0] <= value[1] < float("inf"):
                raise ValueError(f"`{name}` must be a range (low, high) with {lowest:g} <= low <= high, got {value}")
        for name, highest in (("flip_probability", 1), ("brightness", 255), ("hue", 90)):
            if not 0 <= getattr(self, name) <= highest:
                raise ValueError(f"`{name}` must be from 0 to {highest}, got {getattr(self, name)}")

    def __call__(
        self,
        pixels: np.ndarray,
        labels: dict[str, Tensor],
        kinds: dict[str, str],
        rng: np.random.Generator,
        size: Size | None = None,
    ) -> tuple[np.ndarray, dict[str, Tensor]]:
        """
        Args:
            pixels: image `(3, height, width)`, float32 in 0..255.
            labels: task -> map `(channels, height, width)`.
            kinds: task -> kind. The first segmentation task decides on crops.
            rng: where all draws come from.
            size: (height, width) of the image at scale 1, by default its own.

        Returns:
            Image and labels of one common size, at most `self.size`.
        """
        scale = rng.uniform(*self.scale)
        height, width = (max(1, round(length * scale)) for length in size or pixels.shape[-2:])
        classes = next((labels[task] for task, kind in kinds.items() if TASK_KINDS[kind].num_logits is None), None)
        window = draw_window((height, width), self.size, classes, rng)

        pixels = window.of_image(pixels)
        labels = {
            task: rescale_label(window.of_label(label), TASK_KINDS[kinds[task]], scale)
            for task, label in labels.items()
        }
        if rng.random() < self.flip_probability:
            pixels = pixels[..., ::-1]
            labels = {task: flip_label(label, TASK_KINDS[kinds[task]]) for task, label in labels.items()}
        return self.distort(pixels, rng), labels

    def distort(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Photometric distortion of SSD (Liu et al. 2016): brightness, contrast, saturation and hue, each by chance.

        Contrast comes before saturation and hue or after them, as likely. Each step clips to 0..255 as 8-bit images
        are, but does not round.
        """
        brightness = (adjust_brightness, rng.uniform(-self.brightness, self.brightness))
        contrast = (adjust_contrast, rng.uniform(*self.contrast))
        saturation = (adjust_saturation, rng.uniform(*self.saturation))
        hue = (turn_hue, rng.uniform(-self.hue, self.hue))
        contrast_first = rng.random() < 0.5
        for adjust, amount in (
            (brightness, contrast, saturation, hue) if contrast_first else (brightness, saturation, hue, contrast)
        ):
            if rng.random() < DISTORTION_PROBABILITY:
                pixels = adjust(pixels, amount)
        return pixels


@dataclass(frozen=True)
class Window:
    """A rectangle of an image that is resized: only what is seen is computed, to the same values.

    Attributes:
        scaled_size: (height, width) of the whole image after resizing.
        corner: (row, column) at which the rectangle starts there.
        size: (height, width) of the rectangle.
    """

    scaled_size: Size
    corner: tuple[int, int]
    size: Size

    def of_image(self, pixels: np.ndarray) -> np.ndarray:
        """`(channels, height, width)` -> `(channels, *size)`, bilinear with antialiasing, as the processor resizes."""
        (top, left), (height, width) = self.corner, self.size
        vertical, horizontal = pixels.shape[-2:]
        # PIL's filter looks beyond the box, so that the crop's border is that of the whole image resized.
        box = (
            left * horizontal / self.scaled_size[1],
            top * vertical / self.scaled_size[0],
            (left + width) * horizontal / self.scaled_size[1],
            (top + height) * vertical / self.scaled_size[0],
        )
        bilinear = Image.Resampling.BILINEAR
        return np.stack([Image.fromarray(channel).resize((width, height), bilinear, box) for channel in pixels])

    def of_label(self, label: Tensor) -> Tensor:
        """`(channels, height, width)` -> `(channels, *size)`, nearest: no value that was not there before."""
        rows, columns = (
            resize_nearest(torch.arange(own).view(own, 1), (scaled, 1))[start : start + length, 0].numpy()
            for own, scaled, start, length in zip(label.shape[-2:], self.scaled_size, self.corner, self.size)
        )
        # Three times as fast as torch's indexing.
        return torch.from_numpy(label.numpy().take(rows, axis=-2).take(columns, axis=-1))


def draw_window(scaled_size: Size, size: Size, classes: Tensor | None, rng: np.random.Generator) -> Window:
    """A window at random, of `size` or as much of it as `scaled_size` has, that shows not nearly one class only.

    Args:
        scaled_size: of the whole image.
        size: of the window.
        classes: class ids `(1, height, width)` of the image before resizing, if there are any.
        rng: where the corners come from.
    """
    size = tuple(min(lengths) for lengths in zip(scaled_size, size))
    for _ in range(NUM_CROPS):
        corner = tuple(int(rng.integers(whole - part + 1)) for whole, part in zip(scaled_size, size))
        window = Window(scaled_size, corner, size)
        if classes is None or largest_class_fraction(window.of_label(classes)) <= MAX_CLASS_FRACTION:
            break
    return window


def largest_class_fraction(classes: Tensor) -> float:
    """Part of the labelled pixels that the most frequent class covers; 0 if no pixel is labelled."""
    counts = torch.bincount(classes.flatten(), minlength=IGNORE_INDEX + 1)[:IGNORE_INDEX]
    return (counts.max() / counts.sum().clamp(min=1)).item()


def rescale_label(label: Tensor, kind: TaskKind, scale: float) -> Tensor:
    """Values of a map whose image was enlarged by `scale`."""
    return _where_known(label, kind, lambda known: kind.rescale(known, scale))


def flip_label(label: Tensor, kind: TaskKind) -> Tensor:
    """A map `(channels, height, width)` mirrored left to right."""
    return _where_known(label.flip(-1), kind, kind.flip)


def _where_known(label: Tensor, kind: TaskKind, change: Callable[[Tensor], Tensor]) -> Tensor:
    changed = change(label)
    # Most kinds return the map itself; then there is nothing to choose between.
    return label if changed is label else torch.where(kind.unknown(label), label, changed)


def adjust_brightness(pixels: np.ndarray, summand: float) -> np.ndarray:
    return (pixels + np.float32(summand)).clip(0, 255)


def adjust_contrast(pixels: np.ndarray, factor: float) -> np.ndarray:
    return (pixels * np.float32(factor)).clip(0, 255)


def adjust_saturation(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Multiplies HSV's saturation, at most to 1, and keeps hue and value.

    The value is max(R, G, B), and saturation times value is how far the least channel lies below it; so all channels
    move away from the value by one factor.
    """
    value = pixels.max(axis=0)
    chroma = value - pixels.min(axis=0)
    return value - (value - pixels) * np.minimum(np.float32(factor), value / np.maximum(chroma, 1e-6))


def turn_hue(pixels: np.ndarray, amount: float) -> np.ndarray:
    """Adds to HSV's hue, of which 180 is the full circle, and keeps saturation and value."""
    red, green, blue = pixels
    value = pixels.max(axis=0)
    chroma = value - pixels.min(axis=0)
    # From -1 to 5: red is at 0, green at 2, blue at 4. Where the chroma is 0, any hue will do.
    per_chroma = 1 / np.maximum(chroma, 1e-6)
    hue = np.where(
        value == red,
        (green - blue) * per_chroma,
        np.where(value == green, 2 + (blue - red) * per_chroma, 4 + (red - green) * per_chroma),
    )
    hue += np.float32(amount / 30)
    hue -= 6 * np.floor(hue / 6)  # as `hue % 6`, which is slow
    # How much of the chroma each channel lacks: none within 1 of its own hue, all of it from 2 on.
    distances = np.stack([3 - np.abs(hue - 3), np.abs(hue - 2), np.abs(hue - 4)])
    return value - chroma * (distances - 1).clip(0, 1)
