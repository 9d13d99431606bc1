import json
import os

import pytest
import torch
from small_models import ALL_KINDS, BACKBONES, small_model

from transformers_degmix import DeGMixImageProcessor
from transformers_degmix.export import SIZES, compare, export_onnx, export_program


onnxruntime = pytest.importorskip("onnxruntime")
TASKS = {"normals": ALL_KINDS["normals"]}


def smallest_model(backbone, seed=0):
    return small_model(seed, backbone_config=BACKBONES[backbone], tasks=TASKS, num_mixer_layers=1)


def test_swin_program_agrees_at_all_sizes():
    model = smallest_model("swin")
    program = export_program(model).module()
    for batch_size, height, width in SIZES:
        pixel_values = torch.randn(batch_size, 3, height, width)
        with torch.no_grad():
            torch.testing.assert_close(program(pixel_values), model(pixel_values).logits, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model = smallest_model("resnet")
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    differences = export_onnx(model, path, DeGMixImageProcessor(tasks=TASKS))
    return model, path, differences


def test_onnx_file_stands_alone(exported):
    model, path, differences = exported
    assert os.listdir(path.parent) == ["model.onnx"] and [size for size, _ in differences] == list(SIZES)
    session = onnxruntime.InferenceSession(path)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["tasks"]) == model.config.to_dict()["tasks"]
    assert json.loads(metadata["preprocessor"])["image_mean"] == [0.485, 0.456, 0.406]
    assert [output.name for output in session.get_outputs()] == ["normals"]
    pixel_values = torch.randn(2, 3, 47, 81)
    with torch.no_grad():
        expected = model(pixel_values).logits["normals"]
    logits = session.run(["normals"], {"pixel_values": pixel_values.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=1e-4)


def test_another_model_is_told_apart(exported):
    session = onnxruntime.InferenceSession(exported[1])
    with pytest.raises(ValueError, match="logits of 'normals' differ by .* for images of 256 x 320"):
        compare(smallest_model("resnet", seed=1), session)


def test_nothing_is_written_if_it_does_not_agree(tmp_path, monkeypatch):
    model = smallest_model("resnet")
    changed = export_program(smallest_model("resnet", seed=1))
    monkeypatch.setattr("transformers_degmix.export.export_program", lambda model: changed)
    with pytest.raises(ValueError, match="differ"):
        export_onnx(model, tmp_path / "model.onnx")
    assert os.listdir(tmp_path) == []


def test_backbone_that_cannot_be_captured_is_named():
    model = smallest_model("resnet")
    model.model.backbone.register_forward_pre_hook(lambda module, args: print(float(args[0].sum())))
    with pytest.raises(ValueError, match="backbone 'resnet' cannot be captured") as error:
        export_program(model)
    assert "\n" not in str(error.value)
