import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import ALL_KINDS, random_labels

from transformers_degmix import DeGMixConfig
from transformers_degmix.evaluation import METRICS
from transformers_degmix.evaluation.constant import constant_scores
from transformers_degmix.tasks import TASK_KINDS


TASKS = DeGMixConfig(tasks=ALL_KINDS).tasks


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
    metric = METRICS[TASKS[task]["kind"]](TASKS[task])
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


def mean_iou(prediction, label):
    ious = []
    for c in range(5):
        union = np.sum((prediction == c) | (label == c))
        if union:
            ious.append(np.sum((prediction == c) & (label == c)) / union)
    return np.mean(ious)


def best_f(thresholds, beta_squared):
    def score(prediction, label):
        values = []
        for threshold in thresholds:
            hits = np.sum((prediction > threshold) & (label == 1))
            precision = hits / max(np.sum(prediction > threshold), 1)
            recall = hits / np.sum(label == 1)
            if hits:
                values.append((1 + beta_squared) * precision * recall / (beta_squared * precision + recall))
        return max(values)

    return score


def mean_angle(prediction, label):
    degrees = [
        math.degrees(math.acos(max(-1, min(1, float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))))))
        for a, b in zip(prediction, label)
    ]
    return np.mean(degrees)


REFERENCES = {
    "semseg": mean_iou,
    "sal": best_f([0.05 * i for i in range(1, 20)], 0.3),
    "depth": lambda prediction, label: np.sqrt(np.mean((prediction - label) ** 2)),
    "normals": mean_angle,
    "edge": best_f([0.01 * i for i in range(1, 100)], 1.0),
}


@settings(max_examples=20, deadline=None)
@given(task=st.sampled_from(sorted(REFERENCES)), seed=st.integers(0, 1000))
def test_main_score_agrees_with_its_definition(task, seed):
    batch = random_batch(task, seed=seed)
    main = METRICS[TASKS[task]["kind"]].main
    assert scores(task, batch)[main] == pytest.approx(REFERENCES[task](*valid_pixels(*batch)), rel=1e-6)


@pytest.mark.parametrize("task", REFERENCES)
def test_batches_and_their_order_do_not_matter(task):
    prediction, label = random_batch(task)
    together = scores(task, (prediction, label))
    apart = scores(task, *zip(prediction.split([1, 3]), label.split([1, 3])))
    reversed_order = scores(task, (prediction.flip(0), label.flip(0)))
    assert apart == pytest.approx(together) and reversed_order == pytest.approx(together)


@pytest.mark.parametrize("task", REFERENCES)
def test_ignored_pixels_do_not_matter(task):
    prediction, label = random_batch(task)
    ignored = (label == 255) if label.ndim == 3 else (label == 255).any(dim=1, keepdim=True)
    other = torch.where(ignored, prediction.flip(-1), prediction)
    assert not torch.equal(other, prediction)
    assert scores(task, (other, label)) == scores(task, (prediction, label))


@pytest.mark.parametrize(
    ("task", "perfect"),
    [("semseg", 1), ("sal", 1), ("depth", 0), ("normals", 0), ("edge", 1)],
)
def test_a_perfect_prediction(task, perfect):
    _, label = random_batch(task)
    main = METRICS[TASKS[task]["kind"]].main
    prediction = torch.where(label == 255, torch.zeros_like(label), label)
    assert scores(task, (prediction, label))[main] == pytest.approx(perfect, abs=1e-4)


@pytest.mark.parametrize("task", REFERENCES)
def test_no_valid_pixel_is_an_error(task):
    prediction, label = random_batch(task)
    with pytest.raises(ValueError, match="no valid pixel"):
        scores(task, (prediction, torch.full_like(label, 255)))


def test_best_constants():
    constants = {kind: metric.best_constant for kind, metric in METRICS.items()}
    assert constants["segmentation"](torch.tensor([3, 1, 3, 2])) == 3
    assert constants["depth"](torch.tensor([1.0, 9.0, 2.0])) == 2
    normal = constants["normals"](torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[0.0, 0.0]]]))
    torch.testing.assert_close(normal, torch.tensor([0.5**0.5, 0.5**0.5, 0.0]))


def test_a_constant_map_scores_by_chance_on_boundaries():
    label = torch.zeros(1, 10, 10)
    label[0, 0] = 1
    prediction = METRICS["boundary"].best_constant(label).expand(1, 10, 10)
    assert scores("edge", (prediction, label))["exact_f"] == pytest.approx(2 * 0.1 * 1 / 1.1)


def test_constant_scores():
    labels = random_labels(TASKS, 4, 6, 7)
    constants = constant_scores(TASKS, [{"labels": labels}], [{"labels": labels}])
    _, depth = valid_pixels(labels["depth"], labels["depth"])
    median = np.sort(depth)[(depth.size - 1) // 2]
    assert constants["depth"]["rmse"] == pytest.approx(np.sqrt(np.mean((depth - median) ** 2)))
    _, classes = valid_pixels(labels["semseg"], labels["semseg"])
    assert constants["semseg"]["pixel_accuracy"] == pytest.approx(
        np.bincount(classes.astype(int)).max() / classes.size
    )
    assert set(constants) == set(TASKS)
