"""The metrics as modules that `evaluate.load` takes by their path.

```python
import evaluate
from transformers_degmix.evaluation import modules

metric = evaluate.load(f"{modules.__path__[0]}/segmentation", num_labels=40)
metric.add_batch(predictions=predictions, references=labels)
metric.compute()  # {"mean_iou": ..., ...}
```
"""

from abc import ABC, abstractmethod
from copy import copy

import datasets
import evaluate
import torch

from ..metric import StreamingMetric


# `evaluate.load` takes the first class of a script that is not abstract, so this one must be, where scripts import it.
class StreamingModule(evaluate.Metric, ABC):
    """An `evaluate.Metric` that keeps the sums of a [`StreamingMetric`], not predictions.

    Evaluate merges what processes have written to its cache as predictions. Here that is one row of sums per process,
    written by `compute`, where processes wait for each other for `timeout` seconds. As with every `evaluate.Metric`,
    they need a `process_id` each, `num_process`, and an `experiment_id` of its own for each module of one name.
    """

    @abstractmethod
    def __init__(self, metric: StreamingMetric, **kwargs):
        """A module around a metric.

        Args:
            metric: keeps the sums.
            kwargs: of `evaluate.Metric`.
        """
        self.metric = metric
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MetricInfo:
        sums = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=type(self.metric).__doc__,
            citation="",
            features=datasets.Features({"predictions": sums, "references": sums}),
        )

    def add_batch(self, *, predictions, references):
        """Adds images, which need not be of one size.

        Args:
            predictions, references: predictions and labels as [`StreamingMetric.update`] takes them: a batch as one
                array or tensor, or a list of images.

        Raises:
            ValueError: their numbers differ, or the metric refuses an image; those before it are added.
        """
        if len(predictions) != len(references):
            raise ValueError(f"got {len(predictions)} predictions and {len(references)} references")
        for prediction, reference in zip(predictions, references):
            self.add(prediction=prediction, reference=reference)

    def add(self, *, prediction, reference):
        """Adds an image: a prediction and a label as in [`add_batch`], without the dimension of the batch."""
        self.metric.update(torch.as_tensor(prediction)[None], torch.as_tensor(reference)[None])

    def compute(self, *, predictions=None, references=None) -> dict[str, float] | None:
        """The scores of everything that was added, by all processes, which is forgotten then.

        Args:
            predictions, references: added before, if given.

        Returns:
            What the metric computes; `None` but for the process 0.

        Raises:
            ValueError: no valid pixel was added.
        """
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references)
        sums = torch.cat([total.double().flatten() for total in self.metric.sums.values()])
        super().add(prediction=sums.numpy(), reference=[])
        merged = super().compute()
        self.metric.sums = {name: torch.zeros_like(total) for name, total in self.metric.sums.items()}
        return None if merged is None else self._scores(merged)

    def _compute(self, predictions: list[list[float]], references: list[list]) -> StreamingMetric:
        merged = copy(self.metric)
        shares = torch.tensor(predictions, dtype=torch.float64).sum(0)
        shares = shares.split([total.numel() for total in self.metric.sums.values()])
        merged.sums = {
            name: share.view_as(total).to(total.dtype)
            for (name, total), share in zip(self.metric.sums.items(), shares)
        }
        return merged

    def _scores(self, metric: StreamingMetric) -> dict:
        return metric.compute()
