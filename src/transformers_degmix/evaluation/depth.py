"""Depth: root mean squared error."""

import torch
from torch import Tensor

from .metric import StreamingMetric, check_not_empty


class DepthMetric(StreamingMetric):
    """Errors in metres over all valid pixels of the data set."""

    main = "rmse"
    higher_is_better = False

    def __init__(self, task: dict):
        super().__init__(task)
        for name in ("squared", "relative", "valid"):
            self.sums[name] = torch.zeros((), dtype=torch.float64)

    def update(self, prediction: Tensor, label: Tensor):
        valid = label != 255
        prediction, label = prediction[valid].double().cpu(), label[valid].double().cpu()
        self.sums["squared"] += ((prediction - label) ** 2).sum()
        self.sums["relative"] += ((prediction - label).abs() / label).sum()
        self.sums["valid"] += label.numel()

    def compute(self) -> dict[str, float]:
        squared, relative, valid = self.sums.values()
        check_not_empty(valid, self)
        return {"rmse": float((squared / valid) ** 0.5), "abs_rel": float(relative / valid)}

    @staticmethod
    def best_constant(labels: Tensor) -> Tensor:
        """The median depth."""
        return labels.flatten().median()
