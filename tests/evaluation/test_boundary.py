import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from scipy.optimize import linear_sum_assignment
from skimage.morphology import thin

from transformers_degmix.data.benchmarks import BENCHMARKS
from transformers_degmix.evaluation import BoundaryMetric
from transformers_degmix.evaluation.boundary import THRESHOLDS, boundary_counts, suppress_non_maxima


TASK = {"num_labels": 1}


def random_maps(num_images, height, width, seed, ignored=0.0):
    """Smooth random predictions, and labels with boundaries near their ridges; a share of the pixels is ignored."""
    rng = np.random.default_rng(seed)
    smooth = gaussian_filter(rng.random((num_images, height, width)), (0, 1.0, 1.0))
    prediction = (smooth - smooth.min()) / np.ptp(smooth)
    label = (prediction + 0.3 * rng.standard_normal(prediction.shape) > 0.7).astype(float)
    label[rng.random(label.shape) < ignored] = 255
    return torch.from_numpy(prediction), torch.from_numpy(label)


def scores(*batches, tolerance=0.1):
    metric = BoundaryMetric(TASK, tolerance)
    for prediction, label in batches:
        metric.update(prediction, label)
    return metric.compute()


def lines(*rows, height=40, width=40):
    """Horizontal lines `(1, height, width)` away from the border, given as (row, value)."""
    image = torch.zeros(1, height, width)
    for row, value in rows:
        image[0, row, 10:30] = value
    return image


def bsds_pairs(predicted, true, radius):
    """Pairs in the cheapest assignment at BSDS's costs: pixels of one kind can also go to outliers of the other."""
    (n, m), outlier = (len(predicted), len(true)), 100 * radius
    distance = np.linalg.norm(predicted[:, None] - true[None], axis=-1)
    cost = np.full((n + m, n + m), outlier)
    cost[:n, :m] = np.where(distance <= radius, distance, 1e6)
    rows, columns = linear_sum_assignment(cost)
    return np.sum((rows < n) & (columns < m))


def suppressed(prediction, row, column):
    """`suppress_non_maxima` of one pixel away from the border, from the definition."""

    def smoothed(i, j):
        weight = {d: (5 - abs(d)) / 25 for d in range(-4, 5)}
        return sum(weight[a] * weight[b] * prediction[i + a, j + b] for a in weight for b in weight)

    def d_row(f):
        return lambda i, j: (f(i + 1, j) - f(i - 1, j)) / 2

    def d_column(f):
        return lambda i, j: (f(i, j + 1) - f(i, j - 1)) / 2

    def value(y, x):
        i, j = math.floor(y), math.floor(x)
        patch = prediction[i : i + 2, j : j + 2]
        return np.array([1 - y + i, y - i]) @ patch @ np.array([1 - x + j, x - j])

    xx, xy, yy = (
        derivative(smoothed)(row, column)
        for derivative in (lambda f: d_column(d_column(f)), lambda f: d_row(d_column(f)), lambda f: d_row(d_row(f)))
    )
    angle = math.atan(yy * -np.sign(xy) / (xx + 1e-5)) % math.pi
    y, x = math.sin(angle), math.cos(angle)
    reached = max(value(row + y, column + x), value(row - y, column - x))
    return prediction[row, column] if 1.01 * prediction[row, column] >= reached else 0


@settings(max_examples=15)
@given(
    size=st.tuples(st.integers(2, 14), st.integers(2, 14)),
    tolerance=st.floats(0.04, 0.4),
    seed=st.integers(0, 1000),
)
# Thinning takes away pixels that it leaves at higher and at lower thresholds.
@example(size=(14, 14), tolerance=0.1, seed=10)
def test_counts_agree_with_exact_assignment_at_the_costs_of_bsds(size, tolerance, seed):
    (prediction,), (label,) = (maps.numpy() for maps in random_maps(1, *size, seed))
    counts = boundary_counts(prediction, label, tolerance)
    true = np.argwhere(thin(label > 0.5))
    for index in range(0, 99, 7):
        predicted = np.argwhere(thin(suppress_non_maxima(prediction) >= THRESHOLDS[index]))
        pairs = bsds_pairs(predicted, true, tolerance * math.hypot(*size))
        assert counts[:, index].tolist() == [pairs, len(predicted), len(true)]


@settings(max_examples=10)
@given(seed=st.integers(0, 1000), sigma=st.floats(0, 4))
def test_thinning_agrees_with_scikit_image(seed, sigma):
    # A noisy plateau keeps its area when non-maxima are suppressed, and takes many rounds.
    rng = np.random.default_rng(seed)
    prediction = gaussian_filter(rng.random((30, 40)), sigma) > 0.5
    prediction = prediction * (0.995 + 0.005 * rng.random((30, 40))) * rng.choice([0.3, 0.6, 0.9], (1, 40))
    predicted = boundary_counts(prediction, np.zeros((30, 40)), 0.1)[1]
    ridges = suppress_non_maxima(prediction)
    assert predicted.tolist() == [thin(ridges >= threshold).sum() for threshold in THRESHOLDS]


@settings(max_examples=10)
@given(seed=st.integers(0, 1000))
def test_suppression_of_non_maxima_agrees_with_its_definition(seed):
    prediction = gaussian_filter(np.random.default_rng(seed).random((20, 22)), 1)
    ridges = suppress_non_maxima(prediction)
    assert 0 < np.count_nonzero(ridges) < ridges.size
    for row in range(7, 13):
        for column in range(7, 15):
            assert ridges[row, column] == suppressed(prediction, row, column)


def test_predictions_fade_towards_the_border():
    ridges = suppress_non_maxima(np.ones((20, 20)))
    np.testing.assert_allclose(ridges[10], [*np.arange(5) / 5, *np.ones(10), *np.arange(4, -1, -1) / 5])
    np.testing.assert_allclose(ridges[2, 2], 0.4**2)


@settings(max_examples=4)
@given(seed=st.integers(0, 1000), order=st.permutations(range(4)))
def test_batches_and_their_order_do_not_matter(seed, order):
    prediction, label = random_maps(4, 12, 15, seed, ignored=0.1)
    together = scores((prediction, label))
    apart = zip(prediction[order].split([1, 3]), label[order].split([1, 3]))
    assert scores(*apart) == together


def test_added_sums_are_those_of_all_images():
    prediction, label = random_maps(3, 12, 15, 0)
    first, second = BoundaryMetric(TASK), BoundaryMetric(TASK)
    first.update(prediction[:1], label[:1])
    second.update(prediction[1:], label[1:])
    first.sums = {name: first.sums[name] + second.sums[name] for name in first.sums}
    assert first.compute() == scores((prediction, label), tolerance=0.0075)


@settings(max_examples=3)
@given(seed=st.integers(0, 1000))
def test_ignored_pixels_and_padding_do_not_matter(seed):
    prediction, label = random_maps(2, 14, 16, seed, ignored=0.2)
    expected = scores((prediction, label))
    changed = torch.where(label == 255, 1 - prediction, prediction)
    assert scores((changed, label)) == expected
    # The ring is the image's own, so that its box stays the same.
    label[:, [0, -1]] = label[:, :, [0, -1]] = 0
    padded = [torch.nn.functional.pad(maps, (3, 5, 7, 2), value=255.0) for maps in (prediction, label)]
    assert scores(padded) == scores((prediction, label))


def test_a_perfect_prediction():
    label = lines((8, 1.0), (20, 1.0))
    label[0, 8:30, 15] = 1
    result = scores((label, label), tolerance=0.0)
    assert (result["ods_f"], result["ois_f"], result["r50"]) == (1, 1, 1)
    # The curve of a binary prediction is one point, one of 101 recalls.
    assert result["ap"] == pytest.approx(0.01)


@pytest.mark.parametrize(("shift", "expected"), [(-5, 1.0), (5, 1.0), (6, 0.0)])
def test_shifts_within_the_tolerance_and_beyond(shift, expected):
    # 0.09 of the diagonal is 5.09 pixels.
    result = scores((lines((20 + shift, 0.8)), lines((20, 1.0))), tolerance=0.09)
    assert (result["ods_f"], result["ois_f"]) == (expected, expected)


def test_pairs_are_one_to_one():
    result = scores((lines((17, 0.8), (23, 0.8)), lines((20, 1.0))))
    assert result["ods_f"] == pytest.approx(2 * 0.5 * 1 / 1.5)


def test_scores_of_a_curve_known_by_hand():
    # 20 pixels a line. Above 0.3 the false line is gone, above 0.2 the second image's only line.
    first = lines((10, 0.8), (30, 0.3)), lines((10, 1.0))
    second = lines((20, 0.2)), lines((20, 1.0))
    result = scores(first, second, tolerance=0.01)
    # Up to 0.2: 40 of 60 predicted and 40 true pixels match.
    assert result["ods_f"] == pytest.approx(0.8)
    assert result["threshold"] == 0.01
    # Each image is perfect at a threshold of its own.
    assert result["ois_f"] == 1
    # (recall, precision) of the lowest threshold of each recall: (0, 1), (0.5, 0.5), (1, 2/3).
    precision = [1 - 0.01 * k if k <= 50 else 0.5 + (k - 50) / 300 for k in range(101)]
    assert result["ap"] == pytest.approx(sum(precision) / 100)
    assert result["r50"] == 1
    five, two = lines(*((row, 0.2) for row in range(8, 33, 6))), lines((8, 1.0), (32, 1.0))
    assert scores((five, two), tolerance=0.01)["r50"] == 0


def test_images_without_boundaries():
    empty = torch.zeros(1, 20, 20)
    assert scores((empty, empty))["ods_f"] == 0
    # False boundaries in such an image count against the others.
    line = lines((20, 1.0))
    assert scores((line, line), (line, torch.zeros_like(line)))["ods_f"] == pytest.approx(2 * 0.5 * 1 / 1.5)


def test_a_constant_has_a_score():
    label = lines((20, 1.0))
    assert 0 < scores((torch.ones_like(label), label))["ods_f"] < 1


@pytest.mark.parametrize("size", [(1, 20), (20, 1), (2, 20), (1, 1)])
def test_thin_images_have_no_ridges(size):
    # All pixels are at the border, where predictions have faded to 0.
    label = torch.ones(1, *size)
    assert scores((label, label))["ods_f"] == 0
    # In a larger image, such a label is what its valid pixels span.
    padded = torch.nn.functional.pad(label, (2, 3, 4, 5), value=255.0)
    line = lines((20, 1.0))
    assert scores((line, line), (torch.ones_like(padded), padded)) == scores((line, line), (label, label))


def test_no_valid_pixel_is_an_error():
    with pytest.raises(ValueError, match="no valid pixel"):
        scores((torch.zeros(1, 20, 20), torch.full((1, 20, 20), 255.0)))


@pytest.mark.parametrize("tolerance", [-0.01, 3])
def test_tolerances_that_are_no_fraction_are_refused(tolerance):
    with pytest.raises(ValueError, match="fraction of the diagonal"):
        BoundaryMetric(TASK, tolerance)


def test_benchmarks_with_boundaries_have_a_tolerance():
    assert {name: benchmark.edge_tolerance for name, benchmark in BENCHMARKS.items()} == {
        "nyud": 0.011,
        "pascal_context": 0.0075,
        "cityscapes": None,
    }
