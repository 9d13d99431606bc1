import pickle

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from transformers_degmix.loss_degmix import LOSSES
from transformers_degmix.tasks import IGNORE_INDEX, TASK_KINDS, label_palette


def random_prediction(kind, height=5, width=7):
    row = TASK_KINDS[kind]
    return row.activation(torch.randn(2, row.num_logits or 4, height, width))


def test_every_kind_has_a_loss():
    assert set(LOSSES) == set(TASK_KINDS)


@pytest.mark.parametrize("kind", TASK_KINDS)
def test_loaders_that_are_not_forked_have_the_same_kinds(kind):
    assert pickle.loads(pickle.dumps({"tasks": [TASK_KINDS[kind]]})) == {"tasks": [TASK_KINDS[kind]]}


@pytest.mark.parametrize("kind", TASK_KINDS)
def test_activation_gives_the_kind_of_map(kind):
    prediction = random_prediction(kind)
    assert prediction.shape == ((2, 3, 5, 7) if TASK_KINDS[kind].label_channels == 3 else (2, 5, 7))
    assert prediction.dtype == TASK_KINDS[kind].label_dtype or kind == "saliency"
    if kind in ("saliency", "boundary"):
        assert prediction.min() >= 0 and prediction.max() <= 1
    if kind == "depth":
        assert prediction.min() == 0  # negative logits are clipped
    if kind == "normals":
        torch.testing.assert_close(prediction.norm(dim=1), torch.ones(2, 5, 7))


@pytest.mark.parametrize("kind", TASK_KINDS)
def test_mirroring_twice_is_the_identity(kind):
    prediction, flip = random_prediction(kind).numpy(), TASK_KINDS[kind].flip
    assert np.array_equal(flip(flip(prediction)), prediction)


def test_only_the_x_component_of_normals_is_mirrored():
    normals = np.array([0.6, 0.0, 0.8]).reshape(3, 1, 1)
    assert TASK_KINDS["normals"].flip(normals).ravel().tolist() == [-0.6, 0.0, 0.8]


def test_enlarging_an_image_brings_depth_nearer():
    depth = np.array([[4.0]])
    assert TASK_KINDS["depth"].rescale(depth, 2.0).item() == 2
    assert TASK_KINDS["boundary"].rescale(depth, 2.0) is depth


@given(st.integers(1, 255), st.integers(0, 255), st.integers(0, 255))
def test_8_bit_normals_are_decoded_within_half_a_step(x, y, z):
    assume(not all(126 <= value <= 129 for value in (x, y, z)))  # mid-grey stands for unknown
    image = np.array([x, y, z], np.uint8).reshape(3, 1, 1)
    decoded = TASK_KINDS["normals"].decode(image)
    assert decoded.min() >= -1 and decoded.max() <= 1
    assert np.array_equal(((decoded + 1) / 2 * 255).round().astype(np.uint8), image)


def test_black_pixels_of_8_bit_normals_are_unknown():
    image = np.array([[0, 0, 0], [0, 0, 1]], np.uint8).T.reshape(3, 1, 2)
    decoded = TASK_KINDS["normals"].decode(image)
    assert not decoded[..., 0].any() and decoded[0, 0, 1] == -1
    assert TASK_KINDS["normals"].unknown(decoded).flatten().tolist() == [True, False]


@pytest.mark.parametrize("maps", [torch.tensor, np.array])
def test_unknown_pixels(maps):
    assert TASK_KINDS["depth"].unknown(maps([0.0, 1.5, 255.0])).tolist() == [True, False, True]
    assert TASK_KINDS["segmentation"].unknown(maps([0, 3, IGNORE_INDEX])).tolist() == [False, False, True]
    normals = maps([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 255.0, 0.0]]).T.reshape(3, 1, 3)
    assert TASK_KINDS["normals"].unknown(normals).flatten().tolist() == [False, True, True]


def test_palette_colours_are_distinct():
    colours = {tuple(colour) for colour in label_palette(255).tolist()}
    assert len(colours) == 255


@pytest.mark.parametrize("kind", TASK_KINDS)
def test_colours(kind):
    row = TASK_KINDS[kind]
    picture = row.colorize(random_prediction(kind)[0], row.value_range or (0.0, 2.0))
    assert picture.shape == (3, 5, 7) and picture.dtype == torch.uint8


@pytest.mark.parametrize("kind", TASK_KINDS)
@pytest.mark.parametrize("size", [(1, 1), (3, 40), (37, 41)])
def test_confidence_is_a_map_between_0_and_1(kind, size):
    logits = 5 * torch.randn(2, TASK_KINDS[kind].num_logits or 4, *size)
    confidence = TASK_KINDS[kind].confidence(logits)
    assert confidence.shape == (2, *size) and confidence.dtype == torch.float32
    assert confidence.min() >= 0 and confidence.max() <= 1
    # Of each image by itself
    torch.testing.assert_close(TASK_KINDS[kind].confidence(logits[1:]), confidence[1:])


def test_confidence_of_classes_and_sides_is_their_probability():
    logits = torch.tensor([1.0, 3.0, 2.0]).log().view(1, 3, 1, 1)
    assert TASK_KINDS["segmentation"].confidence(logits).item() == pytest.approx(0.5)
    assert TASK_KINDS["saliency"].confidence(logits[:, :2]).item() == pytest.approx(0.75)
    strengths = torch.tensor([3.0, 1 / 3]).log().view(1, 1, 1, 2)
    assert TASK_KINDS["boundary"].confidence(strengths).flatten().tolist() == pytest.approx([0.75, 0.75])


def test_depth_is_surer_near_and_far_from_jumps():
    depth = torch.full((1, 1, 20, 100), 2.0)
    depth[..., 60:] = 4.0
    confidence = TASK_KINDS["depth"].confidence(depth)[0]
    # A window of 21 pixels: 10 and more away from the jump there is none.
    assert confidence[:, :50].flatten().tolist() == pytest.approx([1 / 3] * 1000, abs=2e-3)
    assert confidence[:, 70:].flatten().tolist() == pytest.approx([1 / 5] * 600, abs=2e-3)
    # At the last pixel before it, half of the window's pixels but one lie behind it: mean 62 / 21, variance 440 / 441.
    assert confidence[3, 59].item() == pytest.approx(1 / (1 + 62 / 21 + 4 * (440 / 441) ** 0.5), abs=1e-3)
    assert (confidence.diff(dim=1)[:, 50:59] < 0).all()


def test_normals_are_surer_where_they_agree():
    logits = torch.zeros(1, 3, 20, 100)
    logits[:, 0, :, :50], logits[:, 2, :, 50:] = 7.0, 0.1  # lengths do not matter
    confidence = TASK_KINDS["normals"].confidence(logits)[0]
    assert confidence[:, :48].min() > 0.999 and confidence[:, 52:].min() > 0.999
    # In a window of 5 pixels, 3 lie on the own side of the edge.
    expected = 1 - np.degrees(np.arccos(np.hypot(3, 2) / 5)) / 90
    assert confidence[5, 49].item() == pytest.approx(expected, abs=1e-4)


def test_colours_of_known_values():
    assert TASK_KINDS["boundary"].colorize(torch.tensor([[1.0]]), (0, 1)).flatten().tolist() == [255] * 3
    towards_camera = torch.tensor([0.0, 0.0, 1.0]).view(3, 1, 1)
    assert TASK_KINDS["normals"].colorize(towards_camera, (-1, 1)).flatten().tolist() == [128, 128, 255]
    ends = TASK_KINDS["depth"].colorize(torch.tensor([[1.0, 3.0]]), (1, 3)).permute(1, 2, 0)
    assert ends.tolist() == [[[68, 1, 84], [253, 231, 37]]]
