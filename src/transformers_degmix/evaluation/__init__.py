"""Metrics of dense prediction, one per task kind.

They are streaming: they keep sums over the data set, not predictions, so that batches and their order do not matter.
"""

from .boundary import BoundaryMetric
from .depth import DepthMetric
from .normals import NormalsMetric
from .saliency import SaliencyMetric
from .segmentation import SegmentationMetric


METRICS = {
    "segmentation": SegmentationMetric,
    "saliency": SaliencyMetric,
    "depth": DepthMetric,
    "normals": NormalsMetric,
    "boundary": BoundaryMetric,
}

__all__ = ["METRICS", "BoundaryMetric", "DepthMetric", "NormalsMetric", "SaliencyMetric", "SegmentationMetric"]
