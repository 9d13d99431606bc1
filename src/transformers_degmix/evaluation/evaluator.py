"""Scores of a model on labelled batches."""

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm

from ..tasks import TASK_KINDS
from . import METRICS


@torch.no_grad()
def evaluate_model(
    model: nn.Module, batches: Iterable[dict], tasks: dict[str, dict], accelerator: Accelerator
) -> tuple[float, dict[str, dict[str, float]]]:
    """Mean loss of the batches, and the scores of each task over all of their pixels.

    Args:
        model: a `DeGMixForMultiTaskDensePrediction`, as `accelerator.prepare` returned it; left in eval mode.
        batches: batches with `pixel_values` and `labels`, from a loader that `accelerator.prepare` returned.
        tasks: `DeGMixConfig.tasks`.
        accelerator: gathers the predictions of all processes, each sample once.
    """
    model.eval()
    metrics = {name: METRICS[task["kind"]](task) for name, task in tasks.items()}
    losses = []
    for batch in tqdm(batches, desc="evaluate", leave=False, disable=not accelerator.is_local_main_process):
        outputs = model(**batch)
        losses.append(accelerator.reduce(outputs.loss, "mean").item())
        for name, metric in metrics.items():
            prediction = TASK_KINDS[tasks[name]["kind"]].activation(outputs.logits[name].float())
            metric.update(*accelerator.gather_for_metrics((prediction, batch["labels"][name])))
    return sum(losses) / len(losses), {name: metric.compute() for name, metric in metrics.items()}


def format_main_scores(scores: dict[str, dict[str, float]], tasks: dict[str, dict]) -> str:
    """One line with each task's score of the paper's tables."""
    names = {task: METRICS[fields["kind"]].main for task, fields in tasks.items()}
    return "  ".join(f"{task} {name} {scores[task][name]:.4f}" for task, name in names.items())
