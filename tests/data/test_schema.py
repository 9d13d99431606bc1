"""The schema: what goes in comes out, and what does not fit is named."""

from io import BytesIO

import datasets
import numpy as np
import pytest
from PIL import ExifTags, Image

from transformers_degmix.data.rooms import ROOMS_TASKS, load_rooms
from transformers_degmix.data.schema import encode_normals, encode_row, features_for


SIZE = (5, 7)
TASKS = {
    "semseg": {"kind": "segmentation", "id2label": {0: "wall", 1: "floor", 2: "bed"}},
    "sal": {"kind": "saliency"},
    "depth": {"kind": "depth"},
    "normals": {"kind": "normals"},
    "edge": {"kind": "boundary"},
}


def png(mode="RGB"):
    file = BytesIO()
    Image.new(mode, SIZE[::-1]).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def maps():
    rng = np.random.default_rng(0)
    return {
        "semseg": rng.choice(np.uint8([0, 2, 255]), SIZE),
        "sal": rng.choice(np.uint8([0, 1, 255]), SIZE),
        "depth": rng.random(SIZE, np.float32) * 400,
        "normals": rng.integers(0, 256, (*SIZE, 3), np.uint8),
        "edge": rng.integers(0, 256, SIZE, np.uint8),
    }


def test_round_trip(maps):
    row = encode_row("a", png(), maps, TASKS)
    data = datasets.Dataset.from_dict({key: [value] for key, value in row.items()}, features=features_for(TASKS))
    assert data[0]["image"].size == SIZE[::-1]
    for name, values in maps.items():
        stored = np.array(data[0][name])
        assert stored.dtype == values.dtype and np.array_equal(stored, values), name
    assert data[0]["semseg_classes"] == [0, 2]
    assert data.features["semseg_classes"].feature.names == ["wall", "floor", "bed"]


def test_rooms_have_this_schema(tmp_path):
    room = load_rooms("train", 1, (32, 32), cache_dir=str(tmp_path))
    assert room.features == features_for(ROOMS_TASKS)


def test_255_metres_are_not_the_ignored_label(maps):
    maps["depth"][:] = 255
    stored = np.array(Image.open(BytesIO(encode_row("a", png(), maps, TASKS)["depth"]["bytes"])))
    assert (stored < 255).all() and (stored > 254.9999).all()


def test_code_of_normals():
    normals = np.float32([[0, 0, 1], [-1, 0, 0], [0.6, -0.8, 0]])
    assert np.abs(encode_normals(normals) / 127.5 - 1 - normals).max() <= 1 / 255 + 1e-6


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("semseg", lambda m: m[:-1], r"semseg: expected the shape \(5, 7\) for an image of 5 x 7, got \(4, 7\)"),
        ("normals", lambda m: m[..., 0], r"normals: expected the shape \(5, 7, 3\)"),
        ("semseg", lambda m: np.full_like(m, 3), r"semseg: expected class ids from 0 to 2 or 255, got \[3\]"),
        ("sal", lambda m: np.full_like(m, 2), r"sal: expected class ids from 0 to 1"),
        ("edge", lambda m: m / 255, "edge: expected 8-bit values, got float64"),
        ("depth", lambda m: m.astype(np.uint16), "depth: expected floating point metres, got uint16"),
        ("depth", lambda m: np.full_like(m, np.nan), "depth: expected finite values"),
        ("depth", lambda m: -m, "depth: expected values of 0 or more, got -"),
    ],
)
def test_what_does_not_fit_is_named(maps, name, change, message):
    with pytest.raises(ValueError, match=message):
        encode_row("a", png(), {**maps, name: change(maps[name])}, TASKS)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_that_readers_would_turn_are_refused(maps, orientation):
    file, exif = BytesIO(), Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.new("RGB", SIZE[::-1]).save(file, "JPEG", exif=exif)
    if orientation == 1:
        assert encode_row("a", file.getvalue(), maps, TASKS)["image"]["bytes"] == file.getvalue()
    else:
        with pytest.raises(ValueError, match=f"image: expected EXIF orientation 1, got {orientation}: "):
            encode_row("a", file.getvalue(), maps, TASKS)


def test_image_mode(maps):
    with pytest.raises(ValueError, match="image: expected mode RGB, got LA"):
        encode_row("a", png("LA"), maps, TASKS)
