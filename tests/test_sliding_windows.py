"""Windows against sums by hand; blending that covers everything, leaves no seam and does not depend on batches."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import small_model
from torch.profiler import ProfilerActivity, profile

from transformers_degmix import DeGMixImageProcessorPil
from transformers_degmix.modeling_degmix import DeGMixDensePredictionOutput
from transformers_degmix.sliding_windows import place_windows, predict_in_windows, predict_maps_in_windows


@pytest.fixture(scope="module")
def model():
    return small_model()


def random_images(*size, num_images=1):
    return torch.randn(num_images, 3, *size, generator=torch.Generator().manual_seed(0))


def blended_by_hand(model, images, window, tops, lefts):
    """Sums of all windows' logits, each pixel weighted by its distance from the window's border, over the weights."""
    height, width = window
    weight = torch.tensor(
        [[min(i, height + 1 - i) * min(j, width + 1 - j) for j in range(1, width + 1)] for i in range(1, height + 1)]
    )
    total, sums = torch.zeros(images.shape[-2:]), {}
    for top, left in itertools.product(tops, lefts):
        rows, columns = slice(top, top + height), slice(left, left + width)
        total[rows, columns] += weight
        with torch.no_grad():
            logits = model(images[:, :, rows, columns]).logits
        for task, maps in logits.items():
            sums.setdefault(task, torch.zeros(*maps.shape[:2], *images.shape[-2:]))
            sums[task][:, :, rows, columns] += weight * maps
    return {task: maps / total for task, maps in sums.items()}


def assert_equal_logits(found, expected):
    assert list(found) == list(expected)
    for task, maps in expected.items():
        torch.testing.assert_close(found[task], maps, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_logits_are_those_of_the_windows_weighted_by_hand(model, batch_size):
    images = random_images(70, 100, num_images=2)
    found = predict_in_windows(model, images, (40, 48), overlap=0.25, batch_size=batch_size).logits
    expected = blended_by_hand(model, images, (40, 48), tops=[0, 30], lefts=[0, 26, 52])
    assert_equal_logits(found, expected)
    with torch.no_grad():
        whole = model(images).logits
    assert (found["depth"] - whole["depth"]).abs().max() > 0.01  # the model does see the windows' borders


@pytest.mark.parametrize(("window", "used"), [((50, 60), (50, 60)), ((64, 64), (50, 60)), ((64, 40), (50, 40))])
def test_windows_are_no_larger_than_the_image(model, window, used):
    images = random_images(50, 60)
    lefts = [0] if used[1] == 60 else [0, 20]
    assert_equal_logits(
        predict_in_windows(model, images, window).logits, blended_by_hand(model, images, used, [0], lefts)
    )


def test_a_window_of_the_images_size_is_the_model_itself(model):
    images = random_images(40, 48)
    with torch.no_grad():
        expected = model(images).logits
    assert_equal_logits(predict_in_windows(model, images, (40, 48), overlap=0.9).logits, expected)


def test_a_prediction_that_is_the_same_everywhere_stays():
    constant = small_model()
    with torch.no_grad():
        for head in constant.heads.values():
            head.classifier.weight.zero_()
        expected = constant(random_images(33, 32)).logits
    for task, maps in predict_in_windows(constant, random_images(90, 75), (33, 32), 0.3).logits.items():
        torch.testing.assert_close(maps, expected[task][..., :1, :1].expand_as(maps))


@given(length=st.integers(1, 400), window=st.integers(1, 200), overlap=st.floats(0, 0.99))
def test_windows_cover_the_axis_and_their_weights_sum_to_one(length, window, overlap):
    window = min(window, length)
    starts, weights = place_windows(length, window, overlap)
    assert weights.shape == (len(starts), window) and (weights > 0).all()
    assert starts[0] == 0 and starts[-1] == length - window
    steps = np.diff(starts)
    assert len(starts) == 1 or ((steps > 0).all() and (window == 1 or window - steps.max() >= int(overlap * window)))
    # None could be left out.
    assert len(starts) < 3 or (length - window) / (len(starts) - 2) > max(1, int(window * (1 - overlap)))
    total = np.zeros(length)
    for start, weight in zip(starts, weights.numpy()):
        total[start : start + window] += weight
    np.testing.assert_allclose(total, 1, rtol=1e-5)


def window_means(pixel_values):
    """A model whose prediction is one number in the whole window, and another in the next."""
    means = pixel_values[:, :1].mean(dim=(2, 3), keepdim=True)
    return DeGMixDensePredictionOutput(logits={"depth": means.expand(-1, 1, *pixel_values.shape[-2:])})


def largest_jump(overlap):
    columns = torch.linspace(0, 1, 200).expand(1, 3, 32, 200)
    (blended,) = predict_in_windows(window_means, columns, (32, 40), overlap).logits.values()
    return blended.diff(dim=-1).abs().max().item()


def test_windows_that_disagree_leave_no_seams():
    assert largest_jump(0) == pytest.approx(40 / 199)  # side by side, all of the disagreement in one pixel
    # 7 windows, 26 or 27 columns apart: over the 13 or 14 that two share, linearly.
    assert largest_jump(0.32) == pytest.approx(27 / 199 / 14, rel=0.05)


@pytest.mark.parametrize("window", [(31, 64), (64, 0), (64,), (64, 64, 64)])
def test_bad_windows_are_named(model, window):
    with pytest.raises(ValueError, match=r"`window_size` must be \(height, width\), 32 or more"):
        predict_in_windows(model, random_images(64, 64), window)


@pytest.mark.parametrize("overlap", [-0.1, 1.0, float("nan")])
def test_bad_overlaps_are_named(model, overlap):
    with pytest.raises(ValueError, match=rf"overlap of windows must be a share in \[0, 1\), got {overlap}"):
        predict_in_windows(model, random_images(64, 64), (32, 32), overlap)


def test_logits_are_float32_and_need_no_gradients():
    model = small_model().bfloat16()
    logits = predict_in_windows(model, random_images(40, 40).bfloat16(), (32, 32)).logits
    assert all(maps.dtype == torch.float32 and not maps.requires_grad for maps in logits.values())


@pytest.mark.parametrize("overlap", [0, 0.25, 0.6])
def test_maps_made_band_by_band_are_those_of_all_logits(model, overlap):
    processor = DeGMixImageProcessorPil(tasks=model.config.tasks)
    images = random_images(100, 70, num_images=2)
    seen = []

    def post_process(outputs):
        seen.append(outputs.logits["depth"].shape[2])
        return processor.post_process_dense_prediction(outputs)

    found = predict_maps_in_windows(model, images, post_process, (40, 48), overlap, batch_size=3)
    expected = processor.post_process_dense_prediction(predict_in_windows(model, images, (40, 48), overlap))
    assert len(seen) > 1 and max(seen) <= 40 and sum(seen) == 100
    for maps, expected_maps in zip(found, expected, strict=True):
        assert list(maps) == list(expected_maps)
        for task, values in expected_maps.items():
            assert maps[task].dtype == values.dtype
            if values.dtype == torch.int64:
                assert (maps[task] == values).float().mean() > 0.999
            else:
                torch.testing.assert_close(maps[task], values, atol=1e-4, rtol=1e-4)


def test_a_prediction_that_depends_on_the_place_in_the_window_stays_smooth():
    def model(pixel_values):
        down, across = (torch.linspace(-1, 1, length) for length in pixel_values.shape[-2:])
        return DeGMixDensePredictionOutput(logits={"depth": pixel_values[:, :1] + down[:, None] + across})

    rows, columns = torch.linspace(0, 4, 128)[:, None], torch.linspace(0, 6, 192)
    image = (rows.sin() * columns.cos()).expand(1, 3, -1, -1)

    def largest_jump(overlap):
        depth = predict_in_windows(model, image, (64, 64), overlap).logits["depth"]
        return max(depth.diff(dim=axis).abs().max().item() for axis in (-2, -1))

    assert largest_jump(0) > 1  # side by side, windows end at 1 and begin at -1
    assert largest_jump(0.5) < 0.15  # but for the image, two slopes of 2 / 64 and what one window leaves to the other


def test_logits_in_memory_do_not_grow_with_the_height():
    """Forty classes: all logits of the higher image would take 30 MB."""

    def classes(pixel_values):
        return DeGMixDensePredictionOutput(logits={"semseg": pixel_values[:, :1].expand(-1, 40, -1, -1)})

    def largest(height):
        pixel_values = torch.zeros(1, 3, height, 100)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            predict_maps_in_windows(
                classes, pixel_values, lambda outputs: [{"semseg": outputs.logits["semseg"][0, 0]}], (40, 40)
            )
        now = peak = 0
        for event in recorded.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                peak = max(peak, now)
        return peak - 4 * height * 100  # the map

    assert largest(2000) < 1.1 * largest(200) < 5e6
