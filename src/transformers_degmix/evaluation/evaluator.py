"""Scores of a model during training, the gain over single-task models, and tables of scores."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from tqdm.auto import tqdm

from ..loss_degmix import count_pixels
from ..modeling_degmix import DeGMixForMultiTaskDensePrediction
from ..tasks import TASK_KINDS
from . import METRICS
from .metric import StreamingMetric, compute_scores, finite_logits


Scores = dict[str, float]


def sum_over_processes(sums: Any, accelerator: Accelerator) -> Any:
    """The sum over all processes of a tensor on the CPU, or of each tensor in a dictionary, on the CPU too."""
    if accelerator.num_processes == 1:  # whose device may not have float64
        return sums
    return send_to_device(accelerator.reduce(send_to_device(sums, accelerator.device), "sum"), "cpu")


@torch.no_grad()
def evaluate_model(
    model: DeGMixForMultiTaskDensePrediction, batches: Iterable[dict], tasks: dict[str, dict], accelerator: Accelerator
) -> tuple[dict[str, float], dict[str, Scores]]:
    """The loss and the scores of each task that has labels, over all pixels of the data set.

    Neither depends on how the samples are put into batches, except for the loss of saliency: each batch has its own
    class weights.

    Args:
        model: a `DeGMixForMultiTaskDensePrediction` on the accelerator's device; left in eval mode. Not the one that
            `accelerator.prepare` returned: it exchanges buffers, and processes can have different numbers of batches.
        batches: this process's part of the batches, with `pixel_values` and `labels`.
        tasks: `DeGMixConfig.tasks`, or only the tasks that the batches have labels for.
        accelerator: sums over the processes.
    """
    model.eval()
    metrics = {name: METRICS[task["kind"]](task) for name, task in tasks.items()}
    total = torch.zeros(2, len(tasks), dtype=torch.float64)  # sums of errors, valid pixels
    for batch in tqdm(batches, desc="evaluate", leave=False, disable=not accelerator.is_local_main_process):
        batch = send_to_device(batch, accelerator.device)
        with accelerator.autocast():
            outputs = model(**batch)
        pixels = count_pixels(batch["labels"])
        counts = torch.stack([pixels[name][0] for name in tasks]).cpu().double()
        losses = torch.stack([outputs.losses[name] for name in tasks]).cpu()
        total += torch.stack([counts * losses, counts])
        for name, metric in metrics.items():
            prediction = TASK_KINDS[tasks[name]["kind"]].activation(finite_logits(outputs.logits[name], name))
            metric.update(prediction, batch["labels"][name])

    for metric in metrics.values():
        metric.sums = sum_over_processes(metric.sums, accelerator)
    errors, counts = sum_over_processes(total, accelerator).tolist()
    means = {name: error / count for name, error, count in zip(tasks, errors, counts) if count}
    return means, compute_scores(metrics)


def mean_over_sources(values: Iterable[dict[str, float]]) -> dict[str, float]:
    """The mean of each entry over the dictionaries that have it."""
    collected: dict[str, list[float]] = {}
    for each in values:
        for name, value in each.items():
            collected.setdefault(name, []).append(value)
    return {name: sum(several) / len(several) for name, several in collected.items()}


def multi_task_gain(
    scores: dict[str, Scores],
    single_task_scores: dict[str, float],
    tasks: dict[str, dict],
    metrics: Mapping[str, type[StreamingMetric]] = METRICS,
) -> float:
    """The improvement over single-task models in percent of their scores, mean over the tasks that have scores.

    Args:
        scores: by task and name of the score.
        single_task_scores: task -> main score of a model for that task alone.
        tasks: `DeGMixConfig.tasks`.
        metrics: by task kind; their `main` is the main score.
    """
    gains = []
    for name in scores:
        metric = metrics[tasks[name]["kind"]]
        gain = scores[name][metric.main] / single_task_scores[name] - 1
        gains.append(gain if metric.higher_is_better else -gain)
    return 100 * sum(gains) / max(1, len(gains))


def main_cells(scores: dict[str, Scores], tasks: dict[str, dict]) -> dict[str, str]:
    """Task and name of its main score -> this score, "-" where it has none."""
    names = {task: METRICS[fields["kind"]].main for task, fields in tasks.items()}
    return {f"{task} {name}": f"{scores[task][name]:.4f}" if task in scores else "-" for task, name in names.items()}


def format_main_scores(scores: dict[str, Scores], tasks: dict[str, dict]) -> str:
    """One line with the main score of each task, "-" where it has none."""
    return "  ".join(f"{title} {score}" for title, score in main_cells(scores, tasks).items())


def format_source_table(source_scores: dict[str, dict[str, Scores]], tasks: dict[str, dict]) -> str:
    """A Markdown table of sources and the main scores of tasks, "-" where there is none."""
    rows = [[source, *main_cells(scores, tasks).values()] for source, scores in source_scores.items()]
    return markdown_table([["source", *main_cells({}, tasks)], *rows])


def markdown_table(rows: list[list[str]]) -> str:
    """The lines of a Markdown table, whose titles are the first row."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)
