"""Whether confidence tells where predictions are wrong: calibration error, and sparsification of the errors.

Sources: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017; Ilg et al., "Uncertainty Estimates and
Multi-Hypotheses Networks for Optical Flow", ECCV 2018 (area under the sparsification error).
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..tasks import TASK_KINDS
from ..visualization.geometry import depth_normals_angles, first_of_kind
from . import METRICS
from .metric import valid_pixels


# Counts and sums of pixels are kept in so many equal bins of confidence: memory does not grow with the data set.
# Pixels in one bin count as equally confident.
BINS = 15_000
RELIABILITY_BINS = 15
REMOVED = np.arange(100) / 100


class Calibration:
    """Errors of all labelled pixels of a data set by their confidence.

    Attributes:
        sums: name -> tensor on the CPU, `(BINS,)`, as in [`StreamingMetric`]. The oracle's confidence is
            1 / (1 + error): it is as confident as the prediction is right.
    """

    def __init__(self, kind: str):
        """Args: kind: of the task, a key of `TASK_KINDS`."""
        self.kind = kind
        names = ("count", "error", "confidence", "oracle_count", "oracle_error")
        self.sums = {name: torch.zeros(BINS, dtype=torch.float64) for name in names}

    def update(self, confidence: Tensor, prediction: Tensor, label: Tensor):
        """Adds a batch.

        Args:
            confidence: `(batch, height, width)`, in [0, 1]; pixels where it is NaN are left out.
            prediction, label: as [`StreamingMetric.update`] takes them.
        """
        valid = valid_pixels(self.kind, label) & ~confidence.isnan()
        metric = METRICS[self.kind]
        errors = metric.errors(prediction, label)[valid].double().cpu()
        confidence = confidence[valid].double().cpu()
        powers = errors**metric.error_power
        self._add("count", confidence)
        self._add("error", confidence, powers)
        self._add("confidence", confidence, confidence)
        self._add("oracle_count", 1 / (1 + errors))
        self._add("oracle_error", 1 / (1 + errors), powers)

    def _add(self, name: str, confidence: Tensor, weights: Tensor | None = None):
        bins = (confidence * BINS).long().clamp(max=BINS - 1)
        self.sums[name] += torch.bincount(bins, weights, BINS)

    def sparsification(self) -> dict[str, np.ndarray]:
        """The error of the pixels that are left when the shares `REMOVED` of all pixels are removed, `(100,)`.

        `confidence`: the least confident are removed first, equally confident ones in any order. `oracle`: the worst
        are removed first. The error is a root mean square, a mean angle, or a share of wrong pixels.
        """
        return {
            "confidence": self._errors_left(self.sums["count"], self.sums["error"]),
            "oracle": self._errors_left(self.sums["oracle_count"], self.sums["oracle_error"]),
        }

    def _errors_left(self, counts: Tensor, errors: Tensor) -> np.ndarray:
        # From the most to the least confident
        num_pixels, total = (np.append(0, sums.flip(0).cumsum(0).numpy()) for sums in (counts, errors))
        left = (1 - REMOVED) * num_pixels[-1]
        means = np.interp(left, num_pixels, total) / left
        return means ** (1 / METRICS[self.kind].error_power)

    def reliability(self) -> list[dict[str, float]]:
        """The accuracy of pixels by confidence, for kinds whose confidence is a probability.

        Returns:
            For each of 15 equal bins of confidence that has pixels: `count`, mean `confidence`, and `accuracy`, the
            share of right pixels.
        """
        counts, errors, confidences = (
            self.sums[name].view(RELIABILITY_BINS, -1).sum(1) for name in ("count", "error", "confidence")
        )
        return [
            {"count": int(count), "confidence": float(confidence / count), "accuracy": float(1 - error / count)}
            for count, error, confidence in zip(counts, errors, confidences)
            if count
        ]

    def compute(self) -> dict[str, float]:
        """How well confidence orders pixels by error, and predicts how often they are right.

        - `ause`: area between the two curves of [`sparsification`], as a fraction of the error of all pixels; 0 if no
          order is better.
        - `ause_random`: the same for a random order.
        - `ece`: mean distance between confidence and accuracy over the bins of [`reliability`], weighted by pixels;
          for kinds whose confidence is a probability.

        Raises:
            ValueError: no labelled pixel was added.
        """
        total = float(self.sums["count"].sum())
        if not total:
            raise ValueError("there is no labelled pixel to compare confidence with")
        curves = self.sparsification()
        error = max(curves["oracle"][0], 1e-12)
        scores = {
            "ause": float((curves["confidence"] - curves["oracle"]).mean() / error),
            "ause_random": float((curves["oracle"][0] - curves["oracle"]).mean() / error),
        }
        if TASK_KINDS[self.kind].confidence_is_probability:
            gaps = [abs(row["confidence"] - row["accuracy"]) * row["count"] for row in self.reliability()]
            scores["ece"] = sum(gaps) / total
        return scores


def calibrate_sample(
    tasks: dict[str, dict[str, Any]],
    predictions: dict[str, Tensor],
    confidences: dict[str, Tensor],
    labels: dict[str, Tensor],
    field_of_view: float,
) -> dict[str, dict[str, Calibration]]:
    """Errors of one image by confidence, and by the agreement of depth and normals.

    Args:
        predictions, confidences: of each task, as `post_process_dense_prediction` gives them.
        labels: batches of one.
        field_of_view: see [`depth_normals_angles`].

    Returns:
        `"confidence"`: by task. `"consistency"`: by task, for the depth and the normals that are compared, if both
        exist; their confidence is 1 - angle / 180 degrees.
    """
    calibrations = build_calibrations(tasks)
    shown = {"confidence": confidences}
    angles = depth_normals_angles(predictions, tasks, field_of_view)
    if angles is not None:
        shown["consistency"] = dict.fromkeys(calibrations["consistency"], 1 - angles / 180)
    for signal, maps in shown.items():
        for name, values in maps.items():
            calibrations[signal][name].update(values[None], predictions[name][None], labels[name])
    return calibrations


def build_calibrations(tasks: dict[str, dict[str, Any]]) -> dict[str, dict[str, Calibration]]:
    """Empty calibrations, in the form that [`calibrate_sample`] returns."""
    depth, normals = (first_of_kind(tasks, kind) for kind in ("depth", "normals"))
    compared = [depth, normals] if depth and normals else []
    return {
        "confidence": {name: Calibration(task["kind"]) for name, task in tasks.items()},
        "consistency": {name: Calibration(tasks[name]["kind"]) for name in compared},
    }


def median_angle(consistency: dict[str, Calibration]) -> float:
    """Median angle in degrees between normals that follow from depth and predicted ones, over labelled pixels."""
    counts = next(iter(consistency.values())).sums["count"].cumsum(0)
    middle = torch.searchsorted(counts, counts[-1] / 2)
    return 180 * (1 - (float(middle) + 0.5) / BINS)
