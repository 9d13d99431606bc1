"""The best constant prediction, with which a model's scores must be compared."""

from collections.abc import Iterable

import torch

from . import METRICS
from .metric import compute_scores, valid_pixels


def constant_scores(
    tasks: dict[str, dict], train_batches: Iterable[dict], eval_batches: Iterable[dict]
) -> dict[str, dict[str, float]]:
    """Scores of constant predictions: majority class, median depth, mean normal, all salient, all boundary.

    Args:
        tasks: `DeGMixConfig.tasks`.
        train_batches: batches with `labels`, from which the constants are computed; all are kept in memory.
        eval_batches: batches with `labels`, on which the constants are scored.

    Returns:
        By task, then by name of the score. Tasks that have no label in either are left out.
    """
    train_labels = [batch["labels"] for batch in train_batches]
    metrics, constants = {}, {}
    for name, task in tasks.items():
        labels = torch.cat([maps[name] for maps in train_labels])
        valid = valid_pixels(task["kind"], labels)
        if valid.any():
            metrics[name] = METRICS[task["kind"]](task)
            values = labels[valid] if labels.ndim == 3 else labels.transpose(0, 1)[:, valid]
            constants[name] = metrics[name].best_constant(values)
    for batch in eval_batches:
        for name, metric in metrics.items():
            label = batch["labels"][name]
            metric.update(constants[name][..., None, None].expand_as(label), label)
    return compute_scores(metrics)
