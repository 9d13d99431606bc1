import json
from pathlib import Path

import pytest
from commands import run_command


def write_report(path: Path, name: str, rmse: float, **protocol) -> Path:
    """A report of a model with two tasks, of which only depth was evaluated."""
    path.mkdir()
    tasks = {"edge": {"kind": "boundary"}, "depth": {"kind": "depth"}}
    report = {
        "version": 2,
        "model": {"name": name, "parameters": 3_000_000, "tasks": tasks},
        "scores": {"depth": {"rmse": rmse, "abs_rel": 0.1}},
        "protocol": {"split": "test", "flip": False, "tasks": {"depth": {"kind": "depth"}}, **protocol},
        "fingerprint": {"image": "1", "depth": "2"},
    }
    (path / "report.json").write_text(json.dumps(report))
    return path


@pytest.fixture
def compare(monkeypatch, capsys, tmp_path):
    """Runs the script's `main` in this process: arguments -> its output, or the message with which it exits."""

    def run(*args):
        capsys.readouterr()
        message = run_command(monkeypatch, "compare", *args, "--output", tmp_path / "out" / "table.md")
        return message or capsys.readouterr().out

    return run


def test_table_is_printed_and_written(compare, tmp_path):
    first, second = write_report(tmp_path / "a", "A", 0.5), write_report(tmp_path / "b", "B", 0.25)
    table = (
        "| model | depth RMSE m down | parameters |\n| --- | --- | --- |\n"
        "| A | 0.5000 | 3.00 M |\n| B | **0.2500** | 3.00 M |\n"
    )
    for _ in range(2):  # the second time over the first
        assert compare(first, second / "report.json").startswith(table)
        assert (tmp_path / "out" / "table.md").read_text() == table


def test_what_cannot_be_compared_is_refused(compare, tmp_path):
    first = write_report(tmp_path / "a", "A", 0.5)
    flipped = write_report(tmp_path / "b", "B", 0.25, flip=True)
    (tmp_path / "c.json").write_text("[]")
    (tmp_path / "d.json").write_text("{")
    expected = {
        flipped: f"{first} and {flipped} are not comparable: `protocol.flip` is False and True",
        tmp_path / "c.json": "c.json is not a report",
        tmp_path / "d.json": "d.json is not a report",
        tmp_path / "e.json": "No such file",
    }
    for other, words in expected.items():
        message = compare(first, other)
        assert message.startswith("error: ") and words in message and "\n" not in message
        assert not (tmp_path / "out").exists()
