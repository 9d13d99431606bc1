"""[`NormalsMetric`] for `evaluate.load(<this directory>)`."""

from transformers_degmix.evaluation import NormalsMetric
from transformers_degmix.evaluation.modules import StreamingModule


class Normals(StreamingModule):
    def __init__(self, **kwargs):
        super().__init__(NormalsMetric({"num_labels": 1}), **kwargs)
