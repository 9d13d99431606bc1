"""Depth: errors and accuracies in metres and as ratios."""

import math

import numpy as np
import torch
from torch import Tensor

from ..tasks import TASK_KINDS
from .metric import StreamingMetric, check_not_empty


# (top, bottom, left, right) of the scored region, as fractions of the image, rounded down. `eigen` and `garg` are for
# KITTI. In the 480 x 640 pixels of NYU Depth V2, `eigen` is the region where Eigen et al. project depth.
_CROPS = {
    "eigen": (0.3324324, 0.91351351, 0.0359477, 0.96405229),
    "garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),
}
_NYUD_SIZE, _NYUD_CROP = (480, 640), (slice(45, 471), slice(41, 601))

DEPTH_CROPS = tuple(_CROPS)


def crop_depth(depth: Tensor, crop: str | None, max_depth: float | None) -> Tensor:
    """Labels `(batch, height, width)`, unknown where a protocol does not score them.

    Args:
        crop: `"eigen"` (Eigen et al., 2014) or `"garg"` (Garg et al., 2016), for the outdoor images of KITTI and
            images of the same aspect. For images of 480 x 640, `"eigen"` is the region in use for NYU Depth V2.
        max_depth: metres; labels of this depth or more become unknown.
    """
    rows = columns = slice(None)
    if crop == "eigen" and depth.shape[-2:] == _NYUD_SIZE:
        rows, columns = _NYUD_CROP
    elif crop:
        height, width = depth.shape[-2:]
        top, bottom, left, right = _CROPS[crop]
        rows, columns = slice(int(top * height), int(bottom * height)), slice(int(left * width), int(right * width))
    scored = torch.zeros_like(depth)
    scored[..., rows, columns] = depth[..., rows, columns]
    return torch.where(scored < max_depth, scored, 0) if max_depth else scored


def adapt_depth(prediction: Tensor, label: Tensor, median_scaling: bool, max_depth: float | None) -> Tensor:
    """Predictions `(batch, height, width)` as a protocol scores them.

    Args:
        label: of the same shape, unknown where it is not scored.
        median_scaling: whether each prediction is scaled so that its median over scored pixels equals the label's.
        max_depth: metres; predictions are clamped to the range from 1 mm to this.
    """
    if median_scaling:
        scored = ~TASK_KINDS["depth"].unknown(label)
        medians = [
            (np.median(true[s]), max(np.median(found[s]), 1e-3)) if s.any() else (1, 1)
            for true, found, s in zip(*(maps.double().numpy() for maps in (label, prediction)), scored.numpy())
        ]
        prediction = prediction * torch.tensor([true / found for true, found in medians]).view(-1, 1, 1).float()
    return prediction.clamp(1e-3, max_depth) if max_depth else prediction


class DepthMetric(StreamingMetric):
    """Means over all valid pixels of the data set, of predictions p and labels l in metres.

    - `rmse`: root of the mean of (p - l)^2, in metres.
    - `abs_rel`, `sq_rel`: |p - l| / l, and (p - l)^2 / l in metres.
    - `rmse_log`: root of the mean of (ln p - ln l)^2.
    - `delta1`, `delta2`, `delta3`: share of pixels with max(p / l, l / p) below 1.25, 1.25^2, 1.25^3.

    Predictions can be 0. For `rmse_log` and `delta*`, predicted and true depths below 1 mm count as 1 mm.
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
        prediction, label = prediction[valid].cpu().double(), label[valid].cpu().double()
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
