"""Saliency: the largest F-measure over thresholds."""

import torch

from .metric import ThresholdedMetric


class SaliencyMetric(ThresholdedMetric):
    """maxF: beta^2 = 0.3, thresholds 0.05, 0.10, ..., 0.95, counts summed over the data set."""

    kind = "saliency"
    main = "max_f"
    column = ("maxF %", 100, 2)
    thresholds = torch.linspace(0.05, 0.95, 19)
    beta_squared = 0.3
