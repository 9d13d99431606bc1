import json
import re

import pytest
from commands import run_script
from small_models import BACKBONES, save_small_model


def test_estimate_follows_from_the_report(monkeypatch, capsys, tmp_path):
    rows = {"1 process": {"all": 60.0, "input": 6.0, "output": 12.0, "model": 42.0}}
    report = {"num_images": 100, "size": [240, 320], "bytes_per_image": 4e5, "rows": rows}
    (tmp_path / "report.json").write_text(json.dumps(report))
    options = ["--estimate", tmp_path / "report.json", "--photo-size", 240, 640, "--photos", 36_000_000]
    options += ["--gmacs", 100, "--peak", 100, "--utilisation", 0.2, "--cores", 18, "--price", 3]
    assert run_script(monkeypatch, "benchmarks/dataset.py", *options) is None
    lines = capsys.readouterr().out
    # Twice the pixels: 120 ms and 240 ms, together 20 ms on the cores, against 10 ms of a GPU.
    assert "decoding: 120.00 ms of a core, 6.67 ms on 18" in lines and "writing: 240.00 ms of a core" in lines
    assert "bottleneck: writing" in lines
    assert "= 10.00 ms of a GPU (assumed)" in lines and "a GPU needs 36 cores" in lines
    assert "36,000,000 photos become 28.8 TB" in lines
    assert "| 8 | 400 | 25.0 | 600 | 320 MB |" in lines and "| 64 | 3200 | 3.1 | 600 | 2560 MB |" in lines


@pytest.mark.slow
def test_report(monkeypatch, capsys, tmp_path):
    model = save_small_model(tmp_path / "model", backbone_config=BACKBONES["resnet"], num_mixer_layers=1)
    options = ["--num-images", 4, "--size", 96, 128, "--model", model, "--output", tmp_path / "report.json"]
    assert run_script(monkeypatch, "benchmarks/dataset.py", *options) is None
    report = json.loads((tmp_path / "report.json").read_text())
    names = ["plain predictor", "1 process", "2 processes"]
    assert list(report["rows"])[:3] == names and report["bytes_per_image"] > 4 * 96 * 128
    for row in report["rows"].values():
        assert row["images_per_second"] == pytest.approx(4 * row["processes"] / row["all"])
    table = capsys.readouterr().out
    assert all(re.search(rf"\| {name} \| [\d.]+ \| [\d.]+ \| \d+% \| \d+% \|", table) for name in names)
