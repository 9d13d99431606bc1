"""Each row makes labels as people store them, and says how they are to be read, or what is to be said of them."""

from io import BytesIO
from itertools import permutations, product

import numpy as np
import pytest
import yaml
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import ExifTags, Image

from transformers_degmix.data.columns import RowReader
from transformers_degmix.data.inspection import check_columns
from transformers_degmix.data.mapping import map_columns, select_columns
from transformers_degmix.data.rooms import ROOMS_TASKS, load_rooms, render_room
from transformers_degmix.tasks import TASK_KINDS


SIZE = (24, 32)
BINARY, SEMSEG = {"kind": "segmentation", "num_labels": 2}, {"kind": "segmentation", "num_labels": 40}
SALIENCY, BOUNDARY, DEPTH, NORMALS = ({"kind": kind} for kind in ("saliency", "boundary", "depth", "normals"))
DISC = (np.indices(SIZE) - 12) ** 2
DISC = DISC.sum(0) < 50
ROOMS = [render_room("train", index, (48, 64)) for index in range(4)]


def file(values: np.ndarray | Image.Image, file_format: str = "PNG", **options) -> dict:
    stream = BytesIO()
    if file_format == "NPY":
        np.save(stream, values)
    else:
        image = values if isinstance(values, Image.Image) else Image.fromarray(values)
        image.save(stream, file_format, **options)
    return {"bytes": stream.getvalue(), "path": None}


def make(labels: list, task: dict, column: dict | None = None, are_files: bool = True):
    """The reader of a data set with these labels, after it was checked, the warnings, and the labels as read."""
    height, width = np.asarray(labels[0]).shape[:2] if not isinstance(labels[0], dict) else SIZE
    labels = [label if isinstance(label, dict) or not are_files else file(label) for label in labels]
    rows = {"image": [file(np.full((height, width, 3), 90, np.uint8))] * len(labels), "map": labels}
    features = Features({"image": ImageFeature(), "map": ImageFeature()}) if are_files else None
    data = Dataset.from_dict(rows, features=features)
    if not are_files:
        data = data.cast_column("image", ImageFeature())
    reader = RowReader({"task": task}, {"task": {"column": "map", **(column or {})}}, data.features)
    data = select_columns(data, reader)
    warnings = check_columns(data, reader).warnings()
    kind = TASK_KINDS[task["kind"]]
    read = []
    for row in data:
        label = reader.read_checked(row, "task", (height, width))
        read.append((kind.decode(label) if label.dtype == np.uint8 else label).squeeze())
    return warnings, read


def setting_in(warning: str) -> dict:
    """What the warning says to write in `columns`, as the run's YAML file would be read."""
    text = warning.split("`columns: ")[1].split("`")[0]
    return yaml.safe_load(text)["task"]


LEVELS = [np.uint8(255) * DISC, np.zeros(SIZE, np.uint8)]
IGNORED = np.where(DISC, 1, 0).astype(np.uint8)
IGNORED[:2] = 255


@pytest.mark.parametrize("task", [SALIENCY, BINARY])
@pytest.mark.parametrize(
    "column, labels, expected",
    [
        ({}, LEVELS, [DISC, 0 * DISC]),
        ({}, [IGNORED, LEVELS[0]], [IGNORED, 255 * DISC]),  # 1 occurs, so that 255 is unlabelled
        ({"ignore": 255}, LEVELS, [255 * DISC, 0 * DISC]),
        ({"scale": 1 / 255}, LEVELS, [DISC, 0 * DISC]),
        # 8 bits and 1 bit in one data set
        ({}, [*LEVELS, DISC], [DISC, 0 * DISC, DISC]),
    ],
)
def test_binary_masks(task, column, labels, expected):
    warnings, read = make(labels, task, column)
    for label, right in zip(read, expected, strict=True):
        assert label.tolist() == (right * 1).tolist()
    if not column and len(np.unique(labels[0])) == 2:
        assert len(warnings) == 1 and setting_in(warnings[0])["scale"] == 0.00392 and "read with" in warnings[0]
        assert "column 'map' (for 'task')" in warnings[0] and f"{DISC.mean():.1%} of the pixels" in warnings[0]
    else:
        assert not warnings


def test_conclusions_that_a_later_row_contradicts_are_refused():
    labels = [*LEVELS * 40]
    labels[1] = IGNORED  # not among the 16 that are looked at
    with pytest.raises(ValueError, match="only 0 or 255.*got 1.*`columns`.*`ignore: 255`"):
        make(labels, BINARY)


@pytest.mark.parametrize("task", [SALIENCY, BINARY])
@pytest.mark.parametrize("column", [{}, {"resize": True}])
def test_masks_of_two_levels_that_are_rare(task, column):
    labels = [LEVELS[1]] * 64
    labels[1] = LEVELS[0]  # not among the 16 that are looked at
    with pytest.raises(ValueError, match="column 'map'.*0 and 255 are the only.*scale: 0.00392.*ignore: 255"):
        make(labels, task, column)
    assert make(labels, task, {**column, "scale": 0.00392})[1][1].tolist() == (DISC * 1).tolist()
    assert make(labels, task, {**column, "ignore": 255})[1][1].tolist() == (DISC * 255).tolist()
    # 1 tells that 255 is unlabelled, in the same map or among those that are looked at.
    assert make([*LEVELS[1:] * 2, IGNORED, *LEVELS[1:] * 60], task, column)[1][2].tolist() == IGNORED.tolist()
    assert make([IGNORED, *labels], task, column)[1][2].tolist() == (DISC * 255).tolist()


def test_rare_masks_in_training():
    rows = {"image": [file(np.full((*SIZE, 3), 90, np.uint8))] * 64, "sal": [file(LEVELS[1])] * 64}
    rows["sal"][1] = file(LEVELS[0])
    data = Dataset.from_dict(rows, features=Features(dict.fromkeys(rows, ImageFeature())))
    mapped = map_columns(data, {"sal": SALIENCY})
    assert not np.asarray(mapped[0]["sal"]).any()
    with pytest.raises(ValueError, match="sample 1: column 'sal': 0 and 255 are the only values"):
        mapped[1]


def test_ids_with_gaps_lead_to_a_table():
    with pytest.raises(ValueError, match=r"got 7 \(not class ids, 7, 8, 11; `classes` in `columns`, such as \{"):
        make([np.array([7, 8, 11], np.uint8)[np.indices(SIZE).sum(0) % 3]], SEMSEG | {"num_labels": 3})


def test_masks_of_two_levels_that_are_explained_by_a_table():
    warnings, read = make(LEVELS, SEMSEG, {"classes": {0: 1, 255: 255}})
    assert not warnings and read[0].tolist() == np.where(DISC, 255, 1).tolist()


def test_masks_of_two_levels_that_are_resized():
    large = [label.repeat(2, 0).repeat(2, 1) for label in LEVELS]
    features = Features({"image": ImageFeature(), "task": ImageFeature()})
    rows = {"image": [file(np.full((*SIZE, 3), 90, np.uint8))] * 2, "task": [file(label) for label in large]}
    rows = map_columns(Dataset.from_dict(rows, features=features), {"task": SALIENCY}, {"task": {"resize": True}})
    assert setting_in(rows.warnings[0]) == {"scale": 0.00392, "resize": True}
    assert rows[0]["task"].tolist() == (DISC * 1).tolist()


def test_masks_of_two_levels_for_several_classes():
    warnings, read = make(LEVELS, SEMSEG)
    assert read[0].max() == 255 and setting_in(warnings[0]) == {"column": "map", "scale": 0.00392}
    warnings, read = make(LEVELS, SEMSEG, setting_in(warnings[0]))
    assert not warnings and read[0].tolist() == (DISC * 1).tolist()


def test_boundaries_of_0_and_1():
    warnings, read = make([np.uint8(1) * DISC, np.uint8(0) * DISC], BOUNDARY)
    assert read[0].tolist() == DISC.tolist() and setting_in(warnings[0]) == {"column": "map", "scale": 255}
    # What else 255 beside 1 can mean is for the user to say.
    warnings, read = make([IGNORED], BOUNDARY)
    assert read[0].max() == 1
    warnings, read = make([IGNORED], BOUNDARY, setting_in(warnings[0]))
    assert not warnings and read[0].tolist() == IGNORED.tolist()
    warnings, read = make([np.uint8(5) * DISC], BOUNDARY)
    warnings, read = make([np.uint8(5) * DISC], BOUNDARY, setting_in(warnings[0]))
    assert not warnings and read[0].tolist() == DISC.tolist()
    inverted, _ = make([np.uint8(255) * ~DISC], BOUNDARY)
    _, read = make([np.uint8(255) * ~DISC], BOUNDARY, setting_in(inverted[0]))
    assert read[0].tolist() == DISC.tolist()


@pytest.mark.parametrize("scale", [1, 10])
def test_boundaries_as_floats(scale):
    strength = np.float32(255) * DISC
    _, read = make([strength.tolist()], BOUNDARY, are_files=False)
    assert read[0].tolist() == pytest.approx(DISC.astype(float), abs=1e-3)


def indexed(values: np.ndarray) -> Image.Image:
    levels = np.unique(values)
    image = Image.fromarray(np.searchsorted(levels, values).astype(np.uint8), "P")
    image.putpalette([level for level in levels.tolist() for _ in range(3)])
    return image


@pytest.mark.parametrize("column", [{}, {"ignore": 9}])
def test_palettes(column):
    ids = np.array([0, 3, 7, 255], np.uint8).repeat(8)[None].repeat(24, 0)
    _, read = make([file(indexed(ids))], SEMSEG, column)
    assert read[0].tolist() == ids.tolist()
    edge = np.uint8(255) * DISC
    assert make([file(indexed(edge))], BOUNDARY)[1][0].tolist() == DISC.tolist()
    # A palette of colours shows indices, which are the ids; one without entries, too.
    image = Image.fromarray(DISC * np.uint8(2), "P")
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    assert make([file(image)], SEMSEG, column)[1][0].tolist() == (2 * DISC).tolist()
    image.putpalette([0] * 9)
    assert make([file(image)], SEMSEG, column)[1][0].tolist() == (2 * DISC).tolist()


@pytest.mark.parametrize("how", ["JPEG", "resized"])
def test_ids_that_were_mixed(how):
    ids = np.select([DISC, np.indices(SIZE)[1] > 20], [15, 9], 0).astype(np.uint8)
    mixed = file(ids, "JPEG", quality=95)
    if how == "resized":
        mixed = file(Image.fromarray(ids).resize((16, 12)).resize(SIZE[::-1], Image.Resampling.BILINEAR))
    *others, warning = make([mixed], SEMSEG)[0]
    assert len(others) == (how == "JPEG") and "as JPEG and smooth resizing make them" in warning


@pytest.mark.parametrize("quality", [75, 100])
def test_few_ids_as_jpeg(quality):
    ids = np.select([DISC, np.indices(SIZE)[1] > 20], [2, 1], 0).astype(np.uint8)
    stored = file(ids, "JPEG", quality=quality)
    warnings, read = make([stored], SEMSEG)
    assert (read[0] != ids).any()  # though no id is too large, and at quality 100 none lies between others
    assert "column 'map' (for 'task'): JPEG, which changes class ids, in 100.0%" in warnings[0]
    shifted = file(ids + np.uint8(1), "JPEG", quality=quality)
    with pytest.raises(ValueError, match=r"got \d \(JPEG, which changes class ids: save maps as PNG\)"):
        make([shifted], SEMSEG | {"num_labels": 3})
    # Of two classes, no more is needed than a threshold.
    mask = file(LEVELS[0], "JPEG", quality=quality)
    if quality == 75:
        with pytest.raises(ValueError, match="`scale: 0.00392`"):
            make([mask], SALIENCY)
    warnings, read = make([mask], SALIENCY, {"scale": 0.00392})
    assert not warnings and read[0].tolist() == (DISC * 1).tolist()


@pytest.mark.parametrize("task", [SEMSEG, SALIENCY, BOUNDARY])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
@pytest.mark.parametrize("column", [{}, {"ignore": 9}])
def test_grey_maps_with_more_channels_than_they_need(task, mode, column):
    grey = Image.fromarray(DISC * np.uint8(1))
    _, expected = make([file(grey)], task, column)
    _, read = make([file(grey.convert(mode))], task, column)
    assert read[0].tolist() == expected[0].tolist() and read[0].any()


def test_alpha_and_colours_that_say_something():
    normals = Image.new("RGB", SIZE[::-1], (128, 204, 230))
    _, expected = make([file(normals)], NORMALS)
    _, read = make([file(normals.convert("RGBA"))], NORMALS)
    assert read[0].tolist() == expected[0].tolist()
    for image in (normals, Image.new("L", SIZE[::-1])):
        image = image.convert("RGBA" if image.mode == "RGB" else "LA")
        image.putalpha(Image.fromarray(np.uint8(255) * DISC))
        with pytest.raises(ValueError, match="alpha must be opaque"):
            make([file(image)], NORMALS if image.mode == "RGBA" else SEMSEG)
    with pytest.raises(ValueError, match="classes as colours need `colors`"):
        make([file(Image.new("RGB", SIZE[::-1], (0, 0, 1)))], SEMSEG)


@pytest.mark.parametrize("file_format", ["TIFF", "NPY"])
def test_ids_with_fractions(file_format):
    shares = (0.1 + 0.7 * DISC).astype(np.float32)
    with pytest.raises(ValueError, match=r"whole numbers, got 0\.1, .* in 100\.0% of the pixels \(`scale: 1` in `col"):
        make([file(shares, file_format)], SALIENCY)
    with pytest.raises(ValueError, match="whole numbers"):
        make([file(shares, file_format)], SALIENCY, {"ignore": 9})
    assert make([file(shares, file_format)], SALIENCY, {"scale": 1})[1][0].tolist() == (DISC * 1).tolist()
    ids = np.select([DISC, np.indices(SIZE)[1] > 20], [2, 1], 0)
    for stored, column in ((ids, {}), (ids / 255, {"scale": 255})):
        assert make([file(stored.astype(np.float32), file_format)], SEMSEG, column)[1][0].tolist() == ids.tolist()


@pytest.mark.parametrize("file_format", ["TIFF", "NPY"])
def test_boundaries_as_float_files(file_format):
    stored = file((0.5 * DISC).astype(np.float32), file_format)
    assert make([stored], BOUNDARY)[1][0].tolist() == (0.5 * DISC).tolist()


def test_boundaries_of_16_bits():
    stored = DISC * np.uint16(65535)
    with pytest.raises(ValueError, match="got I;16: 16 bits need the `scale` 0.000015259"):
        make([stored], BOUNDARY)
    _, read = make([stored], BOUNDARY, {"scale": 0.000015259})
    assert read[0] == pytest.approx(DISC.astype(float), abs=1e-4)


def test_hints_are_about_what_is_stored():
    stored = np.where(DISC, 250, np.indices(SIZE)[1] > 20).astype(np.uint8)
    with pytest.raises(ValueError, match="got 251.*`ignore: 250, offset: 1` in `columns`"):
        make([stored], SEMSEG, {"offset": 1})
    data = Dataset.from_dict({"image": [file(np.zeros((*SIZE, 3), np.uint8))], "parts": [file(stored)]})
    with pytest.raises(ValueError, match="sample 0: column 'parts': .*got 251.*`ignore: 250, offset: 1`"):
        map_columns(data, {"parts": SEMSEG}, {"parts": {"offset": 1}})[0]


@pytest.mark.parametrize("column", [{"scale": 1}, {"offset": 1}])
def test_fixes_keep_that_fractions_are_rounded(column):
    stored = file(np.where(DISC, 250, 0.1).astype(np.float32), "TIFF")
    with pytest.raises(ValueError, match="` in `columns` fixes it") as refusal:
        make([stored], SEMSEG, column)
    setting = yaml.safe_load("{" + str(refusal.value).split("`")[1] + "}")
    assert setting == {"ignore": 250, **column}
    assert make([stored], SEMSEG, setting)[1][0].tolist() == np.where(DISC, 255, column.get("offset", 0)).tolist()


def test_classes_that_never_occur():
    ids = np.uint8(12) * DISC
    warnings, _ = make([ids] * 16, SEMSEG)
    assert len(warnings) == 1 and "the largest is 12, `num_labels` is 40" in warnings[0]
    assert not make([ids] * 15, SEMSEG)[0]


@pytest.mark.parametrize(
    "stored, task, setting",
    [
        (DISC * np.uint8(1) + np.uint8(1), BINARY, {"offset": -1}),
        (DISC * np.uint8(128), BINARY, {"scale": 0.0078125}),
        (np.arange(768).reshape(SIZE).astype(np.uint8), BINARY, {"scale": 0.00392}),
        (np.arange(768).reshape(SIZE).astype(np.uint8) % 41, SEMSEG, {"offset": -1, "ignore": 0}),
        (np.arange(768).reshape(SIZE).astype(np.uint8) % 40 + np.uint8(1), SEMSEG, {"offset": -1}),
        (np.where(DISC, 250, 0).astype(np.uint8), SEMSEG, {"ignore": 250}),
        (file(np.where(DISC, -1, 2).astype(np.float32), "TIFF"), DEPTH, {"invalid": -1}),
        (np.select([DISC], [255], np.indices(SIZE)[0] // 12 * 128).astype(np.uint8), BINARY, {"ignore": 128}),
        (file(np.where(DISC, 2**32 - 1, 0).astype(np.uint32), "NPY"), SEMSEG, {"ignore": 4294967295}),
    ],
)
def test_values_that_cannot_be_are_refused_with_the_setting_that_mends_them(stored, task, setting):
    (name, value), *_ = setting.items()
    with pytest.raises(ValueError, match=rf"% of the pixels; `.*{name}: {value}[,`]"):
        make([stored], task)
    make([stored], task, setting)


@pytest.mark.parametrize("unit", [100, 256, 1000])
def test_backgrounds_at_the_end_of_16_bits(unit):
    stored = np.where(DISC, 40000 + np.arange(768).reshape(SIZE), 65535) / unit
    warnings, _ = make([file(stored.astype(np.float32), "TIFF")], DEPTH)
    _, read = make([file(stored.astype(np.float32), "TIFF")], DEPTH, setting_in(warnings[0]))
    assert ((read[0] == 0) == ~DISC).all()


def test_labels_of_nothing_are_not_suspicious():
    nothing = np.full(SIZE, 255, np.float32)
    for task in (BINARY, SEMSEG, SALIENCY, BOUNDARY, DEPTH):
        assert not make([nothing.tolist()], task, are_files=False)[0]
    assert not make([np.zeros((*SIZE, 3)).tolist()], NORMALS, are_files=False)[0]


def test_far_backgrounds():
    depth = np.where(DISC, 2 + np.arange(768).reshape(SIZE) / 768, 1e10).astype(np.float32)
    warnings, _ = make([file(depth, "TIFF")] * 2, DEPTH)
    assert len(warnings) == 1 and f"{1 - DISC.mean():.1%} of the pixels of sample 0 and 1 more" in warnings[0]
    warnings, read = make([file(depth, "TIFF")], DEPTH, setting_in(warnings[0]))
    assert not warnings and ((read[0] == 0) == ~DISC).all()
    # and in another unit: the setting has the stored value
    warnings, _ = make([file(depth * 1000, "TIFF")], DEPTH, {"scale": 0.001})
    assert setting_in(warnings[0])["invalid"] == pytest.approx(1e13)


@pytest.mark.parametrize("gray", [126, 127, 128])
def test_normals_with_a_gray_border(gray):
    stored = ((ROOMS[0]["normals"] + 1) / 2 * 255).round().astype(np.uint8)
    stored[:9] = gray
    warnings, read = make([stored], NORMALS)
    assert not warnings and (read[0][:, :9] == 0).all() and (np.abs(read[0][:, 9:]).max(axis=0) > 0).all()
    stored[1:3] = 255  # this cannot be meant either, but nobody has said what it stands for
    warnings, _ = make([stored], NORMALS)
    warnings, read = make([stored], NORMALS, setting_in(warnings[0]))
    assert not warnings and (read[0][:, 1:3] == 0).all()


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("signs", list(product((1, -1), repeat=3)))
def test_normals_of_other_conventions(order, signs):
    true = [room["normals"] for room in ROOMS]
    stored = [((normals * signs)[..., order] + 1) / 2 * 255 for normals in true]
    stored = [normals.round().astype(np.uint8) for normals in stored]
    warnings, _ = make(stored, NORMALS)
    if order == (0, 1, 2) and signs == (1, 1, 1):
        assert not warnings
        return
    warnings, read = make(stored, NORMALS, setting_in(warnings[0]))
    assert not warnings
    assert np.abs(read[0] - np.moveaxis(true[0], -1, 0)).max() < 0.01


@pytest.mark.parametrize("low, factor", [(0, 1), (0, 255)])
def test_normals_as_floats_of_another_range(low, factor):
    true = ROOMS[0]["normals"]
    stored = ((true + 1) / 2 * factor).astype(np.float32).tolist()
    with pytest.raises(ValueError, match="`scale: .*, offset: -1`"):
        make([stored], NORMALS, are_files=False)
    setting = {"scale": 2 / factor, "offset": -1}
    _, read = make([stored], NORMALS, setting, are_files=False)
    assert read[0] == pytest.approx(np.moveaxis(true, -1, 0), abs=1e-5)


def test_rooms_look_right():
    data = load_rooms("validation", 20, (48, 64))
    reader = RowReader(ROOMS_TASKS, {}, data.features)
    assert not check_columns(select_columns(data, reader), reader).warnings()
    assert not any(column.changes_values for column in reader.columns.values())


def test_warnings_are_logged_once_for_all_processes(monkeypatch):
    rows = {"image": [file(np.zeros((*SIZE, 3), np.uint8))] * 2, "sal": [file(label) for label in LEVELS]}
    data = Dataset.from_dict(rows, features=Features(dict.fromkeys(rows, ImageFeature())))
    said = []
    monkeypatch.setattr("transformers_degmix.data.mapping.logger.warning", said.append)
    mapped = map_columns(data, {"sal": SALIENCY})
    assert said == mapped.warnings and len(said) == 1
    monkeypatch.setenv("RANK", "1")
    map_columns(data, {"sal": SALIENCY})
    assert len(said) == 1
    stream = map_columns(data.to_iterable_dataset(), {"sal": SALIENCY})
    assert next(iter(stream))["sal"].tolist() == (DISC * 1).tolist()


def photo(orientation: int, height: int, width: int) -> dict:
    """An image that EXIF data turns: red at the left, blue at the right of what is stored."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = pixels[:, width // 2 :, 2] = 255
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return file(pixels, "PNG", exif=exif)


@pytest.mark.parametrize(
    "orientation, size, is_said", [(3, SIZE, True), (6, (24, 24), True), (1, (24, 24), False), (9, (24, 24), False)]
)
def test_images_that_are_turned_without_their_labels(orientation, size, is_said):
    rows = {"image": [photo(orientation, *size)], "sal": [file(np.eye(*size, dtype=np.uint8))]}
    data = Dataset.from_dict(rows, features=Features(dict.fromkeys(rows, ImageFeature())))
    warnings = map_columns(data, {"sal": SALIENCY}).warnings
    assert len(warnings) == is_said and all(
        "`columns: {image: {ignore_orientation: true}}`" in line for line in warnings
    )
    mapped = map_columns(data, {"sal": SALIENCY}, {"image": {"ignore_orientation": True}})
    assert not mapped.warnings and mapped[0]["image"][0, 0, 0] == 255  # red
    labels = [photo(orientation, *size)]
    rows = {"image": labels, "normals": labels}
    data = Dataset.from_dict(rows, features=Features(dict.fromkeys(rows, ImageFeature())))
    assert not any("EXIF" in line for line in map_columns(data, {"normals": NORMALS}).warnings)


def test_labels_of_the_size_of_the_image_that_is_not_turned():
    rows = {"image": [photo(6, 24, 32)], "sal": [file(np.eye(24, 32, dtype=np.uint8))]}
    data = Dataset.from_dict(rows, features=Features(dict.fromkeys(rows, ImageFeature())))
    reader = RowReader({"sal": SALIENCY}, {}, data.features)
    row = next(iter(select_columns(data, reader)))
    with pytest.raises(ValueError, match=r"\(24, 32\) \(`image: {ignore_orientation: true}` in `columns`"):
        reader.read_checked(row, "sal", (32, 24))
    assert map_columns(data, {"sal": SALIENCY}, {"image": {"ignore_orientation": True}})[0]["image"].shape == (
        3,
        24,
        32,
    )
