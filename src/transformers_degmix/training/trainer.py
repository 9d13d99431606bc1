"""For Transformers' own `Trainer`: metrics that keep no more than a batch in memory, and augmentation by epoch."""

from typing import Any

import torch
from transformers import EvalPrediction, TrainerCallback

from ..data.collator import DeGMixDataCollator
from ..evaluation import METRICS
from ..evaluation.metric import compute_scores, finite_logits
from ..tasks import TASK_KINDS


class DenseMetrics:
    """The `compute_metrics` of a `Trainer`: the scores of all tasks over the data set.

    With `batch_eval_metrics=True` in its arguments, the trainer passes one batch at a time, and only sums are kept.
    Otherwise, it first collects the logits of the whole data set.

    Args:
        tasks: `DeGMixConfig.tasks`.
    """

    def __init__(self, tasks: dict[str, dict[str, Any]]):
        self.tasks = tasks
        self._reset()

    def _reset(self):
        self.metrics = {name: METRICS[task["kind"]](task) for name, task in self.tasks.items()}

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Adds a batch.

        Args:
            prediction: `predictions` are logits and `label_ids` labels, each by task.
            compute_result: whether this was the last batch.

        Returns:
            `<task>_<score>` -> value over all batches since the last result, for tasks with a label. Empty before the
            last batch.
        """
        for name, metric in self.metrics.items():
            if name not in prediction.label_ids:
                continue
            logits = finite_logits(torch.as_tensor(prediction.predictions[name]), name)
            activation = TASK_KINDS[self.tasks[name]["kind"]].activation
            metric.update(activation(logits), torch.as_tensor(prediction.label_ids[name]))
        if not compute_result:
            return {}
        scores = {
            f"{task}_{name}": score
            for task, scores in compute_scores(self.metrics).items()
            for name, score in scores.items()
        }
        self._reset()
        return scores


class AugmentedDataset(torch.utils.data.Dataset):
    """Augmented samples for training. The collator of a `Trainer` must not augment: it also serves evaluation.

    Args:
        rows: a data set with the columns `image` and one per task, of known length.
        collator: with augmentation.
    """

    def __init__(self, rows, collator: DeGMixDataCollator):
        self.rows = rows
        self.collator = collator

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`pixel_values` `(3, height, width)` and `labels` by task, which [`DeGMixDataCollator`] puts together."""
        batch = self.collator([self.rows[index]])
        return {"pixel_values": batch["pixel_values"][0], "labels": {k: v[0] for k, v in batch["labels"].items()}}


class SetEpochCallback(TrainerCallback):
    """Sets the epoch of an augmented data set, so that each epoch is augmented differently."""

    def __init__(self, dataset: AugmentedDataset):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        # A fraction after resuming within an epoch.
        self.dataset.collator.set_epoch(int(state.epoch))
