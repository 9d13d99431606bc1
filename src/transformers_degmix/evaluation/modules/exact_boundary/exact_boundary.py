"""[`ExactBoundaryMetric`] for `evaluate.load(<this directory>)`."""

from transformers_degmix.evaluation import ExactBoundaryMetric
from transformers_degmix.evaluation.modules import StreamingModule


class ExactBoundary(StreamingModule):
    def __init__(self, **kwargs):
        super().__init__(ExactBoundaryMetric({"num_labels": 1}), **kwargs)
