"""One map -> a picture in colours, as the kind of its task says."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..images_degmix import resize_nearest
from ..tasks import TASK_KINDS
from .layout import to_image


ValueRange = tuple[float, float]

HATCHING = ((44, 44, 48), (104, 104, 110))

# Degrees between the normals of depth and the predicted ones; larger angles have the last colour.
CONSISTENCY_RANGE = (0.0, 60.0)


def shown_range(task: dict[str, Any], *maps: Tensor) -> ValueRange:
    """Values shown as first and last colour, as the task's kind says.

    If the kind leaves them to the maps (depth), they are the 2nd and 98th percentile of all known pixels. A few
    outliers then do not use up the colours.

    Args:
        task: the task's fields, as in `config.tasks`.
        maps: predictions and references `(height, width)` that are to be compared by their colours.
    """
    kind = TASK_KINDS[task["kind"]]
    if kind.value_range is not None:
        return kind.value_range
    known = torch.cat([values[~kind.unknown(values)].float().cpu() for values in maps]).numpy()
    if not known.size:
        return 0.0, 1.0
    # NumPy's, because torch.quantile refuses more than 2 ** 24 values.
    low, high = np.quantile(known, [0.02, 0.98])
    return float(low), float(high)


def draw_prediction(
    prediction: Tensor,
    task: dict[str, Any],
    value_range: ValueRange | None = None,
    size: tuple[int, int] | None = None,
) -> Image.Image:
    """Colours one map by the kind of its task; unknown pixels (ignored, without depth or normal) are hatched.

    Args:
        prediction: class ids, metres, strengths or probabilities `(height, width)`, or unit vectors
            `(3, height, width)`. References are drawn in the same way.
        task: the task's fields, as in `config.tasks`.
        value_range: values shown as first and last colour, by default [`shown_range`] of this map.
        size: (height, width) of the picture, by default the map's. Pixels are picked, not mixed, so that every colour
            is a value of the map; of thin lines, the strongest pixel is picked.

    Raises:
        ValueError: the map does not have the shape of its task's kind.
    """
    kind = TASK_KINDS[task["kind"]]
    channels = () if kind.label_channels == 1 else (kind.label_channels,)
    if prediction.ndim != len(channels) + 2 or prediction.shape[:-2] != channels:
        expected = ", ".join([*map(str, channels), "height", "width"])
        raise ValueError(f"a {task['kind']} map must have the shape ({expected}), got {tuple(prediction.shape)}")
    prediction = prediction.detach().cpu()
    if value_range is None:
        value_range = shown_range(task, prediction)
    unknown = kind.unknown(prediction)
    prediction = prediction.masked_fill(unknown, 0)
    if size is not None:
        prediction = _resize_lines(prediction, size) if kind.thin else resize_nearest(prediction, size)
        unknown = resize_nearest(unknown, size)
    colors = kind.colorize(prediction, value_range)
    return to_image(torch.where(unknown, hatching(colors.shape[-2:]), colors))


def draw_consistency(angles: Tensor, size: tuple[int, int] | None = None) -> Image.Image:
    """Colours angles of [`depth_normals_angles`], `(height, width)`, from 0 to 60 degrees; NaN is hatched.

    Args:
        size: (height, width) of the picture, by default the map's.
    """
    return draw_scale(angles, CONSISTENCY_RANGE, size)


def draw_confidence(confidence: Tensor, task: dict[str, Any], size: tuple[int, int] | None = None) -> Image.Image:
    """Colours a confidence `(height, width)` by [`confidence_range`].

    Args:
        task: the task's fields, as in `config.tasks`.
        size: (height, width) of the picture, by default the map's.
    """
    return draw_scale(confidence, confidence_range(confidence, task), size)


def confidence_range(confidence: Tensor, task: dict[str, Any]) -> ValueRange:
    """Confidences shown as first and last colour.

    They are 0 and 1 for probabilities. Where confidences only order pixels, they are the 2nd and the 98th percentile.
    """
    if TASK_KINDS[task["kind"]].confidence_is_probability:
        return 0.0, 1.0
    low, high = np.quantile(confidence.float().cpu().numpy(), [0.02, 0.98])
    return float(low), float(high)


def _resize_lines(values: Tensor, size: tuple[int, int]) -> Tensor:
    """As `resize_nearest`, but shrinking keeps the largest of the values that become one pixel."""
    smaller = [min(old, new) for old, new in zip(values.shape, size)]
    return resize_nearest(F.adaptive_max_pool2d(values[None].float(), smaller)[0], size)


def hatching(size: Sequence[int]) -> Tensor:
    """uint8 `(3, *size)`, diagonal stripes."""
    rows, columns = torch.meshgrid(*map(torch.arange, size), indexing="ij")
    stripes = ((rows + columns) % 8 < 4).long()
    return torch.tensor(HATCHING, dtype=torch.uint8)[stripes].permute(2, 0, 1)


def draw_scale(values: Tensor, value_range: ValueRange, size: tuple[int, int] | None) -> Image.Image:
    """In the colours of depth; NaN is hatched."""
    values = values.detach().cpu()
    if size is not None:
        values = resize_nearest(values, size)
    colors = TASK_KINDS["depth"].colorize(values.nan_to_num(0), value_range)
    return to_image(torch.where(values.isnan(), hatching(colors.shape[-2:]), colors))
