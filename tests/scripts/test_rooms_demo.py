"""The constant predictions that the demo compares a model with."""

import runpy

import pytest
import torch
from commands import SCRIPTS
from small_models import ALL_KINDS, random_labels

from transformers_degmix import DeGMixConfig


TASKS = DeGMixConfig(tasks=ALL_KINDS).tasks


@pytest.fixture(scope="module")
def demo():
    return runpy.run_path(str(SCRIPTS / "rooms_demo.py"))


def test_best_constants(demo):
    best = demo["best_constant"]
    assert best("segmentation", torch.tensor([3, 1, 3, 2])) == 3
    assert best("depth", torch.tensor([1.0, 9.0, 2.0])) == 2
    normal = best("normals", torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    torch.testing.assert_close(normal, torch.tensor([0.5**0.5, 0.5**0.5, 0.0]))


def test_constant_scores(demo):
    labels = random_labels(TASKS, 4, 6, 7)
    scores = demo["constant_scores"](TASKS, [{"labels": labels}], [{"labels": labels}])
    depth, classes = (labels[name][labels[name] != 255] for name in ("depth", "semseg"))
    assert scores["depth"]["rmse"] == pytest.approx((depth - depth.median()).square().mean().sqrt().item())
    assert scores["semseg"]["pixel_accuracy"] == pytest.approx(
        (classes == classes.mode().values).float().mean().item()
    )
    assert set(scores) == set(TASKS)
    unlabelled = {**labels, "semseg": torch.full_like(labels["semseg"], 255)}
    left = demo["constant_scores"](TASKS, [{"labels": unlabelled}], [{"labels": labels}])
    assert left == {name: values for name, values in scores.items() if name != "semseg"}
