import pytest
import torch
from accelerate import Accelerator
from small_models import ALL_KINDS, random_labels, small_model

from transformers_degmix.evaluation import METRICS, BoundaryMetric
from transformers_degmix.evaluation.evaluator import (
    evaluate_model,
    format_main_scores,
    multi_task_gain,
    sum_over_processes,
)


def make_batch(num_images: int, seed: int) -> dict:
    images = torch.randn(num_images, 3, 32, 40, generator=torch.Generator().manual_seed(seed))
    return {"pixel_values": images, "labels": random_labels(ALL_KINDS, num_images, 32, 40, seed)}


def test_loss_does_not_depend_on_batches():
    tasks = {name: task for name, task in ALL_KINDS.items() if task["kind"] != "saliency"}
    model, whole = small_model(tasks=tasks), make_batch(3, 0)
    del whole["labels"]["sal"]
    parts = [
        {"pixel_values": whole["pixel_values"][part], "labels": {name: x[part] for name, x in whole["labels"].items()}}
        for part in (slice(0, 1), slice(1, 3))
    ]
    losses = [evaluate_model(model, batches, model.config.tasks, Accelerator())[0] for batches in ([whole], parts)]
    with torch.no_grad():
        expected = {name: loss.item() for name, loss in model(**whole).losses.items()}
    assert losses == [pytest.approx(expected, rel=1e-5)] * 2


class WithoutFloat64(torch.Tensor):
    """As a tensor on a device without float64, such as mps."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.double:
            raise TypeError("there is no float64")
        if function is torch.Tensor.cpu:
            return args[0].as_subclass(torch.Tensor)
        return super().__torch_function__(function, types, args, kwargs)


def test_devices_without_float64():
    model, batch = small_model(), make_batch(2, 0)
    expected = evaluate_model(model, [batch], model.config.tasks, Accelerator())
    labels = {name: label.as_subclass(WithoutFloat64) for name, label in batch["labels"].items()}
    batch = {"pixel_values": batch["pixel_values"].as_subclass(WithoutFloat64), "labels": labels}
    assert evaluate_model(model, [batch], model.config.tasks, Accelerator()) == expected
    task = model.config.tasks["edge"]
    metrics = [BoundaryMetric(task), BoundaryMetric(task)]
    for metric, kind in zip(metrics, (torch.Tensor, WithoutFloat64)):
        metric.update(torch.rand(2, 32, 40, generator=torch.manual_seed(0)).as_subclass(kind), labels["edge"])
    assert metrics[0].compute() == metrics[1].compute()


def test_sums_of_one_process_stay_where_they_are(monkeypatch):
    accelerator, sums = Accelerator(), {"a": torch.rand(2, dtype=torch.float64)}
    monkeypatch.setattr(accelerator.state, "device", torch.device("meta"))
    assert sum_over_processes(sums, accelerator) == sums


def test_logits_that_are_not_finite_are_named():
    model = small_model()
    with torch.no_grad():
        model.heads["semseg"].classifier.bias[2] = float("nan")
    with pytest.raises(ValueError, match="the logits of 'semseg' are not finite"):
        evaluate_model(model, [make_batch(1, 0)], model.config.tasks, Accelerator())


def test_tasks_without_labels_have_no_scores():
    model, batch = small_model(), make_batch(2, 0)
    losses, scores = evaluate_model(model, [batch], model.config.tasks, Accelerator())
    batch["labels"]["depth"].fill_(255)
    without, rest = evaluate_model(model, [batch], model.config.tasks, Accelerator())
    assert rest == {name: values for name, values in scores.items() if name != "depth"}
    assert without == {name: loss for name, loss in losses.items() if name != "depth"}
    assert "depth rmse -  " in format_main_scores(rest, model.config.tasks)
    singles = dict.fromkeys(model.config.tasks, 0.5)
    gains = [multi_task_gain({name: rest[name]}, singles, model.config.tasks) for name in rest]
    assert multi_task_gain(rest, singles, model.config.tasks) == pytest.approx(sum(gains) / 5)


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
