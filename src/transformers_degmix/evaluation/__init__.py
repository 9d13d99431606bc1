"""Metrics of dense prediction, one per task kind.

They are streaming: they keep sums over the data set, not predictions, so that batches and their order do not matter.
`modules` has them for `evaluate.load`.
"""

from .boundary import BoundaryMetric, ExactBoundaryMetric
from .depth import DepthMetric
from .normals import NormalsMetric
from .saliency import SaliencyMetric
from .segmentation import SegmentationMetric


# By task kind, quick enough to evaluate with during training. [`BoundaryMetric`], the benchmark, takes longer.
METRICS = {
    metric.kind: metric
    for metric in (SegmentationMetric, SaliencyMetric, DepthMetric, NormalsMetric, ExactBoundaryMetric)
}

__all__ = [
    "METRICS",
    "BoundaryMetric",
    "DepthMetric",
    "ExactBoundaryMetric",
    "NormalsMetric",
    "SaliencyMetric",
    "SegmentationMetric",
]
