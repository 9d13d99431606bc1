"""The table of task kinds: everything that depends on what a dense prediction task predicts, one row per kind.

A *task* is a name, a kind and a few numbers (see [`DeGMixConfig`]); a *kind* says what its maps mean. Configuration,
losses, image processing, augmentation and pictures look their rules up here, so that a new kind is one row, one loss
(`loss_degmix.py`) and one metric (`evaluation/`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


# Pixels with this label take no part in losses and metrics, for every kind.
IGNORE_INDEX = 255

# Anchors of the perceptually uniform "viridis" colour map, interpolated linearly.
_VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))

# Linear sRGB to the responses of the eye's cones, and their cube roots to OKLab.
_RGB_TO_LMS = (
    (0.4122214708, 0.5363325363, 0.0514459929),
    (0.2119034982, 0.6806995451, 0.1073969566),
    (0.0883024619, 0.2817188376, 0.6299787005),
)
_LMS_TO_OKLAB = (
    (0.2104542553, 0.7936177850, -0.0040720468),
    (1.9779984951, -2.4285922050, 0.4505937099),
    (0.0259040371, 0.7827717662, -0.8086757660),
)


@dataclass(frozen=True)
class TaskKind:
    """What the maps of one kind of task mean. Maps are `(..., channels, height, width)` tensors.

    Attributes:
        num_logits: channels the model predicts; `None` where the task itself says (its `num_labels`).
        label_dtype: dtype of labels, `(batch, height, width)`, or `(batch, 3, height, width)` for normals.
        label_channels: 3 for normals, else 1.
        defaults: fields a task of this kind may set, with their defaults; `loss_weight` is the paper's.
        label_padding: label of the pixels by which an image is padded.
        activation: logits `(batch, num_logits, height, width)` -> prediction, `(batch, height, width)` or
            `(batch, 3, height, width)`.
        decode: an 8-bit label image as stored in data sets -> label values, `IGNORE_INDEX` kept where the kind has it.
        unknown: label values -> boolean mask, broadcastable to them, of pixels that carry no measurement.
        flip: values of a map that was mirrored left to right.
        rescale: values of a map whose image was enlarged by a factor.
        colorize: prediction `(height, width)` or `(3, height, width)`, and the values shown as first and last
            colour -> uint8 `(3, height, width)`.
        value_range: those values by default; `None` takes them from the map.
        legend: what explains the colours: `"classes"`, `"scale"` or `"directions"`.
        unit: of the values on a scale, "" where they have none.
        thin: whether the map is of thin lines, which pictures smaller than the map must not lose.
    """

    num_logits: int | None
    label_dtype: torch.dtype
    label_channels: int
    defaults: dict[str, Any]
    label_padding: float
    activation: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    unknown: Callable[[Tensor], Tensor]
    flip: Callable[[Tensor], Tensor]
    rescale: Callable[[Tensor, float], Tensor]
    colorize: Callable[[Tensor, tuple[float, float]], Tensor]
    value_range: tuple[float, float] | None
    legend: str
    unit: str = ""
    thin: bool = False


def _unchanged(label: Tensor, *_) -> Tensor:
    return label


def _is_ignored(label: Tensor) -> Tensor:
    return label == IGNORE_INDEX


def _mirror_x(normals: Tensor) -> Tensor:
    """Negates the x component, the first of the three channels."""
    return normals * normals.new_tensor([-1.0, 1.0, 1.0]).view(3, 1, 1)


def _oklab(colors: Tensor) -> Tensor:
    """sRGB in [0, 255], `(n, 3)` -> OKLab `(n, 3)`, where distances are as the eye sees them (Ottosson 2020)."""
    colors = colors.double() / 255
    linear = torch.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    return (linear @ colors.new_tensor(_RGB_TO_LMS).T) ** (1 / 3) @ colors.new_tensor(_LMS_TO_OKLAB).T


@cache
def _class_colors() -> Tensor:
    """Slate, then always the colour farthest from all before it, without the darkest, palest and most glaring ones;
    the last one, of ignored pixels, is black. uint8 `(256, 3)`."""
    candidates = torch.cartesian_prod(*[torch.arange(0, 256, 17)] * 3)
    lightness, a, b = _oklab(candidates).T
    # Lightness counts less than hue: shading and print change it first.
    places = torch.stack([0.6 * lightness, a, b], dim=1)
    allowed = (lightness > 0.45) & (lightness < 0.88) & (torch.hypot(a, b) < 0.18)
    candidates, places = candidates[allowed], places[allowed]
    colors = [torch.tensor([102, 102, 119])]
    chosen = (candidates == colors[0]).all(dim=1).nonzero()[0, 0]
    distances = torch.full((len(places),), torch.inf, dtype=places.dtype)
    while len(colors) < IGNORE_INDEX:
        distances = torch.minimum(distances, (places - places[chosen]).norm(dim=1))
        chosen = distances.argmax()
        colors.append(candidates[chosen])
    return torch.stack([*colors, torch.zeros(3, dtype=torch.long)]).to(torch.uint8)


def label_palette(num_labels: int) -> Tensor:
    """Colours of class ids, the same whatever the number of classes: slate for class 0 (background, wall), then
    colours as different from each other as can be; black only for `IGNORE_INDEX`.

    Returns:
        uint8 tensor `(num_labels, 3)`.
    """
    return _class_colors()[:num_labels].clone()


def _color_labels(prediction: Tensor, _) -> Tensor:
    return label_palette(256)[prediction.long()].permute(2, 0, 1)


def _unit(prediction: Tensor, value_range: tuple[float, float]) -> Tensor:
    low, high = value_range
    return ((prediction.float() - low) / max(high - low, 1e-6)).clamp(0, 1)


def _color_gray(prediction: Tensor, value_range: tuple[float, float]) -> Tensor:
    return (_unit(prediction, value_range) * 255).round().to(torch.uint8).expand(3, *prediction.shape)


def _color_viridis(prediction: Tensor, value_range: tuple[float, float]) -> Tensor:
    anchors = torch.tensor(_VIRIDIS, dtype=torch.float32)
    position = _unit(prediction, value_range) * (len(anchors) - 1)
    left = position.long().clamp(max=len(anchors) - 2)
    color = torch.lerp(anchors[left], anchors[left + 1], (position - left).unsqueeze(-1))
    return color.round().to(torch.uint8).permute(2, 0, 1)


def _color_normals(prediction: Tensor, value_range: tuple[float, float]) -> Tensor:
    return (_unit(prediction, value_range) * 255).round().to(torch.uint8)


TASK_KINDS: dict[str, TaskKind] = {
    # class ids: int64, argmax over the classes
    "segmentation": TaskKind(
        num_logits=None,
        label_dtype=torch.int64,
        label_channels=1,
        defaults={"loss_weight": 1.0, "id2label": None},
        label_padding=IGNORE_INDEX,
        activation=lambda logits: logits.argmax(dim=1),
        decode=_unchanged,
        unknown=_is_ignored,
        flip=_unchanged,
        rescale=_unchanged,
        colorize=_color_labels,
        value_range=(0, 255),
        legend="classes",
    ),
    # 0 background, 1 salient; predicted as the probability of 1
    "saliency": TaskKind(
        num_logits=2,
        label_dtype=torch.int64,
        label_channels=1,
        defaults={"loss_weight": 5.0},
        label_padding=IGNORE_INDEX,
        activation=lambda logits: logits.softmax(dim=1)[:, 1],
        decode=_unchanged,
        unknown=_is_ignored,
        flip=_unchanged,
        rescale=_unchanged,
        colorize=_color_gray,
        value_range=(0, 1),
        legend="scale",
    ),
    # metres along the optical axis; 0 is unknown. An image enlarged twice shows what would be seen from half as far.
    "depth": TaskKind(
        num_logits=1,
        label_dtype=torch.float32,
        label_channels=1,
        defaults={"loss_weight": 1.0},
        label_padding=0.0,
        activation=lambda logits: logits[:, 0].clamp(min=0),
        decode=lambda image: image.float(),
        unknown=lambda depth: (depth == 0) | (depth == IGNORE_INDEX),
        flip=_unchanged,
        rescale=lambda depth, scale: depth / scale,
        colorize=_color_viridis,
        value_range=None,
        legend="scale",
        unit="m",
    ),
    # unit vectors in the camera frame; 8-bit images hold (n + 1) / 2 * 255; zero vectors are unknown
    "normals": TaskKind(
        num_logits=3,
        label_dtype=torch.float32,
        label_channels=3,
        defaults={"loss_weight": 10.0},
        label_padding=0.0,
        activation=lambda logits: F.normalize(logits, dim=1),
        decode=lambda image: 2 * image.float() / 255 - 1,
        unknown=lambda normals: (
            (normals == 0).all(dim=-3, keepdim=True) | (normals == IGNORE_INDEX).any(dim=-3, keepdim=True)
        ),
        flip=_mirror_x,
        rescale=_unchanged,
        colorize=_color_normals,
        value_range=(-1, 1),
        legend="directions",
    ),
    # boundary strength in [0, 1]; 8-bit images hold it times 255
    "boundary": TaskKind(
        num_logits=1,
        label_dtype=torch.float32,
        label_channels=1,
        defaults={"loss_weight": 50.0, "pos_weight": 0.95},
        label_padding=IGNORE_INDEX,
        activation=lambda logits: logits[:, 0].sigmoid(),
        decode=lambda image: image.float() / 255,
        unknown=_is_ignored,
        flip=_unchanged,
        rescale=_unchanged,
        colorize=_color_gray,
        value_range=(0, 1),
        legend="scale",
        thin=True,
    ),
}
