"""[`DepthMetric`] for `evaluate.load(<this directory>)`."""

from transformers_degmix.evaluation import DepthMetric
from transformers_degmix.evaluation.modules import StreamingModule


class Depth(StreamingModule):
    def __init__(self, **kwargs):
        super().__init__(DepthMetric({"num_labels": 1}), **kwargs)
