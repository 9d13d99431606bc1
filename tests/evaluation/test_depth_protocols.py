"""The depth protocols that papers compare by, against NumPy's way of writing them."""

import numpy as np
import pytest
import torch

from transformers_degmix.evaluation.depth import adapt_depth, crop_depth
from transformers_degmix.evaluation.whole_images import Protocol, score_sample


TASKS = {"depth": {"kind": "depth", "num_labels": 1}}


def expected_scores(prediction, label, region, max_depth, median_scaling):
    """As the evaluation scripts for KITTI's Eigen split do it."""
    height, width = label.shape
    mask = (label > 0) & (label < max_depth)
    if region:
        top, bottom, left, right = region
        crop = np.zeros_like(mask)
        crop[int(top * height) : int(bottom * height), int(left * width) : int(right * width)] = True
        mask &= crop
    prediction, label = prediction[mask], label[mask]
    if median_scaling:
        prediction = prediction * (np.median(label) / np.median(prediction))
    prediction = prediction.clip(1e-3, max_depth)
    ratio = np.maximum(prediction / label, label / prediction)
    return {
        "rmse": np.sqrt(((prediction - label) ** 2).mean()),
        "abs_rel": (np.abs(prediction - label) / label).mean(),
        "delta1": (ratio < 1.25).mean(),
    }


REGIONS = {
    "eigen": (0.3324324, 0.91351351, 0.0359477, 0.96405229),
    "garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),
    None: None,
}


@pytest.mark.parametrize("crop", REGIONS)
@pytest.mark.parametrize("median_scaling", [False, True])
def test_scores_are_those_of_the_usual_scripts(crop, median_scaling):
    rng = np.random.default_rng(0)
    label = rng.uniform(1, 100, (37, 122)).astype(np.float32)
    label[rng.random(label.shape) < 0.3] = 0
    prediction = (0.4 * label + rng.uniform(0, 60, label.shape)).astype(np.float32)
    protocol = Protocol(depth_crop=crop, max_depth=80, median_scaling=median_scaling)
    scored = crop_depth(torch.from_numpy(label)[None], crop, 80)
    metrics, _, _ = score_sample(TASKS, protocol, {"depth": torch.from_numpy(prediction)}, {}, {"depth": scored})
    found = metrics["depth"].compute()
    for name, value in expected_scores(prediction, label, REGIONS[crop], 80, median_scaling).items():
        assert found[name] == pytest.approx(value, rel=1e-5)


def test_crop_of_nyud():
    scored = crop_depth(torch.ones(1, 480, 640), "eigen", None)[0]
    expected = np.zeros((480, 640))
    expected[45:471, 41:601] = 1
    assert np.array_equal(scored, expected)


def test_nothing_to_scale_by():
    prediction = torch.ones(1, 2, 3)
    assert torch.equal(adapt_depth(prediction, torch.zeros(1, 2, 3), True, None), prediction)


@pytest.mark.parametrize("fields", [{"depth_crop": "kb"}, {"max_depth": 0}, {"max_depth": float("nan")}])
def test_bad_protocols_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        Protocol(**fields)
