"""What the metrics of all task kinds share."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class StreamingMetric(ABC):
    """Sums over pixels of a data set, from which the scores follow.

    Attributes:
        main: name of the score that the paper's tables show.
        higher_is_better: whether larger values of `main` are better.
        sums: name -> tensor on the CPU. Those of several metrics, added up, are the sums of all their batches.
    """

    main: str
    higher_is_better: bool

    def __init__(self, task: dict):
        """Args: task: one of `DeGMixConfig.tasks`."""
        self.num_labels = task["num_labels"]
        self.sums: dict[str, Tensor] = {}

    @abstractmethod
    def update(self, prediction: Tensor, label: Tensor):
        """Adds a batch.

        Args:
            prediction: what the kind's `activation` gives, `(batch, height, width)` or `(batch, 3, height, width)`.
            label: ground truth of the same height and width, 255 = ignored pixel.
        """

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """The scores.

        Raises:
            ValueError: no valid pixel was added.
        """

    @staticmethod
    @abstractmethod
    def best_constant(labels: Tensor) -> Tensor:
        """The prediction that does well without looking: one value, or one vector, for valid labels of any shape."""


def check_not_empty(count: Tensor, metric: StreamingMetric):
    if not count:
        raise ValueError(f"{type(metric).__name__} has seen no valid pixel")


class ThresholdedMetric(StreamingMetric):
    """Precision and recall of a probability map at many thresholds, counted over the whole data set.

    Subclasses set `thresholds` and `beta_squared`, the weight of recall in the F-measure.
    """

    thresholds: Tensor
    beta_squared: float
    higher_is_better = True

    def __init__(self, task: dict):
        super().__init__(task)
        for name in ("true_positives", "predicted"):
            self.sums[name] = torch.zeros(len(self.thresholds), dtype=torch.float64)
        for name in ("positives", "valid"):
            self.sums[name] = torch.zeros((), dtype=torch.float64)

    def update(self, prediction: Tensor, label: Tensor):
        valid = label != 255
        prediction, label = prediction[valid].float().cpu(), label[valid].cpu() > 0.5
        # Number of thresholds that each pixel exceeds; a histogram of it, summed from above, counts every threshold.
        exceeded = torch.bucketize(prediction, self.thresholds)
        bins = len(self.thresholds) + 1
        self.sums["predicted"] += _counts_above(exceeded, bins)
        self.sums["true_positives"] += _counts_above(exceeded[label], bins)
        self.sums["positives"] += label.sum()
        self.sums["valid"] += label.numel()

    def compute(self) -> dict[str, float]:
        check_not_empty(self.sums["valid"], self)
        precision = self.sums["true_positives"] / self.sums["predicted"].clamp(min=1)
        recall = self.sums["true_positives"] / self.sums["positives"].clamp(min=1)
        weighted = self.beta_squared * precision + recall
        scores = (1 + self.beta_squared) * precision * recall / weighted.clamp(min=1e-12)
        best = int(scores.argmax())
        return {self.main: float(scores[best]), "threshold": float(self.thresholds[best])}

    @staticmethod
    def best_constant(labels: Tensor) -> Tensor:
        # Any positive constant marks every pixel below its threshold: full recall, precision by chance.
        return torch.ones(())


def _counts_above(exceeded: Tensor, bins: int) -> Tensor:
    """How many pixels exceed the first, second, ... threshold."""
    histogram = torch.bincount(exceeded, minlength=bins).to(torch.float64)
    return histogram.flip(0).cumsum(0).flip(0)[1:]
