"""The backbone of DeGMix: whatever `AutoBackbone` builds, for images of any size.

Some backbones take images of any size. Others fail unless height and width are multiples of a number, or cut off what
does not fill their last patch. The model therefore pads images to multiples of `DeGMixConfig.size_divisor`.
"""

from collections.abc import Callable, Hashable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import AutoBackbone, PreTrainedModel

from .configuration_degmix import DeGMixConfig
from .layers_degmix import pad_centred


Found = TypeVar("Found")

# Side of the image on which a backbone is tried: a multiple of every patch size in use (14, 16, 32). 14 patches of the
# largest fill windows of 7 and of 14.
TRIED_LENGTH = 448
# Rounded up to multiples of a divisor, the two lengths have no larger divisor in common.
TRIED_SIZE = (97, 130)


def build_backbone(config: DeGMixConfig) -> PreTrainedModel:
    """The backbone of a model, with random weights. A `size_divisor` of `None` becomes what the backbone needs.

    Raises:
        ValueError: timm does not know the backbone or one of its `model_args`; or it takes images of one size only, or
            fails on multiples of `size_divisor`.
    """
    backbone_config: Any = config.backbone_config
    if backbone_config.model_type == "timm_backbone":
        backbone = _build_timm_backbone(backbone_config)
    else:
        backbone = AutoBackbone.from_config(backbone_config)
    if config.size_divisor is None:
        config.size_divisor = find_size_divisor(backbone)
    else:
        _map_sizes(backbone, *config.padded_size(TRIED_SIZE))
    return backbone


def _build_timm_backbone(backbone_config: Any) -> PreTrainedModel:
    model_args = getattr(backbone_config, "model_args", {})
    try:
        try:
            # timm's transformers then take images of other sizes than their position embeddings are for.
            return AutoBackbone.from_config(backbone_config, **{"dynamic_img_size": True, **model_args})
        except TypeError:
            # Other models do not have this argument.
            return AutoBackbone.from_config(backbone_config, **model_args)
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"`backbone_config`: timm cannot build {backbone_config.backbone!r} with {model_args}: {error}"
        ) from error


def extract_feature_maps(backbone: PreTrainedModel, pixel_values: Tensor, config: DeGMixConfig) -> tuple[Tensor, ...]:
    """Pads images `(B, 3, H, W)` and returns their maps `(B, c_i, h_i, w_i)`."""
    if config.size_divisor > 1:
        pixel_values = pad_centred(pixel_values, config.padded_size(pixel_values.shape[-2:]))
    return channels_first(backbone, backbone(pixel_values).feature_maps)


def channels_first(backbone: PreTrainedModel, feature_maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Maps of a backbone -> maps `(B, c_i, h_i, w_i)`. Some backbones of timm have the channels last."""
    channels_last = getattr(getattr(backbone, "_backbone", None), "output_fmt", "NCHW") == "NHWC"
    return tuple(x.movedim(-1, 1) for x in feature_maps) if channels_last else feature_maps


def find_size_divisor(backbone: PreTrainedModel) -> int:
    """The number that must divide height and width, so that a backbone runs and sees the whole image.

    It is found by trial on the meta device, without weights and pixels.

    Raises:
        ValueError: there is none, for example if the backbone takes images of one size only; the message is one line.
    """
    strides = [TRIED_LENGTH // rows for rows, _ in _map_sizes(backbone, TRIED_LENGTH, TRIED_LENGTH)]
    running, failures = [], []
    for divisor in (1, *(max(strides) * factor for factor in (1, 2, 4))):
        height, width = (-(-length // divisor) * divisor for length in TRIED_SIZE)
        try:
            sizes = _map_sizes(backbone, height, width)
        except ValueError as error:
            failures.append(error)
            continue
        if all(rows * n >= height and columns * n >= width for (rows, columns), n in zip(sizes, strides)):
            return divisor
        running.append(divisor)
    if not running:
        raise failures[-1]
    # Convolutions without padding lose the border at every size.
    return running[0]


def _tried_once(function: Callable[..., Found]) -> Callable[..., Found]:
    """Calls with the backbone in evaluation mode, where it draws nothing at random and takes a single image.

    Results are remembered by configuration: a pass through a large backbone takes seconds, even without pixels.
    """
    known: dict[tuple[Hashable, ...], Found] = {}

    @wraps(function)
    def find(backbone: PreTrainedModel, *args: Hashable) -> Found:
        key = (type(backbone), backbone.config.to_json_string(), *args)
        if key not in known:
            training = backbone.training
            try:
                known[key] = function(backbone.eval(), *args)
            finally:
                backbone.train(training)
        return known[key]

    return find


@_tried_once
def _map_sizes(backbone: PreTrainedModel, height: int, width: int) -> list[torch.Size]:
    """The sizes of a backbone's maps for an image, or a ValueError that says why there are none."""
    config = backbone.config
    state = {name: x.to("meta") for name, x in (*backbone.named_parameters(), *backbone.named_buffers())}
    pixel_values = torch.empty(1, getattr(config, "num_channels", 3), height, width, device="meta")
    try:
        with torch.no_grad():
            maps = torch.func.functional_call(backbone, state, (pixel_values,)).feature_maps
    except Exception as error:  # of many types: each backbone checks in its own way, or fails somewhere
        raise ValueError(
            f"the backbone {getattr(config, 'backbone', config.model_type)!r} does not take images of any size, as "
            f"DeGMix does: for {height} x {width} it says {' '.join(str(error).split())[:300]!r}. If it takes "
            "multiples of a number, set `size_divisor` to this number"
        ) from error
    return [x.shape[-2:] for x in channels_first(backbone, maps)]


@_tried_once
def find_unread_parameters(backbone: PreTrainedModel, size: tuple[int, int]) -> list[str]:
    """Names of the parameters that a backbone's maps of images of `size` do not depend on.

    Swin ends in a LayerNorm that is not applied to the maps; stages may follow the last one that is fused.
    """
    # The weights can be on the meta device. Zeros in their place give the same graph.
    with torch.device("cpu"), torch.inference_mode(False), torch.enable_grad():
        parameters = {
            name: torch.zeros((), dtype=x.dtype).expand(x.shape).requires_grad_()
            for name, x in backbone.named_parameters()
        }
        buffers = {name: torch.zeros_like(x, device="cpu") for name, x in backbone.named_buffers()}
        pixel_values = torch.zeros(1, getattr(backbone.config, "num_channels", 3), *size)
        maps = torch.func.functional_call(backbone, {**parameters, **buffers}, (pixel_values,)).feature_maps
    nodes = [feature_map.grad_fn for feature_map in maps]
    seen, read = set(nodes), set()
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            read.add(node.variable)
        following = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= following
        nodes += following
    return [name for name, parameter in parameters.items() if parameter not in read]
