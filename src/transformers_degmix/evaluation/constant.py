"""The best constant prediction, with which a model's scores must be compared."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..tasks import IGNORE_INDEX
from . import METRICS
from .metric import compute_scores


def constant_scores(
    tasks: dict[str, dict], train_batches: Iterable[dict], eval_batches: Iterable[dict]
) -> dict[str, dict[str, float]]:
    """Scores of constant predictions: majority class, median depth, mean normal, all salient, all boundary.

    Args:
        tasks: `DeGMixConfig.tasks`.
        train_batches: batches with `labels`, from which the constants are computed; all are kept in memory.
        eval_batches: batches with `labels`, on which the constants are scored.

    Returns:
        By task, then by name of the score.
    """
    train_labels = [batch["labels"] for batch in train_batches]
    metrics, constants = {}, {}
    for name, task in tasks.items():
        metrics[name] = METRICS[task["kind"]](task)
        constants[name] = metrics[name].best_constant(_valid(torch.cat([labels[name] for labels in train_labels])))
    for batch in eval_batches:
        for name, metric in metrics.items():
            label = batch["labels"][name]
            metric.update(constants[name][..., None, None].expand_as(label), label)
    return compute_scores(metrics)


def _valid(label: Tensor) -> Tensor:
    """The values of all valid pixels, `(pixels,)` or `(3, pixels)`."""
    if label.ndim == 3:
        return label[label != IGNORE_INDEX]
    vectors = label.transpose(0, 1).flatten(1)
    return vectors[:, (vectors != IGNORE_INDEX).all(dim=0)]
