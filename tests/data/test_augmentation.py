"""Augmentation: what moves together, what keeps its values, and colours against the standard library's."""

from colorsys import hsv_to_rgb, rgb_to_hsv

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_models import ALL_KINDS, random_labels

from transformers_degmix.data.augmentation import (
    MAX_CLASS_FRACTION,
    Augmentation,
    Window,
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    draw_window,
    largest_class_fraction,
    turn_hue,
)
from transformers_degmix.data.rooms import render_room, sample_room
from transformers_degmix.images_degmix import decode_label
from transformers_degmix.tasks import TASK_KINDS


KINDS = {name: task["kind"] for name, task in ALL_KINDS.items()}
COLORS_AS_THEY_ARE = {"brightness": 0.0, "contrast": (1.0, 1.0), "saturation": (1.0, 1.0), "hue": 0.0}

seeds = st.integers(0, 2**32 - 1)
lengths = st.integers(1, 24)


def random_maps(seed, height, width):
    """Maps of every kind `(channels, height, width)`, ignored and unknown pixels among them."""
    torch.manual_seed(seed)
    labels = random_labels(ALL_KINDS, 1, height, width)
    labels["depth"][torch.rand(1, height, width) < 0.2] = 0
    labels["normals"][(torch.rand(1, 1, height, width) < 0.2).expand(-1, 3, -1, -1)] = 0
    return {task: (label[0] if label.ndim == 4 else label).numpy() for task, label in labels.items()}


def random_pixels(seed, height, width):
    return np.random.default_rng(seed).uniform(0, 255, (3, height, width)).astype(np.float32)


def pixel_set(label):
    """The values of all pixels, as a set of tuples over the channels."""
    return {tuple(pixel) for pixel in label.reshape(len(label), -1).T.tolist()}


def augment_labels(labels, size, scale=1.0, flip=False):
    augmentation = Augmentation(size, scale=(scale, scale), flip_probability=float(flip))
    height, width = labels["semseg"].shape[-2:]
    return augmentation(random_pixels(0, height, width), labels, KINDS, np.random.default_rng(0))[1]


def without_unknown(task, label):
    """What is expected of maps whose values stay: those of unknown pixels are 255."""
    return np.where(TASK_KINDS[KINDS[task]].unknown(label), label.dtype.type(255), label)


@given(seeds, lengths, lengths)
def test_flipping_twice_is_the_identity(seed, height, width):
    labels, size = random_maps(seed, height, width), (height, width)
    twice = augment_labels(augment_labels(labels, size, flip=True), size, flip=True)
    for task, label in labels.items():
        np.testing.assert_array_equal(twice[task], without_unknown(task, label))


@given(seeds, lengths, lengths)
def test_flipped_values(seed, height, width):
    labels = random_maps(seed, height, width)
    for task, flipped in augment_labels(labels, (height, width), flip=True).items():
        mirrored = without_unknown(task, labels[task])[..., ::-1]
        if task == "normals":
            mirrored[0] = np.where(mirrored[0] == 255, 255, -mirrored[0])
        np.testing.assert_array_equal(flipped, mirrored)


@given(seeds, st.floats(0.5, 2))
def test_scale_divides_depth_and_nothing_else(seed, scale):
    labels = random_maps(seed, 1, 1)
    for task, rescaled in augment_labels(labels, (1, 1), scale).items():
        expected = without_unknown(task, labels[task])
        if task == "depth":
            expected = np.where(expected == 255, expected, expected / scale)
        np.testing.assert_array_equal(rescaled, expected)


@given(seeds, lengths, lengths, st.floats(0.5, 2), st.booleans())
def test_8_bit_maps_may_be_decoded_before_or_after(seed, height, width, scale, flip):
    rng = np.random.default_rng(seed)
    kinds = {task: TASK_KINDS[kind] for task, kind in KINDS.items()}
    coded = {
        task: rng.integers(0, 256, (kind.label_channels, height, width), np.uint8) for task, kind in kinds.items()
    }
    coded["normals"][:, rng.random((height, width)) < 0.2] = 0
    decoded = {task: decode_label(label, kinds[task]) for task, label in coded.items()}
    labels, expected = (augment_labels(maps, (12, 12), scale, flip) for maps in (coded, decoded))
    for task, label in labels.items():
        assert label.dtype == kinds[task].array_dtype
        np.testing.assert_array_equal(label, expected[task])


@settings(max_examples=50)
@given(seeds, lengths, lengths, st.floats(0.5, 2), lengths, lengths)
def test_labels_are_never_interpolated(seed, height, width, scale, crop_height, crop_width):
    labels = random_maps(seed, height, width)
    augmentation = Augmentation((crop_height, crop_width), scale=(scale, scale), flip_probability=0.0)
    rng = np.random.default_rng(seed)
    pixels, augmented = augmentation(random_pixels(seed, height, width), labels, KINDS, rng)
    size = tuple(min(crop, max(1, round(own * scale))) for crop, own in ((crop_height, height), (crop_width, width)))
    assert pixels.shape == (3, *size)
    for task, label in augmented.items():
        assert label.dtype == labels[task].dtype and label.shape[-2:] == size
        expected = without_unknown(task, labels[task])
        if task == "depth":
            expected = np.where(expected == 255, expected, expected / scale)
        assert pixel_set(label) <= pixel_set(expected)


@settings(max_examples=50)
@given(seeds, lengths, lengths, lengths, lengths, st.data())
def test_window_is_part_of_the_whole_image_resized(seed, height, width, scaled_height, scaled_width, data):
    top, left = (data.draw(st.integers(0, whole - 1)) for whole in (scaled_height, scaled_width))
    size = (data.draw(st.integers(1, scaled_height - top)), data.draw(st.integers(1, scaled_width - left)))
    window = Window((scaled_height, scaled_width), (top, left), size)
    part = np.s_[top : top + size[0], left : left + size[1]]
    channel = random_pixels(seed, height, width)[0]

    whole = np.array(Image.fromarray(channel).resize((scaled_width, scaled_height), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(window.of_image(channel[None])[0], whole[part], atol=1e-2)
    ids = np.arange(height * width, dtype=np.int32).reshape(height, width)
    seen = np.divmod(window.of_label(ids[None])[0], width)
    for axis, (own, scaled, start) in enumerate(((height, scaled_height, top), (width, scaled_width, left))):
        centers = (np.indices(size)[axis] + start + 0.5) / scaled * own
        assert np.abs(seen[axis] + 0.5 - centers).max() <= 0.5 + 1e-9


@settings(max_examples=40)
@given(seeds, st.floats(0.5, 2))
def test_image_and_labels_move_together(seed, scale):
    """Every map holds the columns of its pixels; so must every augmented map, at the same places."""
    height, width = 40, 60
    columns = np.tile(np.arange(width, dtype=np.float32), (1, height, 1))
    labels = {"semseg": columns.astype(np.int64), "depth": 1 + columns, "edge": columns / width}
    pixels = columns.repeat(3, axis=0)
    augmentation = Augmentation((32, 48), scale=(scale, scale), **COLORS_AS_THEY_ARE)
    kinds = {"semseg": "segmentation", "depth": "depth", "edge": "boundary"}
    pixels, labels = augmentation(pixels, labels, kinds, np.random.default_rng(seed))
    seen = labels["semseg"]
    np.testing.assert_allclose(labels["depth"] * scale - 1, seen, atol=1e-3)
    np.testing.assert_allclose(labels["edge"] * width, seen, atol=1e-3)
    # Nearest and bilinear differ by half a pixel of the finer grid, at the image's border by as much again.
    assert np.abs(pixels - seen).max() <= 0.5 * max(1, 1 / scale) + 0.51


@pytest.mark.parametrize("seed", range(8))
def test_normals_agree_with_depth_on_rooms(seed):
    """Points of one plane, found from augmented depth and the changed camera, lie at right angles to its normal."""
    size, scale = (72, 96), (0.6, 1.7)[seed % 2]
    room, camera = render_room("train", seed, size), sample_room("train", seed).camera
    rows, columns = np.indices(size, dtype=np.float32) / 1000
    labels = {
        "semseg": room["semseg"][None],
        "depth": room["depth"][None],
        "normals": np.moveaxis(room["normals"], -1, 0),
        # where a pixel comes from
        "row": rows[None],
        "column": columns[None],
    }
    kinds = {"semseg": "segmentation", "depth": "depth", "normals": "normals", "row": "boundary", "column": "boundary"}
    augmentation = Augmentation((60, 80), scale=(scale, scale), flip_probability=seed // 2 % 2)
    pixels = room["image"].transpose(2, 0, 1).astype(np.float32)
    _, labels = augmentation(pixels, labels, kinds, np.random.default_rng(seed))

    # The camera's frame has y down and z forward, that of normals x to the right, y down and z backward.
    (focal, _, center_x), (_, _, center_y), _ = camera.intrinsics(size)
    mirror = -1 if labels["column"][0, 0, 0] > labels["column"][0, 0, -1] else 1
    assert mirror == (-1 if augmentation.flip_probability else 1)
    x = mirror * (labels["column"][0] * 1000 - center_x) / focal
    y = (labels["row"][0] * 1000 - center_y) / focal
    points = labels["depth"] * np.stack([x, y, -np.ones_like(x)])
    normals = labels["normals"]
    for a, b in ((np.s_[:, :, :-2], np.s_[:, :, 2:]), (np.s_[:, :-2], np.s_[:, 2:])):
        flat = np.abs(normals[a] - normals[b]).max(axis=0) < 1e-5
        flat &= (labels["semseg"][a] == labels["semseg"][b])[0]
        step, normal = (points[b] - points[a])[:, flat], normals[a][:, flat]
        sine = np.abs((step * normal).sum(axis=0)) / np.linalg.norm(step, axis=0)
        # Not all: neighbours may lie on parallel planes, such as those of two shelves.
        for chosen in (sine, sine[np.abs(normal[0]) > 0.2]):
            assert len(chosen) > 100 and (chosen < 0.01).mean() > 0.8
    source = room["depth"][tuple((labels[axis][0] * 1000).round().astype(int) for axis in ("row", "column"))]
    np.testing.assert_allclose(labels["depth"][0], source / scale, rtol=1e-6)


def test_crops_avoid_one_class():
    classes = np.zeros((1, 60, 60), np.uint8)
    classes[:, :, 40:] = 1
    fractions = []
    for seed in range(200):
        window = draw_window((60, 60), (20, 20), classes, np.random.default_rng(seed))
        fractions.append(largest_class_fraction(window.of_label(classes)))
    # A third of all positions lie across the border well enough, so that ten tries fail twice in a hundred.
    assert np.mean(np.array(fractions) <= MAX_CLASS_FRACTION) > 0.9
    blind = [draw_window((60, 60), (20, 20), None, np.random.default_rng(seed)) for seed in range(200)]
    assert np.mean([largest_class_fraction(window.of_label(classes)) <= MAX_CLASS_FRACTION for window in blind]) < 0.5


def test_crops_that_must_show_one_class_end():
    classes = np.full((1, 60, 60), 3)
    assert draw_window((60, 60), (20, 20), classes, np.random.default_rng(0)).size == (20, 20)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(0, 100))
def test_class_fractions_count_labelled_pixels(counts, ignored):
    classes = np.array([index for index, count in enumerate(counts) for _ in range(count)] + [255] * ignored, np.int64)
    expected = max(counts) / sum(counts) if sum(counts) else 0
    assert largest_class_fraction(classes.reshape(1, 1, -1)) == pytest.approx(expected)


channels = st.floats(0, 255, width=32)


def apply_to_pixel(adjust, pixel, amount):
    return adjust(np.array(pixel, np.float32).reshape(3, 1, 1), amount).ravel()


@given(st.tuples(channels, channels, channels), st.floats(0, 3))
def test_saturation_is_that_of_hsv(pixel, factor):
    hue, saturation, value = rgb_to_hsv(*(channel / 255 for channel in pixel))
    expected = np.array(hsv_to_rgb(hue, min(saturation * factor, 1), value)) * 255
    np.testing.assert_allclose(apply_to_pixel(adjust_saturation, pixel, factor), expected, atol=1e-2)


@given(st.tuples(channels, channels, channels), st.floats(-90, 90))
def test_hue_is_that_of_hsv(pixel, amount):
    hue, saturation, value = rgb_to_hsv(*(channel / 255 for channel in pixel))
    expected = np.array(hsv_to_rgb((hue + amount / 180) % 1, saturation, value)) * 255
    np.testing.assert_allclose(apply_to_pixel(turn_hue, pixel, amount), expected, atol=2e-2)


@given(st.tuples(channels, channels, channels), st.floats(-255, 255), st.floats(0, 3))
def test_brightness_and_contrast(pixel, summand, factor):
    pixel = np.array(pixel, np.float32)
    np.testing.assert_allclose(
        apply_to_pixel(adjust_brightness, pixel, summand), np.clip(pixel + summand, 0, 255), atol=1e-3
    )
    np.testing.assert_allclose(
        apply_to_pixel(adjust_contrast, pixel, factor), np.clip(pixel * factor, 0, 255), atol=1e-3
    )


@given(seeds)
def test_distorted_colors_stay_in_range(seed):
    pixels = random_pixels(seed, 8, 9)
    distorted = Augmentation((8, 9)).distort(pixels, np.random.default_rng(seed))
    assert distorted.shape == pixels.shape and distorted.dtype == np.float32
    assert distorted.min() >= -1e-3 and distorted.max() <= 255 + 1e-3


def test_each_adjustment_has_its_chance():
    """What a color becomes tells which of the four were drawn: 16 combinations, one of them nothing at all."""
    pixels, unchanged = random_pixels(0, 4, 4), 0
    augmentations = {
        name: Augmentation((4, 4), **{**COLORS_AS_THEY_ARE, name: value})
        for name, value in (("brightness", 32.0), ("contrast", (0.5, 0.9)), ("saturation", (0.5, 0.9)), ("hue", 18.0))
    }
    changes = []
    for seed in range(400):
        unchanged += np.array_equal(Augmentation((4, 4)).distort(pixels, np.random.default_rng(seed)), pixels)
        changes.append(
            [
                np.abs(augmentation.distort(pixels, np.random.default_rng(seed)) - pixels).max() > 1e-2
                for augmentation in augmentations.values()
            ]
        )
    assert 10 <= unchanged <= 45  # 25 are expected
    assert np.all(np.abs(np.mean(changes, axis=0) - 0.5) < 0.1)
    assert len({tuple(change) for change in changes}) == 16


def test_contrast_comes_before_or_after_saturation_and_hue():
    """Contrast that clips everything to white leaves nothing to turn; after a turn, it clips the turned color."""
    pixels = np.array([200, 50, 0], np.float32).reshape(3, 1, 1)
    augmentation = Augmentation((1, 1), brightness=0.0, contrast=(9, 9), saturation=(0.5, 0.5), hue=0.0)
    results = {
        tuple(augmentation.distort(pixels, np.random.default_rng(seed)).ravel().round().tolist()) for seed in range(60)
    }
    # untouched; contrast; saturation; contrast, then saturation; saturation, then contrast
    expected = {(200, 50, 0), (255, 255, 0), (200, 125, 100), (255, 255, 128), (255, 255, 255)}
    assert results == expected


def test_draws_are_as_published():
    scales, flips = [], 0
    columns = np.tile(np.arange(100), (1, 8, 1))
    for seed in range(300):
        _, labels = Augmentation((4000, 4000))(
            np.zeros((3, 8, 100), np.float32),
            {"semseg": columns},
            {"semseg": "segmentation"},
            np.random.default_rng(seed),
        )
        scales.append(labels["semseg"].shape[-1] / 100)
        flips += bool(labels["semseg"][0, 0, 0] > 50)
    assert 0.5 <= min(scales) < 0.52 and 1.98 < max(scales) <= 2
    assert np.mean(scales) == pytest.approx(1.25, abs=0.1)
    assert flips / 300 == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    "fields",
    [
        {"size": (0, 5)},
        {"size": (5,)},
        {"scale": (0.0, 1.0)},
        {"scale": (2.0, 1.0)},
        {"contrast": (-0.1, 1.0)},
        {"saturation": (1.0, float("nan"))},
        {"flip_probability": 1.5},
        {"brightness": -1.0},
        {"hue": float("nan")},
        *[{"size": 3}, {"size": (2.5, 3)}, {"size": ["a", "b"]}],
        *[{"scale": 2}, {"contrast": (1, "b")}, {"saturation": None}, {"hue": "x"}, {"brightness": [1]}],
    ],
)
def test_fields_out_of_range(fields):
    with pytest.raises(ValueError, match=f"`{next(iter(fields))}` must be"):
        Augmentation(**{"size": (4, 4), **fields})
