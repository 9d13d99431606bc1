"""Augmentation of one image and its label maps together, driven by the table of task kinds.

Random scale, random crop, horizontal flip and photometric distortion, in this order, before normalisation and padding.
This is the recipe of the field since ATRC (Bruggemann et al. 2021), and of DeGMix. The kind of a task says how label
values change (`TaskKind.flip`, `TaskKind.rescale`). Unknown pixels (`TaskKind.unknown`) become `IGNORE_INDEX`.

Images are float32 arrays `(3, height, width)` in 0..255. Label maps are arrays `(channels, height, width)` from
[`to_coded_label`]. They are decoded after cropping, when they are small.
"""

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
from PIL import Image

from ..images_degmix import Size, decode_label, nearest
from ..tasks import IGNORE_INDEX, TASK_KINDS, TaskKind


# Crops are drawn until no class covers more than this share of the labelled pixels, or `NUM_CROPS` times.
MAX_CLASS_FRACTION = 0.75
NUM_CROPS = 10
# For each of the four photometric adjustments.
DISTORTION_PROBABILITY = 0.5


@dataclass(frozen=True)
class Augmentation:
    """The published augmentation of one sample.

    Attributes:
        size: (height, width) of crops. The collator pads scaled images that are smaller.
        scale: range of the factor for height and width, drawn uniformly. Depth is divided by the factor.
        flip_probability: probability of mirroring left to right.
        brightness: largest change of pixel values, which are in 0..255.
        contrast: range of the factor.
        saturation: range of the factor.
        hue: largest change of the hue, in units of 2 degrees, as in OpenCV's 8-bit HSV.

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
        if not (_are_numbers(self.size, 2, Integral) and min(self.size) >= 1):
            raise ValueError(f"`size` must be a height and a width of at least 1, got {self.size}")
        for name, lowest in (("scale", 1e-2), ("contrast", 0), ("saturation", 0)):
            value = getattr(self, name)
            if not (_are_numbers(value, 2) and lowest <= value[0] <= value[1] < float("inf")):
                raise ValueError(f"`{name}` must be a range (low, high) with {lowest:g} <= low <= high, got {value}")
        for name, highest in (("flip_probability", 1), ("brightness", 255), ("hue", 90)):
            value = getattr(self, name)
            if not (_are_numbers([value], 1) and 0 <= value <= highest):
                raise ValueError(f"`{name}` must be from 0 to {highest}, got {value!r}")

    def __call__(
        self,
        pixels: np.ndarray,
        labels: dict[str, np.ndarray],
        kinds: dict[str, str],
        rng: np.random.Generator,
        size: Size | None = None,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Augments a sample.

        Args:
            pixels: image `(3, height, width)`, float32 in 0..255.
            labels: task -> map `(channels, height, width)`, uint8 or `TaskKind.array_dtype`.
            kinds: task -> kind. The classes of the first segmentation task decide which crop is taken.
            rng: source of all draws.
            size: (height, width) of the image at scale 1; by default the size of `pixels`.

        Returns:
            Image and decoded labels of one common size, at most `self.size`.
        """
        scale = rng.uniform(*self.scale)
        height, width = (max(1, round(length * scale)) for length in size or pixels.shape[-2:])
        classes = next((labels[task] for task, kind in kinds.items() if TASK_KINDS[kind].num_logits is None), None)
        window = draw_window((height, width), self.size, classes, rng)
        is_flipped = rng.random() < self.flip_probability

        labels = {
            task: transform_label(label, TASK_KINDS[kinds[task]], window, scale, is_flipped)
            for task, label in labels.items()
        }
        pixels = self.distort(window.of_image(pixels), rng)
        return (pixels[..., ::-1] if is_flipped else pixels), labels

    def distort(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Photometric distortion of SSD (Liu et al. 2016): random brightness, contrast, saturation and hue.

        Contrast comes before or after saturation and hue with equal probability. Values stay in 0..255 after each
        step, but are not rounded.
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


def _are_numbers(values: Any, count: int, number: type = Real) -> bool:
    return isinstance(values, list | tuple) and len(values) == count and all(isinstance(v, number) for v in values)


@dataclass(frozen=True)
class Window:
    """A rectangle of a resized image, computed without the rest, but with the same values.

    Attributes:
        scaled_size: (height, width) of the whole image after resizing.
        corner: (row, column) of the rectangle's top left pixel in the resized image.
        size: (height, width) of the rectangle.
    """

    scaled_size: Size
    corner: tuple[int, int]
    size: Size

    def of_image(self, pixels: np.ndarray) -> np.ndarray:
        """`(channels, height, width)` -> `(channels, *size)`, bilinear with antialiasing, as the processor resizes."""
        (top, left), (height, width) = self.corner, self.size
        vertical, horizontal = pixels.shape[-2:]
        # PIL's filter also reads pixels outside the box, so the border is the same as in the whole resized image.
        box = (
            left * horizontal / self.scaled_size[1],
            top * vertical / self.scaled_size[0],
            (left + width) * horizontal / self.scaled_size[1],
            (top + height) * vertical / self.scaled_size[0],
        )
        bilinear = Image.Resampling.BILINEAR
        return np.stack(
            [np.asarray(Image.fromarray(channel).resize((width, height), bilinear, box)) for channel in pixels]
        )

    def of_label(self, label: np.ndarray) -> np.ndarray:
        """`(channels, height, width)` -> `(channels, *size)`, a copy, from the nearest pixels: no new values."""
        rows, columns = (
            nearest(own, scaled)[start : start + length]
            for own, scaled, start, length in zip(label.shape[-2:], self.scaled_size, self.corner, self.size)
        )
        return label.take(rows, axis=-2).take(columns, axis=-1)


def draw_window(scaled_size: Size, size: Size, classes: np.ndarray | None, rng: np.random.Generator) -> Window:
    """A random window in which no class covers more than `MAX_CLASS_FRACTION`; the last draw is taken anyway.

    Args:
        scaled_size: (height, width) of the whole image after resizing.
        size: (height, width) of the window, which is cut to `scaled_size`.
        classes: class ids `(1, height, width)` of the image before resizing, if there are any.
        rng: source of the corners.
    """
    size = min(scaled_size[0], size[0]), min(scaled_size[1], size[1])
    for _ in range(NUM_CROPS):
        corner = int(rng.integers(scaled_size[0] - size[0] + 1)), int(rng.integers(scaled_size[1] - size[1] + 1))
        window = Window(scaled_size, corner, size)
        if classes is None or largest_class_fraction(window.of_label(classes)) <= MAX_CLASS_FRACTION:
            break
    return window


def largest_class_fraction(classes: np.ndarray) -> float:
    """Share of the labelled pixels that the most frequent class covers; 0 if no pixel is labelled."""
    counts = np.bincount(classes.ravel(), minlength=IGNORE_INDEX + 1)[:IGNORE_INDEX]
    return counts.max() / max(counts.sum(), 1)


def transform_label(label: np.ndarray, kind: TaskKind, window: Window, scale: float, is_flipped: bool) -> np.ndarray:
    """Map `(channels, height, width)` -> its window, decoded, with the values of the scaled and mirrored image."""
    label = decode_label(window.of_label(label), kind)
    unknown = kind.unknown(label)
    label = kind.rescale(label, scale)
    if is_flipped:
        label = kind.flip(label)
    np.copyto(label, IGNORE_INDEX, where=unknown)  # in place: `of_label` makes a copy
    return label[..., ::-1] if is_flipped else label


def adjust_brightness(pixels: np.ndarray, summand: float) -> np.ndarray:
    return (pixels + np.float32(summand)).clip(0, 255)


def adjust_contrast(pixels: np.ndarray, factor: float) -> np.ndarray:
    return (pixels * np.float32(factor)).clip(0, 255)


def adjust_saturation(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Multiplies HSV's saturation, at most to 1, and keeps hue and value.

    The value is max(R, G, B), and saturation times value is its distance from min(R, G, B). The distances of all
    channels from the value are therefore multiplied by one factor.
    """
    value = pixels.max(axis=0)
    chroma = value - pixels.min(axis=0)
    distances = value - pixels
    distances *= np.minimum(np.float32(factor), value / np.maximum(chroma, 1e-6))
    return np.subtract(value, distances, out=distances)


def turn_hue(pixels: np.ndarray, amount: float) -> np.ndarray:
    """Adds to HSV's hue (180 is the full circle) and keeps saturation and value."""
    red, green, blue = pixels
    value, least = pixels.max(axis=0), pixels.min(axis=0)
    chroma = value - least
    # The hue from cyan: green is at 1, red at 3 and -3, blue at -1. Any hue is right where the chroma is 0.
    hue = red - green
    hue -= blue
    hue += least
    hue /= np.maximum(chroma, 1e-6)
    hue += 2
    np.copysign(hue, green - blue, out=hue)
    hue -= np.float32(amount / 30)
    hue -= 6 * np.rint(hue / 6)  # `hue % 6` is slow
    # How much of the chroma each channel lacks: none within 1 of its own hue, all of it from 2 on.
    lacks = np.stack([2 - np.abs(hue), np.abs(hue - 1) - 1, np.abs(hue + 1) - 1])
    lacks.clip(0, 1, out=lacks)
    lacks *= chroma
    return np.subtract(value, lacks, out=lacks)
