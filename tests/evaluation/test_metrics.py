import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import percentileofscore
from sklearn.metrics import (
    accuracy_score,
    fbeta_score,
    jaccard_score,
    mean_absolute_percentage_error,
    precision_score,
    recall_score,
    root_mean_squared_error,
)
from small_models import ALL_KINDS, random_labels

from transformers_degmix import DeGMixConfig
from transformers_degmix.evaluation import METRICS, BoundaryMetric
from transformers_degmix.tasks import TASK_KINDS


TASKS = DeGMixConfig(tasks=ALL_KINDS).tasks
METRIC_OF_TASK = {name: METRICS[task["kind"]] for name, task in TASKS.items()}


def random_batch(task, batch_size=4, height=6, width=7, seed=0):
    """A prediction and a label, a fifth of it ignored."""
    fields = TASKS[task]
    logits = torch.randn(
        batch_size, fields["num_labels"], height, width, generator=torch.Generator().manual_seed(seed + 1)
    )
    label = random_labels(TASKS, batch_size, height, width, seed)[task]
    if fields["kind"] == "boundary":
        label = torch.where(label == 255, label, label.round())
    return TASK_KINDS[fields["kind"]].activation(logits), label


def scores(task, *batches):
    metric = METRIC_OF_TASK[task](TASKS[task])
    for prediction, label in batches:
        metric.update(prediction, label)
    return metric.compute()


def valid_pixels(prediction, label):
    """Arrays of the valid pixels' predictions and labels, `(pixels,)` or `(pixels, 3)`."""
    if label.ndim == 4:
        prediction, label = prediction.permute(0, 2, 3, 1), label.permute(0, 2, 3, 1)
        valid = (label != 255).all(dim=-1)
    else:
        valid = label != 255
    return prediction[valid].double().numpy(), label[valid].double().numpy()


def segmentation_scores(prediction, label):
    present = np.unique(label)
    return {
        "mean_iou": jaccard_score(label, prediction, average="macro"),
        "mean_accuracy": recall_score(label, prediction, labels=present, average="macro"),
        "pixel_accuracy": accuracy_score(label, prediction),
    }


def depth_scores(prediction, label):
    ratios = [max(p, 1e-3) / max(t, 1e-3) for p, t in zip(prediction, label)]
    return {
        "rmse": root_mean_squared_error(label, prediction),
        "rmse_log": math.sqrt(sum(math.log(ratio) ** 2 for ratio in ratios) / len(ratios)),
        "abs_rel": mean_absolute_percentage_error(label, prediction),
        "sq_rel": sum((p - t) ** 2 / t for p, t in zip(prediction, label)) / len(label),
        **{f"delta{n}": sum(1 / 1.25**n < ratio < 1.25**n for ratio in ratios) / len(ratios) for n in (1, 2, 3)},
    }


def normals_scores(prediction, label):
    # from sine and cosine
    angles = np.degrees([math.atan2(np.linalg.norm(np.cross(a, b)), a @ b) for a, b in zip(prediction, label)])
    return {
        "mean_angle": angles.mean(),
        "median_angle": pytest.approx(np.median(angles), abs=0.00501),
        "rmse_angle": np.sqrt(np.mean(angles**2)),
        **{f"within_{limit:g}": percentileofscore(angles, limit, "strict") / 100 for limit in (11.25, 22.5, 30)},
    }


def best_f(name, thresholds, beta):
    def scores(prediction, label):
        values = [fbeta_score(label, prediction > threshold, beta=beta, zero_division=0) for threshold in thresholds]
        return {name: max(values), "threshold": pytest.approx(thresholds[np.argmax(values)])}

    return scores


REFERENCES = {
    "semseg": segmentation_scores,
    "sal": best_f("max_f", [0.05 * i for i in range(1, 20)], 0.3**0.5),
    "depth": depth_scores,
    "normals": normals_scores,
    "edge": best_f("exact_f", [0.01 * i for i in range(1, 100)], 1.0),
}
FLOATS = [task for task in REFERENCES if task != "semseg"]


@settings(max_examples=25)
@given(task=st.sampled_from(sorted(REFERENCES)), seed=st.integers(0, 1000), height=st.integers(2, 9))
def test_scores_agree_with_their_definitions(task, seed, height):
    batch = random_batch(task, height=height, seed=seed)
    result, expected = scores(task, batch), REFERENCES[task](*valid_pixels(*batch))
    assert set(result) == set(expected)
    for name, value in expected.items():
        assert result[name] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), name


@pytest.mark.parametrize("task", ["sal", "edge"])
def test_precision_and_recall_at_all_thresholds(task):
    prediction, label = random_batch(task)
    metric = METRIC_OF_TASK[task](TASKS[task])
    metric.update(0.5 * prediction, label)  # none reach the highest thresholds
    prediction, label = valid_pixels(0.5 * prediction, label)
    for threshold, *found in zip(metric.thresholds.tolist(), *metric.precision_recall(), strict=True):
        shown = prediction > threshold
        expected = precision_score(label, shown, zero_division=1), recall_score(label, shown)
        assert found == pytest.approx(expected)


def test_iou_per_class_of_those_that_occur():
    metric = METRICS["segmentation"](TASKS["semseg"])
    prediction, label = random_batch("semseg")
    prediction, label = torch.where(prediction == 3, 0, prediction), torch.where(label == 3, 1, label)
    metric.update(prediction, label)
    expected = jaccard_score(*reversed(valid_pixels(prediction, label)), average=None)
    assert metric.per_class_iou() == pytest.approx(dict(zip([0, 1, 2, 4], expected)))


@pytest.mark.parametrize(("prediction", "label", "ratio"), [(0, 1e-2, 10), (1e-4, 1e-2, 10), (0, 5e-4, 1)])
def test_depths_below_a_millimetre_count_as_one(prediction, label, ratio):
    result = scores("depth", (torch.full((1, 2, 2), prediction), torch.full((1, 2, 2), label)))
    assert result["rmse_log"] == pytest.approx(math.log(ratio), abs=1e-6)
    assert result["delta1"] == result["delta3"] == (ratio == 1)


@pytest.mark.parametrize("angles", [(0, 90), (180, 180), (0, 20, 180), (5, 20.5, 60, 180)])
def test_median_angle(angles):
    angles = torch.tensor(angles, dtype=torch.float64)
    radians = angles.deg2rad()
    prediction = torch.stack([radians.cos(), radians.sin(), torch.zeros_like(angles)])[None, :, None]
    label = torch.tensor([1.0, 0, 0])[None, :, None, None].expand_as(prediction)
    assert scores("normals", (prediction, label))["median_angle"] == pytest.approx(np.median(angles))


@settings(max_examples=25)
@given(task=st.sampled_from(sorted(REFERENCES)), order=st.permutations(range(4)), cut=st.integers(0, 4))
def test_batches_and_their_order_do_not_matter(task, order, cut):
    prediction, label = random_batch(task)
    parts = [(prediction[part], label[part]) for part in (order[:cut], order[cut:])]
    assert scores(task, *parts) == pytest.approx(scores(task, (prediction, label)))


@pytest.mark.parametrize("task", REFERENCES)
def test_the_order_of_pixels_does_not_matter(task):
    prediction, label = random_batch(task)
    order = torch.randperm(42, generator=torch.Generator().manual_seed(0))
    shuffled = [values.flatten(-2)[..., order].view_as(values) for values in (prediction, label)]
    assert scores(task, shuffled) == pytest.approx(scores(task, (prediction, label)))


@pytest.mark.parametrize("task", REFERENCES)
def test_ignored_pixels_do_not_matter(task):
    prediction, label = random_batch(task)
    ignored = (label == 255) if label.ndim == 3 else (label == 255).any(dim=1, keepdim=True)
    other = prediction.masked_fill(ignored, math.nan if prediction.is_floating_point() else 77)
    assert ignored.any() and scores(task, (other, label)) == scores(task, (prediction, label))


@pytest.mark.parametrize("task", ["depth", "normals"])
def test_labels_of_zero_are_ignored(task):
    prediction, label = random_batch(task)
    assert scores(task, (prediction, label.masked_fill(label == 255, 0))) == scores(task, (prediction, label))


@pytest.mark.parametrize("task", REFERENCES)
def test_a_perfect_prediction(task):
    _, label = random_batch(task)
    prediction = torch.where(label == 255, torch.zeros_like(label), label)
    for name, score in scores(task, (prediction, label)).items():
        if name != "threshold":
            is_error = name.startswith(("rmse", "abs", "sq")) or name.endswith("angle")
            assert score == pytest.approx(0 if is_error else 1, abs=1e-4), name


@pytest.mark.parametrize("task", REFERENCES)
def test_no_valid_pixel_is_an_error(task):
    prediction, label = random_batch(task)
    for batches in ([], [(prediction, torch.full_like(label, 255))]):
        with pytest.raises(ValueError, match="no valid pixel"):
            scores(task, *batches)


def check_refused(metric, prediction, label, message):
    with pytest.raises(ValueError, match=message):
        metric.update(prediction, label)
    assert not any(total.any() for total in metric.sums.values())


@pytest.mark.parametrize("metric", [*METRICS.values(), BoundaryMetric])
def test_shapes_that_do_not_fit_are_refused(metric):
    task = {metric.kind: name for name, metric in METRIC_OF_TASK.items()}[metric.kind]
    prediction, label = random_batch(task)
    for bad in ((prediction[:-1], label), (prediction[..., :-1], label), (prediction[0], label[0])):
        check_refused(metric(TASKS[task]), *bad, r"one shape \(batch, .*, got \(\d")
    without_channels = label[:, 0] if label.ndim == 4 else label[:, None]
    check_refused(metric(TASKS[task]), without_channels, without_channels, "one shape")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("task", FLOATS)
def test_values_that_are_not_finite_are_refused(task, value):
    prediction, label = random_batch(task)
    label = label.masked_fill(label == 255, 0.5).float()
    for role in ("predictions", "labels"):
        maps = {"predictions": prediction.clone(), "labels": label.clone()}
        maps[role].view(-1)[5] = value
        check_refused(METRIC_OF_TASK[task](TASKS[task]), *maps.values(), f"finite {role} .*got {value}")


@pytest.mark.parametrize(
    ("task", "value"),
    [("semseg", 5), ("semseg", 254), ("semseg", -1), ("sal", 2), ("depth", -0.5), ("edge", 1.5)],
)
def test_values_outside_of_the_range_are_refused(task, value):
    prediction, label = random_batch(task)
    label = label.masked_fill(label == 255, 1)
    for role in ("predictions", "labels"):
        maps = {"predictions": prediction.clone(), "labels": label.clone()}
        maps[role][0, 2, 3] = value
        check_refused(METRIC_OF_TASK[task](TASKS[task]), *maps.values(), f"{role} from 0 to .*got {value}")


def test_a_constant_map_scores_by_chance_on_boundaries():
    label = torch.zeros(1, 10, 10)
    label[0, 0] = 1
    assert scores("edge", (torch.ones_like(label), label))["exact_f"] == pytest.approx(2 * 0.1 * 1 / 1.1)
