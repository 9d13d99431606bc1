"""What the metrics of all task kinds share."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers.utils import logging

from ..tasks import TASK_KINDS


logger = logging.get_logger(__name__)


class StreamingMetric(ABC):
    """Sums over pixels of a data set, from which the scores follow.

    Attributes:
        kind: key of `TASK_KINDS`.
        main: name of the score that the paper's tables show.
        higher_is_better: whether larger values of `main` are better.
        column: how tables show `main`: heading, factor, decimals.
        error_name: what [`errors`] are, and their unit.
        error_power: errors of pixels are averaged as the root of the mean of this power.
        value_range: smallest and largest value of predictions and labels.
        sums: name -> tensor on the CPU. The sums of several metrics add up to the sums of all their batches.
    """

    kind: str
    main: str
    higher_is_better: bool
    column: tuple[str, int, int]
    error_name: str
    error_power: int = 1
    value_range: tuple[float, float] = (0, 1)

    def __init__(self, task: dict):
        """Args: task: one of `DeGMixConfig.tasks`."""
        self.num_labels = task["num_labels"]
        self.sums: dict[str, Tensor] = {}

    def update(self, prediction: Tensor, label: Tensor):
        """Adds a batch.

        Args:
            prediction: what the kind's `activation` gives, `(batch, height, width)` or `(batch, 3, height, width)`.
            label: ground truth of the same shape. 255 = ignored pixel; so are depth 0 and the zero vector.

        Raises:
            ValueError: the shapes are not these, or a pixel that is not ignored has a value that is NaN, infinite or
                outside of `value_range`. Nothing of the batch is added then.
        """
        name, kind = type(self).__name__, TASK_KINDS[self.kind]
        channels = [kind.label_channels] if kind.label_channels > 1 else []
        if not prediction.shape == label.shape == (len(label), *channels, *label.shape[-2:]):
            expected = ", ".join(["batch", *map(str, channels), "height", "width"])
            raise ValueError(
                f"{name} takes predictions and labels of one shape ({expected}), "
                f"got {tuple(prediction.shape)} and {tuple(label.shape)}"
            )
        valid = ~kind.unknown(label)
        low, high = self.value_range
        for role, values in (("predictions", prediction), ("labels", label)):
            wrong = valid & ~(values.isfinite() & (values >= low) & (values <= high))
            if wrong.any():
                raise ValueError(
                    f"{name} takes finite {role} from {low:g} to {high:g}, got {values[wrong][0].item():g}"
                )
        self._add(prediction, label, valid)

    @abstractmethod
    def _add(self, prediction: Tensor, label: Tensor, valid: Tensor):
        """Adds a checked batch. `valid` is a mask of the label's shape, with 1 channel instead of 3."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """The scores.

        Raises:
            NoValidPixelError: no valid pixel was added.
        """

    @staticmethod
    @abstractmethod
    def errors(prediction: Tensor, label: Tensor) -> Tensor:
        """The error of each pixel, `(batch, height, width)`, for maps as [`update`] takes them.

        For classes, it is 1 (wrong) or 0 (right). Where there is no label, the value has no meaning.
        """


def valid_pixels(kind: str, label: Tensor) -> Tensor:
    """Mask `(batch, height, width)` of the labelled pixels of a batch."""
    return ~TASK_KINDS[kind].unknown(label).view(len(label), *label.shape[-2:])


def finite_logits(logits: Tensor, task: str) -> Tensor:
    """The logits as float32. They are checked because an argmax hides NaN.

    Raises:
        ValueError: a value is NaN or infinite; the message names the task.
    """
    if not logits.isfinite().all():
        raise ValueError(f"the logits of {task!r} are not finite")
    return logits.float()


class NoValidPixelError(ValueError):
    """A metric has seen no pixel with a label."""


def check_not_empty(count: Tensor, metric: StreamingMetric):
    if not count:
        raise NoValidPixelError(f"{type(metric).__name__} has seen no valid pixel")


def compute_scores(metrics: Mapping[str, StreamingMetric]) -> dict[str, dict[str, float]]:
    """The scores of the tasks that had a valid pixel. The others are left out, and a warning says so once."""
    scores = {}
    for name, metric in metrics.items():
        try:
            scores[name] = metric.compute()
        except NoValidPixelError:
            logger.warning_once(f"the task {name!r} has no valid label in this split: it is left out of the scores")
    return scores


class ThresholdedMetric(StreamingMetric):
    """Precision and recall of a probability map at many thresholds, counted over the whole data set.

    Subclasses set `thresholds` and `beta_squared`, the weight of recall in the F-measure.
    """

    thresholds: Tensor
    beta_squared: float
    higher_is_better = True
    error_name = "share of wrong pixels"

    def __init__(self, task: dict):
        super().__init__(task)
        for name in ("true_positives", "predicted"):
            self.sums[name] = torch.zeros(len(self.thresholds), dtype=torch.float64)
        for name in ("positives", "valid"):
            self.sums[name] = torch.zeros((), dtype=torch.float64)

    def _add(self, prediction: Tensor, label: Tensor, valid: Tensor):
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
        precision, recall = self.precision_recall()
        weighted = self.beta_squared * precision + recall
        scores = (1 + self.beta_squared) * precision * recall / weighted.clamp(min=1e-12)
        best = int(scores.argmax())
        return {self.main: float(scores[best]), "threshold": float(self.thresholds[best])}

    def precision_recall(self) -> tuple[Tensor, Tensor]:
        """At each threshold. Predicting nothing has a precision of 1."""
        hits, predicted = self.sums["true_positives"], self.sums["predicted"]
        precision = torch.where(predicted > 0, hits / predicted.clamp(min=1), 1.0)
        return precision, hits / self.sums["positives"].clamp(min=1)

    @staticmethod
    def errors(prediction: Tensor, label: Tensor) -> Tensor:
        return (prediction > 0.5) != (label > 0.5)


def _counts_above(exceeded: Tensor, bins: int) -> Tensor:
    """How many pixels exceed the first, second, ... threshold."""
    histogram = torch.bincount(exceeded, minlength=bins).to(torch.float64)
    return histogram.flip(0).cumsum(0).flip(0)[1:]
