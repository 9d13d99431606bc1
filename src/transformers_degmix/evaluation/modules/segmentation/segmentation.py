"""[`SegmentationMetric`] for `evaluate.load(<this directory>, num_labels=<number of classes>)`."""

from transformers_degmix.evaluation import SegmentationMetric
from transformers_degmix.evaluation.modules import StreamingModule


class Segmentation(StreamingModule):
    def __init__(self, num_labels: int, **kwargs):
        super().__init__(SegmentationMetric({"num_labels": num_labels}), **kwargs)

    def _scores(self, metric: SegmentationMetric) -> dict:  # type: ignore[override]
        return {**metric.compute(), "per_class_iou": metric.per_class_iou()}
