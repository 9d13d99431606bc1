import itertools
import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from commands import run_script
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoBackbone, AutoConfig


RECIPE = """
output_dir: unused
dataset: unused
benchmark: nyud
model:
  hidden_size: 32
  gating_intermediate_size: 64
  backbone_config:
    model_type: swin
    embed_dim: 8
    depths: [1, 1, 1, 1]
    num_heads: [1, 1, 2, 2]
    window_size: 4
    out_features: [stage1, stage2, stage3, stage4]
"""


@pytest.mark.slow
def test_report(monkeypatch, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    options = ["--recipe", tmp_path / "recipe.yaml", "--size", "160x192", "--sizes", "64x64", "64x96", "--tasks", 1, 2]
    options += ["--large", 64, "--rounds", 1, "--single-task"]
    assert run_script(monkeypatch, "benchmarks/speed.py", *options, "--output", tmp_path / "report") is None

    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["images"] == [1, 3, 160, 192] and report["gemm_gflops"] > 0
    against = {row["what"]: row for row in report["tables"]["Against the textbook"]}
    assert list(against) == [
        "head, inference: time",
        "head, inference: peak memory",
        "head, training step: time",
        "head, training step: peak memory",
    ]
    # Bytes, unlike seconds, are the same on every machine.
    assert against["head, inference: peak memory"]["ours / textbook"] < 0.6
    assert against["head, training step: peak memory"]["ours / textbook"] < 0.75

    *blocks, head, backbone = report["tables"]["Where the head's time goes"]
    assert backbone["block"] == "backbone" and backbone["ms"] > 0
    assert sum(row["share"] for row in blocks) == pytest.approx(1)
    assert sum(row["GFLOP"] for row in blocks) == pytest.approx(head["GFLOP"])
    pixels, channels = 40 * 48, 32
    operations = {row["block"]: 1e9 * row["GFLOP"] for row in blocks}
    # By hand, two per multiply-add: 4 tasks of 2 layers with a 1 x 1 convolution; 4 tasks' merged tokens.
    assert operations["mixers: channel mixing"] == pytest.approx(2 * pixels * channels**2 * 8)
    assert operations["interaction"] == pytest.approx(2 * pixels * channels**2 * 4)

    assert [row["size"] for row in report["tables"]["Time against size"]] == ["64 x 64", "64 x 96"]
    large = report["tables"]["Memory against size"]
    assert [(row["size"], row["way"]) for row in large] == [
        ("64 x 64", way) for way in ("resized", "windows", "whole")
    ]
    model, *single = report["tables"]["Models of one task"]
    backbone = AutoBackbone.from_config(AutoConfig.for_model(**yaml.safe_load(RECIPE)["model"]["backbone_config"]))
    with FlopCounterMode(display=False) as counter:
        backbone(torch.empty(1, 3, 160, 192))
    assert 2 * model["G multiply-adds"] == pytest.approx(head["GFLOP"] + counter.get_total_flops() / 1e9, rel=0.01)
    assert [(row["predicts"], row["attends to"]) for row in single] == [
        (task, attended) for task in ("semseg", "depth", "normals") for attended in ("all", "itself")
    ]
    for row in single:
        assert row["parameters, millions"] < model["parameters, millions"] and row["s / all"] > 0
        assert row["G multiply-adds"] < model["G multiply-adds"]
    # The channel mixing of 3 mixers of 2 layers, and more
    for everything, alone in zip(single[::2], single[1::2]):
        difference = everything["G multiply-adds"] - alone["G multiply-adds"]
        assert difference > 1e-9 * pixels * channels**2 * 3 * 2
    assert [row["tasks"] for row in report["tables"]["Time against the number of tasks"]] == [1, 2]
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "report.json",
        "report.md",
        "size.png",
        "tasks.png",
    }
    assert (tmp_path / "report" / "report.md").read_text().strip() in capsys.readouterr().out


def children() -> set[str]:
    """Processes that this one has started and that are not gone."""
    return {pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}


@pytest.mark.slow
def test_portions_beside_busy_processes(monkeypatch, tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    before, threads = children(), torch.get_num_threads()
    # One core is busy. If all were, threads would wait for each other, on a slow machine for minutes.
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    options = ["--recipe", tmp_path / "recipe.yaml", "--size", "32x32", "--rounds", 1, "--busy", 32, 64]
    assert run_script(monkeypatch, "benchmarks/speed.py", *options, "--output", tmp_path / "report") is None
    table = json.loads((tmp_path / "report" / "report.json").read_text())["tables"]["Beside busy processes"]
    assert [tuple(row[name] for name in ("head", "cores", "threads", "portion")) for row in table] == list(
        itertools.product(("inference", "training step"), ("idle", "busy"), (1, 2), (32, 64))
    )
    for row in table:
        assert 0 < row["s"] <= row["longest s"] and 0 < row["textbook s"] <= row["textbook longest s"]
        assert row["ours / textbook"] == pytest.approx(row["s"] / row["textbook s"])
    assert children() == before and torch.get_num_threads() == threads


@pytest.mark.parametrize(
    "options, message",
    [
        (["--busy", 0], "portions of at least 1 pixel, got [0]"),
        (["--busy", 64, "--device", "cuda"], "needs `--device cpu`, got 'cuda'"),
        (["--rounds", 0], "at least 1, got 0"),
    ],
)
def test_bad_options(monkeypatch, tmp_path, capsys, options, message):
    assert run_script(monkeypatch, "benchmarks/speed.py", *options, "--output", tmp_path / "report") == 2
    assert message in capsys.readouterr().err


def test_errors_are_one_line_and_nothing_is_written(monkeypatch, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("benchmark: nyud", ""))
    options = ["--output", tmp_path / "report", "--recipe"]
    message = run_script(monkeypatch, "benchmarks/speed.py", *options, tmp_path / "recipe.yaml")
    assert "must be for one of the benchmarks ['cityscapes', 'nyud', 'pascal_context']" in message
    assert "nowhere.yaml" in run_script(monkeypatch, "benchmarks/speed.py", *options, tmp_path / "nowhere.yaml")
    assert run_script(monkeypatch, "benchmarks/speed.py", *options, tmp_path / "recipe.yaml", "--size", "64") == 2
    assert "expected HEIGHTxWIDTH, got '64'" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()
