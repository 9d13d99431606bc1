import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import ALL_KINDS, random_labels

from transformers_degmix import DeGMixConfig
from transformers_degmix.loss_degmix import count_pixels, multi_task_loss


TASKS = DeGMixConfig(tasks=ALL_KINDS).tasks


def random_logits(batch_size, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(batch_size, task["num_labels"], height, width, generator=generator, requires_grad=True)
        for name, task in TASKS.items()
    }


def pixels(logits, label):
    """(logits of a pixel, its label) of all pixels, as lists of numbers."""
    if label.ndim == 3:
        label = label.unsqueeze(1)
    rows = logits.permute(0, 2, 3, 1).reshape(-1, logits.shape[1]).tolist()
    return list(zip(rows, label.permute(0, 2, 3, 1).reshape(len(rows), -1).tolist()))


def log_softmax(row, i):
    return row[i] - math.log(sum(math.exp(x) for x in row))


def cross_entropy(logits, label):
    errors = [-log_softmax(row, int(y)) for row, (y,) in pixels(logits, label) if y != 255]
    return sum(errors) / len(errors)


def saliency(logits, label):
    valid = [(row, int(y)) for row, (y,) in pixels(logits, label) if y != 255]
    w_pos = sum(y == 0 for _, y in valid) / len(valid)
    return sum((w_pos if y else 1 - w_pos) * -log_softmax(row, y) for row, y in valid) / len(valid)


def depth(logits, label):
    errors = [abs(x - y) for (x,), (y,) in pixels(logits, label) if y != 255]
    return sum(errors) / len(errors)


def normals(logits, label):
    errors = []
    for row, target in pixels(logits, label):
        if 255 not in target:
            length = math.sqrt(sum(x * x for x in row))
            errors.append(sum(abs(x / length - y) for x, y in zip(row, target)))
    return sum(errors) / len(errors)


def boundary(logits, label):
    errors = []
    for (x,), (y,) in pixels(logits, label):
        if y != 255:
            s = 1 / (1 + math.exp(-x))
            errors.append(0.8 * y * -math.log(s) + 0.2 * (1 - y) * -math.log(1 - s))
    return sum(errors) / len(errors)


REFERENCES = {
    "semseg": (1, cross_entropy),
    "human_parts": (2, cross_entropy),
    "sal": (5, saliency),
    "depth": (1, depth),
    "normals": (10, normals),
    "edge": (50, boundary),
}


@settings(max_examples=20)
@given(batch_size=st.integers(1, 3), height=st.integers(3, 7), width=st.integers(3, 7), seed=st.integers(0, 99))
def test_losses_are_those_of_the_recipe(batch_size, height, width, seed):
    labels = random_labels(TASKS, batch_size, height, width, seed)
    # One component alone makes a normal invalid; grey boundaries count in both terms.
    labels["normals"][0, 1, 0, 0] = 255
    logits = random_logits(batch_size, height, width, seed)
    loss, losses = multi_task_loss(logits, labels, TASKS)
    assert list(losses) == list(TASKS)
    for task, (weight, reference) in REFERENCES.items():
        assert losses[task].item() == pytest.approx(weight * reference(logits[task], labels[task]), rel=1e-4)
    assert loss.item() == pytest.approx(sum(x.item() for x in losses.values()), rel=1e-5)


@pytest.mark.parametrize(("height", "width"), [(3, 40), (20, 1)])
def test_depth_of_logarithms_and_gradients(height, width):
    generator = torch.Generator().manual_seed(0)
    label = 10 * torch.rand(2, height, width, generator=generator)
    label[torch.rand(label.shape, generator=generator) < 0.2] = 255
    logits = 4 * torch.randn(2, 1, height, width, generator=generator)  # below 0 too
    losses = {
        (log_loss, weight): multi_task_loss(
            {"depth": logits},
            {"depth": label},
            DeGMixConfig(tasks={"depth": {"kind": "depth", "log_loss": log_loss, "gradient_weight": weight}}).tasks,
        )[0].item()
        for log_loss in (False, True)
        for weight in (0, 0.5)
    }

    def log(metres):
        return math.log(metres) if metres > 0.1 else math.log(0.1) + (metres - 0.1) / 0.1

    for log_loss, transform in ((False, float), (True, log)):
        errors = [
            {
                (row, column): transform(logits[image, 0, row, column].item())
                - transform(label[image, row, column].item())
                for row, column in itertools.product(range(height), range(width))
                if label[image, row, column] != 255
            }
            for image in range(2)
        ]
        count = sum(map(len, errors))
        own = sum(abs(error) for image in errors for error in image.values())
        differences = sum(
            abs(error - image[other])
            for image in errors
            for (row, column), error in image.items()
            for step in (1, 2, 4, 8, 16)
            for other in ((row + step, column), (row, column + step))
            if other in image
        )
        assert losses[log_loss, 0] == pytest.approx(own / count, rel=1e-4)
        assert losses[log_loss, 0.5] == pytest.approx((own + 0.5 * differences) / count, rel=1e-4)


def test_labels_of_some_tasks_only():
    loss, losses = multi_task_loss(random_logits(2, 4, 5), {"depth": torch.rand(2, 4, 5)}, TASKS)
    assert list(losses) == ["depth"] and torch.equal(loss, losses["depth"])


@pytest.mark.parametrize("task", list(TASKS))
def test_no_valid_pixel_gives_zero_with_a_graph(task):
    logits = random_logits(1, 4, 5)
    channels = 3 if task == "normals" else 1
    loss, _ = multi_task_loss(logits, {task: torch.full((1, channels, 4, 5), 255.0)}, TASKS)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits[task].grad, torch.zeros_like(logits[task]))


@pytest.mark.parametrize("task", list(TASKS))
def test_ignored_pixels_have_no_gradient(task):
    logits, label = random_logits(1, 4, 5), random_labels(TASKS, 1, 4, 5)[task]
    multi_task_loss(logits, {task: label}, TASKS)[0].backward()
    ignored = (label == 255) if label.ndim == 3 else (label == 255).any(dim=1)
    gradient = logits[task].grad.abs().sum(dim=1)
    assert ignored.any() and not gradient[ignored].any() and (gradient[~ignored] > 0).all()


@pytest.mark.parametrize("length", [0, 1e-30, 1e-6, 1])
def test_normals_of_any_length_have_small_gradients(length):
    logits = (length * random_logits(1, 4, 5)["normals"].detach()).requires_grad_()
    labels = {"normals": random_labels(TASKS, 1, 4, 5)["normals"]}
    loss, _ = multi_task_loss({"normals": logits}, labels, TASKS)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all() and logits.grad.abs().max() < 1e4


def test_half_precision_logits_are_summed_in_float32():
    logits = {"depth": torch.full((1, 1, 300, 300), 3.0, dtype=torch.float16)}
    loss, _ = multi_task_loss(logits, {"depth": torch.zeros(1, 300, 300)}, TASKS)
    assert loss.item() == 3


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({}, "some of the tasks"),
        ({"depht": torch.zeros(1, 4, 5)}, "depht"),
        ({"depth": torch.zeros(1, 5, 4)}, r"labels\['depth'\].*\(1, 1, 4, 5\).*\(1, 1, 5, 4\)"),
        ({"normals": torch.zeros(1, 4, 5)}, r"labels\['normals'\].*\(1, 3, 4, 5\)"),
        ({"depth": torch.zeros(2, 4, 5)}, r"labels\['depth'\]"),
    ],
)
def test_bad_labels(labels, message):
    with pytest.raises(ValueError, match=message):
        multi_task_loss(random_logits(1, 4, 5), labels, TASKS)


@settings(max_examples=20)
@given(sizes=st.lists(st.integers(1, 3), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_losses_of_parts_add_up_to_that_of_the_batch(sizes, seed):
    labels, logits = random_labels(TASKS, sum(sizes), 4, 5, seed), random_logits(sum(sizes), 4, 5, seed)
    labels["sal"][:1] = 1  # classes are shared unequally
    _, expected = multi_task_loss(logits, labels, TASKS)
    total = dict.fromkeys(TASKS, 0.0)
    for start, end in zip(itertools.accumulate([0, *sizes[:-1]]), itertools.accumulate(sizes)):
        part = {task: label[start:end] for task, label in labels.items()}
        part_logits = {task: values[start:end] for task, values in logits.items()}
        _, losses = multi_task_loss(part_logits, part, TASKS, count_pixels(labels))
        total = {task: total[task] + losses[task].item() for task in TASKS}
    for task in TASKS:
        assert total[task] == pytest.approx(expected[task].item(), rel=1e-4)


def test_count_pixels():
    label = torch.tensor([[[0, 1, 255], [0, 2, 0]]])
    normals = torch.zeros(1, 3, 2, 3)
    normals[:, 1, 0, 0], normals[:, 2, 1, 1] = 255, 1
    counts = count_pixels({"a": label, "b": label.unsqueeze(1), "n": normals})
    assert {task: count.tolist() for task, count in counts.items()} == {"a": [5, 3], "b": [5, 3], "n": [5, 4]}
