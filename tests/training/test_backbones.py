"""Pretrained backbones: the features of a model are those of the backbone's own library, from the first step on."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import BACKBONES, STAGES, randomize
from transformers import (
    AutoModel,
    Dinov2Model,
    ResNetForImageClassification,
    SwinForImageClassification,
    Tipsv2Config,
    Tipsv2Model,
    ViTImageProcessorPil,
)

from transformers_degmix.model_card import hub_id
from transformers_degmix.training.arguments import TrainingArguments
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
from transformers_degmix.training.arguments import TrainingArguments
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
    ViTImageProcessorPil(
        image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.2, 0.2], resample=3, do_rescale=False
    ).save_pretrained(tmp_path / "source")
    fields = {"pretrained_backbone": str(tmp_path / "source")}
    model, processor = build_model(arguments(tmp_path, **fields))
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
    assert list(processor.image_mean) == [0.5, 0.4, 0.3] and processor.resample == 3 and not processor.do_rescale
    assert processor.size == {"shortest_edge": 32}

    _, processor = build_model(arguments(tmp_path, **fields, image_processor={"image_mean": [0.1, 0.1, 0.1]}))
    assert list(processor.image_mean) == [0.1, 0.1, 0.1] and list(processor.image_std) == [0.2, 0.2, 0.2]


def test_part_of_a_model_of_images_and_texts(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 8, "num_attention_heads": 2}
    text = {**sizes, "intermediate_size": 16, "vocab_size": 20}
    original = Tipsv2Model(Tipsv2Config(vision_config={**sizes, "image_size": 56}, text_config=text))
    original.save_pretrained(tmp_path / "source")
    model, _ = build_model(arguments(tmp_path, pretrained_backbone=str(tmp_path / "source")))
    assert model.config.backbone_config.out_features == ["stage2", "stage4", "stage6", "stage8"]
    expected = original.vision_model.state_dict()
    weights = model.model.backbone.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


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
    with pytest.raises(OSError, match="`pretrained_backbone: nowhere` is no directory"):
        build_model(arguments(tmp_path, pretrained_backbone="nowhere"))
    (directory / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="'bert', of which there is no backbone"):
        build_model(arguments(tmp_path, pretrained_backbone=str(directory)))


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
