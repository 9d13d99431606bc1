"""Augmentation of one image and its label maps together, driven by the table of task kinds.

Random scale, random crop, horizontal flip and photometric distortion, in this order, before normalisation and padding:
the recipe of the field since ATRC (Bruggemann et al. 2021), and DeGMix's. A label's kind says what becomes of its
values (`TaskKind.flip`, `TaskKind.rescale`). Pixels that the kind calls unknown become `IGNORE_INDEX`.

Images are float32 arrays `(3, height, width)` in 0..255, label maps arrays `(channels, height, width)` as
[`to_coded_label`] makes them, which are decoded once they are small.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..images_degmix import Size, decode_label, nearest
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
        labels: dict[str, np.ndarray],
        kinds: dict[str, str],
        rng: np.random.Generator,
        size: Size | None = None,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """A sample, changed at random.

        Args:
            pixels: image `(3, height, width)`, float32 in 0..255.
            labels: task -> map `(channels, height, width)`, uint8 or else `TaskKind.array_dtype`.
            kinds: task -> kind. The first segmentation task decides on crops.
            rng: where all draws come from.
            size: (height, width) of the image at scale 1, by default its own.

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
        return np.stack(
            [np.asarray(Image.fromarray(channel).resize((width, height), bilinear, box)) for channel in pixels]
        )

    def of_label(self, label: np.ndarray) -> np.ndarray:
        """`(channels, height, width)` -> `(channels, *size)`, a copy; nearest: no value that was not there before."""
        rows, columns = (
            nearest(own, scaled)[start : start + length]
            for own, scaled, start, length in zip(label.shape[-2:], self.scaled_size, self.corner, self.size)
        )
        return label.take(rows, axis=-2).take(columns, axis=-1)


def draw_window(scaled_size: Size, size: Size, classes: np.ndarray | None, rng: np.random.Generator) -> Window:
    """A window at random, of `size` or as much of it as `scaled_size` has, that shows not nearly one class only.

    Args:
        scaled_size: of the whole image.
        size: of the window.
        classes: class ids `(1, height, width)` of the image before resizing, if there are any.
        rng: where the corners come from.
    """
    size = min(scaled_size[0], size[0]), min(scaled_size[1], size[1])
    for _ in range(NUM_CROPS):
        corner = int(rng.integers(scaled_size[0] - size[0] + 1)), int(rng.integers(scaled_size[1] - size[1] + 1))
        window = Window(scaled_size, corner, size)
        if classes is None or largest_class_fraction(window.of_label(classes)) <= MAX_CLASS_FRACTION:
            break
    return window


def largest_class_fraction(classes: np.ndarray) -> float:
    """Part of the labelled pixels that the most frequent class covers; 0 if no pixel is labelled."""
    counts = np.bincount(classes.ravel(), minlength=IGNORE_INDEX + 1)[:IGNORE_INDEX]
    return counts.max() / max(counts.sum(), 1)


def transform_label(label: np.ndarray, kind: TaskKind, window: Window, scale: float, is_flipped: bool) -> np.ndarray:
    """Map `(channels, height, width)` -> its window, with the values that an image so scaled and mirrored has."""
    label = decode_label(window.of_label(label), kind)
    unknown = kind.unknown(label)
    label = kind.rescale(label, scale)
    if is_flipped:
        label = kind.flip(label)
    np.copyto(label, IGNORE_INDEX, where=unknown)  # into the window's own copy
    return label[..., ::-1] if is_flipped else label


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
    distances = value - pixels
    distances *= np.minimum(np.float32(factor), value / np.maximum(chroma, 1e-6))
    return np.subtract(value, distances, out=distances)


def turn_hue(pixels: np.ndarray, amount: float) -> np.ndarray:
    """Adds to HSV's hue (180 is the full circle), and keeps saturation and value."""
    red, green, blue = pixels
    value, least = pixels.max(axis=0), pixels.min(axis=0)
    chroma = value - least
    # The hue from cyan: green is at 1, red at 3 and -3, blue at -1. Where the chroma is 0, any hue will do.
    hue = red - green
    hue -= blue
    hue += least
    hue /= np.maximum(chroma, 1e-6)
    hue += 2
    np.copysign(hue, green - blue, out=hue)
    hue -= np.float32(amount / 30)
    hue -= 6 * np.rint(hue / 6)  # as `hue % 6`, which is slow
    # How much of the chroma each channel lacks: none within 1 of its own hue, all of it from 2 on.
    lacks = np.stack([2 - np.abs(hue), np.abs(hue - 1) - 1, np.abs(hue + 1) - 1])
    lacks.clip(0, 1, out=lacks)
    lacks *= chroma
    return np.subtract(value, lacks, out=lacks)
