import os
import re
import resource
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from commands import run_command
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from transformers_degmix.data.rooms import load_rooms
from transformers_degmix.tasks import label_palette


@pytest.fixture
def inspect(monkeypatch, capsys, tmp_path):
    """Arguments -> the command's output, or the message with which it exits."""

    def run(*args):
        capsys.readouterr()
        code = run_command(monkeypatch, "inspect", *args, "--output", tmp_path / "out")
        return capsys.readouterr().out if code is None else str(code)

    return run


def save(folder: Path, rows: list[dict]) -> Path:
    Dataset.from_list(rows).to_parquet(folder / "train-00000-of-00001.parquet")
    return folder


def photo(width: int = 8, height: int = 6) -> Image.Image:
    return Image.new("RGB", (width, height), (90, 80, 70))


def floats(value: float, width: int = 8, height: int = 6) -> Image.Image:
    return Image.fromarray(np.full((height, width), value, np.float32))


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    data = load_rooms("train", 4, (32, 48))
    folder = tmp_path_factory.mktemp("rooms")
    data.to_parquet(folder / "train-00000-of-00001.parquet")
    return folder, data


def test_rooms(inspect, rooms, tmp_path):
    folder, data = rooms
    output = inspect(folder, "--num", "3")
    assert "warning" not in output
    chosen = [data[index] for index in (0, 2, 3)]
    ids = np.concatenate([np.asarray(row["semseg"]).ravel() for row in chosen])
    assert f"   0  {(ids == 0).mean():6.1%}  wall" in output
    depth = np.concatenate([np.asarray(row["depth"]).ravel() for row in chosen])
    least, low, median, high, most = np.quantile(depth, [0, 0.01, 0.5, 0.99, 1])
    assert f"min {least:.4g} m, 1% {low:.4g} m, median {median:.4g} m, 99% {high:.4g} m, max {most:.4g} m" in output
    assert output.count("labelled: 3 of 3 samples, 100.0% of their pixels") == 6
    assert re.search(r"length: min 0\.99.*max 1\.00", output)

    picture = Image.open(tmp_path / "out" / "inspection.png")
    colors = {color for _, color in picture.getcolors(1 << 24)}
    assert picture.width > 7 * 300 and {tuple(color) for color in label_palette(2).tolist()} <= colors


def test_a_full_disk_leaves_the_old_picture(inspect, rooms, tmp_path):
    inspect(rooms[0], "--num", "2")
    picture, limits = tmp_path / "out" / "inspection.png", resource.getrlimit(resource.RLIMIT_FSIZE)
    old = picture.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, limits[1]))
    try:
        assert "File too large" in inspect(rooms[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert picture.read_bytes() == old and os.listdir(picture.parent) == [picture.name]


def test_tasks_and_columns_of_a_run(inspect, tmp_path):
    rows = [
        {"rgb": photo(), "ids": Image.new("L", (8, 6), 2), "mm": Image.fromarray(np.full((6, 8), 1500, np.uint16))},
        {"rgb": photo(), "ids": Image.new("L", (8, 6), 0), "mm": None},
    ]
    config = tmp_path / "run.yaml"
    text = (
        "output_dir: o\n"
        "columns: {image: rgb, parts: {column: ids, ignore: 0, offset: -1}, depth: {column: mm, scale: 0.001}}\n"
        "model: {tasks: {parts: {kind: segmentation, num_labels: 2, id2label: {0: a, 1: b}}, depth: {kind: depth}}}\n"
    )
    for streaming in ("false", "true"):
        config.write_text(text + f"streaming: {streaming}\n")
        output = inspect(save(tmp_path / "data", rows), "--config", config)
        assert "labelled: 2 of 2 samples, 50.0% of their pixels\n     1  100.0%  b\n" in output
        assert "classes that do not occur: a" in output
        assert "labelled: 1 of 2 samples, 100.0%" in output and "median 1.5 m" in output
        # Sample 1 is without parts: all 0.
        assert (
            output.count("warning") == 1
            and "column 'ids' (for 'parts'): nothing is labelled, in 100.0% of the pixels of sample 1" in output
        )


def test_a_source_of_a_run(inspect, tmp_path):
    folder = save(tmp_path / "data", [{"image": photo(), "ids": Image.new("L", (8, 6), 1), "depth": floats(2)}] * 2)
    config = tmp_path / "run.yaml"
    config.write_text(
        "output_dir: o\n"
        "model: {tasks: {parts: {kind: segmentation, num_labels: 2}, depth: {kind: depth}, sal: {}}}\n"
        f"datasets:\n- {{name: ids, dataset: {folder}, columns: {{parts: ids}}, tasks: [parts]}}\n"
        f"- {{name: rest, dataset: {folder}}}\n"
        "- {name: rooms, dataset: rooms, num_train_images: 9}\n"
    )
    output = inspect("ids", "--config", config)
    assert "parts (segmentation, column 'ids')" in output and "depth (" not in output and "2 samples" in output
    output = inspect("rest", "--config", config)
    assert "depth (depth, column 'depth')" in output and "parts (" not in output
    output = inspect("rooms", "--config", config, "--num", "1")
    assert "depth (" in output and "sal (" in output and "parts (" not in output
    assert "is none of the sources of" in (message := inspect(folder, "--config", config)) and "['ids', 'r" in message


@pytest.mark.parametrize("name", ["photos #2", "null", "2024"])
def test_a_data_set_of_any_name_with_a_recipe(inspect, tmp_path, monkeypatch, name):
    save(tmp_path / name, [{"image": photo(), "depth": floats(2)}])
    (tmp_path / "run.yaml").write_text("output_dir: o")
    monkeypatch.chdir(tmp_path)
    assert "depth (depth, column 'depth')" in inspect(name, "--config", "run.yaml")


def test_new_tasks_of_a_run(inspect, tmp_path):
    rows = [{"image": photo(), "ids": Image.new("L", (8, 6), 1), "depth": floats(2)}] * 2
    config = tmp_path / "run.yaml"
    config.write_text(
        "output_dir: o\npretrained: degmix_lite0_nyud\ncolumns: {surface: {column: ids, classes: {1: 0}}}\n"
        "new_tasks: {surface: {kind: segmentation, num_labels: 2}}\n"
    )
    folder = save(tmp_path / "data", rows)
    output = inspect(folder, "--config", config)
    assert "surface (segmentation, column 'ids')" in output and "depth (" not in output
    config.write_text(config.read_text() + "train_only_new: false\n")
    output = inspect(folder, "--config", config)
    assert "surface (segmentation, column 'ids')" in output and "depth (" in output


def test_columns_that_serve_several_sources(inspect, tmp_path):
    folder = save(tmp_path / "data", [{"image": photo(), "ids": Image.new("L", (8, 6), 1), "mm": floats(2)}] * 2)
    config = tmp_path / "run.yaml"
    config.write_text(
        "output_dir: o\ncolumns: {parts: ids, depth: mm}\n"
        "model: {tasks: {parts: {kind: segmentation, num_labels: 2}, depth: {kind: depth}}}\n"
        f"datasets:\n- {{name: a, dataset: {folder}, tasks: [parts]}}\n"
        f"- {{name: b, dataset: {folder}, tasks: [depth]}}\n"
    )
    assert "parts (segmentation, column 'ids')" in inspect("a", "--config", config)
    assert "depth (depth, column 'mm')" in inspect("b", "--config", config)
    config.write_text(config.read_text().replace("parts: ids", "part: ids"))
    message = inspect("b", "--config", config)
    assert message.startswith("error: source 'b': `columns` names ['part']; the run knows ['image', 'parts', 'depth'")


STOP = "sample 1: training would stop: column "
CASES = {
    "millimetres": (
        {"depth": floats(1500)},
        r"column 'depth': not in metres\?.*100.0%.*sample 1: .*1500; .*`columns: {depth: {scale: 0.001}}`",
    ),
    "empty depth": ({"depth": floats(0)}, "column 'depth': nothing is labelled.*sample 1"),
    "negative depth": ({"depth": floats(-2)}, STOP + "'depth'.* -2 .*100.0%.*`invalid: -2`"),
    "NaN": ({"depth": floats(float("nan"))}, STOP + "'depth'.*NaN in 100.0%.*`invalid: .nan`"),
    "size": ({"depth": floats(1, width=9)}, STOP + r"'depth'.*\(1, 6, 8\).*\(6, 9\)"),
    "lengths": (
        {"normals": np.full((3, 6, 8), 0.53).tolist()},
        "column 'normals': vectors are not of len.*sample 1.*0.918",
    ),
    "class": ({"parts": Image.new("L", (8, 6), 254)}, STOP + "'parts'.*0 to 4.*254.*`ignore: 254`"),
    "mode": ({"parts": photo()}, STOP + "'parts'.*RGB"),
    "black": (
        {"image": np.full((3, 6, 8), 0.5).tolist()},
        "column 'image': black.*sample 1.*above 1.*`columns: {image: {scale: 255}}`",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_looks_wrong_is_named(inspect, tmp_path, case):
    bad, message = CASES[case]
    good = {
        "image": np.full((3, 6, 8), 90.0).tolist() if "image" in bad else photo(),
        "depth": floats(2),
        "parts": Image.new("L", (8, 6), 4),
        "normals": np.float32([[[0]], [[0.6]], [[0.8]]]).repeat(6, 1).repeat(8, 2).tolist(),
    }
    tasks = "{depth: {kind: depth}, normals: {kind: normals}, parts: {kind: segmentation, num_labels: 5}}"
    config = tmp_path / "run.yaml"
    config.write_text(f"output_dir: o\nmodel: {{tasks: {tasks}}}")
    output = inspect(save(tmp_path / "data", [good, {**good, **bad}]), "--config", config)
    warnings = [line for line in output.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and re.search(message, warnings[0]), output
    assert (tmp_path / "out" / "inspection.png").exists()
    if case == "class":  # counted, though it cannot be drawn
        assert "   254   50.0%" in output


def test_warnings_are_counted(inspect, tmp_path):
    rows = [
        {"image": photo(), "semseg": Image.new("L", (8, 6), 0), "depth": floats(2000 + index)} for index in range(3)
    ]
    output = inspect(save(tmp_path / "data", rows), "--split", "train")
    assert "in 100.0% of the pixels of sample 0 and 2 more: the largest median is 2002; " in output


def test_errors(inspect, tmp_path):
    folder = save(tmp_path / "data", [{"image": photo(), "other": 1}])
    assert re.match(r"error: none of the columns \['image', 'other'\] is a known task", inspect(folder))
    config = tmp_path / "run.yaml"
    config.write_text("output_dir: o\nmodel: {tasks: {other: {kind: segmentaton}}}")
    assert re.match(r"error: .*'other'.*'segmentation'.*'segmentaton'", inspect(folder, "--config", config))
    assert "error: " in inspect(folder, "--split", "nowhere")
    assert "error: " in inspect(tmp_path / "nowhere")


def test_all_rows_are_read_and_the_bad_ones_listed(inspect, tmp_path, capsys):
    file = BytesIO()
    photo().save(file, "PNG")
    whole = {"image": {"bytes": file.getvalue(), "path": None}, "depth": floats(1.0)}
    rows = [dict(whole) for _ in range(40)]
    rows[3]["image"] = {"bytes": file.getvalue()[:-30], "path": None}
    rows[17]["depth"] = floats(-1.0)
    rows[38] = {"image": None, "depth": None}
    features = Features(dict.fromkeys(whole, ImageFeature()))
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "train-00000-of-00001.parquet"
    Dataset.from_list(rows, features=features).to_parquet(path)
    assert "warning" not in inspect(tmp_path / "data", "--num", 2)
    assert inspect(tmp_path / "data", "--num", 2, "--all") == "1"
    output = capsys.readouterr().out
    named = re.findall(r"^warning: sample (\d+): .*column '(\w+)'", output, re.MULTILINE)
    assert named == [("3", "image"), ("17", "depth"), ("38", "image")]
    assert "labelled: 2 of 2 samples" in output and "40 samples read, 3 of their images and labels refused" in output
    Dataset.from_list([whole] * 3, features=features).to_parquet(path)
    assert inspect(tmp_path / "data", "--all") == "0"


def test_a_damaged_image_is_named(inspect, tmp_path):
    file = BytesIO()
    photo().save(file, "PNG")
    rows = {"image": [{"bytes": file.getvalue()[:-30], "path": None}], "depth": [floats(1.0)]}
    features = Features(dict.fromkeys(rows, ImageFeature()))
    (tmp_path / "data").mkdir()
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    assert inspect(tmp_path / "data").startswith("error: sample 0: column 'image': cannot read the image: ")
