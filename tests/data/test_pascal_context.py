"""PASCAL-Context: a miniature of the archive against an independent reading of its files."""

from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image
from small_data import codes_of_normals, regions

from transformers_degmix.data.pascal_context import LABELS_IN_NYU, MERGED_PARTS, PASCALContext, label_boundaries
from transformers_degmix.data.schema import encode_row


SIZE = (9, 12)
WALL, TVMONITOR, GRASS = 440, 427, 187
# The parts of PASCAL-Part in the six groups that multi-task learning uses.
PARTS = {
    "head": 1, "hair": 1, "nose": 1, "mouth": 1, "leye": 1, "reye": 1, "lear": 1, "rear": 1, "lebrow": 1, "rebrow": 1,
    "torso": 2, "neck": 2, "luarm": 3, "ruarm": 3, "llarm": 4, "rlarm": 4, "lhand": 4, "rhand": 4,
    "luleg": 5, "ruleg": 5, "llleg": 6, "rlleg": 6, "lfoot": 6, "rfoot": 6,
}  # fmt: skip
EXAMPLES = {"2008_000001": 2, "2008_000002": 1, "2008_000003": 0}  # id -> number of people


def struct_array(rows: list[dict]) -> np.ndarray:
    """A struct array of MATLAB; without rows its empty matrix, as in PASCAL-Part."""
    if not rows:
        return np.zeros((0, 0))
    array = np.empty((1, len(rows)), [(field, object) for field in rows[0]])
    for index, row in enumerate(rows):
        array[0, index] = tuple(row.values())
    return array


def write_parts(path: Path, image_id: str, num_people: int, rng: np.random.Generator, size=SIZE, names=tuple(PARTS)):
    def mask():
        return regions(rng, np.uint8([0, 0, 0, 0, 0, 1]), size)

    things = [{"class": "dog", "class_ind": 12, "mask": mask(), "parts": [{"part_name": "head", "mask": mask()}]}]
    for _ in range(num_people):
        parts = [{"part_name": name, "mask": mask()} for name in rng.permutation(names)[:8].tolist()]
        things.append({"class": "person", "class_ind": 15, "mask": mask(), "parts": parts})
    things.append({"class": "person", "class_ind": 15, "mask": mask(), "parts": []})
    objects = struct_array([{**thing, "parts": struct_array(thing["parts"])} for thing in things])
    scipy.io.savemat(path, {"anno": struct_array([{"imname": image_id, "objects": objects}])}, do_compression=True)


def write_pascal_context(folder: Path) -> Path:
    """An archive of random images, with maps that look like labels, unpacked in `folder / "PASCALContext"`."""
    root = folder / "PASCALContext"
    folders = ("JPEGImages", "semseg/VOC12", "semseg/pascal-context", "pascal-context/trainval", "human_parts")
    for name in (*folders, "normals_distill", "sal_distill", "ImageSets/Context"):
        (root / name).mkdir(parents=True)
    for image_id, num_people in EXAMPLES.items():
        rng = np.random.default_rng(int(image_id[-6:]))
        Image.fromarray(rng.integers(0, 256, (*SIZE, 3), np.uint8)).save(root / f"JPEGImages/{image_id}.jpg")
        for name in ("VOC12", "pascal-context")[0 if num_people == 2 else 1 :]:
            ids = Image.fromarray(regions(rng, np.uint8([0, 1, 15, 20, 255]), SIZE))
            ids.putpalette(rng.bytes(768))
            ids.save(root / f"semseg/{name}/{image_id}.png")
        labels = regions(rng, np.uint16([WALL, TVMONITOR, GRASS]), SIZE, length=3)
        scipy.io.savemat(root / f"pascal-context/trainval/{image_id}.mat", {"LabelMap": labels})
        write_parts(root / f"human_parts/{image_id}.mat", image_id, num_people, rng)
        Image.fromarray(codes_of_normals(rng, SIZE)).save(root / f"normals_distill/{image_id}.png")
        Image.fromarray(rng.choice(np.uint8([0, 127, 128, 255]), SIZE)).save(root / f"sal_distill/{image_id}.png")
    ids = list(EXAMPLES)
    (root / "ImageSets/Context/train.txt").write_text("\n".join(ids[:2]))
    (root / "ImageSets/Context/val.txt").write_text("\n".join(ids[2:]))
    return root


def check_pascal_context_row(row: dict, root: Path, image_id: str):
    """Compares a row of the finished data set with the files, which are read in the plainest way."""
    assert np.array_equal(np.array(row["image"]), np.array(Image.open(root / f"JPEGImages/{image_id}.jpg")))
    semseg = root / f"semseg/VOC12/{image_id}.png"
    if not semseg.exists():
        semseg = root / f"semseg/pascal-context/{image_id}.png"
    assert np.array_equal(np.array(row["semseg"]), np.array(Image.open(semseg)))
    assert row["semseg_classes"] == sorted(set(np.array(row["semseg"]).flat) - {255})

    parts = np.zeros(SIZE, int)
    for thing in scipy.io.loadmat(root / f"human_parts/{image_id}.mat")["anno"][0, 0][1][0]:
        if int(thing[1][0, 0]) == 15 and thing[3].size:
            for part in thing[3][0]:
                parts[part[1] == 1] = PARTS[str(part[0][0])]
    assert np.array_equal(np.array(row["human_parts"]), parts)
    assert row["human_parts_classes"] == sorted(set(parts.flat))

    labels = scipy.io.loadmat(root / f"pascal-context/trainval/{image_id}.mat")["LabelMap"]
    saliency = np.array(Image.open(root / f"sal_distill/{image_id}.png"))
    normals = np.array(Image.open(root / f"normals_distill/{image_id}.png"))
    for pixel in np.ndindex(SIZE):
        assert np.array(row["sal"])[pixel] == int(saliency[pixel] / 255 > 0.5)
        expected = (0, 0, 0) if labels[pixel] == GRASS else normals[pixel]
        assert tuple(np.array(row["normals"])[pixel]) == tuple(expected)
    assert np.array_equal(np.array(row["edge"]), label_boundaries(labels))


@pytest.fixture
def root(tmp_path):
    return write_pascal_context(tmp_path)


def row(root, image_id="2008_000001"):
    source = PASCALContext(root)
    return encode_row(image_id, *source.read("train", image_id), source.tasks)


def test_ids_and_tasks(root):
    source = PASCALContext(root.parent)
    assert source.ids == {"train": ["2008_000001", "2008_000002"], "validation": ["2008_000003"]}
    assert list(source.tasks) == ["semseg", "human_parts", "sal", "normals", "edge"] == list(source.columns)
    assert [len(source.tasks[name]["id2label"]) for name in ("semseg", "human_parts")] == [21, 7]


def test_image_is_the_source_file(root):
    assert row(root)["image"]["bytes"] == (root / "JPEGImages/2008_000001.jpg").read_bytes()


def test_the_miniature_has_people_with_all_parts():
    assert sorted(part for parts in MERGED_PARTS.values() for part in parts.split()) == sorted(PARTS)


def test_boundaries_are_where_the_laplacian_is_not_zero_and_thin():
    labels = np.random.default_rng(0).integers(0, 460, (6, 8)).repeat(5, axis=0).repeat(5, axis=1).astype(np.uint16)
    padded = np.pad(labels.astype(int), 1, mode="reflect")
    neighbours = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
    edge = label_boundaries(labels)
    assert edge.dtype == np.uint8 and set(edge.flat) == {0, 255}
    assert (neighbours != 4 * padded[1:-1, 1:-1])[edge > 0].all()
    # The Laplacian is two pixels wide along a straight boundary, and one of them stays.
    half = np.repeat(np.uint16([[3] * 6 + [9] * 6]), 12, axis=0)
    assert (label_boundaries(half) > 0).sum(axis=1)[1:-1].tolist() == [1] * 10
    assert not label_boundaries(np.full((5, 5), 7, np.uint16)).any()


def test_labels_in_nyu():
    assert len(LABELS_IN_NYU) == 170 and min(LABELS_IN_NYU) >= 1 and max(LABELS_IN_NYU) <= 459
    # PASCAL-Context numbers its labels in alphabetical order.
    assert list(LABELS_IN_NYU.values()) == sorted(LABELS_IN_NYU.values())
    assert LABELS_IN_NYU[WALL] == "wall" and LABELS_IN_NYU[TVMONITOR] == "tvmonitor" and GRASS not in LABELS_IN_NYU


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rng, path: write_parts(path, "a", 2, rng, names=["tail"] * 8), "unknown part.*tail"),
        (lambda rng, path: write_parts(path, "a", 2, rng, size=(9, 11)), r"expected the shape \(9, 12\)"),
        (lambda rng, path: scipy.io.savemat(path, {"anno": 1}), "not of PASCAL-Part"),
        (lambda rng, path: scipy.io.savemat(path, {"other": 1}), "has no variable 'anno'"),
        (lambda rng, path: path.write_bytes(path.read_bytes()[:200]), "cannot read"),
        (lambda rng, path: path.unlink(), "cannot read"),
    ],
)
def test_bad_parts(root, change, message):
    change(np.random.default_rng(0), root / "human_parts/2008_000001.mat")
    with pytest.raises(ValueError, match=f"human_parts/2008_000001.mat.*{message}|{message}.*human_parts/2008_000001"):
        row(root)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("JPEGImages/2008_000001.jpg", np.zeros(SIZE, np.uint8), "image: expected mode RGB, got L"),
        ("JPEGImages/2008_000001.jpg", np.zeros((9, 11, 3), np.uint8), "semseg: expected the shape"),
        (
            "semseg/VOC12/2008_000001.png",
            np.full(SIZE, 21, np.uint8),
            r"semseg: expected class ids from 0 to 20.*\[21\]",
        ),
        ("sal_distill/2008_000001.png", np.zeros((*SIZE, 3), np.uint8), "000001.png: expected an image of mode L"),
        (
            "normals_distill/2008_000001.png",
            np.zeros((9, 11, 3), np.uint8),
            r"000001.mat: expected the shape \(9, 11\)",
        ),
    ],
)
def test_bad_images(root, name, values, message):
    Image.fromarray(values).save(root / name)
    with pytest.raises(ValueError, match=message):
        row(root)


@pytest.mark.parametrize("label", [460, -1, 0.5, np.nan])
def test_label_outside_the_459(root, label):
    labels = np.full(SIZE, 12, np.float32)
    labels[0] = label
    scipy.io.savemat(root / "pascal-context/trainval/2008_000001.mat", {"LabelMap": labels})
    with pytest.raises(ValueError, match=rf"2008_000001.mat: expected labels from 0 to 459, got {label}"):
        row(root)


def test_empty_split(root):
    (root / "ImageSets/Context/train.txt").write_text("")
    with pytest.raises(ValueError, match="train.txt lists no images"):
        PASCALContext(root)
