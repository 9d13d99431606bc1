import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from transformers_degmix.evaluation.calibration import (
    BINS,
    REMOVED,
    Calibration,
    build_calibrations,
    calibrate_sample,
    median_angle,
)


def classes(confidence: list[float], right: list[bool], kind: str = "segmentation") -> Calibration:
    calibration = Calibration(kind)
    label = torch.ones(1, 1, len(right), dtype=torch.int64)
    prediction = torch.tensor(right).view(1, 1, -1).to(torch.int64)
    calibration.update(torch.tensor(confidence).view(1, 1, -1), prediction, label)
    return calibration


def depths(confidence, errors) -> Calibration:
    calibration = Calibration("depth")
    errors = torch.as_tensor(errors).view(1, 1, -1)
    calibration.update(torch.as_tensor(confidence).view(1, 1, -1), 2 + errors, torch.full_like(errors, 2.0))
    return calibration


def test_calibrated_predictions_have_no_error():
    confidence, right = [], []
    for percent in range(5, 100, 10):
        confidence += [percent / 100] * 100
        right += [index < percent for index in range(100)]
    calibration = classes(confidence, right)
    assert calibration.compute()["ece"] == pytest.approx(0, abs=1e-6)
    for row in calibration.reliability():
        assert row["confidence"] == pytest.approx(row["accuracy"])
    assert sum(row["count"] for row in calibration.reliability()) == 1000


@pytest.mark.parametrize("kind", ["segmentation", "saliency", "boundary"])
def test_error_of_overconfidence(kind):
    # 0.9 and right in half of the cases; 0.6 and always right; in other bins: 4 / 6 * 0.4 + 2 / 6 * 0.4
    calibration = classes([0.9, 0.9, 0.9, 0.9, 0.6, 0.6], [True, False, False, True, True, True], kind)
    assert calibration.compute()["ece"] == pytest.approx(0.4)
    assert [row["count"] for row in calibration.reliability()] == [2, 4]
    # In one bin, of 1 / 15, they make up for each other.
    assert classes([0.61, 0.65], [True, False]).compute()["ece"] == pytest.approx(0.13)


def test_strengths_are_right_on_the_likelier_side():
    calibration = Calibration("boundary")
    strength = torch.tensor([0.1, 0.6, 0.9, 0.4]).view(1, 1, 4)
    calibration.update((strength - 0.5).abs() + 0.5, strength, torch.tensor([0.0, 0.0, 1.0, 0.8]).view(1, 1, 4))
    assert [(row["accuracy"], row["count"]) for row in calibration.reliability()] == [(0, 2), (1, 2)]


def test_sparsification_by_hand():
    curves = classes([0.9, 0.8, 0.2, 0.1], [True, False, True, False]).sparsification()
    # By quarters: 2 of 4 wrong, 1 of 3, 1 of 2, 0 of 1; the oracle: 2 of 4, 1 of 3, none
    assert curves["confidence"][[0, 25, 50, 75]].tolist() == pytest.approx([1 / 2, 1 / 3, 1 / 2, 0])
    assert curves["oracle"][[0, 25, 50, 75]].tolist() == pytest.approx([1 / 2, 1 / 3, 0, 0])
    # Depth: the root of the mean square. Half of a pixel may be removed.
    curves = depths([0.9, 0.1], [3.0, 4.0]).sparsification()
    assert curves["confidence"][[0, 25, 50, 75]].tolist() == pytest.approx([12.5**0.5, (17 / 1.5) ** 0.5, 3, 3])
    assert curves["oracle"][0] == curves["confidence"][0] and len(REMOVED) == len(curves["oracle"]) == 100


def test_errors_of_normals_are_degrees():
    calibration = Calibration("normals")
    predictions = torch.tensor([[1.0, 0, 0], [0, 3.0, 0], [0, 0, 1.0]]).T.reshape(1, 3, 1, 3)
    labels = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0, 0, 0]]).T.reshape(1, 3, 1, 3)  # the last is unknown
    calibration.update(torch.tensor([0.2, 0.7, 0.9]).view(1, 1, 3), predictions, labels)
    curves = calibration.sparsification()
    assert curves["confidence"][[0, 60]].tolist() == pytest.approx([45, 90])
    assert curves["oracle"][[0, 60]].tolist() == pytest.approx([45, 0])
    assert set(calibration.compute()) == {"ause", "ause_random"}


errors = st.lists(st.integers(0, 400).map(lambda value: value / 100), min_size=2, max_size=30)


@given(errors, st.randoms())
def test_no_confidence_is_better_than_the_oracle_and_a_constant_is_random(errors, random):
    errors = torch.tensor(errors, dtype=torch.float64)
    # To the last bit, the oracle's bins
    assert depths(1 / (1 + ((2 + errors) - 2).abs()), errors).compute()["ause"] == 0
    constant = depths(torch.full_like(errors, 0.3), errors).compute()
    assert constant["ause"] == pytest.approx(constant["ause_random"])
    shuffled = depths(torch.tensor([random.random() for _ in errors]), errors).compute()
    worst = depths(errors / 5, errors).compute()
    assert -1e-9 <= shuffled["ause"] <= worst["ause"] + 1e-3
    assert worst["ause"] >= constant["ause"] - 1e-9


@given(st.lists(st.tuples(st.integers(0, 100), st.booleans()), min_size=1, max_size=40), st.randoms())
def test_order_batches_and_copies_of_pixels_do_not_matter(pixels, random):
    confidence, right = [value / 100 for value, _ in pixels], [is_right for _, is_right in pixels]
    expected = classes(confidence, right).compute()
    order = random.sample(range(len(pixels)), len(pixels))
    moved, more = ([values[i] for i in order] for values in (confidence, right))
    half = len(pixels) // 2
    split = classes(moved[:half], more[:half]) if half else Calibration("segmentation")
    for name, values in classes(moved[half:], more[half:]).sums.items():
        split.sums[name] += values
    assert split.compute() == pytest.approx(expected, abs=1e-9)
    assert classes(confidence * 3, right * 3).compute() == pytest.approx(expected, abs=1e-9)
    # Sparsification sees the order only.
    squared = classes([value**0.5 for value in confidence], right).compute()
    assert squared["ause"] == pytest.approx(expected["ause"], abs=1e-9)


def test_unlabelled_pixels_and_unknown_confidence_are_left_out():
    calibration = Calibration("segmentation")
    confidence = torch.tensor([0.9, 0.9, torch.nan, 0.9]).view(1, 1, 4)
    calibration.update(confidence, torch.tensor([[[3, 3, 3, 3]]]), torch.tensor([[[3, 255, 1, 3]]]))
    assert calibration.sums["count"].sum() == 2
    assert calibration.compute() == pytest.approx({"ause": 0, "ause_random": 0, "ece": 0.1})
    with pytest.raises(ValueError, match="no labelled pixel"):
        Calibration("depth").compute()


def test_confidences_of_0_and_1_have_bins():
    scores = classes([0.0, 1.0], [False, True]).compute()
    assert (scores["ause"], scores["ece"]) == (0, 0)


def test_consistency_of_a_sample():
    tasks = {name: {"kind": kind} for name, kind in (("up", "normals"), ("parts", "segmentation"), ("range", "depth"))}
    normals = F.normalize(torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 1.0]]), dim=1)
    predictions = {
        "up": normals[torch.arange(20) % 2][:, :, None].expand(20, 3, 30).permute(1, 0, 2),
        "parts": torch.zeros(20, 30, dtype=torch.int64),
        "range": torch.full((20, 30), 2.0),
    }
    labels = {
        "up": normals[:1, :, None, None].expand(1, 3, 20, 30),
        "parts": torch.zeros(1, 20, 30, dtype=torch.int64),
        "range": torch.full((1, 20, 30), 2.5),
    }
    confidences = {name: torch.full((20, 30), 0.5) for name in tasks}
    found = calibrate_sample(tasks, predictions, confidences, labels, 60)
    assert list(found["confidence"]) == list(tasks) and set(found["consistency"]) == {"range", "up"}
    # Half of the normals are wrong, by 45 degrees, and it is there that they contradict depth.
    assert found["consistency"]["up"].compute()["ause"] == pytest.approx(0, abs=1e-6)
    assert found["confidence"]["up"].compute()["ause"] > 0.3
    assert found["consistency"]["range"].compute()["ause_random"] == pytest.approx(0, abs=1e-6)
    assert found["confidence"]["parts"].compute()["ece"] == pytest.approx(0.5)
    counts = np.flatnonzero(found["consistency"]["up"].sums["count"])
    assert counts / BINS == pytest.approx([0.75, 1], abs=2 / BINS)
    assert median_angle(found["consistency"]) == pytest.approx(45, abs=0.02)
    del tasks["range"]
    assert not build_calibrations(tasks)["consistency"]
