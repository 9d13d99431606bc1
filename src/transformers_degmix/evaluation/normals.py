"""Surface normals: angular error."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .metric import StreamingMetric, check_not_empty


BINS_PER_DEGREE = 100


def angular_errors(prediction: Tensor, label: Tensor) -> Tensor:
    """Angles in degrees between vectors of any length, `(batch, 3, height, width)` -> `(batch, height, width)`."""
    # Labels stored in 8 bits do not have exactly length 1.
    return F.cosine_similarity(prediction.double(), label.double(), dim=1).clamp(-1, 1).acos().rad2deg()


class NormalsMetric(StreamingMetric):
    """Angles between predicted and true normals, over all valid pixels of the data set.

    - `mean_angle`, `rmse_angle`: mean, and root of the mean square, in degrees.
    - `median_angle`: from a histogram of the angles rounded to 0.01 degrees: at most half of that off.
    - `within_11.25`, `within_22.5`, `within_30`: share of pixels with smaller angles, in degrees.
    """

    kind = "normals"
    main = "mean_angle"
    column = ("mean error °", 1, 2)
    higher_is_better = False
    error_name = "error in degrees"
    value_range = (-math.inf, math.inf)
    within = (11.25, 22.5, 30.0)

    def __init__(self, task: dict):
        super().__init__(task)
        for name in ("angles", "squared"):
            self.sums[name] = torch.zeros((), dtype=torch.float64)
        self.sums["within"] = torch.zeros(len(self.within), dtype=torch.float64)
        self.sums["histogram"] = torch.zeros(180 * BINS_PER_DEGREE + 1, dtype=torch.int64)

    def _add(self, prediction: Tensor, label: Tensor, valid: Tensor):
        angles = angular_errors(prediction.cpu(), label.cpu())[valid[:, 0].cpu()]
        self.sums["angles"] += angles.sum()
        self.sums["squared"] += (angles**2).sum()
        self.sums["within"] += torch.stack([(angles < limit).sum() for limit in self.within])
        bins = (angles * BINS_PER_DEGREE).round().long()
        self.sums["histogram"] += torch.bincount(bins, minlength=len(self.sums["histogram"]))

    def compute(self) -> dict[str, float]:
        valid = self.sums["histogram"].sum()
        check_not_empty(valid, self)
        middle = torch.stack([(valid - 1) // 2, valid // 2])
        median = torch.searchsorted(self.sums["histogram"].cumsum(0), middle, right=True).double().mean()
        shares = (self.sums["within"] / valid).tolist()
        return {
            "mean_angle": float(self.sums["angles"] / valid),
            "median_angle": float(median / BINS_PER_DEGREE),
            "rmse_angle": float((self.sums["squared"] / valid) ** 0.5),
            **{f"within_{limit:g}": share for limit, share in zip(self.within, shares)},
        }

    @staticmethod
    def errors(prediction: Tensor, label: Tensor) -> Tensor:
        return angular_errors(prediction, label)
