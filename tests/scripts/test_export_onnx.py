import os

from run_script import run_main


def test_wrong_model_is_one_line_and_leaves_nothing(monkeypatch, tmp_path):
    message = run_main(
        monkeypatch, "export_onnx.py", "--model", tmp_path / "nowhere", "--output", tmp_path / "model.onnx"
    )
    assert message.startswith("error: cannot load") and "nowhere" in message and "\n" not in message
    assert os.listdir(tmp_path) == []


def test_existing_file_is_kept(monkeypatch, tmp_path):
    (tmp_path / "model.onnx").write_text("before")
    message = run_main(monkeypatch, "export_onnx.py", "--model", tmp_path, "--output", tmp_path / "model.onnx")
    assert message == f"error: {tmp_path / 'model.onnx'} exists"
    assert (tmp_path / "model.onnx").read_text() == "before"
