"""Metrics of dense prediction, one per task kind.

They are streaming: they keep sums over the data set, not predictions, so that batches and their order do not matter.
`evaluate_module` makes them available to `evaluate.load`.
"""

from .boundary import BoundaryMetric, ExactBoundaryMetric
from .depth import DepthMetric
from .normals import NormalsMetric
from .saliency import SaliencyMetric
from .segmentation import SegmentationMetric


# By task kind. They are quick enough for evaluation during training, by our loop and by `Trainer`. [`BoundaryMetric`],
# the benchmark, would take minutes for the images of NYUD-v2.
METRICS = {
    metric.kind: metric
    for metric in (SegmentationMetric, SaliencyMetric, DepthMetric, NormalsMetric, ExactBoundaryMetric)
}

# The metrics of the paper's tables, for reports: the same classes except for boundaries.
BENCHMARK_METRICS = {**METRICS, "boundary": BoundaryMetric}

__all__ = [
    "BENCHMARK_METRICS",
    "METRICS",
    "BoundaryMetric",
    "DepthMetric",
    "ExactBoundaryMetric",
    "NormalsMetric",
    "SaliencyMetric",
    "SegmentationMetric",
]
