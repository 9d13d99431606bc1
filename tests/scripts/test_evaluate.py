import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
from accelerate.state import AcceleratorState
from run_script import SCRIPTS, run_main
from small_models import small_model

from transformers_degmix import DeGMixImageProcessorPil
from transformers_degmix.data.rooms import ROOMS_TASKS, load_rooms
from transformers_degmix.saving import save_model_directory


ROOMS = ("--dataset", "rooms", "--split", "test", "--num-images", 3, "--image-size", 32, 48)
TASKS = {name: ROOMS_TASKS[name] for name in ("depth", "edge")}


def save_model(path: Path, tasks: dict = TASKS) -> Path:
    model = small_model(tasks=tasks)
    save_model_directory(path, model, DeGMixImageProcessorPil(tasks=model.config.tasks))
    return path


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "both")


@pytest.fixture
def evaluate(monkeypatch, capsys):
    """Runs the script's `main` in this process: arguments -> its output, or the message with which it exits."""

    def run(*args):
        capsys.readouterr()
        AcceleratorState._reset_state(True)  # which has the precision of the process's first accelerator
        return run_main(monkeypatch, "evaluate.py", *args) or capsys.readouterr().out

    yield run
    AcceleratorState._reset_state(True)


@pytest.fixture
def rooms(evaluate, model_dir, tmp_path) -> Path:
    """The report of the model on rooms."""
    evaluate("--model", model_dir, *ROOMS, "--output", tmp_path / "rooms")
    return tmp_path / "rooms"


def test_rooms_and_parquet_give_the_same_report(evaluate, model_dir, rooms, tmp_path):
    data = load_rooms("test", 3, (32, 48))
    (tmp_path / "data").mkdir()
    data.rename_column("depth", "distance").to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    config = tmp_path / "run.yaml"
    config.write_text("output_dir: o\nstreaming: true\ncolumns: {depth: distance}\n")
    arguments = ("--dataset", tmp_path / "data", "--split", "test", "--config", config)
    output = evaluate("--model", model_dir, *arguments, "--output", tmp_path / "read")
    assert output.startswith("| model |") and f"report: {tmp_path / 'read' / 'report.md'}" in output
    first, second = (json.loads((path / "report.json").read_text()) for path in (rooms, tmp_path / "read"))
    for part in ("scores", "fingerprint", "protocol"):
        assert first[part] == second[part]
    assert "--dataset rooms --split test --num-images 3" in first["command"]


def test_processes_give_the_same_report(model_dir, rooms, tmp_path):
    arguments = ("--model", model_dir, *ROOMS, "--output", tmp_path / "two")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    process = subprocess.run(
        [*map(str, (*launch, SCRIPTS / "evaluate.py", *arguments))],
        env={**os.environ, "ACCELERATE_USE_CPU": "1"},
        capture_output=True,
        timeout=120,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    first, second = (json.loads((path / "report.json").read_text()) for path in (rooms, tmp_path / "two"))
    for name, scores in first["scores"].items():
        assert second["scores"][name] == pytest.approx(scores, rel=1e-6)
    assert (first["fingerprint"], first["protocol"]) == (second["fingerprint"], second["protocol"])
    samples = (pyarrow.parquet.read_table(path / "samples.parquet").to_pylist() for path in (rooms, tmp_path / "two"))
    for one, other in zip(*samples, strict=True):
        assert one["image_id"] == other["image_id"]
        assert one["depth_rmse"] == pytest.approx(other["depth_rmse"], rel=1e-6)


def test_gain(evaluate, model_dir, tmp_path):
    singles = []
    for name in TASKS:
        single = save_model(tmp_path / f"{name}_model", {name: TASKS[name]})
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
    assert "\n" not in message and "but for the gain: this evaluation and" in message and "protocol.flip" in message
    assert "gain_percent" not in json.loads((tmp_path / "flipped" / "report.json").read_text())
    message = evaluate(*arguments[:-1], tmp_path / "third", "--single-task-reports", singles[0])
    assert message == "error: the gain needs a single-task report of each task; there is none of ['edge']"
    assert not (tmp_path / "third").exists()


def test_bf16(evaluate, model_dir, rooms, tmp_path):
    evaluate("--model", model_dir, *ROOMS, "--precision", "bf16", "--output", tmp_path / "bf16")
    first, second = (json.loads((path / "report.json").read_text()) for path in (rooms, tmp_path / "bf16"))
    assert second["protocol"]["precision"] == "bf16"
    assert first["scores"]["depth"] != second["scores"]["depth"]
    assert second["scores"]["depth"]["rmse"] == pytest.approx(first["scores"]["depth"]["rmse"], rel=0.1)


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
        ((*data, "--split", "test"), ("lacks the columns 'edge'", "'depth'")),
        ((*ROOMS, "--model", tmp_path / "nothing"), ("cannot load", "nothing")),
        ((*ROOMS, "--output", tmp_path / "full"), ("full", "not empty")),
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


def test_bad_label_is_named(evaluate, model_dir, tmp_path):
    rows = load_rooms("test", 2, (32, 48))
    changed = [dict(row) for row in rows]
    changed[0]["edge"] = changed[0]["edge"].resize((40, 30))
    (tmp_path / "data").mkdir()
    type(rows).from_list(changed, features=rows.features).to_parquet(tmp_path / "data" / "test.parquet")
    arguments = ("--dataset", tmp_path / "data", "--split", "test", "--output", tmp_path / "out")
    message = evaluate("--model", model_dir, *arguments)
    assert "\n" not in message and "`edge`" in message and rows[0]["image_id"] in message, message
