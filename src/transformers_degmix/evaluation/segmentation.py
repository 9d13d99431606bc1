"""Segmentation: mean intersection over union."""

import torch
from torch import Tensor

from .metric import StreamingMetric, check_not_empty


class SegmentationMetric(StreamingMetric):
    """Scores of classes from one confusion matrix of the whole data set, all in [0, 1].

    - `mean_iou`: intersection over union, mean over the classes that labels or predictions contain.
    - `mean_accuracy`: share of a class's pixels that are found, mean over the classes that labels contain.
    - `pixel_accuracy`: share of all pixels that are right.
    """

    kind = "segmentation"
    main = "mean_iou"
    column = ("mIoU %", 100, 2)
    higher_is_better = True
    error_name = "share of wrong pixels"

    def __init__(self, task: dict):
        super().__init__(task)
        self.value_range = (0, self.num_labels - 1)
        # rows: true class, columns: predicted class
        self.sums["confusion"] = torch.zeros(self.num_labels, self.num_labels, dtype=torch.int64)

    def _add(self, prediction: Tensor, label: Tensor, valid: Tensor):
        pairs = label[valid].long() * self.num_labels + prediction[valid].long()
        counts = torch.bincount(pairs, minlength=self.num_labels**2).cpu()
        self.sums["confusion"] += counts.view(self.num_labels, self.num_labels)

    def compute(self) -> dict[str, float]:
        matrix = self.sums["confusion"].double()
        check_not_empty(matrix.sum(), self)
        hits, pixels = matrix.diagonal(), matrix.sum(1)
        iou = self.per_class_iou().values()
        return {
            "mean_iou": sum(iou) / len(iou),
            "mean_accuracy": float((hits / pixels)[pixels > 0].mean()),
            "pixel_accuracy": float(hits.sum() / matrix.sum()),
        }

    def per_class_iou(self) -> dict[int, float]:
        """Class id -> intersection over union, for the classes that labels or predictions contain."""
        matrix = self.sums["confusion"].double()
        union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
        iou = (matrix.diagonal() / union).tolist()
        return {index: iou[index] for index in union.nonzero().flatten().tolist()}

    @staticmethod
    def errors(prediction: Tensor, label: Tensor) -> Tensor:
        return prediction != label
