"""Cityscapes: a miniature of the archive against an independent reading of its files."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_data import regions

from transformers_degmix.data.cityscapes import Cityscapes, decode_disparity
from transformers_degmix.data.schema import encode_row


SIZE = (6, 12)
IDS = {"train": ["aachen_000000_000019", "ulm_000001_000019"], "val": ["lindau_000000_000019"]}
# Class and category by the names of the ids, for the classes that the benchmark scores.
SCORED = {
    7: ("road", "flat"), 8: ("sidewalk", "flat"), 11: ("building", "construction"), 12: ("wall", "construction"),
    13: ("fence", "construction"), 17: ("pole", "object"), 19: ("traffic light", "object"),
    20: ("traffic sign", "object"), 21: ("vegetation", "nature"), 22: ("terrain", "nature"), 23: ("sky", "sky"),
    24: ("person", "human"), 25: ("rider", "human"), 26: ("car", "vehicle"), 27: ("truck", "vehicle"),
    28: ("bus", "vehicle"), 31: ("train", "vehicle"), 32: ("motorcycle", "vehicle"), 33: ("bicycle", "vehicle"),
}  # fmt: skip


def paths(root: Path, split: str, image_id: str) -> dict[str, Path]:
    city = image_id.split("_")[0]
    return {
        "image": root / f"leftImg8bit/{split}/{city}/{image_id}_leftImg8bit.png",
        "labels": root / f"gtFine/{split}/{city}/{image_id}_gtFine_labelIds.png",
        "disparity": root / f"disparity/{split}/{city}/{image_id}_disparity.png",
        "camera": root / f"camera/{split}/{city}/{image_id}_camera.json",
    }


def write_cityscapes(folder: Path, cameras: bool = True) -> Path:
    """An archive of random images, with maps that look like labels and the files that nobody needs, unpacked in
    `folder / "cityscapes"`."""
    root = folder / "cityscapes"
    for split, ids in IDS.items():
        for image_id in ids:
            files, rng = paths(root, split, image_id), np.random.default_rng(len(image_id))
            for name, path in files.items():
                if name != "camera" or cameras:
                    path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (*SIZE, 3), np.uint8)).save(files["image"])
            Image.fromarray(regions(rng, 34, SIZE).astype(np.uint8)).save(files["labels"])
            Image.fromarray(rng.integers(0, 34, SIZE, np.uint8)).save(
                files["labels"].with_name(f"{image_id}_gtFine_instanceIds.png")
            )
            values = rng.integers(2000, 20000, SIZE, np.uint16)
            values[0, :4] = 0, 1, 65281, 65535  # 65281 is a disparity of 255
            Image.fromarray(values).save(files["disparity"])
            if cameras:
                camera = {"extrinsic": {"baseline": 0.209313}, "intrinsic": {"fx": 2262.52, "fy": 2265.3}}
                files["camera"].write_text(json.dumps(camera))
    return root


def check_cityscapes_row(row: dict, root: Path, split: str, image_id: str, names: list[str], scored=0):
    """Compares a row of the finished data set with the files."""
    files = paths(root, split, image_id)
    assert np.array_equal(np.array(row["image"]), np.array(Image.open(files["image"])))
    labels, disparity = np.array(Image.open(files["labels"])), np.array(Image.open(files["disparity"])).astype(float)
    semseg = np.array(row["semseg"])
    for pixel in np.ndindex(SIZE):
        known = SCORED.get(labels[pixel])
        assert (semseg[pixel] == 255) if known is None else (names[semseg[pixel]] == known[scored])
        p = disparity[pixel]
        d = 0 if p == 0 else (p - 1) / 256
        if "depth" in row:
            expected = 0.209313 * 2262.52 / d if d else 0
        else:
            expected = np.nextafter(np.float32(255), np.float32(0)) if d == 255 else d
        assert np.array(row["depth" if "depth" in row else "disparity"])[pixel] == np.float32(expected)


@pytest.fixture
def root(tmp_path):
    return write_cityscapes(tmp_path)


def row(root, **options):
    source = Cityscapes(root, **options)
    image_id = IDS["train"][0]
    return encode_row(image_id, *source.read("train", image_id), source.tasks)


def test_ids_and_tasks(root):
    source = Cityscapes(root.parent)
    assert source.ids == {"train": IDS["train"], "validation": IDS["val"]}
    assert {name: task["kind"] for name, task in source.tasks.items()} == {"semseg": "segmentation", "depth": "depth"}
    assert list(source.columns) == list(source.tasks)


def test_without_cameras_the_column_is_not_called_depth(tmp_path):
    source = Cityscapes(write_cityscapes(tmp_path, cameras=False))
    assert source.tasks["disparity"] == {"kind": "depth"} and "depth" not in source.tasks
    assert list(source.columns) == list(source.tasks)


@pytest.mark.parametrize("num_classes", [19, 7])
def test_number_of_classes(root, num_classes):
    source = Cityscapes(root, num_classes)
    assert len(source.tasks["semseg"]["id2label"]) == num_classes
    with pytest.raises(ValueError, match="19 classes or 7 categories, not 20"):
        Cityscapes(root, 20)


def test_disparity():
    stored = np.uint16([0, 1, 2, 257, 65281, 65535])
    assert decode_disparity(stored).tolist() == [0, 0, 1 / 256, 1, 255, 65534 / 256]


@pytest.mark.parametrize("name", ["image", "labels", "disparity", "camera"])
def test_an_image_that_lacks_one_file_is_not_overlooked(root, name):
    path = paths(root, "train", IDS["train"][0])[name]
    path.unlink()
    source = Cityscapes(root)
    assert source.ids["train"] == IDS["train"]
    with pytest.raises(ValueError, match=path.name):
        source.read("train", IDS["train"][0])


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("labels", np.full(SIZE, 34, np.uint8), "labelIds.png: expected label ids from 0 to 33, got 34"),
        ("labels", np.zeros((*SIZE, 3), np.uint8), "labelIds.png: expected an image of mode L, got RGB"),
        ("labels", np.zeros((6, 6), np.uint8), "semseg: expected the shape"),
        ("disparity", np.zeros(SIZE, np.uint8), "disparity.png: expected an image of mode I;16"),
        ("disparity", np.zeros((6, 6), np.uint16), "depth: expected the shape"),
        ("image", np.zeros(SIZE, np.uint8), "image: expected mode RGB, got L"),
    ],
)
def test_bad_images(root, name, values, message):
    Image.fromarray(values).save(paths(root, "train", IDS["train"][0])[name])
    with pytest.raises(ValueError, match=message):
        row(root)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read"),
        ("{}", "has no number extrinsic.baseline"),
        ('{"extrinsic": {"baseline": -1}, "intrinsic": {"fx": 1}}', "above 0, got the product -1.0"),
        ('{"extrinsic": {"baseline": NaN}, "intrinsic": {"fx": 1}}', "above 0, got the product nan"),
    ],
)
def test_bad_camera(root, text, message):
    paths(root, "train", IDS["train"][0])["camera"].write_text(text)
    with pytest.raises(ValueError, match=message):
        row(root)


def test_empty_split(root):
    for path in root.glob("*/val/*/*"):
        path.unlink()
    with pytest.raises(ValueError, match="leftImg8bit/val has no images"):
        Cityscapes(root)
