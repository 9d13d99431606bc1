import importlib.util
import os
import signal
import subprocess
import time
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from commands import DEGMIX, run_command
from PIL import Image
from small_models import BACKBONES, small_model
from transformers import SwinModel, pipeline

from transformers_degmix import DeGMixImageProcessorPil
from transformers_degmix.files import write_whole
from transformers_degmix.hub.model_directory import save_model_directory
from transformers_degmix.tasks import label_palette


SCRIPT = Path(__file__).parents[2] / "scripts" / "predict.py"
ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model = small_model()
    model.save_pretrained(path)
    DeGMixImageProcessorPil(tasks=model.config.tasks, size_divisor=64).save_pretrained(path)
    return path


@pytest.fixture
def predict(monkeypatch, capsys):
    """Arguments -> the command's exit code and lines on stderr."""

    def run(*args):
        capsys.readouterr()
        code = run_command(monkeypatch, "predict", *args)
        errors = capsys.readouterr().err.splitlines()
        if isinstance(code, str):  # which Python prints when it exits with 1
            return 1, [*errors, *code.splitlines()]
        return code, errors

    return run


def photo(width: int = 70, height: int = 50) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def mixed_run(model_dir, tmp_path_factory) -> tuple[Path, Path, subprocess.CompletedProcess]:
    """Images of all sorts in one directory, some of them broken, and the results of predicting them."""
    images, output = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("results") / "new" / "directory"
    photo().save(images / "rgb.png")
    photo().convert("L").save(images / "grey.png")
    transparent = photo()
    transparent.putalpha(Image.linear_gradient("L").resize(transparent.size))
    transparent.save(images / "rgba.png")
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    photo().save(images / "rotated.jpg", exif=exif)
    photo().save(images / "malformed.png", exif=b"b'Exif\\x00")
    photo(400, 300).save(images / "truncated.jpg")
    (images / "truncated.jpg").write_bytes((images / "truncated.jpg").read_bytes()[:9000])
    (images / "text.png").write_text("not an image")
    (images / "empty.png").touch()
    (images / "notes.txt").write_text("no image by its name, left alone")
    command = [*DEGMIX, "predict", "--model", model_dir, "--input", images, images / "missing.png"]
    command += ["--output", output]
    return images, output, subprocess.run(command, capture_output=True, text=True, timeout=900)


GOOD = ["grey", "malformed", "rgb", "rgba", "rotated"]
BAD = ["truncated.jpg", "text.png", "empty.png", "missing.png"]


def test_bad_files_are_named_and_the_others_predicted(mixed_run):
    images, output, run = mixed_run
    assert run.returncode == 1
    assert "Traceback" not in run.stderr and "notes.txt" not in run.stderr
    errors = [line for line in run.stderr.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert sorted(line.split(": ")[1] for line in errors) == sorted(str(images / name) for name in BAD)
    assert f"5 of 9 inputs: {output}" in run.stdout


def test_every_good_image_has_all_files_and_nothing_else_is_left(mixed_run):
    _, output, _ = mixed_run
    endings = ["npz", "overview.png", *(f"{task}.png" for task in small_model().config.tasks)]
    assert sorted(os.listdir(output)) == sorted(f"{name}.{ending}" for name in GOOD for ending in endings)


@pytest.mark.parametrize("name", ["grey.png", "rgb.png", "rgba.png", "rotated.jpg"])
def test_arrays_are_those_of_the_pipeline(mixed_run, model_dir, name):
    images, output, _ = mixed_run
    expected = pipeline("multi-task-dense-prediction", model=str(model_dir))(str(images / name))
    with np.load(output / f"{Path(name).stem}.npz") as arrays:
        assert list(arrays) == list(expected)
        for task, values in expected.items():
            assert arrays[task].dtype == values.numpy().dtype
            if task in ("semseg", "human_parts"):
                # a tie may fall the other way with another number of threads
                assert (arrays[task] == values.numpy()).mean() > 0.99
            else:
                np.testing.assert_allclose(arrays[task], values.numpy(), atol=1e-4)


def test_pictures_are_of_the_upright_image(mixed_run):
    _, output, _ = mixed_run
    with np.load(output / "rotated.npz") as arrays:
        assert arrays["depth"].shape == (70, 50) and arrays["normals"].shape == (3, 70, 50)
        ids = arrays["semseg"]
    assert Image.open(output / "rotated.depth.png").size == (50, 70)
    assert np.array_equal(np.array(Image.open(output / "rotated.semseg.png")), label_palette(5).numpy()[ids])


def test_overview_shows_the_input_upright(predict, model_dir, tmp_path):
    half = Image.new("RGB", (60, 40), (250, 0, 0))
    half.paste((0, 0, 250), (30, 0, 60, 40))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    half.save(tmp_path / "half.png", exif=exif)
    assert predict("--model", model_dir, "--input", tmp_path / "half.png", "--output", tmp_path)[0] == 0
    overview = np.array(Image.open(tmp_path / "half.overview.png"))[:, :300]
    red_rows = np.nonzero((overview == (250, 0, 0)).all(axis=-1))[0]
    blue_rows = np.nonzero((overview == (0, 0, 250)).all(axis=-1))[0]
    assert red_rows.max() < blue_rows.min()


def test_results_are_replaced_and_half_precision_is_stored_in_full(predict, mixed_run, model_dir, tmp_path):
    images, _, _ = mixed_run
    (tmp_path / "rgb.npz").write_text("old")
    arguments = ("--input", images / "rgb.png", "--output", tmp_path, "--dtype", "bfloat16")
    assert predict("--model", model_dir, *arguments)[0] == 0
    with np.load(tmp_path / "rgb.npz") as arrays:
        assert arrays["depth"].dtype == np.float32 and arrays["semseg"].dtype == np.int64


def test_windows(predict, mixed_run, model_dir, tmp_path):
    images, _, _ = mixed_run
    arguments = ("--model", model_dir, "--input", images / "rotated.jpg", "--output", tmp_path / "out")
    assert predict(*arguments, "--window", 48, 32, "--window-overlap", 0.5)[0] == 0
    predict_maps = pipeline("multi-task-dense-prediction", model=str(model_dir))
    expected = predict_maps(str(images / "rotated.jpg"), window_size=(48, 32), window_overlap=0.5)
    with np.load(tmp_path / "out" / "rotated.npz") as arrays:
        for task in ("depth", "normals", "edge"):
            np.testing.assert_allclose(arrays[task], expected[task].numpy(), atol=1e-4)
    code, errors = predict(*arguments[:-1], tmp_path / "other", "--window", 48, 16)
    assert code == 1 and len(errors) == 1 and "`window_size`" in errors[0] and not (tmp_path / "other").exists()
    code, errors = predict(*arguments, "--window-overlap", 0.5)
    assert code == 2 and "--window-overlap is for --window" in errors[-1]


@pytest.mark.parametrize("options", [{}, {"window_size": (32, 48)}])
def test_confidence(predict, mixed_run, model_dir, tmp_path, options):
    window = ["--window", 32, 48] if options else []
    image = mixed_run[0] / "rotated.jpg"
    assert predict("--model", model_dir, "--input", image, "--output", tmp_path, "--confidence", *window) == (0, [])
    maps, confidences = pipeline("multi-task-dense-prediction", model=str(model_dir))(
        str(image), return_confidence=True, **options
    )
    with np.load(tmp_path / "rotated.npz") as arrays:
        assert set(arrays) == {name for task in maps for name in (task, f"{task}_confidence")}
        for task, confidence in confidences.items():
            np.testing.assert_allclose(arrays[f"{task}_confidence"], confidence, rtol=0, atol=1e-5)
            np.testing.assert_allclose(arrays[task], maps[task], rtol=0, atol=1e-4)
            assert Image.open(tmp_path / f"rotated.{task}.confidence.png").size == (50, 70)
    predict("--model", model_dir, "--input", image, "--output", tmp_path / "without", *window)
    heights = [Image.open(folder / "rotated.overview.png").height for folder in (tmp_path, tmp_path / "without")]
    assert heights[0] > heights[1]


def test_model_without_decoder_has_no_attention_to_show(predict, mixed_run, tmp_path):
    images, _, _ = mixed_run
    model = small_model(use_decoder=False)
    save_model_directory(tmp_path / "model", model, DeGMixImageProcessorPil(tasks=model.config.tasks))
    arguments = ("--model", tmp_path / "model", "--input", images / "rgb.png", "--output", tmp_path / "out")
    assert predict(*arguments) == (0, []) and (tmp_path / "out" / "rgb.overview.png").exists()


def test_same_stem_is_refused_before_anything_is_written(predict, model_dir, tmp_path):
    for name in ("a.png", "a.jpg"):
        photo().save(tmp_path / name)
    code, errors = predict("--model", model_dir, "--input", tmp_path, "--output", tmp_path / "out")
    assert code == 1 and len(errors) == 1
    assert str(tmp_path / "a.png") in errors[0] and str(tmp_path / "a.jpg") in errors[0]
    assert not (tmp_path / "out").exists()


def test_inputs_are_not_overwritten(predict, model_dir, tmp_path):
    for name in ("a.png", "a.depth.png"):
        photo().save(tmp_path / name)
    before = (tmp_path / "a.depth.png").read_bytes()
    code, errors = predict("--model", model_dir, "--input", tmp_path, "--output", tmp_path)
    assert code == 1 and "a.depth.png is an input" in errors[-1]
    assert sorted(os.listdir(tmp_path)) == ["a.depth.png", "a.png"]
    assert (tmp_path / "a.depth.png").read_bytes() == before


def test_wrong_model_is_one_line(predict, tmp_path):
    photo().save(tmp_path / "a.png")
    code, errors = predict(
        "--model", tmp_path / "nowhere", "--input", tmp_path / "a.png", "--output", tmp_path / "out"
    )
    assert code == 1 and len(errors) == 1 and "nowhere" in errors[0]
    assert not (tmp_path / "out").exists()


def test_model_of_another_type_is_refused(predict, tmp_path):
    photo().save(tmp_path / "a.png")
    SwinModel(BACKBONES["swin"]).save_pretrained(tmp_path / "swin")
    code, errors = predict("--model", tmp_path / "swin", "--input", tmp_path / "a.png", "--output", tmp_path / "out")
    assert code == 1 and "SwinModel" in errors[-1]


def test_directory_without_images(predict, model_dir, tmp_path):
    code, errors = predict("--model", model_dir, "--input", tmp_path, "--output", tmp_path / "out")
    assert code == 1 and errors == [f"error: there are no images or videos in {tmp_path}"]


def test_all_photos_of_a_directory_are_predicted_or_named(predict, model_dir, tmp_path):
    names = ["a.AVIF", "b.jfif", "c.ppm", "d.jp2", "my [1] ü.MPO", "e.HEIC", "f.cr2", ".hidden.png"]
    for name, of in zip(names, ("AVIF", "JPEG", "PPM", "JPEG2000", "MPO")):
        photo().save(tmp_path / name, of)
    for name in names[5:]:
        (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200))
    code, errors = predict("--model", model_dir, "--input", tmp_path, "--output", tmp_path / "out")
    assert sorted(path.stem for path in (tmp_path / "out").glob("*.npz")) == ["a", "b", "c", "d", "my [1] ü"]
    errors = [line for line in "\n".join(errors).replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert code == 1 and len(errors) == 1 and "e.HEIC" in errors[0]
    if importlib.util.find_spec("pillow_heif") is None:
        assert "pip install transformers-degmix[heic]" in errors[0]


def test_what_is_left_out_is_printed(mixed_run, predict, model_dir, tmp_path):
    assert "left out, because their names are not of images or videos: notes.txt" in mixed_run[2].stdout
    (tmp_path / "a.cr2").touch()
    code, errors = predict("--model", model_dir, "--input", tmp_path, "--output", tmp_path / "out")
    assert code == 1 and errors == [f"error: there are no images or videos in {tmp_path}, only a.cr2"]


def test_heic(predict, model_dir, tmp_path):
    pytest.importorskip("pillow_heif")
    photo().save(tmp_path / "a.heic")
    assert predict("--model", model_dir, "--input", tmp_path, "--output", tmp_path / "out")[0] == 0


def test_limit_of_pixels(predict, model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    photo(300, 200).save(tmp_path / "a.png")
    arguments = ("--model", model_dir, "--input", tmp_path / "a.png", "--output", tmp_path / "out")
    code, errors = predict(*arguments, "--max-pixels", 59_998)
    assert code == 1 and "a.png" in errors[-1] and "`--max-pixels`" in errors[-1]
    assert predict(*arguments, "--max-pixels", 60_000, "--window", 200, 160) == (0, [])


def test_image_that_would_fill_the_memory_is_a_bad_file(predict, model_dir, tmp_path):
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    code, errors = predict("--model", model_dir, "--input", tmp_path / "bomb.png", "--output", tmp_path)
    assert code == 1 and "bomb.png" in errors[-1] and os.listdir(tmp_path) == ["bomb.png"]


def test_broken_write_leaves_nothing(tmp_path):

    def write_half(file):
        file.write(b"half")
        raise OSError("disk full")

    (tmp_path / "a.npz").write_bytes(b"before")
    with pytest.raises(OSError, match="disk full"):
        write_whole(tmp_path / "a.npz", write_half)
    assert os.listdir(tmp_path) == ["a.npz"] and (tmp_path / "a.npz").read_bytes() == b"before"
    write_whole(tmp_path / "a.npz", lambda file: file.write(b"after"))
    assert os.listdir(tmp_path) == ["a.npz"] and (tmp_path / "a.npz").read_bytes() == b"after"


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    """Ten frames that get brighter, with a pause after the fifth."""
    video = pytest.importorskip("transformers_degmix.inference.video")
    path = tmp_path_factory.mktemp("videos") / "clip.mp4"
    with open(path, "wb") as file, video.VideoWriter(file, Fraction(25)) as writer:
        for index in range(10):
            writer.write(Image.fromarray(np.array(photo()) // 4 + 18 * index), index / 25 + (index > 4))
    return path


@pytest.mark.parametrize("options", [(), ("--num-workers", 0), ("--window", 48, 32, "--batch-size", 4)])
def test_video(predict, model_dir, video, tmp_path, options):
    from transformers_degmix.inference.video import read_frames

    assert predict("--model", model_dir, "--input", video, "--output", tmp_path, *options)[0] == 0
    assert os.listdir(tmp_path) == ["clip.overview.mp4"]
    frames = list(read_frames(tmp_path / "clip.overview.mp4"))
    expected = list(read_frames(video))
    assert [frame.time for frame in frames] == pytest.approx([frame.time for frame in expected], abs=1e-4)
    # The input at the top left, everything else beside and below it.
    bottom, right = 12 + 200, 12 + 300
    for frame, before in zip(frames, expected):
        shown = np.array(frame.image)[bottom - 100 : bottom, 12:right].mean()
        assert shown == pytest.approx(np.array(before.image).mean(), abs=6)
    legends = [np.array(frame.image)[bottom + 50 :].astype(int) for frame in frames]
    assert all(np.abs(legend - legends[0]).max() < 60 for legend in legends)  # but for the compression


def test_directory_of_images_and_videos_some_of_them_broken(predict, model_dir, video, tmp_path):
    (tmp_path / "a.mp4").write_bytes(video.read_bytes()[:-2000])
    (tmp_path / "b.mp4").write_bytes(video.read_bytes())
    photo().save(tmp_path / "c.png")
    (tmp_path / "d.png").touch()
    output = tmp_path / "out"
    code, errors = predict("--model", model_dir, "--input", tmp_path, "--output", output, "--batch-size", 3)
    assert code == 1
    errors = [line for line in "\n".join(errors).replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and "d.png" in errors[0] and "a.mp4" in errors[1]
    tasks = small_model().config.tasks
    of_image = ["c.npz", "c.overview.png", *(f"c.{task}.png" for task in tasks)]
    assert sorted(os.listdir(output)) == sorted(["b.overview.mp4", *of_image])


def test_images_at_their_own_size(predict, tmp_path):
    model = small_model()
    processor = DeGMixImageProcessorPil(tasks=model.config.tasks, do_resize=True, size={"height": 40, "width": 40})
    save_model_directory(tmp_path / "model", model, processor)
    photo().save(tmp_path / "a.png")
    arguments = ("--model", tmp_path / "model", "--input", tmp_path / "a.png", "--output")
    assert predict(*arguments, tmp_path / "whole", "--no-resize")[0] == 0
    assert predict(*arguments, tmp_path / "resized")[0] == 0
    predict_maps = pipeline("multi-task-dense-prediction", model=str(tmp_path / "model"))
    for name, options in (("whole", {"do_resize": False}), ("resized", {})):
        expected = predict_maps(str(tmp_path / "a.png"), **options)["depth"].numpy()
        with np.load(tmp_path / name / "a.npz") as arrays:
            np.testing.assert_allclose(arrays["depth"], expected, atol=1e-4)


def test_an_interrupted_video_leaves_nothing(model_dir, video, tmp_path):
    from transformers_degmix.inference.video import VideoWriter, read_frames

    frames = [frame.image for frame in read_frames(video)] * 30
    with open(tmp_path / "long.mp4", "wb") as file, VideoWriter(file, Fraction(25)) as writer:
        for index, image in enumerate(frames):
            writer.write(image, index / 25)
    command = [*DEGMIX, "predict", "--model", model_dir, "--input", tmp_path / "long.mp4"]
    # The signal is ignored in what a shell has started in the background, these tests perhaps.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    command += ["--output", tmp_path / "out"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed) as run:
        while not ((tmp_path / "out").exists() and os.listdir(tmp_path / "out")):
            assert run.poll() is None
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        errors = run.communicate()[1]
    assert run.returncode == 1 and errors.endswith("interrupted\n") and "Traceback" not in errors
    assert os.listdir(tmp_path / "out") == []
