"""Scores of a model on labelled batches."""

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn
from tqdm.auto import tqdm

from ..loss_degmix import count_pixels
from ..tasks import TASK_KINDS
from . import METRICS


@torch.no_grad()
def evaluate_model(
    model: nn.Module, batches: Iterable[dict], tasks: dict[str, dict], accelerator: Accelerator
) -> tuple[float, dict[str, dict[str, float]]]:
    """The loss, and the scores of each task, over all pixels of the data set.

    Neither depends on how the samples are put into batches, but for the class weights in the loss of saliency, which
    are those of each batch.

    Args:
        model: a `DeGMixForMultiTaskDensePrediction` on the accelerator's device; left in eval mode. Not the one that
            `accelerator.prepare` returned: it exchanges buffers, and processes may have different numbers of batches.
        batches: this process's part of the batches, with `pixel_values` and `labels`.
        tasks: `DeGMixConfig.tasks`.
        accelerator: sums over the processes.
    """
    model.eval()
    metrics = {name: METRICS[task["kind"]](task) for name, task in tasks.items()}
    total = torch.zeros(2, len(tasks), dtype=torch.float64)  # sums of errors, valid pixels
    for batch in tqdm(batches, desc="evaluate", leave=False, disable=not accelerator.is_local_main_process):
        batch = send_to_device(batch, accelerator.device)
        with accelerator.autocast():
            outputs = model(**batch)
        counts = torch.stack([count[0] for count in count_pixels(batch["labels"]).values()]).double()
        total += torch.stack([counts * torch.stack(list(outputs.losses.values())), counts]).cpu()
        for name, metric in metrics.items():
            prediction = TASK_KINDS[tasks[name]["kind"]].activation(outputs.logits[name].float())
            metric.update(prediction, batch["labels"][name])

    def over_processes(sums):
        return send_to_device(accelerator.reduce(send_to_device(sums, accelerator.device), "sum"), "cpu")

    for metric in metrics.values():
        metric.sums = over_processes(metric.sums)
    errors, counts = over_processes(total)
    return float((errors / counts).sum()), {name: metric.compute() for name, metric in metrics.items()}


def multi_task_gain(
    scores: dict[str, dict[str, float]], single_task_scores: dict[str, float], tasks: dict[str, dict]
) -> float:
    """How much better than single-task models, in percent of their scores, mean over the tasks.

    Args:
        scores: by task and name of the score.
        single_task_scores: task -> what a model for it alone reaches in the score of the paper's tables.
        tasks: `DeGMixConfig.tasks`.
    """
    gains = []
    for name, task in tasks.items():
        metric = METRICS[task["kind"]]
        gain = scores[name][metric.main] / single_task_scores[name] - 1
        gains.append(gain if metric.higher_is_better else -gain)
    return 100 * sum(gains) / len(gains)


def format_main_scores(scores: dict[str, dict[str, float]], tasks: dict[str, dict]) -> str:
    """One line with each task's score of the paper's tables."""
    names = {task: METRICS[fields["kind"]].main for task, fields in tasks.items()}
    return "  ".join(f"{task} {name} {scores[task][name]:.4f}" for task, name in names.items())
