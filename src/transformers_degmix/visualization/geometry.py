"""What depth says about surface normals, through a pinhole camera whose field of view is known or assumed."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..tasks import TASK_KINDS


# Across the longer side, in degrees. The camera of a photo is unknown; phones and depth cameras have 57 to 70.
FIELD_OF_VIEW = 60.0

# Differences of depth are taken over the longer side divided by this, because predicted depth has less detail than
# pixels. The heads' maps are a quarter of the images' size; models were trained on images of 128 to 560 pixels.
CONSISTENCY_STEPS = 32


def viewing_rays(size: Sequence[int], field_of_view: float = FIELD_OF_VIEW) -> Tensor:
    """X / z and y / z of the point that each pixel shows, with x to the right, y down and z the depth.

    Args:
        size: (height, width).
        field_of_view: across the longer side, in degrees; the optical axis goes through the image's centre.

    Returns:
        float32 `(2, height, width)`.

    Raises:
        ValueError: the field of view is not between 0 and 180 degrees.
    """
    focal = _focal_length(size, field_of_view)
    y, x = torch.meshgrid(*[(torch.arange(length) - (length - 1) / 2) / focal for length in size], indexing="ij")
    return torch.stack([x, y])


def _focal_length(size: Sequence[int], field_of_view: float) -> float:
    """In pixels."""
    if not 0 < field_of_view < 180:
        raise ValueError(f"`field_of_view` must be between 0 and 180 degrees, got {field_of_view}")
    return max(size) / 2 / math.tan(math.radians(field_of_view / 2))


def normals_from_depth(depth: Tensor, field_of_view: float = FIELD_OF_VIEW, step: int = 1) -> Tensor:
    """Normals of the surface that a depth map shows, exact on planes.

    A plane's inverse depth is linear in the image, so that its differences give the normal. Of the differences to
    the pixels on both sides, the smaller one counts: at an edge, a pixel takes the normal of the surface it lies on.

    Args:
        depth: metres along the optical axis, `(..., height, width)`, of any floating dtype; unknown where not above 0.
        field_of_view: see [`viewing_rays`].
        step: distance of the compared pixels. A larger step shows less of the noise and of the details.

    Returns:
        float32 `(..., 3, height, width)`, unit vectors with x to the right, y down and z towards the camera, as in
        the kind `"normals"`; zero vectors where they are unknown.
    """
    depth = depth.float()
    inverse = torch.where(depth > 0, 1 / depth, torch.nan)
    size = depth.shape[-2:]
    x, y = viewing_rays(size, field_of_view).to(depth.device)
    focal = _focal_length(size, field_of_view)
    across, down = (focal * _smaller_differences(inverse, dim, step) for dim in (-1, -2))
    normals = torch.stack([-across, -down, inverse - x * across - y * down], dim=-3)
    # Where one component is unknown, so is the last.
    return F.normalize(normals.where(~normals[..., 2:, :, :].isnan(), 0), dim=-3)


def _smaller_differences(values: Tensor, dim: int, step: int) -> Tensor:
    """Per pixel, the smaller difference to the pixels `step` before and after; NaN where neither is known."""
    length = values.shape[dim]
    margins = [step, step] if dim == -1 else [0, 0, step, step]
    padded = F.pad(values, margins, value=torch.nan)
    backward = (values - padded.narrow(dim, 0, length)) / step
    forward = (padded.narrow(dim, 2 * step, length) - values) / step
    return torch.where((forward.abs() <= backward.abs()) | backward.isnan(), forward, backward)


def first_of_kind(tasks: dict[str, dict[str, Any]], kind: str) -> str | None:
    """The name of the first task of a kind."""
    return next((name for name, task in tasks.items() if task["kind"] == kind), None)


def depth_normals_angles(
    predictions: dict[str, Tensor], tasks: dict[str, dict[str, Any]], field_of_view: float = FIELD_OF_VIEW
) -> Tensor | None:
    """Angles between the predicted normals and the normals of the predicted depth: 0 where the tasks agree.

    Differences of depth are taken over a 32nd of the longer side, see [`normals_from_depth`].

    Args:
        predictions: maps of one image, at least of the first task of kind depth and the first of kind normals.
        tasks: `config.tasks`, or some of them.
        field_of_view: see [`viewing_rays`].

    Returns:
        Degrees `(height, width)`, float32, NaN where a normal is unknown; `None` without one of the two tasks.
    """
    depth_task, normals_task = (first_of_kind(tasks, kind) for kind in ("depth", "normals"))
    if depth_task is None or normals_task is None:
        return None
    depth, normals = predictions[depth_task], F.normalize(predictions[normals_task].float(), dim=0)
    depth = depth.masked_fill(TASK_KINDS["depth"].unknown(depth), 0)
    derived = normals_from_depth(depth, field_of_view, max(1, round(max(depth.shape) / CONSISTENCY_STEPS)))
    # Not from the cosine, whose rounding alone makes angles of 0.02 degrees.
    angles = 2 * torch.atan2((derived - normals).norm(dim=0), (derived + normals).norm(dim=0)).rad2deg()
    is_unknown = TASK_KINDS["normals"].unknown
    unknown = is_unknown(derived) | is_unknown(predictions[normals_task])
    return angles.masked_fill(unknown[0], torch.nan)
