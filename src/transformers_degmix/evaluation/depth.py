"""Depth: errors and accuracies in metres and as ratios."""

import math

import torch
from torch import Tensor

from .metric import StreamingMetric, check_not_empty


class DepthMetric(StreamingMetric):
    """Means over all valid pixels of the data set, of predictions p and labels l in metres.

    - `rmse`: root of the mean of (p - l)^2, in metres.
    - `abs_rel`, `sq_rel`: |p - l| / l, and (p - l)^2 / l in metres.
    - `rmse_log`: root of the mean of (ln p - ln l)^2.
    - `delta1`, `delta2`, `delta3`: share of pixels with max(p / l, l / p) below 1.25, 1.25^2, 1.25^3.

    Predictions may be 0: for `rmse_log` and `delta*`, depths below 1 mm, of labels too, count as 1 mm.
    """

    kind = "depth"
    main = "rmse"
    column = ("RMSE m", 1, 4)
    higher_is_better = False
    error_name = "error in metres"
    error_power = 2
    value_range = (0, math.inf)

    def __init__(self, task: dict):
        super().__init__(task)
        for name in ("squared", "abs_rel", "sq_rel", "squared_log", "delta1", "delta2", "delta3", "valid"):
            self.sums[name] = torch.zeros((), dtype=torch.float64)

    def _add(self, prediction: Tensor, label: Tensor, valid: Tensor):
        prediction, label = prediction[valid].double().cpu(), label[valid].double().cpu()
        error = prediction - label
        self.sums["squared"] += (error**2).sum()
        self.sums["abs_rel"] += (error.abs() / label).sum()
        self.sums["sq_rel"] += (error**2 / label).sum()
        prediction, label = prediction.clamp(min=1e-3), label.clamp(min=1e-3)
        self.sums["squared_log"] += ((prediction / label).log() ** 2).sum()
        ratio = torch.maximum(prediction / label, label / prediction)
        for power in (1, 2, 3):
            self.sums[f"delta{power}"] += (ratio < 1.25**power).sum()
        self.sums["valid"] += label.numel()

    def compute(self) -> dict[str, float]:
        check_not_empty(self.sums["valid"], self)
        means = {name: float(total / self.sums["valid"]) for name, total in self.sums.items()}
        return {
            "rmse": means["squared"] ** 0.5,
            "rmse_log": means["squared_log"] ** 0.5,
            **{name: means[name] for name in ("abs_rel", "sq_rel", "delta1", "delta2", "delta3")},
        }

    @staticmethod
    def errors(prediction: Tensor, label: Tensor) -> Tensor:
        return (prediction - label).abs()

    @staticmethod
    def best_constant(labels: Tensor) -> Tensor:
        """The median depth."""
        return labels.flatten().median()
