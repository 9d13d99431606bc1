"""The demo page: what it computes, and a server as a client meets it, with good and bad files."""

import struct
import threading
import zlib
from contextlib import contextmanager
from pathlib import Path

import gradio_client
import numpy as np
import pytest
import torch
import trimesh
from commands import run_command
from PIL import Image
from small_models import save_small_onnx, small_model
from transformers import pipeline

from transformers_degmix import DeGMixImageProcessorPil
from transformers_degmix.cli.demo import read_examples
from transformers_degmix.data.rooms import render_room
from transformers_degmix.demo import page
from transformers_degmix.demo.page import LAUNCH_OPTIONS, LONGEST_SIDE, build_demo, read_photo
from transformers_degmix.demo.readings import draw_legend, read_point
from transformers_degmix.demo.surface import depth_surface
from transformers_degmix.hub.model_directory import load_model_directory
from transformers_degmix.tasks import TASK_KINDS
from transformers_degmix.visualization.geometry import FIELD_OF_VIEW


@contextmanager
def serve(model, processor):
    page = build_demo(model, processor, max_pixels=200 * 200)
    _, url, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **LAUNCH_OPTIONS)
    try:
        yield gradio_client.Client(url, verbose=False, httpx_kwargs={"timeout": 900})
    finally:
        page.close(verbose=False)


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def processor(model):
    return DeGMixImageProcessorPil(tasks=model.config.tasks, size_divisor=32)


@pytest.fixture(scope="module")
def client(model, processor):
    with serve(model, processor) as client:
        yield client


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "kitchen.png"
    Image.fromarray(render_room("test", 0, (60, 80))["image"]).save(path)
    return path


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = struct.pack(">I", 1000) + b"IDAT"
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + data


def arrays_of(outputs) -> tuple[Path, dict[str, np.ndarray]]:
    """The arrays among all that the page shows."""
    lists = [output for output in outputs if isinstance(output, list)]
    (path,) = [Path(file) for files in lists for file in files if str(file).endswith(".npz")]
    with np.load(path) as arrays:
        return path, dict(arrays)


def predict(client, path):
    return client.predict(gradio_client.handle_file(path), api_name="/predict")


def test_arrays_are_the_pipelines(client, model, processor, photo):
    path, arrays = arrays_of(predict(client, photo))
    expected = pipeline("multi-task-dense-prediction", model=model, image_processor=processor)(str(photo))
    assert path.name == "kitchen.npz" and list(arrays) == list(expected)
    for task, values in expected.items():
        np.testing.assert_allclose(arrays[task], values.numpy(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["model", "ONNX file"])
def test_models_without_depth_and_decoder_are_shown(photo, tmp_path, form):
    if form == "model":
        model = small_model(tasks={"normals": {"kind": "normals"}}, use_decoder=False)
        processor = DeGMixImageProcessorPil(tasks=model.config.tasks, size_divisor=32)
    else:
        model, processor = load_model_directory(save_small_onnx(tmp_path / "model.onnx"))
    with serve(model, processor) as client:
        _, arrays = arrays_of(predict(client, photo))
        tabs = {
            component["props"]["label"]: component["props"].get("visible", True)
            for component in client.config["components"]
            if component["type"] == "tabitem"
        }
    assert list(arrays) == ["normals"]
    assert tabs == {"All tasks": True, "Compare": True, "3-D": False, "Attention": False, "Files": True}


@pytest.mark.parametrize(
    "content, message",
    [
        (b"no image", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60 60\n%%EOF\n", "not an image"),
        (png_header(201, 200), "201 x 200 pixels"),
        (png_header(30_000, 30_000), "too large"),
        (png_header(150, 20), "too narrow"),
        (png_header(100, 100), "damaged"),
    ],
)
def test_bad_files_are_refused_with_the_reason(client, tmp_path, content, message):
    path = tmp_path / "photo.png"
    path.write_bytes(content)
    with pytest.raises(gradio_client.exceptions.AppError, match=message):
        predict(client, path)
    with pytest.raises(gradio_client.exceptions.AppError, match=f"photo.png: .*{message}"):
        client.predict([gradio_client.handle_file(path)], api_name="/add_photos")


def test_too_many_files_at_once_are_refused(client, photo):
    files = [gradio_client.handle_file(photo)] * 9
    assert len(client.predict(files[:8], api_name="/add_photos")) == 8
    with pytest.raises(gradio_client.exceptions.AppError, match="9 files at once, at most 8"):
        client.predict(files, api_name="/add_photos")


def test_whoever_comes_to_a_full_queue_is_told(monkeypatch, model, processor, tmp_path):
    monkeypatch.setattr(page, "MAX_WAITING", 1)
    started, go_on = threading.Event(), threading.Event()

    def wait(*_):
        started.set()
        go_on.wait(900)

    files = []
    for index in range(3):  # of their own: Gradio writes equal results into one file, again while it is being read
        path = tmp_path / f"{index}.png"
        Image.fromarray(render_room("test", index, (40, 60))["image"]).save(path)
        files.append(gradio_client.handle_file(path))
    hook = model.register_forward_pre_hook(wait)
    try:
        with serve(model, processor) as client:
            first = client.submit(files[0], api_name="/predict")
            assert started.wait(900)
            others = [client.submit(file, api_name="/predict") for file in files[1:]]
            refused = threading.Event()
            for job in others:
                job.add_done_callback(lambda _: refused.set())
            assert refused.wait(900)
            go_on.set()
            errors = [error for error in (job.exception(900) for job in others) if error]
            assert len(errors) == 1 and "full" in str(errors[0])
            arrays_of(first.result(900))
    finally:
        go_on.set()
        hook.remove()


def test_photos_are_shrunk_and_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.linear_gradient("L").resize((1000, 500)).save(tmp_path / "turned.jpg", exif=exif)
    photo = read_photo(tmp_path / "turned.jpg")
    assert photo.size == (LONGEST_SIDE // 2, LONGEST_SIDE) and photo.mode == "RGB"
    left, right = (np.array(photo)[:, columns].mean() for columns in (slice(0, 50), slice(-50, None)))
    assert left > 200 and right < 50


def test_values_of_another_range_are_warned_of(tmp_path):
    Image.fromarray(np.full((60, 80), 4000, np.uint16)).save(tmp_path / "dark.png")
    with pytest.warns(UserWarning, match="no value is above 4000"):
        read_photo(tmp_path / "dark.png")


def test_stray_files_among_the_examples_are_named(photo, tmp_path, capsys):
    (tmp_path / "examples" / "folder").mkdir(parents=True)
    (tmp_path / "examples" / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    for name in ("a.png", "b.png"):
        (tmp_path / "examples" / name).write_bytes(photo.read_bytes())
    assert [photo.size for photo in read_examples(tmp_path / "examples", 10**6)] == [(80, 60)] * 2
    first, second = capsys.readouterr().err.splitlines()
    assert ".DS_Store: not an image" in first and "folder: " in second


def test_surface_of_a_wall():
    picture = Image.linear_gradient("L").convert("RGB").resize((90, 60))
    surface = trimesh.load(
        trimesh.util.wrap_as_stream(depth_surface(torch.full((60, 90), 2.0), picture).export(file_type="glb")),
        file_type="glb",
        force="mesh",
    )
    width = 2 * 2 * np.tan(np.radians(FIELD_OF_VIEW / 2))
    np.testing.assert_allclose(surface.extents, [width * 89 / 90, width * 59 / 90, 0], atol=1e-4)
    np.testing.assert_allclose(surface.bounds.mean(axis=0), [0, 0, -2], atol=1e-4)
    assert (surface.face_normals[:, 2] > 0.99).all()
    np.testing.assert_allclose(surface.area, surface.extents[0] * surface.extents[1], rtol=1e-4)
    # The picture is upright on it: dark above, light below.
    colors = surface.visual.uv[:, 1] > 0.5
    np.testing.assert_array_equal(colors, surface.vertices[:, 1] > 0)


def test_surface_is_torn_at_jumps_and_unknown_depth():
    depth = torch.full((40, 60), 1.0)
    depth[:, 30:] = 3
    depth[:5] = 0
    picture = Image.new("RGB", (60, 40))
    parts = depth_surface(depth, picture).split(only_watertight=False)
    assert sorted(round(float(-part.vertices[:, 2].mean())) for part in parts) == [1, 3]
    assert sum(len(part.faces) for part in parts) == 2 * 34 * (29 + 29)
    assert depth_surface(torch.zeros(40, 60), picture) is None


def test_readings_are_of_the_pixel():
    tasks = {
        "things": {"kind": "segmentation", "num_labels": 3, "id2label": {2: "cup"}},
        "stuff": {"kind": "segmentation", "num_labels": 3},
        "distance": {"kind": "depth"},
        "normals": {"kind": "normals"},
        "edge": {"kind": "boundary"},
        "sal": {"kind": "saliency"},
    }
    predictions = {"things": torch.zeros(4, 5).long(), "normals": torch.zeros(3, 4, 5)}
    predictions |= {name: torch.zeros(4, 5) for name in ("stuff", "distance", "edge", "sal")}
    predictions["things"][1, 3] = 2
    predictions["distance"][1, 3] = 2.25
    predictions["normals"][:, 1, 3] = torch.tensor([0.6, -0.8, 0.0])
    predictions["edge"][1, 3] = 0.25
    readings = read_point(predictions, tasks, 1, 3)
    assert readings == {
        "things": "cup",
        "stuff": "class 0",
        "distance": "2.25 m",
        "normals": "up (0.60, -0.80, 0.00)",
        "edge": "0.25",
        "sal": "0.00",
    }
    elsewhere = read_point(predictions, tasks, 0, 0)
    assert elsewhere["distance"] == elsewhere["normals"] == "unknown" and elsewhere["edge"] == "0.00"


@pytest.mark.parametrize("kind", TASK_KINDS)
def test_every_kind_has_a_legend(kind):
    values = torch.ones((3, 4, 5) if TASK_KINDS[kind].label_channels == 3 else (4, 5))
    legend = draw_legend({"kind": kind, "id2label": {1: "<script>"}}, values)
    assert "rgb(" in legend and "<script>" not in legend


def test_script_names_a_model_that_cannot_be_loaded(monkeypatch, tmp_path):
    assert f"cannot load {tmp_path}" in run_command(monkeypatch, "demo", "--model", tmp_path)
