"""Boundaries: F-measure of pixels that match exactly."""

import torch

from .metric import ThresholdedMetric


class BoundaryMetric(ThresholdedMetric):
    """The best F-measure over 99 thresholds when boundary pixels must coincide with the true ones.

    Stricter than the BSDS benchmark's odsF, which thins predictions and allows a tolerance: not comparable with it.
    """

    main = "exact_f"
    thresholds = torch.linspace(0.01, 0.99, 99)
    beta_squared = 1.0
