import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from accelerate.state import AcceleratorState
from commands import run_command
from hub_server import File, Repo
from PIL import Image
from safetensors.torch import load_file, save_file
from small_models import save_small_model

from transformers_degmix import DeGMixImageProcessorPil
from transformers_degmix.data.rooms import ROOMS_TASKS, load_rooms


ROOMS = ("--dataset", "rooms", "--split", "test", "--num-images", 3, "--image-size", 32, 48)
TASKS = {name: ROOMS_TASKS[name] for name in ("depth", "edge")}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model") / "both", tasks=TASKS)


@pytest.fixture
def evaluate(monkeypatch, capsys):
    """Runs the script's `main` in this process: arguments -> its output, or the message with which it exits."""

    def run(*args):
        capsys.readouterr()
        AcceleratorState._reset_state(True)  # which has the precision of the process's first accelerator
        return run_command(monkeypatch, "evaluate", *args) or capsys.readouterr().out

    yield run
    AcceleratorState._reset_state(True)


@pytest.fixture
def rooms(evaluate, model_dir, tmp_path) -> Path:
    """The report of the model on rooms."""
    evaluate("--model", model_dir, *ROOMS, "--calibration", "--output", tmp_path / "rooms")
    return tmp_path / "rooms"


def test_rooms_and_parquet_give_the_same_report(evaluate, model_dir, rooms, tmp_path):
    data = load_rooms("test", 3, (32, 48))
    (tmp_path / "data").mkdir()
    data.rename_column("depth", "distance").to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    config = tmp_path / "run.yaml"
    columns = "columns: {depth: distance}"
    first = json.loads((rooms / "report.json").read_text())
    assert "--dataset rooms --split test --num-images 3" in first["command"]
    for number, (recipe, dataset) in enumerate(
        [(columns, tmp_path / "data"), (f"datasets: [{{name: x, dataset: {tmp_path / 'data'}, {columns}}}]", "x")]
    ):
        config.write_text(f"output_dir: o\nstreaming: true\n{recipe}\n")
        arguments = ("--dataset", dataset, "--split", "test", "--config", config)
        output = evaluate("--model", model_dir, *arguments, "--output", tmp_path / f"read{number}")
        assert output.startswith("| model |") and f"report: {tmp_path / f'read{number}' / 'report.md'}" in output
        second = json.loads((tmp_path / f"read{number}" / "report.json").read_text())
        for part in ("scores", "fingerprint", "protocol"):
            assert first[part] == second[part]
        assert second["data"]["dataset"] == str(tmp_path / "data")


def test_processes_give_the_same_report(model_dir, rooms, tmp_path):
    arguments = ("--model", model_dir, *ROOMS, "--calibration", "--output", tmp_path / "two")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    process = subprocess.run(
        [*map(str, (*launch, "-m", "transformers_degmix", "evaluate", *arguments))],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        timeout=900,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    first, second = (json.loads((path / "report.json").read_text()) for path in (rooms, tmp_path / "two"))
    for name, scores in first["scores"].items():
        assert second["scores"][name] == pytest.approx(scores, rel=1e-6)
        for key in ("ause", "ause_random"):
            assert second["calibration"][name][key] == pytest.approx(first["calibration"][name][key], rel=1e-3)
    assert (first["fingerprint"], first["protocol"]) == (second["fingerprint"], second["protocol"])
    samples = (pyarrow.parquet.read_table(path / "samples.parquet").to_pylist() for path in (rooms, tmp_path / "two"))
    for one, other in zip(*samples, strict=True):
        assert one["image_id"] == other["image_id"]
        assert one["depth_rmse"] == pytest.approx(other["depth_rmse"], rel=1e-6)


@pytest.mark.slow
def test_a_model_and_data_from_the_hub_launched_by_accelerate(model_dir, rooms, hub, tmp_path):
    files = {path.name: File(path.read_bytes(), path.suffix == ".safetensors") for path in model_dir.iterdir()}
    hub.repos["models", "user/model"] = Repo(private=True)
    hub.repos["models", "user/model"].commit(files)
    load_rooms("test", 3, (32, 48)).to_parquet(tmp_path / "test.parquet")
    data = {"data/test-00000-of-00001.parquet": File((tmp_path / "test.parquet").read_bytes(), is_lfs=True)}
    hub.repos["datasets", "user/rooms"] = Repo(private=True)
    hub.repos["datasets", "user/rooms"].commit(data)
    launch = ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "transformers_degmix", "evaluate"]
    arguments = ["--model", "user/model", "--dataset", "user/rooms", "--split", "test", "--output", tmp_path / "out"]
    process = subprocess.run(
        [sys.executable, "-m", *map(str, (*launch, *arguments))],
        env={**os.environ, **hub.env, "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        timeout=900,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    first, second = (json.loads((path / "report.json").read_text()) for path in (rooms, tmp_path / "out"))
    for part in ("scores", "fingerprint", "protocol"):
        assert first[part] == second[part]
    assert second["model"]["name"] == "user/model"


def test_gain(evaluate, model_dir, tmp_path):
    singles = []
    for name in TASKS:
        single = save_small_model(tmp_path / f"{name}_model", tasks={name: TASKS[name]})
        singles.append(tmp_path / name)
        evaluate("--model", single, *ROOMS, "--output", singles[-1])
    output = evaluate("--model", model_dir, *ROOMS, "--output", tmp_path / "both", "--single-task-reports", *singles)
    report, depth, edge = (json.loads((p / "report.json").read_text()) for p in (tmp_path / "both", *singles))
    lower = 1 - report["scores"]["depth"]["rmse"] / depth["scores"]["depth"]["rmse"]
    higher = report["scores"]["edge"]["ods_f"] / edge["scores"]["edge"]["ods_f"] - 1
    assert report["gain_percent"] == pytest.approx(50 * (lower + higher))
    assert f"{report['gain_percent']:+.2f}" in output

    arguments = ("--model", model_dir, *ROOMS, "--flip", "--output", tmp_path / "flipped")
    message = evaluate(*arguments, "--single-task-reports", *singles)
    assert "\n" not in message and "no gain: this evaluation and" in message and "protocol.flip" in message
    assert "gain_percent" not in json.loads((tmp_path / "flipped" / "report.json").read_text())
    message = evaluate(*arguments[:-1], tmp_path / "third", "--single-task-reports", singles[0])
    assert (
        message
        == "error: the gain needs a single-task report with a score above 0 for each task; there is none for ['edge']"
    )
    assert not (tmp_path / "third").exists()


def test_bf16(evaluate, model_dir, rooms, tmp_path):
    evaluate("--model", model_dir, *ROOMS, "--precision", "bf16", "--output", tmp_path / "bf16")
    first, second = (json.loads((path / "report.json").read_text()) for path in (rooms, tmp_path / "bf16"))
    assert second["protocol"]["precision"] == "bf16"
    assert first["scores"]["depth"] != second["scores"]["depth"]
    assert second["scores"]["depth"]["rmse"] == pytest.approx(first["scores"]["depth"]["rmse"], rel=0.1)


def test_depth_protocols(evaluate, model_dir, rooms, tmp_path):
    options = ("--depth-crop", "garg", "--max-depth", 4.5, "--median-scaling")
    evaluate("--model", model_dir, *ROOMS, *options, "--output", tmp_path / "garg")
    first, second = (json.loads((path / "report.json").read_text()) for path in (rooms, tmp_path / "garg"))
    rules = {"crop": "garg", "max_depth": 4.5, "median_scaling": True}
    assert second["protocol"]["tasks"]["depth"] == {**first["protocol"]["tasks"]["depth"], **rules}
    assert second["scores"]["edge"] == first["scores"]["edge"]
    assert second["scores"]["depth"]["rmse"] < first["scores"]["depth"]["rmse"]
    assert "depth: crop garg, max_depth 4.5, median_scaling True" in (tmp_path / "garg" / "report.md").read_text()
    edge = save_small_model(tmp_path / "edge", tasks={"edge": TASKS["edge"]})
    error = evaluate("--model", edge, *ROOMS, *options, "--output", tmp_path / "none")
    assert error.startswith("error: crop, max_depth, median_scaling: no task") and not (tmp_path / "none").exists()


def test_windows(evaluate, model_dir, rooms, tmp_path):
    window = ("--window", 32, 33, "--window-overlap", 0.5)
    evaluate("--model", model_dir, *ROOMS, *window, "--flip", "--output", tmp_path / "windows")
    first, second = (json.loads((path / "report.json").read_text()) for path in (rooms, tmp_path / "windows"))
    assert first["protocol"]["windows"] is None
    assert second["protocol"]["windows"] == {"size": [32, 33], "overlap": 0.5}
    assert first["scores"]["depth"] != second["scores"]["depth"]
    assert "windows of 32 x 33 that overlap by 0.5" in (tmp_path / "windows" / "report.md").read_text()


def test_errors_are_one_line_and_nothing_is_written(evaluate, model_dir, tmp_path):
    data = load_rooms("test", 2, (32, 48))
    (tmp_path / "data").mkdir()
    data.remove_columns("edge").to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    data = ("--dataset", tmp_path / "data")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    output = tmp_path / "out"
    for arguments, words in (
        ((*ROOMS[:2], "--split", "nowhere", *ROOMS[4:]), ("nowhere", "validation")),
        ((*data, "--split", "nowhere"), ("nowhere", "test")),
        ((*data, "--split", "test", "--tasks", "edge", "depth"), ("lacks column 'edge'", "'depth'")),
        ((*data, "--split", "test", "--tasks", "edg"), ("`--tasks`", "'edge'", "'edg'")),
        ((*ROOMS, "--model", tmp_path / "nothing"), ("cannot load", "nothing")),
        ((*ROOMS, "--output", tmp_path / "full"), ("full", "not empty")),
        ((*ROOMS, "--output", tmp_path / "full" / "file" / "out"), ("cannot make", "file: Not a directory")),
        ((*ROOMS, "--edge-tolerance", 2), ("tolerance", "[0, 1]")),
        ((*ROOMS, "--scales", 0), ("scales", "positive")),
        ((*ROOMS, "--scales", 0.5), ("32", "16")),
        ((*ROOMS, "--window", 32, 16), ("`window_size`", "(32, 16)")),
        ((*ROOMS, "--window", 32, 32, "--window-overlap", 1), ("overlap", "[0, 1)")),
        ((*ROOMS, "--single-task-reports", tmp_path / "full" / "file"), ("full", "not a report")),
    ):
        message = evaluate("--model", model_dir, "--output", output, *arguments)
        assert message.startswith("error: ") and "\n" not in message, message
        assert all(word in message for word in words), message
        assert not output.exists() and os.listdir(tmp_path / "full") == ["file"]


def test_a_data_set_with_labels_of_some_tasks(evaluate, model_dir, rooms, tmp_path):
    data = load_rooms("test", 3, (32, 48)).remove_columns("edge")
    (tmp_path / "data").mkdir()
    data.to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    output = tmp_path / "out"
    arguments = ("--model", model_dir, "--dataset", tmp_path / "data", "--split", "test", "--output", output)
    for tasks in ((), ("--tasks", "depth")):
        output = evaluate(*arguments, *tasks)
        assert output.startswith("| model | depth RMSE m down | parameters |\n"), output
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        assert report["scores"] == {"depth": json.loads((rooms / "report.json").read_text())["scores"]["depth"]}
        shutil.rmtree(tmp_path / "out")


def test_only_the_tasks_that_a_source_labels_are_scored(evaluate, model_dir, tmp_path):
    load_rooms("test", 2, (32, 48)).to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    config = tmp_path / "run.yaml"

    def scored(*labelled: str, options=()) -> list[str] | str:
        config.write_text(
            f"output_dir: o\ndatasets: [{{name: x, dataset: {tmp_path / 'data'}, tasks: {list(labelled)}}}]\n"
        )
        arguments = ("--model", model_dir, "--dataset", "x", "--split", "test", "--config", config)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        output = evaluate(*arguments, "--output", tmp_path / "out", *options)
        report = tmp_path / "out" / "report.json"
        return list(json.loads(report.read_text())["scores"]) if report.exists() else output

    assert scored("depth", "sal") == ["depth"]
    assert scored("depth", options=("--tasks", "edge")) == ["edge"]
    assert scored("sal") == "error: the source 'x' labels none of ['depth', 'edge']; give `--tasks`"


def test_what_looks_wrong_is_in_the_report_and_one_bad_sample_is_not_all(evaluate, tmp_path):
    rows = load_rooms("test", 4, (32, 48))
    changed = [dict(row) for row in rows]
    for row in changed:
        row["depth"] = Image.fromarray(1000 * np.asarray(row["depth"]))
    changed[1]["depth"] = Image.new("F", (9, 9))
    (tmp_path / "data").mkdir()
    type(rows).from_list(changed, features=rows.features).to_parquet(tmp_path / "data" / "test.parquet")
    model_dir = save_small_model(tmp_path / "model", tasks={"depth": ROOMS_TASKS["depth"]})
    arguments = ("--dataset", tmp_path / "data", "--split", "test", "--output", tmp_path / "out")
    message = evaluate("--model", model_dir, *arguments)
    assert message.startswith(f"error: {tmp_path / 'out'} is complete except for 1: '{rows[1]['image_id']}' could not")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["protocol"]["num_images"] == 3 and report["failed"][0]["image_id"] == rows[1]["image_id"]
    assert len(report["warnings"]) == 1 and "`columns: {depth: {scale: 0.001}}`" in report["warnings"][0]
    assert report["warnings"][0] in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("task", "label", "words"),
    [
        ("edge", np.zeros((30, 40), np.uint8), "(30, 40)"),
        ("semseg", np.full((32, 48), 200, np.uint8), "200"),
        ("depth", np.full((32, 48), np.nan, np.float32), "NaN"),
    ],
)
def test_bad_label_is_named(evaluate, tmp_path, task, label, words):
    rows = load_rooms("test", 1, (32, 48))
    changed = [dict(row) for row in rows]
    changed[0][task] = Image.fromarray(label)
    (tmp_path / "data").mkdir()
    type(rows).from_list(changed, features=rows.features).to_parquet(tmp_path / "data" / "test.parquet")
    model_dir = save_small_model(tmp_path / "model", tasks={task: ROOMS_TASKS[task]})
    arguments = ("--dataset", tmp_path / "data", "--split", "test", "--output", tmp_path / "out")
    message = evaluate("--model", model_dir, *arguments)
    assert "\n" not in message and all(x in message for x in (f"`{task}`", rows[0]["image_id"], words)), message
    assert not (tmp_path / "out").exists()


def test_bad_models_are_named(evaluate, model_dir, tmp_path):
    def changed(name: str, change) -> Path:
        path = tmp_path / name
        shutil.copytree(model_dir, path)
        change(path)
        return path

    def change_weights(path: Path, change):
        weights = load_file(path / "model.safetensors")
        change(weights)
        save_file(weights, path / "model.safetensors", {"format": "pt"})

    bias = "heads.edge.classifier.bias"
    processor = DeGMixImageProcessorPil(tasks={"depth": "depth"})
    for model, words in (
        (changed("cut", lambda path: os.truncate(path / "model.safetensors", 5000)), ("cannot load", "cut")),
        (changed("no_json", lambda path: (path / "config.json").write_text("{")), ("cannot load", "config.json")),
        (changed("bare", lambda path: (path / "preprocessor_config.json").unlink()), ("cannot load", "processor")),
        (changed("less", lambda p: change_weights(p, lambda weights: weights.pop(bias))), ("lacks weights (1)", bias)),
        (
            changed("nan", lambda p: change_weights(p, lambda w: w[bias].fill_(math.nan))),
            ("logits", "'edge'", "finite"),
        ),
        (changed("task", processor.save_pretrained), ("logits", "edge", "tasks of the processor")),
    ):
        message = evaluate("--model", model, *ROOMS, "--output", tmp_path / "out")
        assert message.startswith("error: ") and "\n" not in message, message
        assert all(word in message for word in words), message
        assert not (tmp_path / "out").exists()
