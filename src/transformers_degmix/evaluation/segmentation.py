"""Segmentation: mean intersection over union."""

import torch
from torch import Tensor

from .metric import StreamingMetric, check_not_empty


class SegmentationMetric(StreamingMetric):
    """Intersection over union per class from one confusion matrix of the whole data set.

    Classes that neither labels nor predictions contain take no part in the mean.
    """

    main = "mean_iou"
    higher_is_better = True

    def __init__(self, task: dict):
        super().__init__(task)
        # rows: true class, columns: predicted class
        self.sums["confusion"] = torch.zeros(self.num_labels, self.num_labels, dtype=torch.int64)

    def update(self, prediction: Tensor, label: Tensor):
        valid = label != 255
        pairs = label[valid].long() * self.num_labels + prediction[valid].long()
        counts = torch.bincount(pairs, minlength=self.num_labels**2).cpu()
        self.sums["confusion"] += counts.view(self.num_labels, self.num_labels)

    def compute(self) -> dict[str, float]:
        matrix = self.sums["confusion"].double()
        check_not_empty(matrix.sum(), self)
        hits = matrix.diagonal()
        union = matrix.sum(0) + matrix.sum(1) - hits
        iou = hits[union > 0] / union[union > 0]
        return {"mean_iou": float(iou.mean()), "pixel_accuracy": float(hits.sum() / matrix.sum())}

    @staticmethod
    def best_constant(labels: Tensor) -> Tensor:
        """The most frequent class."""
        return labels.flatten().mode().values
