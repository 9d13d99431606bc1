"""The metrics as a module that `evaluate.load` takes by its path.

```python
import evaluate
from transformers_degmix.evaluation import evaluate_module

metric = evaluate.load(evaluate_module.__file__, "segmentation", num_labels=40)
metric.add_batch(predictions=predictions, references=labels)
metric.compute()  # {"mean_iou": ..., ...}
```
"""

from copy import copy
from typing import Any

import datasets
import evaluate
import torch

# Absolute, because `evaluate.load` copies this file.
from transformers_degmix.evaluation import BENCHMARK_METRICS, METRICS, SegmentationMetric
from transformers_degmix.evaluation.metric import StreamingMetric


CONFIGURATIONS = {**BENCHMARK_METRICS, "exact_boundary": METRICS["boundary"]}


class DensePredictionMetric(evaluate.Metric):
    """An `evaluate.Metric` that keeps the sums of a [`StreamingMetric`], not predictions.

    Evaluate merges the predictions that processes write to its cache. Here, `compute` writes one row of sums per
    process instead, and waits for the other processes for up to `timeout` seconds. As with every `evaluate.Metric`,
    each process needs `num_process` and its own `process_id`, and metrics of one name need different `experiment_id`s.

    Args:
        config_name: a task kind, for the metric of the benchmarks, or `"exact_boundary"`.
        num_labels: classes of a segmentation.
        tolerance: of `"boundary"`, see [`BoundaryMetric`].
        kwargs: of `evaluate.Metric`.

    Raises:
        ValueError: there is no such metric, it needs `num_labels`, or it takes no `tolerance`.
    """

    def __init__(
        self, config_name: str | None = None, num_labels: int | None = None, tolerance: float | None = None, **kwargs
    ):
        if config_name not in CONFIGURATIONS:
            raise ValueError(f"`config_name` must be one of {list(CONFIGURATIONS)}, got {config_name!r}")
        if config_name == "segmentation" and (num_labels is None or num_labels < 1):
            raise ValueError(f"`num_labels` must be the number of classes, got {num_labels}")
        if tolerance is not None and config_name != "boundary":
            raise ValueError(f"`tolerance` is for 'boundary', not for {config_name!r}")
        options = {} if tolerance is None else {"tolerance": tolerance}
        self.metric = CONFIGURATIONS[config_name]({"num_labels": num_labels}, **options)
        super().__init__(config_name=config_name, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        sums = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=type(self.metric).__doc__,
            citation="",
            features=datasets.Features({"predictions": sums, "references": sums}),
        )

    def add_batch(self, *, predictions, references):
        """Adds images, which can have different sizes.

        Args:
            predictions, references: predictions and labels as [`StreamingMetric.update`] takes them: a batch as one
                array or tensor, or a list of images.

        Raises:
            ValueError: their numbers differ, or the metric refuses an image; the images before it have been added.
        """
        if len(predictions) != len(references):
            raise ValueError(f"got {len(predictions)} predictions and {len(references)} references")
        for prediction, reference in zip(predictions, references):
            self.add(prediction=prediction, reference=reference)

    def add(self, *, prediction, reference):
        """Adds an image: a prediction and a label as in [`add_batch`], without the dimension of the batch."""
        self.metric.update(torch.as_tensor(prediction)[None], torch.as_tensor(reference)[None])

    def compute(self, *, predictions=None, references=None) -> dict[str, Any] | None:
        """The scores of everything that all processes have added. The metric is empty afterwards.

        Args:
            predictions, references: added before, if given.

        Returns:
            What the metric computes; `None` except in process 0.

        Raises:
            ValueError: no valid pixel was added.
        """
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references)
        sums = torch.cat([total.double().flatten() for total in self.metric.sums.values()])
        super().add(prediction=sums.numpy(), reference=[])
        merged = super().compute()
        self.metric.sums = {name: torch.zeros_like(total) for name, total in self.metric.sums.items()}
        if isinstance(merged, SegmentationMetric):
            return {**merged.compute(), "per_class_iou": merged.per_class_iou()}
        return None if merged is None else merged.compute()

    def _compute(self, predictions: list[list[float]], references: list[list]) -> StreamingMetric:
        merged = copy(self.metric)
        shares = torch.tensor(predictions, dtype=torch.float64).sum(0)
        shares = shares.split([total.numel() for total in self.metric.sums.values()])
        merged.sums = {
            name: share.view_as(total).to(total.dtype)
            for (name, total), share in zip(self.metric.sums.items(), shares)
        }
        return merged
