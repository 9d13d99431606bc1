import json
import os
import sys

import pytest
import torch
from small_models import ALL_KINDS, save_small_onnx, small_model
from transformers import ConvNextV2Config, ResNetConfig, SwinConfig, TimmBackboneConfig

from transformers_degmix import DeGMixImageProcessor, EfficientNetLiteConfig
from transformers_degmix.hub.model_directory import load_model_directory
from transformers_degmix.hub.onnx import SIZES, compare, export_onnx, export_program, quantize_onnx


onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
TASKS = {"normals": ALL_KINDS["normals"]}
STAGES = ["stage1", "stage2"]
BACKBONES = {
    "resnet": ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", out_features=STAGES
    ),
    # a shifted window, and all that pads: patches, pairs of them, windows
    "swin": SwinConfig(embed_dim=8, depths=[1, 2], num_heads=[1, 2], out_features=STAGES),
    # pads odd and even sizes differently, at every stride
    "efficientnet_lite": EfficientNetLiteConfig(
        embedding_size=4, hidden_sizes=[8] * 7, depths=[1] * 7, out_features=["stage2"]
    ),
    # of images that the model pads
    "convnextv2": ConvNextV2Config(hidden_sizes=[4, 4], depths=[1, 1], num_stages=2, out_features=STAGES),
}


def smallest_model(backbone="resnet", seed=0):
    return small_model(seed, backbone_config=BACKBONES[backbone], tasks=TASKS, num_mixer_layers=1)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model = smallest_model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    differences = export_onnx(model, path, DeGMixImageProcessor(tasks=TASKS))
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    return model.eval(), path, differences


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


def test_onnx_file_loads_like_a_model_directory(exported):
    model, path, _ = exported
    loaded, processor = load_model_directory(path)
    assert loaded.config.tasks == model.config.tasks and loaded.num_parameters() == model.num_parameters()
    pixel_values = processor(torch.randint(256, (3, 50, 70)), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixel_values).logits, model(pixel_values).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("lacking", ["tasks", "preprocessor"])
def test_files_without_what_prediction_needs_are_refused(tmp_path, lacking):
    path = save_small_onnx(tmp_path / "model.onnx", **{lacking: None})
    with pytest.raises(ValueError, match=rf"model\.onnx: its metadata lack \['{lacking}'\], which `degmix export` "):
        load_model_directory(path)


def test_files_are_named_so_that_they_can_be_loaded(tmp_path):
    with pytest.raises(ValueError, match=r"model must end in \.onnx"):
        export_onnx(smallest_model(), tmp_path / "model")
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_swin_pads_at_all_sizes(tmp_path):
    # `export_onnx` compares at all of them
    path = tmp_path / "model.onnx"
    differences = export_onnx(smallest_model("swin"), path)
    assert [size for size, _ in differences] == list(SIZES) and path.exists()


def test_efficientnet_lite_pads_at_all_sizes(tmp_path):
    # What stands on the backbone is the same as with the others. Later stages are made of the same layers.
    path = tmp_path / "model.onnx"
    config = BACKBONES["efficientnet_lite"]
    model = small_model(backbone_config=config, tasks=TASKS, num_mixer_layers=0, use_decoder=False)
    del model.model.backbone.stages[3:]
    model.model.unread_parameters = []
    differences = export_onnx(model, path)
    assert [size for size, _ in differences] == list(SIZES) and path.exists()


@pytest.mark.vision
def test_timm(tmp_path):
    config = TimmBackboneConfig(backbone="test_vit", out_indices=[1, 5])
    model = small_model(backbone_config=config, tasks=TASKS, num_mixer_layers=0, use_decoder=False)
    assert [size for size, _ in export_onnx(model, tmp_path / "model.onnx")] == list(SIZES)


@pytest.mark.vision
@pytest.mark.parametrize(
    "name, module", [("tf_efficientnet_lite0", "conv2d_same"), ("swin_tiny_patch4_window7_224", "swin_transformer")]
)
def test_what_cannot_be_captured_is_refused_at_once(name, module):
    model = small_model(backbone_config=TimmBackboneConfig(backbone=name, out_indices=[1, 2, 3]))
    with pytest.raises(ValueError, match=rf"{name}.*dynamic sizes.*{module}"):
        export_program(model)


def test_another_model_is_told_apart(exported):
    session = onnxruntime.InferenceSession(exported[1])
    with pytest.raises(ValueError, match="logits of 'normals' differ by .* for images of 256 x 320"):
        compare(smallest_model(seed=1), session)


def test_nothing_is_written_if_it_does_not_agree(tmp_path):
    model = small_model(backbone_config=BACKBONES["resnet"], tasks=TASKS, num_mixer_layers=0, use_decoder=False)
    model.heads["normals"].register_forward_hook(
        lambda module, args, output: output + 1 if torch.compiler.is_compiling() else output
    )
    with pytest.raises(ValueError, match="differ"):
        export_onnx(model, tmp_path / "model.onnx")
    assert os.listdir(tmp_path) == []


def test_8_bits_everywhere_but_where_positions_are_computed(exported, tmp_path):
    _, path, _ = exported
    output = tmp_path / "int8.onnx"
    # Positions of hundreds of pixels: in 8 bits, they would more than double the error.
    batches = [torch.randn(1, 3, 40, 4000 + 8 * i) for i in range(2)]
    quantize_onnx(path, output, batches)
    assert os.listdir(tmp_path) == ["int8.onnx"]
    graph = onnx.load(output).graph
    producers = {name: node.op_type for node in graph.node for name in node.output}
    in_float = {
        name
        for node in graph.node
        if node.op_type == "Conv" and producers.get(node.input[0]) != "DequantizeLinear"
        for name in node.output
    }
    convolutions = [node.name for node in onnx.load(path).graph.node if node.op_type == "Conv"]
    # of the mixer, 3 x 3 to 9 points and from there to the channels
    assert len(in_float) == 2 and len(convolutions) > 4
    # Not optimised, rounded numbers are computed with in float32. What the kernels for 8 bits make of them depends on
    # the CPU: on one without VNNI, the error of this model was three to four times as large.
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    sessions = (onnxruntime.InferenceSession(file, options) for file in (path, output))
    exact, rounded = (session.run(["normals"], {"pixel_values": batches[0].numpy()})[0] for session in sessions)
    assert 0 < abs(rounded - exact).mean() < 0.035 * abs(exact).mean()


def test_missing_extra_is_named(exported, tmp_path, monkeypatch):
    model, path, _ = exported
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"onnx is missing: pip install transformers-degmix\[onnx\]"):
        export_onnx(model, tmp_path / "model.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"cannot load .*onnxruntime is missing: pip install"):
        load_model_directory(path)


def test_backbone_that_cannot_be_captured_is_named():
    model = smallest_model()
    model.model.backbone.register_forward_pre_hook(lambda module, args: print(float(args[0].sum())))
    with pytest.raises(ValueError, match="backbone 'resnet' cannot be captured") as error:
        export_program(model)
    assert "\n" not in str(error.value)
