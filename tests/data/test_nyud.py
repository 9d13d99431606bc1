"""NYUD-v2: a miniature of the archive against an independent reading of its files."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_data import codes_of_normals, regions

from transformers_degmix.data.nyud import NYUD
from transformers_degmix.data.schema import encode_row


SIZE = (6, 8)


def write_nyud(folder: Path, train=("0001", "0003"), validation=("0002",)) -> Path:
    """An archive of random images, with maps that look like labels, unpacked in `folder / "NYUDv2"`."""
    root = folder / "NYUDv2"
    for name in ("images", "segmentation", "edge", "normals", "depth", "gt_sets"):
        (root / name).mkdir(parents=True)
    for image_id in (*train, *validation):
        rng = np.random.default_rng(int(image_id))
        Image.fromarray(rng.integers(0, 256, (*SIZE, 3), np.uint8)).save(root / f"images/{image_id}.png")
        Image.fromarray(regions(rng, 41, SIZE).astype(np.uint8)).save(root / f"segmentation/{image_id}.png")
        edge = rng.integers(0, 256, SIZE, np.uint8) * (rng.random(SIZE) < 0.5)
        Image.fromarray(edge).save(root / f"edge/{image_id}.png")
        normals = codes_of_normals(rng, SIZE)
        normals[1, :2] = [[0, 0, 0], [128, 128, 128]]  # unknown
        Image.fromarray(normals).save(root / f"normals/{image_id}.png")
        np.save(root / f"depth/{image_id}.npy", rng.uniform(0.5, 10, SIZE).astype(np.float32))
    (root / "gt_sets/train.txt").write_text("\n".join(train) + "\n")
    (root / "gt_sets/val.txt").write_text("\n".join(validation) + "\n")
    return root


def check_nyud_row(row: dict, root: Path, image_id: str):
    """Compares a row of the finished data set with the files."""
    pixels = {name: np.array(row[name]) for name in ("image", "semseg", "depth", "normals", "edge")}
    segmentation = np.array(Image.open(root / "segmentation" / f"{image_id}.png"))
    for y, x in np.ndindex(SIZE):
        assert pixels["semseg"][y, x] == (255 if segmentation[y, x] == 0 else segmentation[y, x] - 1)
    for name, folder in (("image", "images"), ("normals", "normals"), ("edge", "edge")):
        assert np.array_equal(pixels[name], np.array(Image.open(root / folder / f"{image_id}.png")))
    assert pixels["depth"].dtype == np.float32
    assert np.array_equal(pixels["depth"], np.load(root / "depth" / f"{image_id}.npy"))
    assert row["semseg_classes"] == sorted({int(value) - 1 for value in segmentation.flat if value})


@pytest.fixture
def root(tmp_path):
    return write_nyud(tmp_path)


def row(root, image_id="0001", split="train"):
    source = NYUD(root)
    return encode_row(image_id, *source.read(split, image_id), source.tasks)


def test_older_archive(root):
    expected = row(root)
    normals = np.asarray(Image.open(root / "normals/0001.png")) / 127.5 - 1
    normals[0, 0] = 0
    for name in ("edge", "normals"):
        edge = np.asarray(Image.open(root / "edge/0001.png")) / np.float32(255) if name == "edge" else normals
        (root / f"{name}/0001.png").unlink()
        np.save(root / f"{name}/0001.npy", edge)
    (root / "images/0001.png").unlink()
    Image.new("RGB", SIZE[::-1], (9, 8, 7)).save(root / "images/0001.jpg")
    found = row(root)
    assert found["image"]["bytes"] == (root / "images/0001.jpg").read_bytes()
    for name in ("semseg", "depth", "edge"):
        assert found[name] == expected[name]
    before, after = (np.array(Image.open(BytesIO(r["normals"]["bytes"]))) for r in (expected, found))
    assert after[0, 0].tolist() == [0, 0, 0]
    assert np.array_equal(before.reshape(-1, 3)[1:], after.reshape(-1, 3)[1:])
    for name, lowest in (("edge", 0), ("normals", -1)):
        np.save(root / f"{name}/0001.npy", 255 * np.ones((*SIZE, 3)))
        with pytest.raises(ValueError, match=rf"{root}/{name}/0001\.npy: expected values from {lowest} to 1, got 255"):
            row(root)


def test_ids_and_tasks(root):
    source = NYUD(root.parent)  # the folder around it will do
    assert source.ids == {"train": ["0001", "0003"], "validation": ["0002"]}
    assert {name: task["kind"] for name, task in source.tasks.items()} == {
        "semseg": "segmentation",
        "depth": "depth",
        "normals": "normals",
        "edge": "boundary",
    }
    assert len(source.tasks["semseg"]["id2label"]) == 40 and set(source.columns) == set(source.tasks)
    assert all(path.exists() for path in source.files("train", "0001").values())


def test_image_is_the_source_file(root):
    assert row(root)["image"]["bytes"] == (root / "images/0001.png").read_bytes()


def save(path, values):
    Image.fromarray(values).save(path) if path.suffix == ".png" else np.save(path, values)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("images/0001.png", np.zeros(SIZE, np.uint8), "image: expected mode RGB, got L"),
        (
            "segmentation/0001.png",
            np.zeros((*SIZE, 3), np.uint8),
            "0001.png: expected an image of mode L or P, got RGB",
        ),
        ("segmentation/0001.png", np.full(SIZE, 41, np.uint8), r"semseg: expected class ids from 0 to 39 .*\[40\]"),
        ("segmentation/0001.png", np.ones((5, 8), np.uint8), "semseg: expected the shape"),
        ("normals/0001.png", np.zeros(SIZE, np.uint8), "0001.png: expected an image of mode RGB, got L"),
        ("edge/0001.png", np.zeros(SIZE, bool), "0001.png: expected an image of mode L, got 1"),
        ("depth/0001.npy", np.full(SIZE, np.nan), "depth: expected finite"),
        ("depth/0001.npy", np.full(SIZE, -1.0), "depth: expected values of 0 or more"),
        ("depth/0001.npy", np.full(SIZE, 1500), "depth: expected floating point metres"),
        ("depth/0001.npy", np.ones((8, 6)), "depth: expected the shape"),
    ],
)
def test_bad_files(root, name, values, message):
    save(root / name, values)
    with pytest.raises(ValueError, match=message):
        row(root)


def test_corrupt_png(root):
    path = root / "normals/0001.png"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="normals/0001.png"):
        row(root)


def test_empty_split(root):
    (root / "gt_sets/val.txt").write_text("\n")
    with pytest.raises(ValueError, match="val.txt lists no images"):
        NYUD(root)
