"""Losses of DeGMix: one per task kind, and their weighted sum.

Sums and counts run over the whole batch and leave out pixels labelled 255. A batch without a valid pixel for a task
gives that task a loss of 0 that still has a graph.

A batch may come in parts, to several processes or one after the other. If they are given the counts of the whole batch
([`count_pixels`], summed over the parts), their losses add up to the loss of the whole batch.
"""

from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .tasks import IGNORE_INDEX, TASK_KINDS


# Gradients grow with one over the length of the predicted vector. A new head predicts 0 where its features are 0.
# PyTorch's default is 1e-12.
SHORTEST_NORMAL = 1e-3
# In metres. Below it, the logarithm of depth is linear, which bounds the gradient.
SHORTEST_DEPTH = 0.1
# Distances in pixels over which gradients of depth are compared.
GRADIENT_STEPS = (1, 2, 4, 8, 16)


def count_pixels(labels: dict[str, Tensor]) -> dict[str, Tensor]:
    """Per task an int64 tensor `(2,)`: how many pixels are valid, and how many of them have the label 0.

    Args:
        labels: as for [`multi_task_loss`]. A pixel is valid if none of its channels is 255.
    """
    counts = {}
    for name, label in labels.items():
        label = label.unsqueeze(1) if label.ndim == 3 else label
        counts[name] = torch.stack([(label != IGNORE_INDEX).all(dim=1).sum(), (label == 0).all(dim=1).sum()])
    return counts


def multi_task_loss(
    logits: dict[str, Tensor],
    labels: dict[str, Tensor],
    tasks: dict[str, dict[str, Any]],
    pixel_counts: dict[str, Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the losses of the tasks that have labels.

    Args:
        logits: `(batch, num_labels, height, width)` per task.
        labels: per task `(batch, height, width)` or `(batch, 1, height, width)`; `(batch, 3, height, width)` for
            normals.
        tasks: `DeGMixConfig.tasks`.
        pixel_counts: [`count_pixels`] of the whole batch, if `labels` are part of one.

    Returns:
        The sum, and each task's loss times its weight, in the order of `tasks`.

    Raises:
        ValueError: no labels, labels of an unknown task, or of another size than the logits.
    """
    unknown = sorted(set(labels) - set(tasks))
    if unknown or not labels:
        raise ValueError(f"`labels` must be of some of the tasks {list(tasks)}, got {sorted(labels)}")
    if pixel_counts is None:
        pixel_counts = count_pixels(labels)
    losses = {}
    for name, task in tasks.items():
        if name in labels:
            kind = TASK_KINDS[task["kind"]]
            # Sums over pixels overflow in half precision.
            task_logits = logits[name].to(torch.promote_types(logits[name].dtype, torch.float32))
            label = _with_channels(name, labels[name], task_logits, kind.label_channels)
            dtype = kind.label_dtype if kind.has_class_ids else task_logits.dtype
            losses[name] = task["loss_weight"] * LOSSES[task["kind"]](
                task_logits, label.to(dtype), task, pixel_counts[name]
            )
    return sum(losses.values()), losses


def _with_channels(name: str, label: Tensor, logits: Tensor, channels: int) -> Tensor:
    if label.ndim == 3:
        label = label.unsqueeze(1)
    expected = (logits.shape[0], channels, *logits.shape[-2:])
    if label.shape != expected:
        raise ValueError(f"`labels[{name!r}]` must have the shape {expected} of the images, got {tuple(label.shape)}")
    return label


def cross_entropy_loss(logits: Tensor, label: Tensor, task: dict[str, Any], counts: Tensor) -> Tensor:
    """Segmentation: cross-entropy, mean over the valid pixels."""
    total = F.cross_entropy(logits, label.squeeze(1), ignore_index=IGNORE_INDEX, reduction="sum")
    return total / counts[0].clamp(min=1)


def balanced_cross_entropy_loss(logits: Tensor, label: Tensor, task: dict[str, Any], counts: Tensor) -> Tensor:
    """Saliency: two-class cross-entropy, each class weighted by the other's share of the batch, mean over pixels."""
    valid, background = counts
    positive_weight = background / valid.clamp(min=1)
    class_weights = torch.stack((1 - positive_weight, positive_weight)).to(logits.dtype)
    total = F.cross_entropy(logits, label.squeeze(1), class_weights, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / valid.clamp(min=1)


def depth_loss(logits: Tensor, label: Tensor, task: dict[str, Any], counts: Tensor) -> Tensor:
    """Depth: absolute error, mean over the valid pixels (released code).

    With `log_loss`, logarithms of depth are compared. With `gradient_weight`, a loss of gradients is added: the
    absolute difference between the errors of two pixels, for all pairs in a row or a column whose distance is one of
    `GRADIENT_STEPS`. (Li and Snavely 2018 subsample maps instead.)
    """
    valid = label != IGNORE_INDEX
    if task["log_loss"]:
        logits, label = _log_metres(logits), _log_metres(label)
    errors = torch.where(valid, logits - label, 0)
    total = errors.abs().sum()
    if task["gradient_weight"]:
        for step, dim in product(GRADIENT_STEPS, (-2, -1)):
            first, second = _slice_pairs(errors, step, dim)
            both_valid = torch.logical_and(*_slice_pairs(valid, step, dim))
            total = total + task["gradient_weight"] * torch.where(both_valid, (second - first).abs(), 0).sum()
    return total / counts[0].clamp(min=1)


def _log_metres(depth: Tensor) -> Tensor:
    """The logarithm; below `SHORTEST_DEPTH` its tangent, so that predictions of any value have a gradient."""
    near = depth.clamp(min=SHORTEST_DEPTH)
    return near.log() + (depth - near) / SHORTEST_DEPTH


def _slice_pairs(maps: Tensor, step: int, dim: int) -> tuple[Tensor, Tensor]:
    """The first and the second pixels of all pairs that are `step` apart; none if the map is not longer."""
    length = max(0, maps.shape[dim] - step)
    return maps.narrow(dim, 0, length), maps.narrow(dim, maps.shape[dim] - length, length)


def normalized_l1_loss(logits: Tensor, label: Tensor, task: dict[str, Any], counts: Tensor) -> Tensor:
    """Normals: absolute error of the unit vectors, summed over components, mean over the valid pixels.

    Predictions shorter than `SHORTEST_NORMAL` are divided by it instead of their length.
    """
    valid = (label != IGNORE_INDEX).all(dim=1, keepdim=True)
    normals = F.normalize(logits, dim=1, eps=SHORTEST_NORMAL)
    return torch.where(valid, (normals - label).abs(), 0).sum() / counts[0].clamp(min=1)


def balanced_binary_cross_entropy_loss(logits: Tensor, label: Tensor, task: dict[str, Any], counts: Tensor) -> Tensor:
    """Boundaries: binary cross-entropy, `pos_weight` on boundary pixels and `1 - pos_weight` on others, mean.

    Labels between 0 and 1 take part in both terms.
    """
    weight = task["pos_weight"]
    valid = label != IGNORE_INDEX
    errors = (1 - weight) * F.binary_cross_entropy_with_logits(
        logits, label, reduction="none", pos_weight=logits.new_tensor(weight / (1 - weight))
    )
    return torch.where(valid, errors, 0).sum() / counts[0].clamp(min=1)


LOSSES = {
    "segmentation": cross_entropy_loss,
    "saliency": balanced_cross_entropy_loss,
    "depth": depth_loss,
    "normals": normalized_l1_loss,
    "boundary": balanced_binary_cross_entropy_loss,
}
