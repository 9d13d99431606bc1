"""[`BoundaryMetric`] for `evaluate.load(<this directory>, tolerance=<fraction of the diagonal>)`."""

from transformers_degmix.evaluation import BoundaryMetric
from transformers_degmix.evaluation.modules import StreamingModule


class Boundary(StreamingModule):
    def __init__(self, tolerance: float, **kwargs):
        super().__init__(BoundaryMetric({"num_labels": 1}, tolerance), **kwargs)
