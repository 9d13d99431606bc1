import pytest
import torch
from accelerate import Accelerator
from small_models import ALL_KINDS, random_labels, small_model

from transformers_degmix.evaluation import METRICS
from transformers_degmix.evaluation.evaluator import evaluate_model, multi_task_gain


def make_batch(num_images: int, seed: int) -> dict:
    images = torch.randn(num_images, 3, 32, 40, generator=torch.Generator().manual_seed(seed))
    return {"pixel_values": images, "labels": random_labels(ALL_KINDS, num_images, 32, 40, seed)}


def test_images_count_alike():
    model = small_model()
    batches = [make_batch(3, 0), make_batch(1, 1)]
    loss, scores = evaluate_model(model, batches, model.config.tasks, Accelerator())
    with torch.no_grad():
        losses = [model(**batch).loss.item() for batch in batches]
    assert loss == pytest.approx((3 * losses[0] + losses[1]) / 4, rel=1e-5)
    assert list(scores) == list(ALL_KINDS)


@pytest.mark.parametrize("name", list(ALL_KINDS))
def test_sums_of_parts_are_the_sums_of_the_whole(name):
    task = small_model().config.tasks[name]
    metric = METRICS[task["kind"]]
    parts, whole = [metric(task), metric(task)], metric(task)
    for seed, part in enumerate(parts):
        label = random_labels(ALL_KINDS, 2, 16, 20, seed)[name]
        prediction = torch.rand(label.shape).round().to(label.dtype)
        part.update(prediction, label)
        whole.update(prediction, label)
    first, second = parts
    first.sums = {key: first.sums[key] + second.sums[key] for key in first.sums}
    assert first.compute() == pytest.approx(whole.compute())


def test_multi_task_gain():
    tasks = {"depth": {"kind": "depth"}, "semseg": {"kind": "segmentation"}}
    scores = {"depth": {"rmse": 0.5, "abs_rel": 9.0}, "semseg": {"mean_iou": 0.45}}
    # depth 50 % less, semseg 10 % less
    assert multi_task_gain(scores, {"depth": 1.0, "semseg": 0.5}, tasks) == pytest.approx((50 - 10) / 2)
