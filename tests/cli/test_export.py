import os

from commands import run_command


def test_wrong_model_is_one_line_and_leaves_nothing(monkeypatch, tmp_path):
    message = run_command(monkeypatch, "export", "--model", tmp_path / "nowhere", "--output", tmp_path / "model.onnx")
    assert message.startswith("error: cannot load") and "nowhere" in message and "\n" not in message
    assert os.listdir(tmp_path) == []


def test_existing_file_is_kept(monkeypatch, tmp_path):
    (tmp_path / "model.onnx").write_text("before")
    message = run_command(monkeypatch, "export", "--model", tmp_path, "--output", tmp_path / "model.onnx")
    assert message == f"error: {tmp_path / 'model.onnx'} exists"
    assert (tmp_path / "model.onnx").read_text() == "before"


def test_existing_8_bit_file_is_kept(monkeypatch, tmp_path):
    (tmp_path / "model.int8.onnx").write_text("before")
    arguments = ("--model", tmp_path, "--output", tmp_path / "model.onnx", "--int8", tmp_path / "a.png")
    assert run_command(monkeypatch, "export", *arguments) == f"error: {tmp_path / 'model.int8.onnx'} exists"
    assert os.listdir(tmp_path) == ["model.int8.onnx"]
