"""[`SaliencyMetric`] for `evaluate.load(<this directory>)`."""

from transformers_degmix.evaluation import SaliencyMetric
from transformers_degmix.evaluation.modules import StreamingModule


class Saliency(StreamingModule):
    def __init__(self, **kwargs):
        super().__init__(SaliencyMetric({"num_labels": 2}), **kwargs)
