"""What the labels of a data set look like in numbers, and what looks wrong about them though it can be read."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..tasks import TASK_KINDS


# No indoor or street scene is this far away at the median; in millimetres, all are.
FARTHEST_MEDIAN = 100
# What 8 bits per component leave of length 1 is within 0.01.
LENGTH_TOLERANCE = 0.05


def summarize(labels: list[Tensor | None], task: dict[str, Any]) -> list[str]:
    """Lines about a task: how much is labelled, and the share of each class or the distribution of the values.

    Args:
        labels: per sample a map `(height, width)`, or `(3, height, width)` for normals, or `None`.
        task: its fields, as in `DeGMixConfig.tasks`; `num_labels` may be missing.
    """
    kind = TASK_KINDS[task["kind"]]
    maps = [label for label in labels if label is not None]
    lines = [f"labelled: {len(maps)} of {len(labels)} samples"]
    if not maps:
        return lines
    known = torch.cat([known_values(label, task) for label in maps], dim=-1)
    num_pixels = sum(label.shape[-2] * label.shape[-1] for label in maps)
    lines[0] += f", {known.shape[-1] / num_pixels:.1%} of their pixels"
    if not known.numel():
        return lines
    if kind.label_dtype.is_floating_point:
        return [*lines, _describe_distribution(known, kind.unit)]
    return lines + _describe_classes(known, task)


def find_suspicions(label: Tensor, task: dict[str, Any]) -> dict[str, str]:
    """What looks wrong about a map: the suspicion -> what it is based on.

    Args:
        label: `(height, width)`, or `(3, height, width)` for normals.
        task: its fields, as in `DeGMixConfig.tasks`.
    """
    kind, known = TASK_KINDS[task["kind"]], known_values(label, task)
    if not known.numel():
        return {"nothing is labelled": "every pixel has a value that stands for unknown"}
    found = {}
    if kind.unit == "m" and known.median() > FARTHEST_MEDIAN:
        found["not in metres? (`scale: 0.001` for millimetres)"] = f"the median is {known.median():.6g}"
    if kind.label_channels > 1:
        lengths = torch.linalg.vector_norm(known, dim=0)
        if (lengths - 1).abs().median() > LENGTH_TOLERANCE:
            found["vectors are not of length 1"] = f"their median length is {lengths.median():.4g}"
    return found


def known_values(label: Tensor, task: dict[str, Any]) -> Tensor:
    """The values that are not unknown: `(n,)`, or `(3, n)` for normals."""
    unknown = TASK_KINDS[task["kind"]].unknown(label)
    return label[..., ~unknown.reshape(label.shape[-2:])]


def _describe_distribution(known: Tensor, unit: str) -> str:
    """Of values `(n,)`, or of the lengths of vectors `(3, n)`."""
    name, values = ("value", known) if known.ndim == 1 else ("length", torch.linalg.vector_norm(known, dim=0))
    # NumPy's, since torch.quantile refuses more than 2 ** 24 values.
    numbers = np.quantile(values.numpy(), [0, 0.01, 0.5, 0.99, 1])
    titles = ("min", "1%", "median", "99%", "max")
    return f"{name}: " + ", ".join(f"{title} {number:.4g} {unit}".rstrip() for title, number in zip(titles, numbers))


def _describe_classes(known: Tensor, task: dict[str, Any]) -> list[str]:
    """A line per class that occurs, and how many do not."""
    names = task.get("id2label") or {}
    ids, counts = (values.tolist() for values in known.unique(return_counts=True))
    lines = [
        f"{index:4}  {count / len(known):6.1%}  {names.get(index, '')}".rstrip() for index, count in zip(ids, counts)
    ]
    absent = sorted(set(range(task.get("num_labels") or 0)) - set(ids))
    if absent:
        lines.append(f"classes that do not occur: {', '.join(str(names.get(index, index)) for index in absent)}")
    return lines
