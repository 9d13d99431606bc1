"""EfficientNet-Lite as a Transformers backbone.

Shapes: B images of H x W pixels, h x w the size of a map; a stride of s makes h = ceil(H / s), w = ceil(W / s).
"""

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoBackbone, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import BackboneOutput
from transformers.utils.generic import can_return_tuple


# Expansion, kernel size and stride of the first block of each group. The other blocks have stride 1.
GROUPS = ((1, 3, 1), (6, 3, 2), (6, 5, 2), (6, 3, 2), (6, 5, 1), (6, 5, 2), (6, 3, 1))


@strict
class EfficientNetLiteConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""Configuration of [`EfficientNetLiteBackbone`]; by default EfficientNet-Lite0's.

    Args:
        embedding_size (`int`, *optional*, defaults to 32):
            Channels of the first convolution.
        hidden_sizes (`list[int]`, *optional*, defaults to `[16, 24, 40, 80, 112, 192, 320]`):
            Channels of each of the seven groups of blocks.
        depths (`list[int]`, *optional*, defaults to `[1, 2, 2, 3, 3, 4, 1]`):
            Blocks of each group.
        out_features (`list[str]`, *optional*):
            The stages whose maps are returned, of `"stem"`, `"stage1"`, `"stage2"`, `"stage3"` and `"stage4"`, with
            strides 2, 4, 8, 16 and 32, and in Lite0 16, 24, 40, 112 and 320 channels. Defaults to the last.
        out_indices (`list[int]`, *optional*):
            The same by number, in place of `out_features`.

    Raises:
        ValueError: there are not seven groups, or a stage has another name.
    """

    model_type = "efficientnet_lite"

    embedding_size: int = 32
    hidden_sizes: list[int] | tuple[int, ...] = (16, 24, 40, 80, 112, 192, 320)
    depths: list[int] | tuple[int, ...] = (1, 2, 2, 3, 3, 4, 1)

    def __post_init__(self, **kwargs):
        for field in ("hidden_sizes", "depths"):
            value = list(getattr(self, field))
            if len(value) != len(GROUPS) or min(value) < 1:
                raise ValueError(f"`{field}` must have {len(GROUPS)} numbers from 1, got {value}")
            setattr(self, field, value)
        self.stage_names = ["stem", "stage1", "stage2", "stage3", "stage4"]
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        super().__post_init__(**kwargs)


class EfficientNetLiteConv(nn.Module):
    """Convolution, BatchNorm and, except in projections, ReLU6."""

    NORM_MOMENTUM = 0.01

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1, activate=True
    ):
        super().__init__()
        self.stride, self.margin, self.activate = stride, kernel_size // 2, activate
        padding = self.margin if stride == 1 else 0
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(out_channels, eps=1e-3, momentum=self.NORM_MOMENTUM)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(B, in_channels, h, w)` -> `(B, out_channels, ceil(h / stride), ceil(w / stride))`."""
        if self.stride == 2:
            # TensorFlow's "SAME" adds what the last window needs: half of it, rounded down, before the first pixel.
            top, left = (self.margin - 1 + size % 2 for size in hidden_states.shape[-2:])
            hidden_states = F.pad(hidden_states, (left, self.margin, top, self.margin))
        hidden_states = self.norm(self.conv(hidden_states))
        return F.relu6(hidden_states) if self.activate else hidden_states


class EfficientNetLiteBlock(nn.Module):
    """Inverted residual block: expansion, depthwise convolution, projection."""

    def __init__(self, in_channels: int, out_channels: int, expansion: int, kernel_size: int, stride: int):
        super().__init__()
        channels = expansion * in_channels
        self.residual = stride == 1 and in_channels == out_channels
        self.expansion = EfficientNetLiteConv(in_channels, channels, 1) if expansion > 1 else nn.Identity()
        self.depthwise = EfficientNetLiteConv(channels, channels, kernel_size, stride, groups=channels)
        self.projection = EfficientNetLiteConv(channels, out_channels, 1, activate=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(B, in_channels, h, w)` -> `(B, out_channels, ceil(h / stride), ceil(w / stride))`."""
        output = self.projection(self.depthwise(self.expansion(hidden_states)))
        return hidden_states + output if self.residual else output


class EfficientNetLiteBackbone(BackboneMixin, PreTrainedModel):
    """EfficientNet-Lite up to its last block.

    It ([code](https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite)) is an EfficientNet
    ([paper](https://huggingface.co/papers/1905.11946)) without squeeze-and-excitation and with ReLU6. Images can
    have any size.

    Gradient checkpointing is not supported, because a recomputed BatchNorm would count its batch twice.
    """

    config: EfficientNetLiteConfig
    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    has_attentions = False
    _no_split_modules = ["EfficientNetLiteBlock"]

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        channels = config.embedding_size
        stages: list[list[nn.Module]] = [[EfficientNetLiteConv(3, channels, 3, stride=2)]]
        self.num_features = []
        for (expansion, kernel_size, stride), size, depth in zip(GROUPS, config.hidden_sizes, config.depths):
            if stride == 2:
                stages.append([])
                self.num_features.append(channels)
            for index in range(depth):
                block = EfficientNetLiteBlock(channels, size, expansion, kernel_size, 1 if index else stride)
                stages[-1].append(block)
                channels = size
        self.num_features.append(channels)
        self.stages = nn.ModuleList(nn.Sequential(*stage) for stage in stages)
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: Tensor, output_hidden_states: bool | None = None, **kwargs) -> BackboneOutput:
        """The feature maps of images.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`):
                Images; ImageNet's weights expect values from -1 to 1 (mean and standard deviation 0.5).
            output_hidden_states (`bool`, *optional*):
                Whether the maps of all stages are returned too.
        """
        hidden_states: tuple[Tensor, ...] = ()
        for stage in self.stages:
            pixel_values = stage(pixel_values)
            hidden_states += (pixel_values,)
        feature_maps = tuple(
            feature_map for name, feature_map in zip(self.stage_names, hidden_states) if name in self.out_features
        )
        return BackboneOutput(feature_maps=feature_maps, hidden_states=hidden_states)

    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.Conv2d):
            # Outputs that an input influences: in a depthwise convolution, only outputs of its own channel.
            fan_out = module.weight[:, 0].numel() / module.groups
            init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
        else:
            super()._init_weights(module)


# Here, because without the package this file lies beside the weights, and nobody else registers it.
AutoBackbone.register(EfficientNetLiteConfig, EfficientNetLiteBackbone)
