import json
import os
from pathlib import Path

import numpy as np
import pytest
from commands import run_command
from PIL import Image
from small_models import ALL_KINDS, save_small_model, save_small_onnx

from transformers_degmix.data.rooms import load_rooms


TASKS = {name: ALL_KINDS[name] for name in ("depth", "edge")}
ROOMS = ("--dataset", "rooms", "--split", "test", "--num-images", 2, "--image-size", 32, 48)
ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model") / "both", tasks=TASKS)


@pytest.fixture
def photo(tmp_path) -> Path:
    """60 x 40, turned upright 40 x 60"""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg", exif=exif)
    return tmp_path / "photo.jpg"


@pytest.fixture
def explain(monkeypatch, capsys):
    """Runs the script's `main` in this process: arguments -> its output, or what it says when it fails."""

    def run(*args):
        capsys.readouterr()
        code = run_command(monkeypatch, "explain", *args)
        output = capsys.readouterr()
        return code if isinstance(code, str) else output.err.splitlines()[-1] if code else output.out

    return run


def test_data_and_photo(explain, model_dir, photo, tmp_path):
    output = explain("--model", model_dir, *ROOMS, "--image", photo, "--output", tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == [
        "affinity.json",
        "affinity.png",
        "sampling.json",
        "sampling.layer1.png",
        "sampling.layer2.png",
    ]
    affinity = json.loads((tmp_path / "out" / "affinity.json").read_text())
    assert affinity["num_images"] == 2 and affinity["tasks"] == list(TASKS) and affinity["dataset"] == "rooms"
    np.testing.assert_allclose(np.sum(affinity["mean"], axis=1), 1, atol=1e-6)
    assert f"--image {photo}" in affinity["command"]
    layers = json.loads((tmp_path / "out" / "sampling.json").read_text())["layers"]
    assert f"| 2 | edge | {layers[1]['edge']['median_distance']:.1f} |" in output
    assert f"{photo}, layer 2, outside: depth" in output and f"results: {tmp_path / 'out'}" in output
    assert Image.open(tmp_path / "out" / "affinity.png").width > 300


def test_labels_are_not_needed_and_columns_are_those_of_the_config(explain, model_dir, tmp_path):
    (tmp_path / "data").mkdir()
    data = load_rooms("test", 2, (32, 48)).select_columns("image").rename_column("image", "photo")
    data.to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    config = tmp_path / "run.yaml"
    config.write_text("output_dir: o\ncolumns: {image: photo, depth: distance}\n")
    arguments = ("--dataset", tmp_path / "data", "--split", "test", "--config", config)
    explain("--model", model_dir, *arguments, "--output", tmp_path / "read")
    explain("--model", model_dir, *ROOMS, "--output", tmp_path / "rooms")
    first, second = (json.loads((tmp_path / name / "affinity.json").read_text()) for name in ("read", "rooms"))
    assert first["mean"] == second["mean"] and first["std"] == second["std"]


def test_points_of_the_upright_photo(explain, model_dir, photo, tmp_path):
    arguments = ("--model", model_dir, "--image", photo)
    assert "results" in explain(*arguments, "--points", "0,0", "39,59", "--output", tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["sampling.layer1.png", "sampling.layer2.png"]
    message = explain(*arguments, "--points", "40,0", "--output", tmp_path / "none")
    assert message == (
        f"error: {photo}: the pixel 40,0 is outside of the image of 40 x 60: x must be from 0 to 39, y from 0 to 59"
    )
    assert not (tmp_path / "none").exists()


def test_models_without_mixers_have_attention(explain, tmp_path):
    model_dir = save_small_model(tmp_path / "model", tasks=TASKS, num_mixer_layers=0)
    explain("--model", model_dir, *ROOMS, "--output", tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["affinity.json", "affinity.png"]


def test_errors_are_one_line_and_nothing_is_written(explain, model_dir, photo, tmp_path):
    bare = save_small_model(tmp_path / "bare", tasks=TASKS, use_decoder=False)
    flat = save_small_model(tmp_path / "flat", tasks=TASKS, num_mixer_layers=0)
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    image = ("--image", photo)
    for arguments, words in (
        (("--model", bare, *ROOMS), ("no decoder",)),
        (("--model", bare, *image, *ROOMS), ("no decoder",)),
        (("--model", flat, *image), ("no mixer layers",)),
        (("--model", tmp_path / "nothing", *image), ("cannot load", "nothing")),
        (("--image", tmp_path / "text.png"), ("cannot read", "text.png")),
        (("--image", tmp_path / "missing.png"), ("cannot read", "missing.png")),
        ((*ROOMS[:2], "--split", "nowhere", *ROOMS[4:]), ("nowhere", "validation")),
        ((*image, "--output", tmp_path / "full"), ("full", "not empty")),
        ((*image, "--points", "1,x"), ("--points", "'1,x'")),
        ((*image, "--points", "1"), ("--points", "'1'")),
        ((), ("--dataset, --image, or both",)),
        (ROOMS[:2], ("--dataset and --split",)),
        ((*image, "--num-images", 3), ("--num-images are for --dataset",)),
        ((*ROOMS, "--points", "1,1"), ("--points are for --image",)),
        ((*ROOMS[:-3],), ("--image-size",)),
    ):
        message = explain("--model", model_dir, "--output", tmp_path / "out", *arguments)
        assert "error: " in message and "\n" not in message, message
        assert all(word in message for word in words), message
        assert not (tmp_path / "out").exists() and os.listdir(tmp_path / "full") == ["file"]


def test_onnx_files_are_refused(explain, photo, tmp_path):
    path = save_small_onnx(tmp_path / "model.onnx")
    message = explain("--model", path, "--image", photo, "--output", tmp_path / "out")
    assert message == f"error: {path} is an ONNX file, which gives only logits"
