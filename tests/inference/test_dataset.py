"""Data sets in, data sets out: each row once, whatever is killed, and what training makes of them."""

import csv
import json
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from accelerate import PartialState
from commands import DEGMIX, run_command
from PIL import Image
from small_models import BACKBONES, save_small_model

from transformers_degmix.data.columns import RowReader
from transformers_degmix.data.splits import DataSplit
from transformers_degmix.hub.model_directory import load_model_directory, save_model_directory
from transformers_degmix.images_degmix import decode_image, decode_label
from transformers_degmix.inference.dataset import Job, predict_dataset, predict_dataset_with_ray
from transformers_degmix.inference.predictor import Predictor
from transformers_degmix.tasks import TASK_KINDS
from transformers_degmix.training.arguments import TrainingArguments
from transformers_degmix.training.loop import train


MODEL = {"backbone_config": BACKBONES["resnet"], "num_mixer_layers": 1}
ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model") / "model", **MODEL)


def photo(seed: int, mode: str = "RGB", file_format: str = "JPEG", **options) -> bytes:
    """An image file, of one size per mode."""
    size = {"RGB": (40, 36), "L": (36, 40), "RGBA": (44, 36)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, file_format, **options)
    return file.getvalue()


def rotated(seed: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    return photo(seed, exif=exif)


def save_photos(folder: Path, images: list[bytes | str | None], ids: list | None = None, num_files: int = 1) -> Path:
    """A data set of image files, of paths to them, and of nulls."""
    folder.mkdir(exist_ok=True)
    cells = [None if image is None else {"bytes" if isinstance(image, bytes) else "path": image} for image in images]
    features = datasets.Features({"image": datasets.Image()})
    columns = {"image": cells}
    if ids:
        features["image_id"] = datasets.Value("string")
        columns["image_id"] = ids
    for number in range(num_files):
        rows = slice(number * len(cells) // num_files, (number + 1) * len(cells) // num_files)
        part = {name: values[rows] for name, values in columns.items()}
        # `datasets` would read the files of the paths.
        table = pyarrow.table(part, schema=features.arrow_schema)
        pyarrow.parquet.write_table(table, folder / f"train-{number:05d}-of-{num_files:05d}.parquet")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Seven photos in two files."""
    return save_photos(tmp_path_factory.mktemp("photos"), [photo(seed) for seed in range(7)], num_files=2)


@pytest.fixture
def job(model_dir, photos, tmp_path) -> Job:
    return Job(str(model_dir), DataSplit(str(photos), "train"), tmp_path / "out", num_shards=5)


@pytest.fixture(scope="module")
def expected(model_dir, photos, tmp_path_factory) -> list[dict]:
    """The rows that a single, undisturbed run makes of the seven photos."""
    output = tmp_path_factory.mktemp("expected") / "out"
    predict_dataset(Job(str(model_dir), DataSplit(str(photos), "train"), output, num_shards=1))
    return read_rows(output)


def read_rows(output: Path) -> list[dict]:
    """As they are stored."""
    return [row for path in sorted(output.glob("data/*")) for row in pyarrow.parquet.read_table(path).to_pylist()]


def read_maps(output: Path, tasks: dict, columns: dict | None = None) -> list[dict[str, np.ndarray]]:
    """What training reads: `image_id`, `image`, and each task's values `(channels, height, width)`."""
    data = datasets.load_dataset(str(output), split="train")
    reader = RowReader(tasks, columns, data.features)
    for name in ("image", *tasks):
        if isinstance(data.features[name], datasets.Image):
            data = data.cast_column(name, datasets.Image(decode=False))
    samples = []
    for row in data:
        image = reader.read_image(row)
        labels = {name: reader.read_checked(row, name, (image.height, image.width)) for name in tasks}
        values = {name: decode_label(label, reader.kinds[name]) for name, label in labels.items()}
        samples.append({"image_id": row["image_id"], "image": image, **values})
    return samples


def predict_files(model_dir: Path, images: list[bytes], **options):
    """The plain predictor's results."""
    predictor = Predictor(*load_model_directory(str(model_dir)), **options)
    results = predictor(images, lambda image: decode_image(BytesIO(image)), lambda _, result: result)
    return [result for _, result in results]


def command(job: Job, *options) -> list[str]:
    words = ["--model", job.model, "--dataset", job.split.dataset, "--output-dataset", job.output]
    return [*map(str, (*words, "--num-shards", job.num_shards, *options))]


def test_rows_are_what_the_plain_predictor_gives_to_the_bit(model_dir, tmp_path):
    images = [photo(0), photo(1, "L"), rotated(2), photo(3, "RGBA", "PNG"), photo(4)]
    split = DataSplit(str(save_photos(tmp_path / "photos", images)), "train")
    job = Job(str(model_dir), split, tmp_path / "out", normals_format="float16", return_confidence=True, num_shards=2)
    summary = predict_dataset(job)
    assert (summary.num_rows, summary.num_failed) == (5, 0) and summary.seconds["all"] > 0
    rows, tasks = read_rows(job.output), load_model_directory(str(model_dir))[0].config.tasks
    assert [row["image_id"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert [row["image"]["bytes"] for row in rows] == images
    results = predict_files(model_dir, images, return_confidence=True)
    for row, sample, result in zip(rows, read_maps(job.output, tasks), results, strict=True):
        assert (sample["image"].width, sample["image"].height) == result.photo.size
        for name, values in result.predictions.items():
            values, stored = values.numpy(), sample[name]
            if name == "sal":
                values = values > 0.5
            if name == "normals":
                values = values.astype(np.float16).astype(np.float32)
            if name == "edge":
                assert np.abs(stored[0] - values).max() < 0.501 / 255
            else:
                assert np.array_equal(stored if name == "normals" else stored[0], values), name
            confidence = np.array(Image.open(BytesIO(row[f"{name}_confidence"]["bytes"])))
            assert np.abs(confidence / 255 - result.confidences[name].numpy()).max() < 0.501 / 255


def test_unsure_pixels_are_unknown_and_training_goes_on_from_there(model_dir, photos, tmp_path, expected):
    thresholds = {None: 0.5, "semseg": 0.6, "sal": 0.55, "edge": 0.6, "human_parts": 0.0}
    job = Job(str(model_dir), DataSplit(str(photos), "train"), tmp_path / "out", confidence_thresholds=thresholds)
    predict_dataset(job)
    tasks = load_model_directory(str(model_dir))[0].config.tasks
    columns = {name: {"ignore": 255} for name in ("semseg", "sal")}
    shares = dict.fromkeys(tasks, 0.0)
    results = predict_files(model_dir, [row["image"]["bytes"] for row in expected], return_confidence=True)
    for sample, result in zip(read_maps(job.output, tasks, columns), results, strict=True):
        for name, confidence in result.confidences.items():
            unknown = TASK_KINDS[tasks[name]["kind"]].unknown(sample[name])[0]
            unsure = (confidence < thresholds.get(name, 0.5)).numpy()
            zero_depth = (result.predictions["depth"] == 0).numpy() if name == "depth" else False
            assert np.array_equal(unknown, unsure | zero_depth), name
            shares[name] += unknown.mean() / len(results)
    assert shares.pop("human_parts") == 0 and all(0.01 < share < 1 for share in shares.values()), shares
    card = (job.output / "README.md").read_text()
    assert "`columns: {semseg: {ignore: 255}, sal: {ignore: 255}}`" in card and "| train | 7 |" in card

    fields = {"model": {**MODEL, "tasks": {name: dict(task) for name, task in tasks.items()}}, "columns": columns}
    fields["model"]["backbone_config"] = BACKBONES["resnet"].to_dict()
    fields |= {"eval_split": "train", "num_train_images": 4, "num_eval_images": 2, "image_size": [32, 32]}
    fields |= {"max_steps": 2, "batch_size": 2, "num_workers": 0, "num_logged_images": 0}
    scores = train(TrainingArguments(dataset=str(job.output), output_dir=str(tmp_path / "run"), **fields))
    assert set(scores) == set(tasks)


@pytest.mark.parametrize("with_ids", [True, False])
def test_streams(model_dir, tmp_path, with_ids, expected):
    ids = [f"photo {index}" for index in range(7)] if with_ids else None
    photos = save_photos(tmp_path / "photos", [row["image"]["bytes"] for row in expected], ids, num_files=3)
    split = DataSplit(str(photos), "train", streaming=True)
    job = Job(str(model_dir), split, tmp_path / "out")
    assert predict_dataset(job).num_rows == 7
    # a file for each of the input
    assert sorted(os.listdir(job.output / "data")) == [f"train-{index:05d}-of-00003.parquet" for index in range(3)]
    rows = read_rows(job.output)
    assert [row["image_id"] for row in rows] == (ids or ["0-0", "0-1", "1-0", "1-1", "2-0", "2-1", "2-2"])
    assert [row | {"image_id": ""} for row in rows] == [row | {"image_id": ""} for row in expected]
    first = replace(job, split=replace(split, num_images=4), output=tmp_path / "first")
    assert predict_dataset(first).num_rows == 4
    assert [row["depth"] for row in read_rows(first.output)] == [row["depth"] for row in expected[:4]]
    with pytest.raises(ValueError, match="`num_shards` must be from 1 to 3 for files that the stream has, got 4"):
        predict_dataset(replace(job, output=tmp_path / "more", num_shards=4))
    assert not (tmp_path / "more").exists()


def test_bad_rows_are_listed_and_do_not_stop_anything(monkeypatch, capsys, model_dir, tmp_path):
    gone = str(tmp_path / "gone.jpg")
    images = [photo(0), b"text", None, photo(0)[:600], gone, b"", photo(1)]
    save_photos(tmp_path / "photos", images, ["a", "b", "c", "d", "e", None, "g"])
    job = Job(str(model_dir), DataSplit(str(tmp_path / "photos"), "train"), tmp_path / "out", num_shards=3)
    message = run_command(monkeypatch, "predict", *command(job))
    assert message == f"error: 5 rows could not be predicted: {job.output / 'errors.csv'}"
    assert f"2 of 7 rows: {job.output}" in capsys.readouterr().out
    with open(job.output / "errors.csv") as file:
        table = list(csv.DictReader(file))
    assert [row["image_id"] for row in table] == ["b", "c", "d", "e", "5"]
    assert {row["split"] for row in table} == {"train"}
    for row, reason in zip(table, ["not an image", "there is no image", "Truncated", "gone.jpg", "the file is empty"]):
        assert reason in row["reason"], row
    # the second shard has none but bad rows
    data = datasets.load_dataset(str(job.output))
    assert list(data) == ["train"] and data["train"]["image_id"][:] == ["a", "g"]
    assert "5 images could not be predicted" in (job.output / "README.md").read_text()
    # again: nothing to do, and the same is said
    assert run_command(monkeypatch, "predict", *command(job)) == message


def test_predictions_that_are_not_finite_are_bad_rows(job, tmp_path):
    model, processor = load_model_directory(job.model)
    for name, parameter in model.named_parameters():
        if name.startswith("heads.normals"):
            torch.nn.init.constant_(parameter, float("nan"))
    save_model_directory(tmp_path / "model", model, processor)
    summary = predict_dataset(replace(job, model=str(tmp_path / "model")))
    assert summary.num_failed == summary.num_rows == 7
    assert (job.output / "errors.csv").read_text().count("the logits are NaN or infinite") == 7


def test_failures_of_the_machine_end_the_run_and_lose_nothing(monkeypatch, job, model_dir, tmp_path, expected):
    def fail(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with monkeypatch.context() as context:
        context.setattr(torch.nn.functional, "conv2d", fail)
        with pytest.raises(OSError, match=r"cannot make .*train-00000-of-00005.parquet: image 0: CUDA error"):
            predict_dataset(job)
    assert predict_dataset(job).num_failed == 0 and read_rows(job.output) == expected

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))  # nobody listens
        image = f"http://127.0.0.1:{server.getsockname()[1]}/photo.jpg"
        photos = save_photos(tmp_path / "remote", [photo(0), image])
        remote = Job(str(model_dir), DataSplit(str(photos), "train"), tmp_path / "remote_out", num_shards=2)
        with pytest.raises(OSError, match="cannot read the image"):
            predict_dataset(remote)
    assert os.listdir(remote.output / "data") == ["train-00000-of-00002.parquet"]


def test_images_of_a_doubtful_range_are_warned_of(model_dir, tmp_path, caplog):
    file = BytesIO()
    Image.fromarray(np.linspace(0, 3997, 1600).reshape(40, 40).astype(np.uint16)).save(file, "PNG")
    photos = save_photos(tmp_path / "photos: dark", [file.getvalue()])
    output = tmp_path / "out"
    predict_dataset(Job(str(model_dir), DataSplit(str(photos), "train"), output))
    assert "is 4095 meant?" in caplog.text
    # The card can be read, whatever the folder is called.
    assert len(datasets.load_dataset(str(output), split="train")) == 1


def test_images_in_arrays_and_in_other_columns(model_dir, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 36, 40, 3), np.uint8)
    features = datasets.Features({"photo": datasets.Array3D((36, 40, 3), "float32")})
    (tmp_path / "arrays").mkdir()
    data = datasets.Dataset.from_dict({"photo": pixels / np.float32(255)}, features=features)
    data.to_parquet(tmp_path / "arrays" / "train.parquet")
    split = DataSplit(str(tmp_path / "arrays"), "train", columns={"image": {"column": "photo", "scale": 255}})
    job = Job(str(model_dir), split, tmp_path / "out")
    assert predict_dataset(job).num_failed == 0
    for array, row in zip(pixels, read_rows(job.output), strict=True):
        assert np.array_equal(np.array(Image.open(BytesIO(row["image"]["bytes"]))), array)


def wait_for(condition, process: multiprocessing.Process):
    for _ in range(2000):
        if condition():
            return
        assert process.is_alive()
        time.sleep(0.05)
    pytest.fail("nothing happens")


@pytest.fixture
def blocked(tmp_path, expected) -> tuple[Path, Path]:
    """The seven photos, and the file of the fifth: who reads it waits until there is something to read."""
    images = [row["image"]["bytes"] for row in expected]
    path = tmp_path / "fifth.jpg"
    os.mkfifo(path)
    return save_photos(tmp_path / "photos", [*images[:4], str(path), *images[5:]]), path


def unblock(path: Path, expected: list[dict]):
    path.unlink()
    path.write_bytes(expected[4]["image"]["bytes"])


def test_a_killed_run_goes_on_with_what_is_missing(model_dir, blocked, expected, tmp_path):
    photos, fifth = blocked
    job = Job(str(model_dir), DataSplit(str(photos), "train"), tmp_path / "out", num_shards=3)
    process = multiprocessing.get_context("fork").Process(target=predict_dataset, args=(job,), daemon=True)
    process.start()
    wait_for(lambda: len(list(job.output.glob("data/*.parquet"))) == 2, process)
    wait_for(lambda: list(job.output.glob("data/.*unfinished*")), process)
    with pytest.raises(ValueError, match="another process is writing"):
        predict_dataset(job)
    process.kill()
    process.join()
    assert list(job.output.glob("data/.*unfinished*")) and not (job.output / "README.md").exists()
    done = {path: path.stat().st_mtime_ns for path in job.output.glob("data/*.parquet")}
    unblock(fifth, expected)
    assert predict_dataset(job).num_rows == 7
    assert read_rows(job.output) == expected
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert sorted(os.listdir(job.output)) == ["README.md", "data", "fingerprint.json"]
    assert len(os.listdir(job.output / "data")) == 3


def one_of_two(rank: int, job: Job):
    # What torchrun sets; the address serves only to be there, since the processes find each other by the file.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="0")
    store = job.output.with_name("store")
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    PartialState._reset_state()
    summary = predict_dataset(job)
    assert (summary and summary.num_rows) == (None if rank else 7)
    torch.distributed.destroy_process_group()


def test_two_processes_are_one(job, expected, capfd):
    # Shards of 1, 1, 2, 1 and 2 rows, of which the main process makes every second.
    torch.multiprocessing.start_processes(one_of_two, (job,), nprocs=2, start_method="fork")
    assert " 5/5 " in capfd.readouterr().err
    assert read_rows(job.output) == expected


@pytest.mark.slow
def test_processes_of_a_launcher(job, expected):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [*launch, *DEGMIX[1:], "predict", *command(job)]
    process = subprocess.run(words, env={**os.environ, "ACCELERATE_USE_CPU": "1"}, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count(f"7 of 7 rows: {job.output}") == 1
    assert read_rows(job.output) == expected


def test_several_splits_share_a_folder(job, photos, tmp_path, expected):
    both = tmp_path / "both"
    both.mkdir()
    for name in ("train", "validation"):
        (both / f"{name}.parquet").write_bytes((photos / "train-00000-of-00002.parquet").read_bytes())
    splits = [DataSplit(str(both), name) for name in ("train", "validation")]
    assert [predict_dataset(replace(job, split=split, num_shards=2)).num_rows for split in splits] == [3, 3]
    assert {name: len(split) for name, split in datasets.load_dataset(str(job.output)).items()} == {
        "train": 3,
        "validation": 3,
    }
    with pytest.raises(ValueError, match="another run: .*`dtype` was 'float32' and is 'bfloat16'; choose another"):
        predict_dataset(replace(job, split=replace(splits[1], name="validation"), num_shards=2, dtype="bfloat16"))


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"model": {"num_mixer_layers": 2}}, ["model_hash"]),
        ({"photos": 1}, ["dataset_fingerprint"]),
        ({"num_shards": 4}, ["num_shards"]),
        ({"normals_format": "float16", "return_confidence": True}, ["return_confidence", "normals_format"]),
        ({"confidence_thresholds": {"depth": 0.5}}, ["confidence_thresholds"]),
    ],
)
def test_a_folder_of_another_run_is_refused(job, tmp_path, changes, named):
    job = replace(job, split=replace(job.split, num_images=4), num_shards=2)
    predict_dataset(job)
    before = {path: path.stat().st_mtime_ns for path in job.output.rglob("*")}
    if fields := changes.pop("model", None):
        changes["model"] = str(save_small_model(tmp_path / "other", **{**MODEL, **fields}))
    if number := changes.pop("photos", None):
        other = save_photos(tmp_path / "photos", [photo(10 + index) for index in range(4)], num_files=number)
        changes["split"] = DataSplit(str(other), "train", 4)
    with pytest.raises(ValueError, match="has predictions of another run") as error:
        predict_dataset(replace(job, **changes))
    assert [name for name in named if f"`{name}` was" not in str(error.value)] == []
    assert str(error.value).count("` was ") == len(named)
    assert {path: path.stat().st_mtime_ns for path in job.output.rglob("*")} == before


def test_what_cannot_be_done_is_said_before_anything_is_written(job, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    datasets.Dataset.from_dict({"image": []}, features=datasets.Features({"image": datasets.Image()})).to_parquet(
        empty / "train.parquet"
    )
    (tmp_path / "file").touch()
    wrong = {
        "lacks column 'photo' .for 'image'.; it has .'image'": {"split": {"columns": {"image": "photo"}}},
        "split 'validation'": {"split": {"name": "validation"}},
        "split 'train': .*no data": {"split": {"dataset": str(empty)}},
        "nowhere": {"model": str(tmp_path / "nowhere")},
        r"name the tasks \['walls'\]; the model has \['semseg'": {"confidence_thresholds": {"walls": 0.5}},
        "must be from 0 to 1, got 80": {"confidence_thresholds": {None: 80}},
        "`normals_format` must be one of": {"normals_format": "exr"},
        "`num_shards` must be from 1 to 7 for rows, got 8": {"num_shards": 8},
        "must be a plain name, got 'train.:2.'": {"split": {"name": "train[:2]"}},
        "`window_size`": {"window_size": (48, 16), "window_overlap": 0.5},
    }
    for message, changes in wrong.items():
        changes = {**changes, "split": replace(job.split, **changes.get("split", {}))}
        with pytest.raises(ValueError, match=message):
            predict_dataset(replace(job, **changes))
        assert not job.output.exists(), message
    for name, message in (("file", "is not a directory"), ("photos", "is not empty")):
        save_photos(tmp_path / "photos", [photo(0)])
        with pytest.raises(FileExistsError, match=message):
            predict_dataset(replace(job, output=tmp_path / name))
    with pytest.raises(OSError, match="file"):
        predict_dataset(replace(job, output=tmp_path / "file" / "out"))


def test_a_full_disk_leaves_whole_shards_and_the_run_can_go_on(job, expected):
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot make .*train-00000-of-00005.parquet: .*File too large"):
            predict_dataset(job)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(job.output / "data") == []
    assert predict_dataset(job).num_rows == 7
    assert read_rows(job.output) == expected


def test_arguments_that_clash(monkeypatch, capsys, tmp_path):
    data = ["--dataset", "rooms", "--num-images", 2, "--image-size", 32, 48]
    for words, message in (
        ([], "give images and videos as --input, or a data set as --dataset"),
        (["--dataset", "x", "--input", "a.jpg", "--output-dataset", "o"], "--dataset does not go with --input"),
        (["--dataset", "x", "--output", "o"], "--dataset does not go with --output"),
        (["--dataset", "x"], "--dataset needs --output-dataset"),
        (["--input", "a.jpg", "--output", "o", "--num-shards", 2], "--input does not go with --num-shards"),
        (["--input", "a.jpg"], "--input needs --output"),
        (["--dataset", "rooms", "--output-dataset", "o"], "rooms are rendered: give --num-images and --image-size"),
        ([*data, "--output-dataset", "o", "--workers", 2], "--workers is for --engine ray"),
    ):
        assert run_command(monkeypatch, "predict", *words) == 2
        assert message in capsys.readouterr().err
    words = [*data, "--output-dataset", tmp_path / "out", "--confidence-threshold", "semseg:0.5"]
    assert "takes NUMBER or TASK=NUMBER, got 'semseg:0.5'" in run_command(monkeypatch, "predict", *words)
    assert not (tmp_path / "out").exists()


def test_rooms_on_the_command_line(monkeypatch, model_dir, tmp_path, capsys):
    words = ["--model", model_dir, "--dataset", "rooms", "--num-images", 2, "--image-size", 32, 48]
    words += ["--output-dataset", tmp_path / "out", "--confidence-threshold", 0.4, "depth=0.5", "--confidence"]
    assert run_command(monkeypatch, "predict", *words) is None
    record = json.loads((tmp_path / "out" / "fingerprint.json").read_text())
    assert record["confidence_thresholds"]["depth"] == 0.5 and record["confidence_thresholds"]["edge"] == 0.4
    assert [row["image_id"] for row in read_rows(tmp_path / "out")] == ["train_000000", "train_000001"]
    assert "2 of 2 rows" in capsys.readouterr().out


@pytest.fixture(scope="module")
def ray_cluster():
    """Two CPUs."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.slow
def test_ray_gives_each_row_once_though_a_worker_is_killed(ray_cluster, model_dir, blocked, expected, tmp_path):
    photos, fifth = blocked
    job = Job(str(model_dir), DataSplit(str(photos), "train"), tmp_path / "out", num_shards=7)

    ended = threading.Event()

    def kill_who_waits():
        # The name of an unfinished file ends with the id of its process.
        while len(list(job.output.glob("data/*.parquet"))) < 6:
            assert not ended.wait(0.1)
        unblock(fifth, expected)
        (unfinished,) = job.output.glob("data/.*unfinished*")
        os.kill(int(unfinished.name.rpartition(".")[2]), signal.SIGKILL)

    with ThreadPoolExecutor(1) as executor:
        killing = executor.submit(kill_who_waits)
        try:
            summary = predict_dataset_with_ray(job, num_workers=2)
        finally:
            ended.set()
        killing.result()
    assert summary.num_rows == 7 and summary.seconds["model"] > 0
    assert read_rows(job.output) == expected
    assert len(os.listdir(job.output / "data")) == 7


@pytest.mark.slow
def test_one_worker_of_ray_is_the_plain_predictor(ray_cluster, monkeypatch, capsys, job, expected):
    assert run_command(monkeypatch, "predict", *command(job), "--engine", "ray", "--workers", 1) is None
    assert f"7 of 7 rows: {job.output}" in capsys.readouterr().out
    assert read_rows(job.output) == expected
    # nothing is left to do, which needs no worker
    assert predict_dataset_with_ray(job).num_rows == 7
