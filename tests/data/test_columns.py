import json
import math
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import (
    Array2D,
    Array3D,
    ClassLabel,
    Dataset,
    Features,
    IterableDataset,
    List,
    Sequence,
    Value,
    load_dataset,
)
from datasets import Image as ImageFeature
from PIL import Image

from transformers_degmix.data.collator import DeGMixDataCollator
from transformers_degmix.data.columns import RowReader, parse_columns
from transformers_degmix.data.mapping import map_columns, name_classes
from transformers_degmix.image_processing_pil_degmix import DeGMixImageProcessorPil
from transformers_degmix.training.arguments import find_recipe


SEMSEG, DEPTH, NORMALS = {"kind": "segmentation", "num_labels": 13}, {"kind": "depth"}, {"kind": "normals"}
TASKS = {"semseg": SEMSEG, "depth": DEPTH, "normals": NORMALS}
IMAGE = Image.new("RGB", (3, 2), (10, 20, 30))


def encoded(image: Image.Image | np.ndarray) -> bytes:
    file = BytesIO()
    np.save(file, image) if isinstance(image, np.ndarray) else image.save(file, "TIFF" if image.mode == "F" else "PNG")
    return file.getvalue()


def read(task: dict, column: dict | str, stored, name: str = "task"):
    """The label that a row with this value gives."""
    source = column if isinstance(column, str) else column.get("column", name)
    return RowReader({name: task}, {name: column})({"image": IMAGE, source: stored})[name]


def nyuv2(height: int = 6, width: int = 8, num_rows: int = 3) -> tuple[list[dict], Features]:
    """Rows of the schema of tanganke/nyuv2 but for the size."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(num_rows):
        normal = rng.standard_normal((3, height, width)).astype(np.float32)
        normal /= np.linalg.norm(normal, axis=0)
        normal[:, 0, 0] = 0
        normal[0, 1, 1], normal[1, 1, 1], normal[2, 1, 1] = 0, 0.6, 0.8
        depth = rng.uniform(1, 5, (1, height, width)).astype(np.float32)
        depth[0, 2, 3] = 0
        row = {"image": rng.random((3, height, width), np.float32), "depth": depth, "normal": normal}
        row["segmentation"] = rng.integers(-1, 13, (height, width))
        rows.append({**row, "noise": rng.random((1, height, width), np.float32)})
    arrays = {name: Array3D((rows[0][name].shape), "float32") for name in ("image", "depth", "normal", "noise")}
    return rows, Features({**arrays, "segmentation": Array2D((height, width), "int64")})


@pytest.fixture(scope="module")
def nyuv2_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("nyuv2")
    rows, features = nyuv2()
    for split in ("train", "val"):
        Dataset.from_list(rows, features=features).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_recipe_for_nyuv2_of_tanganke(nyuv2_folder, streaming):
    recipe = yaml.safe_load(find_recipe("nyuv2_tanganke").read_text())
    tasks = recipe["model"]["tasks"]
    data = load_dataset(str(nyuv2_folder), split=recipe["eval_split"], streaming=streaming)
    mapped = map_columns(data, tasks, recipe["columns"])
    rows, _ = nyuv2()
    seen = list(mapped) if streaming else [mapped[index] for index in range(len(mapped))]
    assert len(seen) == len(rows)
    for read_row, row in zip(seen, rows):
        assert read_row["image"] == pytest.approx(255 * row["image"], abs=1e-4)
        expected = np.where(row["segmentation"] == -1, 255, row["segmentation"])
        assert read_row["semseg"].dtype == torch.int64 and np.array_equal(read_row["semseg"], expected)
        assert np.array_equal(read_row["depth"], row["depth"][0])
        assert np.array_equal(read_row["normals"], row["normal"])

    batch = DeGMixDataCollator(DeGMixImageProcessorPil(tasks=tasks), tasks=tasks)(seen)
    assert batch["pixel_values"].shape == (3, 3, 6, 8)
    assert (batch["labels"]["depth"][:, 2, 3] == 255).all()
    assert (batch["labels"]["normals"][:, :, 0, 0] == 255).all()
    # A vector with one component of 0 is a normal all the same.
    assert batch["labels"]["normals"][0, :, 1, 1].tolist() == pytest.approx([0, 0.6, 0.8])


def test_values_as_stored_become_values_as_meant():
    ids = np.array([[0, 1, 2], [13, 255, 7]], np.uint8)
    meant = read(SEMSEG, {"ignore": [0, 255], "offset": -1}, Image.fromarray(ids))
    assert meant.tolist() == [[255, 0, 1], [12, 255, 6]]

    millimetres = np.array([[0, 1500, 65535], [1, 2000, 10]], np.uint16)
    metres = read(DEPTH, {"column": "mm", "scale": 0.001, "invalid": 65535}, Image.fromarray(millimetres))
    assert metres.dtype == torch.float32
    assert metres.numpy() == pytest.approx(np.where(millimetres == 65535, 0, millimetres / 1000))

    # Cityscapes' disparity: invalid is what is stored, not what it would become
    disparity = read(DEPTH, {"scale": 1 / 256, "offset": -1 / 256, "invalid": 0}, np.full((2, 3), 257, np.uint16))
    assert disparity.tolist() == [[1.0] * 3] * 2

    saliency = np.array([[0, 255, 0], [255, 255, 0]], np.uint8)
    assert read({"kind": "saliency"}, {"scale": 1 / 255}, saliency).tolist() == (saliency // 255).tolist()

    edge = read({"kind": "boundary"}, {"scale": 255, "invalid": 9}, np.array([[0, 1, 9], [0, 0, 1]], np.uint8))
    assert edge.tolist() == [[0, 1, 255], [0, 0, 1]]

    depth = np.array([[1, np.nan, 2], [3, 4, np.nan]], np.float32)
    assert read(DEPTH, {"invalid": float("nan")}, depth).tolist() == [[1, 0, 2], [3, 4, 0]]


@pytest.mark.parametrize("channels_last", [False, True])
def test_channels_of_normals(channels_last):
    stored = np.array([0.8, 0.6, 0.0], np.float32)[:, None, None] * np.ones((3, 2, 3), np.float32)
    stored[:, 1, 2] = 9
    if channels_last:
        stored = np.moveaxis(stored, 0, -1)
    column = {"channel_order": [2, 1, 0], "scale": [1, -1, 1], "invalid": 9}
    normals = read(NORMALS, column, stored)
    assert normals.shape == (3, 2, 3)
    assert normals[:, 0, 0].tolist() == pytest.approx([0, -0.6, 0.8])
    assert normals[:, 1, 2].tolist() == [0, 0, 0]


def test_eight_bit_normals_are_decoded_before_they_are_scaled():
    stored = np.full((2, 3, 3), 255, np.uint8)
    stored[0, 0] = 0
    normals = read(NORMALS, {"scale": 0.5, "invalid": 0}, Image.fromarray(stored))
    assert normals[:, 0, 0].tolist() == [0, 0, 0] and normals[:, 1, 1].tolist() == [0.5, 0.5, 0.5]


COLORS = np.array([[0, 0, 0], [128, 64, 128], [70, 70, 70]], np.uint8)
IDS = np.array([[0, 1, 2], [2, 1, 0]])


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "channels first"])
def test_classes_as_colors(mode):
    image = Image.fromarray(COLORS[IDS])
    stored = np.moveaxis(COLORS[IDS], -1, 0)
    if mode != "channels first":
        stored = image.quantize(3) if mode == "P" else image.convert(mode)
    column = {"colors": COLORS.tolist()}
    assert read(SEMSEG, column, stored).tolist() == IDS.tolist()
    # What else is said is about the indices.
    label = read(SEMSEG, {**column, "ignore": 0, "classes": {1: 4, 2: 3}}, stored)
    assert label.tolist() == [[255, 4, 3], [3, 4, 255]]
    with pytest.raises(ValueError, match=r"the colour \[70, 70, 70\] is not one of the 2 `colors`.* 33.3%"):
        read(SEMSEG, {"colors": COLORS[:2].tolist()}, stored)
    with pytest.raises(ValueError, match="three channels of colours"):
        read(SEMSEG, column, IDS)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64, np.float32])
def test_table_of_ids(dtype):
    stored = np.array([[7, 8, 11], [0, 255, 8]], dtype)
    meant = [[0, 1, 2], [255, 255, 1]]
    assert read(SEMSEG, {"classes": {7: 0, 8: 1, 11: 2}}, stored).tolist() == meant
    assert read(SEMSEG, {"classes": {"7": 0, "8": 1, "11": 2}}, Image.fromarray(stored.astype("u2"))).tolist() == meant
    swapped = read({"kind": "saliency"}, {"classes": {0: 1, 1: 0}}, np.array([[0, 1, 5], [1, 0, 5]], dtype))
    assert swapped.tolist() == [[1, 0, 255], [0, 1, 255]]


@pytest.mark.parametrize("size", [(1, 1), (4, 6), (7, 5)])
def test_maps_of_another_size_take_the_nearest_pixel(size):
    ids = np.random.default_rng(0).integers(0, 13, size)
    rows, columns = ([int((i + 0.5) * old / new) for i in range(new)] for old, new in zip(size, (2, 3)))
    expected = ids[np.ix_(rows, columns)]
    assert read(SEMSEG, {"resize": True}, ids).tolist() == expected.tolist()
    assert read(SEMSEG, {"resize": True, "ignore": 3}, Image.fromarray(ids.astype(np.uint8))).tolist() == (
        np.where(expected == 3, 255, expected).tolist()
    )
    normals = np.stack([ids, ids, ids + 1], -1).astype(np.float32)
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    for stored in (normals, np.moveaxis(normals, -1, 0)):
        found = read(NORMALS, {"resize": True}, stored)
        assert np.array_equal(found, np.moveaxis(normals, -1, 0)[:, rows][:, :, columns])
    with pytest.raises(ValueError, match="`resize: true`"):
        read(SEMSEG, {"offset": 0, "ignore": 3}, ids)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["bytes and path", "bytes", "binary"])
def test_files_in_cells_that_are_not_said_to_be_images(tmp_path, form, streaming):
    depth = np.arange(6, dtype=np.float32).reshape(2, 3)
    files = {"image": encoded(IMAGE), "semseg": encoded(Image.new("L", (3, 2), 4)), "depth": encoded(depth)}
    cells = {
        "bytes and path": {name: {"bytes": file, "path": f"{name}.png"} for name, file in files.items()},
        "bytes": {name: {"bytes": file} for name, file in files.items()},
        "binary": files,
    }[form]
    array = Array2D((2, 3), "float32")  # in which `datasets` has another format
    features = Dataset.from_list([cells]).features | {"more": array}
    rows = [{**cells, "more": depth}, {**cells, "depth": None, "more": depth}]
    Dataset.from_list(rows, features=Features(features)).to_parquet(tmp_path / "train.parquet")
    data = load_dataset(str(tmp_path), split="train", streaming=streaming)
    tasks = {"semseg": SEMSEG, "depth": DEPTH, "more": DEPTH}
    first, second = map_columns(data, tasks)
    assert np.array_equal(first["image"], IMAGE) and np.array_equal(first["semseg"], np.full((2, 3), 4))
    assert np.array_equal(first["depth"], depth) and second["depth"] is None


@pytest.mark.parametrize("streaming", [False, True])
def test_arrays_of_numpy_as_label_files(tmp_path, streaming):
    depth = np.linspace(1, 2, 6, dtype=np.float32).reshape(2, 3)
    IMAGE.save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", depth)
    np.save(tmp_path / "b.npy", np.array([{}]), allow_pickle=True)
    lines = [json.dumps({"file_name": "a.png", "depth_file_name": f"{name}.npy"}) for name in "ab"]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    rows = iter(map_columns(load_dataset(str(tmp_path), split="train", streaming=streaming), {"depth": DEPTH}))
    assert np.array_equal(next(rows)["depth"], depth)
    with pytest.raises(ValueError, match=r"column 'depth': cannot read the image .*b\.npy"):
        next(rows)


def test_images():
    blue_first = RowReader({}, {"image": {"channel_order": [2, 1, 0]}})({"image": IMAGE})["image"]
    assert blue_first[:, 0, 0].tolist() == [30, 20, 10]
    assert RowReader({}, {"image": "rgb"})({"rgb": IMAGE})["image"] is IMAGE
    grey = RowReader({}, {"image": {"scale": 255}})({"image": np.full((2, 3), 0.5, np.float32)})["image"]
    assert grey.tolist() == [[[127.5] * 3] * 2] * 3


def test_labels_that_are_not_mapped_are_left_for_the_collator():
    label = Image.new("L", (3, 2), 4)
    assert read(SEMSEG, "ids", label) is label
    assert read(SEMSEG, "ids", None) is None


@pytest.mark.parametrize("streaming", [False, True])
def test_null_labels_and_dtypes_of_arrays(streaming):
    features = Features(
        {"image": ImageFeature(), "normals": Array3D((2, 3, 3), "uint8"), "depth": Array2D((2, 3), "float32")}
    )
    features["ids"] = List(List(Value("uint8")))
    right = np.uint8([255, 128, 128]) * np.ones((2, 3, 1), np.uint8)
    full = {"image": IMAGE, "normals": right, "depth": np.ones((2, 3), np.float32)}
    rows = [{**full, "ids": [[1, 2, 3]] * 2}, {"image": IMAGE, "normals": None, "depth": None, "ids": None}]
    data = Dataset.from_list(rows, features=features)
    mapped = map_columns(data.to_iterable_dataset() if streaming else data, TASKS, {"semseg": "ids"})
    first, second = list(mapped) if streaming else [mapped[0], mapped[1]]
    assert first["normals"].dtype == np.uint8 and first["semseg"].dtype == np.uint8
    assert [second[task] for task in TASKS] == [None] * 3
    batch = DeGMixDataCollator(DeGMixImageProcessorPil(tasks=TASKS), tasks=TASKS)([first, second])
    assert batch["labels"]["normals"][0, :, 0, 0].tolist() == pytest.approx([1, 1 / 255, 1 / 255], abs=1e-6)
    assert all((label[1] == 255).all() for label in batch["labels"].values())


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"depth": {"scal": 2}},
            r"columns\['depth'\].*\['scal'\]; allowed are \['column', 'ignore', 'invalid', 's.*t', 'resize'\]",
        ),
        ({"depth": {"channel_order": [2, 1, 0]}}, r"columns\['depth'\].*channel_order"),
        ({"image": {"ignore": 0}}, r"columns\['image'\].*\['ignore'\]; allowed are \['column', 'scale'"),
        ({"depth": 3}, r"columns\['depth'\].*name of a column or a dictionary, got 3"),
        ({"depth": {"column": 3}}, r"columns\['depth'\].*`column`, got 3"),
        ({"depth": {"scale": "1/256"}}, r"columns\['depth'\].*`scale`, got '1/256'"),
        ({"depth": {"ignore": True}}, r"columns\['depth'\].*a number or a list of them as `ignore`, got True"),
        ({"depth": {"scale": [1, 2, 3]}}, r"columns\['depth'\].*1 finite number.*`scale`"),
        ({"normals": {"scale": [1, 2]}}, r"columns\['normals'\].*1 or 3 finite.*`scale`"),
        ({"depth": {"offset": float("nan")}}, r"columns\['depth'\].*`offset`, got nan"),
        ({"normals": {"channel_order": [0, 0, 1]}}, r"columns\['normals'\].*0, 1 and 2 as `channel_order`"),
    ],
)
def test_mappings_that_are_refused(columns, message):
    with pytest.raises(ValueError, match=message):
        parse_columns(columns, TASKS)


def test_numbers_that_yaml_takes_for_texts():
    columns = parse_columns({"depth": {"scale": "1e-3"}, "semseg": {"classes": {"7": 0, 8.0: 1}}}, TASKS)
    assert columns["depth"].scale == (0.001,) and columns["semseg"].classes == {7: 0, 8: 1}


@pytest.mark.parametrize(
    ("task", "column", "stored", "message"),
    [
        (SEMSEG, {"ignore": 0}, IMAGE, "column 'task': expected 1 channel.*mode RGB"),
        (
            NORMALS,
            {"column": "n", "invalid": 0},
            Image.new("L", (3, 2)),
            r"column 'n' \(for 'task'\).*3 channel.*mode L",
        ),
        (DEPTH, {"scale": 2}, np.ones((2, 4), np.float32), r"column 'task': expected the shape \(1, 2, 3\).*\(2, 4\)"),
        (DEPTH, {"scale": 2}, np.array([[1, np.nan, 1]] * 2), "column 'task': expected finite values"),
        (
            DEPTH,
            "d",
            "depth/1.png",
            "column 'd'.*the text 'depth/1.png'.*'d_file_name' in metadata.jsonl.*cast_column",
        ),
        (DEPTH, "d", 3, r"column 'd'.*expected an image, an array, or a file as bytes or \{bytes, path\}, got a int"),
        (DEPTH, "d", [encoded(IMAGE)], "column 'd'.*expected an array of numbers"),
        (DEPTH, "d", b"", "column 'd'.*the file is empty"),
        (DEPTH, "d", [[1.0, 2.0], [3.0]], "column 'd'"),
        (DEPTH, {"resize": True}, [1.0, 2.0], r"column 'task': .*height and width, got one of the shape \(2,\)"),
    ],
)
def test_values_that_are_refused(task, column, stored, message):
    with pytest.raises(ValueError, match=message):
        read(task, column, stored)


def test_images_without_width_are_refused():
    with pytest.raises(ValueError, match=r"column 'image': .*height and width, got one of the shape \(2,\)"):
        RowReader({"depth": DEPTH}, {"depth": {"resize": True}})({"image": [1, 2], "depth": [[1.0]]})


@pytest.mark.parametrize("ids", [{}, {"image_id": [None, None]}])
def test_bad_rows_are_named(ids):
    rows = {"image": [IMAGE, None], "depth": [Image.new("F", (3, 2)), Image.new("F", (3, 2))], **ids}
    features = Features({"image": ImageFeature(), "depth": ImageFeature(), **dict.fromkeys(ids, Value("string"))})
    mapped = map_columns(Dataset.from_dict(rows, features=features), {"depth": DEPTH})
    assert mapped[0]["image_id"] == "0"
    with pytest.raises(ValueError, match="sample 1: column 'image': there is no image"):
        mapped[1]


def test_rows_of_streams_have_the_ids_that_are_not_null():
    rows = Dataset.from_dict({"image": [IMAGE, IMAGE], "image_id": [7, None], "depth": [None, None]})
    mapped = map_columns(rows.to_iterable_dataset(), {"depth": DEPTH})
    assert [row.get("image_id", "none") for row in mapped] == ["7", "none"]


@pytest.mark.parametrize("streaming", [False, True])
def test_damaged_images_are_named_and_columns_that_nobody_needs_not_read(streaming):
    file = BytesIO()
    Image.fromarray(np.random.default_rng(0).random((20, 30), np.float32)).save(file, "TIFF")
    whole, half = ({"bytes": part, "path": None} for part in (file.getvalue(), file.getvalue()[:1000]))
    rows = {"image": [whole, whole], "depth": [whole, half], "more": [half, half], "image_id": ["a", "b"]}
    features = Features(dict.fromkeys(("image", "depth", "more"), ImageFeature()) | {"image_id": Value("string")})
    data = Dataset.from_dict(rows, features=features)
    mapped = map_columns(data.to_iterable_dataset() if streaming else data, {"depth": DEPTH})
    samples = iter(mapped) if streaming else (mapped[index] for index in range(2))
    assert next(samples)["depth"].mode == "F"
    with pytest.raises(ValueError, match="'b', column 'depth': cannot read the image: "):
        next(samples)


def test_malformed_exif_costs_no_row(tmp_path):
    IMAGE.save(tmp_path / "a.png", exif=b"b'Exif\\x00")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}')
    rows = map_columns(load_dataset(str(tmp_path), split="train"), {})
    assert np.array_equal(rows[0]["image"], IMAGE)


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_columns_and_empty_splits(streaming):
    data = Dataset.from_dict({"image": [1], "depth": [2]})
    empty = data.select([])
    if streaming:
        data, empty = data.to_iterable_dataset(), IterableDataset.from_generator(lambda: iter(()))
    message = r"lacks column 'z' \(for 'depth'\), column 'normals'; it has \['image', 'depth'\]"
    with pytest.raises(ValueError, match=message):
        map_columns(data, {"depth": DEPTH, "normals": NORMALS}, {"depth": "z"})
    with pytest.raises(ValueError, match="no samples"):
        map_columns(empty, {"depth": DEPTH})


def test_a_stream_whose_columns_are_unknown_before_it_is_read():
    data = IterableDataset.from_generator(lambda: iter([{"image": IMAGE, "depth": None, "more": 1}]))
    assert data.column_names is None
    assert list(map_columns(data, {"depth": DEPTH})) == [{"image": IMAGE, "depth": None}]
    with pytest.raises(ValueError, match=r"'normals'; it has \['image', 'depth', 'more'\]"):
        map_columns(data, {"normals": NORMALS})


NAMES = ClassLabel(names=["blade", "handle"])
ID2LABEL = {0: "blade", 1: "handle"}


@pytest.mark.parametrize(
    ("features", "columns"),
    [
        ({"parts_classes": List(NAMES)}, {}),
        ({"parts_classes": NAMES}, {}),
        ({"ids_classes": Sequence(NAMES)}, {"parts": {"column": "ids", "ignore": 0}}),
        ({"parts": List(List(NAMES))}, {}),
        ({"ids": List(List(NAMES))}, {"parts": "ids"}),
    ],
)
def test_class_names_come_from_the_data(features, columns):
    tasks = {"parts": {"kind": "segmentation"}, "depth": {"kind": "depth"}}
    named = name_classes(tasks, Features(features), columns)
    assert named["parts"] == {"kind": "segmentation", "num_labels": 2, "id2label": ID2LABEL}
    assert named["depth"] == tasks["depth"] and list(named) == list(tasks)


def test_class_names_that_are_given_go_first():
    features = Features({"parts_classes": NAMES, "sal_classes": NAMES})
    own = {"kind": "segmentation", "num_labels": 3, "id2label": {0: "a", 1: "b", 2: "c"}}
    tasks = {"parts": own, "sal": {"kind": "saliency"}}
    assert name_classes(tasks, features) == tasks
    assert name_classes(tasks, None) == tasks
    with pytest.raises(ValueError, match=r"tasks\['parts'\].*is 3.*names 2 classes"):
        name_classes({"parts": {"kind": "segmentation", "num_labels": 3}}, features)


@pytest.mark.parametrize(
    "column",
    [
        {"colors": [[0, 0]]},
        {"colors": [[0, 0, 256]]},
        {"colors": [[1, 2, 3], [1, 2, 3]]},
        {"colors": 3},
        {"classes": [7, 8]},
        {"classes": {"road": 0}},
        {"classes": {7.9: 0}},
        {"classes": {7: 0.9}},
        {"classes": {7: True}},
        {"classes": {math.inf: 0}},
        {"colors": [[0.5, 0, 0]]},
    ],
)
def test_tables_that_are_refused(column):
    with pytest.raises(ValueError, match=r"columns\['semseg'\].*as `colors`.* and a table"):
        parse_columns({"semseg": column}, TASKS)
    with pytest.raises(ValueError, match=r"columns\['depth'\].*has unknown fields"):
        parse_columns({"depth": column}, TASKS)
    with pytest.raises(ValueError, match="true or false as `resize`, got 'no'"):
        parse_columns({"depth": {"resize": "no"}}, TASKS)


@pytest.mark.parametrize(
    "column, message",
    [
        (
            {"classes": {7: 0, 8: 13}},
            "8 in `classes` into the class id 13, but the task has 13 classes.*0 to 12, or 255",
        ),
        ({"classes": {7: -1}}, "7 in `classes` into the class id -1"),
        ({"classes": {7: 13}, "offset": 1}, "7 in `classes` into the class id 14"),
        ({"colors": [[index, 0, 0] for index in range(14)]}, "13 in `colors` into the class id 13"),
    ],
)
def test_tables_of_class_ids_that_the_task_does_not_have(column, message):
    with pytest.raises(ValueError, match=rf"`columns\['semseg'\]` turns {message}"):
        parse_columns({"semseg": column}, TASKS)


def test_tables_of_class_ids_that_the_task_has():
    colors = [[index, 0, 0] for index in range(14)]
    for column in (
        {"classes": {7: 12, 8: 255}},
        {"classes": {7: 13}, "offset": -1},
        {"colors": colors, "ignore": 13},
        {"colors": colors, "classes": {13: 0}},
    ):
        parse_columns({"semseg": column}, TASKS)


@pytest.mark.parametrize("cell", [{"bytes": None, "path": None}, {"bytes": None}, {"path": None}])
def test_files_that_are_not_there(cell):
    assert read(DEPTH, "d", cell) is None
    reader = RowReader({})
    assert reader.read_file({"image": cell}) is None
    with pytest.raises(ValueError, match="there is no image"):
        reader.read_image({"image": cell})


UNLABELLED = [
    (SEMSEG, np.array([[0, 1, 255]], np.uint8), {"offset": 2}, [2, 3, 255]),
    (SEMSEG, np.array([[0, 1, 255]], np.int64), {"offset": -0.0, "scale": 3}, [0, 3, 255]),
    (SEMSEG, np.array([[0, 10, 255]], np.uint8), {"scale": 0.1}, [0, 1, 255]),
    ({"kind": "saliency"}, np.array([[0, 100, 255]], np.uint8), {"scale": 0.01}, [0, 1, 255]),
    ({"kind": "saliency"}, np.array([[0, 100, 255]], np.uint8), {"scale": 0.00392}, [0, 0, 1]),
    (DEPTH, np.array([[0, 1.5, 255]], np.float32), {"offset": 1}, [0, 2.5, 0]),
    (DEPTH, np.array([[0, 1000, 255]], np.uint16), {"scale": 0.001, "offset": 1}, [0, 2, 1.255]),
    (DEPTH, np.array([[np.nan, 0, 3]], np.float32), {"scale": 2, "offset": 1, "invalid": np.nan}, [0, 0, 7]),
    ({"kind": "boundary"}, np.array([[0, 1, 255]], np.uint8), {"scale": 255}, [0, 1, 255]),
    ({"kind": "boundary"}, np.array([[0, 0.5, 255]], np.float32), {"scale": -1, "offset": 1}, [1, 0.5, 255]),
    ({"kind": "boundary"}, np.array([[0, 127.5, 255]], np.float32), {"scale": 1 / 255}, [0, 0.5, 1]),
]


@pytest.mark.parametrize("task, stored, column, expected", UNLABELLED)
def test_unlabelled_stays_unlabelled(task, stored, column, expected):
    label = RowReader({"task": task}, {"task": column})({"image": Image.new("RGB", (3, 1)), "task": stored})["task"]
    assert label.flatten().tolist() == pytest.approx(expected)


def test_unlabelled_normals_stay_unlabelled():
    stored = np.float32([[[0.0, 255, 1]], [[0, 255, 0.5]], [[0, 255, 0.5]]])
    assert read_normals(stored, {"scale": 2, "offset": -1}) == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]
    assert read_normals(stored, {"scale": [1, -1, -1]}) == [[0, 0, 1], [0, 0, -0.5], [0, 0, -0.5]]
    levels = np.float32([[[0, 127.5, 255]], [[0, 255, 127.5]], [[0, 127.5, 127.5]]])
    assert read_normals(levels, {"scale": 1 / 127.5, "offset": -1}) == [[0, 0, 1], [0, 1, 0], [0, 0, 0]]
    codes = np.uint8([[[0, 128, 255]], [[0, 128, 0]], [[0, 128, 0]]])
    assert read_normals(codes, {"offset": 0.5, "scale": 0.5}) == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]


def read_normals(stored: np.ndarray, column: dict) -> list:
    row = {"image": Image.new("RGB", (3, 1)), "normals": stored}
    return RowReader({"normals": NORMALS}, {"normals": column})(row)["normals"][:, 0].tolist()
