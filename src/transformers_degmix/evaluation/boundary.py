"""Boundaries: the BSDS benchmark, and a cheaper F-measure of pixels that coincide."""

import numpy as np
import torch
from scipy.ndimage import convolve1d, map_coordinates
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow
from scipy.spatial import KDTree
from skimage.morphology import thin
from torch import Tensor

from .metric import StreamingMetric, ThresholdedMetric, check_not_empty


THRESHOLDS = np.arange(1, 100) / 100
# Row n has the first n bits set: the thresholds that a pixel reaches, two words for 99 bits.
PLANES = np.packbits(np.tri(len(THRESHOLDS) + 1, 128, -1, dtype=np.uint8), axis=1).view(np.uint64)


class ExactBoundaryMetric(ThresholdedMetric):
    """The best F-measure over 99 thresholds when boundary pixels must coincide with the true ones.

    It is stricter than [`BoundaryMetric`], which thins predictions and allows a tolerance; the two are not comparable.
    It is quick enough for evaluation during training.
    """

    kind = "boundary"
    main = "exact_f"
    column = ("exact F %", 100, 2)
    thresholds = torch.from_numpy(THRESHOLDS).float()
    beta_squared = 1.0


class BoundaryMetric(StreamingMetric):
    """The BSDS boundary benchmark, as the SEISM toolbox runs it on NYUD-v2 and PASCAL-Context.

    Predictions are thinned to their ridges, and at each of 99 thresholds (0.01 to 0.99) again to lines one pixel wide.
    Predicted and true pixels are then matched one to one within a tolerance ([`boundary_counts`] has the details).
    Scores, all in [0, 1]:

    - `ods_f`: F-measure at the best threshold for the whole data set (optimal data set scale), from summed counts.
    - `ois_f`: F-measure with the best threshold of each image (optimal image scale), from summed counts.
    - `ap`: average precision over recalls 0, 0.01, ..., 1; recalls outside the curve's range add nothing.
    - `r50`: the largest recall at a threshold with at least 50% precision.
    - `threshold`: the one with the score `ods_f`.

    The toolbox differs in three details: predictions pass through 8-bit images, there are two more thresholds (0.001
    and 0.999), and the true boundary is drawn around the regions of the label. Here, the label is the boundary.

    Sources: Martin et al., "Learning to Detect Natural Image Boundaries Using Local Brightness, Color, and Texture
    Cues", PAMI 2004; Pont-Tuset and Marques, "Supervised Evaluation of Image Segmentation and Object Proposal
    Techniques", PAMI 2016, with https://github.com/jponttuset/seism (read_one_cont_png, eval_cont, general_*).
    """

    kind = "boundary"
    main = "ods_f"
    column = ("odsF %", 100, 2)
    higher_is_better = True
    error_name = ExactBoundaryMetric.error_name
    errors = staticmethod(ExactBoundaryMetric.errors)
    thresholds = THRESHOLDS

    def __init__(self, task: dict, tolerance: float = 0.0075):
        """The metric of a task.

        Args:
            task: one of `DeGMixConfig.tasks`.
            tolerance: largest distance of matching pixels as a fraction of the image's diagonal, in [0, 1]: 0.0075 on
                PASCAL-Context, 0.011 on NYUD-v2 (`Benchmark.edge_tolerance`).

        Raises:
            ValueError: the tolerance is out of range.
        """
        super().__init__(task)
        if not 0 <= tolerance <= 1:
            raise ValueError(f"`tolerance` is a fraction of the diagonal, in [0, 1], got {tolerance}")
        self.tolerance = tolerance
        # Rows: matched pairs, predicted pixels, true pixels.
        self.sums["counts"] = torch.zeros(3, len(THRESHOLDS), dtype=torch.int64)
        self.sums["best_counts"] = torch.zeros(3, dtype=torch.int64)
        self.sums["valid"] = torch.zeros((), dtype=torch.int64)

    def _add(self, prediction: Tensor, label: Tensor, valid: Tensor):
        self.sums["valid"] += valid.sum().cpu()
        for image in zip(prediction.cpu().double().numpy(), label.cpu().numpy()):
            counts = boundary_counts(*image, self.tolerance)
            self.sums["counts"] += torch.from_numpy(counts)
            *_, f_measure = _precision_recall_f(counts)
            self.sums["best_counts"] += torch.from_numpy(counts[:, f_measure.argmax()])

    def compute(self) -> dict[str, float]:
        check_not_empty(self.sums["valid"], self)
        precision, recall, f_measure = _precision_recall_f(self.sums["counts"].numpy())
        best = f_measure.argmax()
        recalls, first = np.unique(recall, return_index=True)
        average_precision = np.interp(np.linspace(0, 1, 101), recalls, precision[first], left=0, right=0).sum() / 100
        return {
            "ods_f": float(f_measure[best]),
            "ois_f": float(_precision_recall_f(self.sums["best_counts"].numpy())[2]),
            # The toolbox too divides 101 values by 100.
            "ap": min(float(average_precision), 1.0),
            "r50": float(recall[precision >= 0.5].max(initial=0)),
            "threshold": float(THRESHOLDS[best]),
        }

    def precision_recall(self) -> tuple[np.ndarray, np.ndarray]:
        """At each threshold. Predicting nothing has a precision of 1, as in SEISM."""
        precision, recall, _ = _precision_recall_f(self.sums["counts"].numpy())
        return precision, recall


def boundary_counts(prediction: np.ndarray, label: np.ndarray, tolerance: float) -> np.ndarray:
    """Matched pairs, predicted and true boundary pixels of one image at each of `THRESHOLDS`.

    The image is the bounding box of its valid pixels, so that padding does not count. Ignored pixels are not boundary,
    neither predicted nor true. Non-maxima of the prediction are suppressed. The pixels that reach a threshold are
    thinned, and so are the label's. As many predicted and true pixels as possible are paired, one to one, no further
    apart than the tolerance.

    BSDS (correspondPixels) minimises the sum of the distances, plus 100 times the tolerance for each unmatched pixel.
    Its optimum has as many pairs, unless one more pair would break up about 100 others: distances can be ignored. Its
    program links unmatched pixels at random to save time and misses up to 0.2% of the pairs.

    Args:
        prediction: probabilities `(height, width)` in [0, 1].
        label: `(height, width)`, boundary above 0.5, 255 = ignored.
        tolerance: largest distance of a pair as a fraction of the image's diagonal.

    Returns:
        Integers `(3, 99)`.
    """
    valid = label != 255
    if not valid.any():
        return np.zeros((3, len(THRESHOLDS)), dtype=np.int64)
    box = tuple(slice(where.min(), where.max() + 1) for where in valid.nonzero())
    valid = valid[box]
    ridges = suppress_non_maxima(np.where(valid, prediction[box], 0))
    pixels, present = _thin(np.searchsorted(THRESHOLDS, ridges, side="right"))
    true = np.argwhere(thin(valid & (label[box] > 0.5)))

    distances = KDTree(pixels).sparse_distance_matrix(
        KDTree(true), tolerance * np.hypot(*valid.shape), output_type="coo_matrix"
    )
    predicted = present.sum(axis=0)
    return np.stack([_count_pairs(csr_array(distances), present), predicted, np.full_like(predicted, len(true))])


def suppress_non_maxima(prediction: np.ndarray) -> np.ndarray:
    """The prediction on its ridges, 0 elsewhere, fading within 5 pixels of the image's border.

    The direction across a ridge comes from second derivatives of the prediction smoothed by a triangle of radius 4. A
    pixel stays if 1.01 times its value reaches the interpolated values one pixel away on both sides. This is how SEISM
    reads predictions, after Dollár and Zitnick, "Fast Edge Detection Using Structured Forests", PAMI 2015 (edgesNms
    with r = 1, s = 5, m = 1.01).

    Args:
        prediction: `(height, width)`.
    """
    if min(prediction.shape) < 3:
        return np.zeros_like(prediction)  # all pixels are at the border
    triangle = np.convolve(np.ones(5), np.ones(5)) / 25
    smooth = convolve1d(convolve1d(prediction, triangle, axis=0), triangle, axis=1)
    d_row, d_column = np.gradient(smooth)
    d_row_row = np.gradient(d_row, axis=0)
    d_column_row, d_column_column = np.gradient(d_column)
    angle = np.arctan(d_row_row * np.sign(-d_column_row) / (d_column_column + 1e-5))
    step = np.stack([np.sin(angle), np.cos(angle)])
    pixel = np.indices(prediction.shape)
    neighbours = [map_coordinates(prediction, pixel + way * step, order=1, mode="nearest") for way in (-1, 1)]
    ridges = np.where(1.01 * prediction >= np.maximum(*neighbours), prediction, 0)

    rim = min(5, min(prediction.shape) // 2)
    to_border = np.minimum(pixel, np.array(prediction.shape)[:, None, None] - 1 - pixel)
    return ridges * (to_border / rim).clip(max=1).prod(axis=0)


def _thin(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`skimage.morphology.thin` of the maps `levels > n` for every n in one pass, many times faster.

    A word holds a pixel's bits of many maps, so that the conditions of Guo and Hall, "Parallel Thinning with
    Two-Subiteration Algorithms", CACM 1989, are logic on words. They are tested again only near changed pixels.

    Args:
        levels: integers `(height, width)` in 0..99: how many maps have the pixel at the start.

    Returns:
        The pixels left in any map: row and column `(pixels, 2)`, and whether each map has them, `(pixels, 99)`.
    """
    width = levels.shape[1] + 2
    planes = PLANES[np.pad(levels, 1)].reshape(-1, 2)
    # The eight neighbours, anticlockwise from the east.
    ring = np.array([1, 1 - width, -width, -width - 1, -1, width - 1, width, width + 1])
    # What the last two subiterations changed.
    changes = [planes.any(axis=1).nonzero()[0]] * 2
    while any(change.size for change in changes):
        near = np.zeros(len(planes), dtype=bool)
        near[np.concatenate(changes) + ring[:, None]] = True
        candidates = near.nonzero()[0]
        candidates = candidates[planes[candidates].any(axis=1)]
        neighbours = planes[candidates + ring[:, None]]
        sides, corners = neighbours[0::2], neighbours[1::2]
        after = np.roll(sides, -1, axis=0)
        # A pixel is removed if its neighbours form one run and are two or three (in pairs), unless it is protected.
        runs = ~sides & (corners | after)
        pairs, other_pairs = sides | corners, corners | after
        one_run = np.bitwise_or.reduce(runs) & ~_at_least_two(runs)
        enough = _at_least_two(pairs) & _at_least_two(other_pairs)
        full = np.bitwise_and.reduce(pairs) & np.bitwise_and.reduce(other_pairs)
        protected = (corners[0] | sides[1] | ~corners[3]) & sides[0]
        removed = planes[candidates] & one_run & enough & ~full & ~protected
        changed = removed.any(axis=1)
        planes[candidates[changed]] &= ~removed[changed]
        changes = [changes[1], candidates[changed]]
        # The second subiteration is the first, turned by 180 degrees.
        ring = np.roll(ring, 4)

    left = planes.any(axis=1).nonzero()[0]
    present = np.unpackbits(planes[left].view(np.uint8), axis=1, count=len(THRESHOLDS)).astype(bool)
    return np.stack(np.divmod(left, width), axis=1) - 1, present


def _at_least_two(planes: np.ndarray) -> np.ndarray:
    """Bits that are set in two or more of four planes."""
    a, b, c, d = planes
    return a & b | c & d | (a | b) & (c | d)


def _count_pairs(neighbours: csr_array, present: np.ndarray) -> np.ndarray:
    """Size of the maximum matching of predicted and true pixels at every threshold.

    A matching is a flow from a source through predicted and true pixels to a sink. From the highest threshold down,
    each flow starts from the previous matching, with the edges of matched pairs reversed, and finds pairs to add.
    (SciPy's `maximum_bipartite_matching` takes exponential time on some of these graphs: scipy/scipy#26147.)

    Args:
        neighbours: `(predicted, true)`, an entry for each pair within the tolerance.
        present: `(predicted, thresholds)`, whether a pixel is predicted at a threshold.

    Returns:
        Integers `(thresholds,)`.
    """
    near = np.diff(neighbours.indptr) > 0
    neighbours, present = neighbours[near], present[near]
    num_true = neighbours.shape[1]
    partner = np.full(len(present), -1)
    counts = []
    for shown in present.T[::-1]:
        pixels = shown.nonzero()[0]
        edges = neighbours[pixels]
        matched_to = partner[pixels]
        matched = (matched_to >= 0).nonzero()[0]
        # Nodes: predicted pixels, true pixels, source, sink. A true pixel leads to its partner or to the sink.
        source = len(pixels) + num_true
        leads_to = np.full(num_true, source + 1)
        leads_to[matched_to[matched]] = matched
        targets = np.concatenate([edges.indices + len(pixels), leads_to, (matched_to < 0).nonzero()[0]])
        starts = np.concatenate([edges.indptr, edges.nnz + np.arange(1, num_true + 1), [len(targets)] * 2])
        network = csr_array(
            (np.ones_like(targets, np.int32), targets.astype(np.int32), starts.astype(np.int32)),
            shape=(source + 2, source + 2),
        )
        flow = maximum_flow(network, source, source + 1).flow[: len(pixels)].tocoo()
        matched_to[flow.row[flow.data > 0]] = flow.col[flow.data > 0] - len(pixels)
        partner[:] = -1
        partner[pixels] = matched_to
        counts.append((matched_to >= 0).sum())
    return np.array(counts[::-1])


def _precision_recall_f(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F-measure of counts `(3, ...)`. Predicting nothing has a precision of 1, as in SEISM."""
    matched, predicted, true = counts
    precision = np.where(predicted > 0, matched / np.maximum(predicted, 1), 1.0)
    return precision, matched / np.maximum(true, 1), 2 * matched / np.maximum(predicted + true, 1)
