"""PyTorch DeGMix model: shared backbone, deformable mixers per task, task-aware gating transformer, heads per task.

Shapes: B images, T tasks, C = `config.hidden_size` channels, h x w the size of the backbone's first map, N = h * w.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoBackbone, PreTrainedModel
from transformers import initialization as init
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_degmix import DeGMixConfig, complete_fields
from .loss_degmix import multi_task_loss


@dataclass
class DeGMixModelOutput(ModelOutput):
    """
    Output of [`DeGMixModel`].

    Args:
        fused_features (`torch.Tensor` of shape `(batch_size, hidden_size, h, w)`):
            The backbone's maps fused at the resolution of the first.
        task_features (`dict[str, torch.Tensor]`, each of shape `(batch_size, hidden_size, h, w)`):
            Features of each task after the decoder.
        hidden_states (`tuple[torch.Tensor]`, *optional*, with `output_hidden_states=True`):
            The backbone's feature maps, then the fused features, then the features of all tasks,
            `(batch_size, num_tasks, hidden_size, h, w)`, after the mixers and after the decoder.
        attentions (`tuple[torch.Tensor]`, *optional*, with `output_attentions=True`):
            One tensor `(batch_size, num_tasks, num_attention_heads, num_tasks, h, w)`: how much the query of a task
            (second axis) takes from each task (fourth axis, sums to 1, 0 for tasks that it does not attend to) at each
            pixel. `None` without decoder.
    """

    fused_features: Tensor | None = None
    task_features: dict[str, Tensor] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class DeGMixDensePredictionOutput(ModelOutput):
    """
    Output of [`DeGMixForMultiTaskDensePrediction`].

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*, with `labels`):
            Weighted sum of the tasks' losses.
        losses (`dict[str, torch.Tensor]`, *optional*, with `labels`):
            Loss of each task that has labels, times its weight.
        logits (`dict[str, torch.Tensor]`, each of shape `(batch_size, num_labels, height, width)`):
            One map per task at the size of the input, in the order of `config.tasks`.
        hidden_states (`tuple[torch.Tensor]`, *optional*): see [`DeGMixModelOutput`].
        attentions (`tuple[torch.Tensor]`, *optional*): see [`DeGMixModelOutput`].
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    logits: dict[str, Tensor] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class DeGMixLinear(nn.Linear):
    """A layer that, called without inputs, gives its weight and bias to the module around it.

    Accelerate loads weights that it keeps on another device or on disk when their own layer is called, and only then.
    """

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return super().forward(*inputs) if inputs else _weight_and_bias(self)


class DeGMixConv2d(nn.Conv2d):
    """The same as [`DeGMixLinear`] for convolutions."""

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return super().forward(*inputs) if inputs else _weight_and_bias(self)


def _weight_and_bias(layer: nn.Linear | nn.Conv2d) -> tuple[Tensor, Tensor]:
    # In inference mode, PyTorch's module tracker (that of `FlopCounterMode`) cannot take modules that give parameters.
    parameters = layer.weight, layer.bias
    return parameters if torch.is_grad_enabled() else tuple(x.detach() for x in parameters)


class DeGMixFeatureFusion(nn.Module):
    """Concatenation of all backbone maps at the first one's size, Linear and LayerNorm per pixel.

    The linear map commutes with bilinear upsampling, so each map is projected at its own resolution by its slice of
    the weight, then upsampled and summed.
    """

    def __init__(self, config: DeGMixConfig, channels: list[int]):
        super().__init__()
        self.channels = channels
        self.projection = DeGMixLinear(sum(channels), config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, feature_maps: tuple[Tensor, ...]) -> Tensor:
        """Maps `(B, c_i, h_i, w_i)` -> `(B, C, h, w)`."""
        size = feature_maps[0].shape[-2:]
        weight, bias = self.projection()
        weights = weight[:, :, None, None].split(self.channels, dim=1)
        fused = F.conv2d(feature_maps[0], weights[0], bias)
        for feature_map, weight in zip(feature_maps[1:], weights[1:]):
            fused += F.interpolate(F.conv2d(feature_map, weight), size=size, mode="bilinear", align_corners=False)
        return self.norm(fused.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


class DeGMixPointwiseConv(nn.Conv2d):
    """A 1 x 1 convolution as a matrix product: about half of the time of PyTorch's own in training on a CPU."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(B, C, h, w)` -> `(B, C, h, w)`."""
        weight = self.weight.flatten(1).expand(hidden_states.shape[0], -1, -1)
        return torch.baddbmm(self.bias[:, None], weight, hidden_states.flatten(2)).view_as(hidden_states)


class DeGMixDeformableConv(GradientCheckpointingLayer):
    """Samples every channel at its own offsets, then mixes the channels (paper, section 3.2).

    A deformable convolution with a 1 x 1 kernel and as many offset groups as channels. As in the released code, the
    first half of the channels sees only rows, the second only columns; by default, the offsets are made from absolute
    pixel positions.
    """

    KERNEL_SIZE = 3

    def __init__(self, config: DeGMixConfig):
        super().__init__()
        channels, points = config.hidden_size, self.KERNEL_SIZE**2
        self.offset_position = config.offset_position
        self.point_offsets = DeGMixConv2d(channels, 2 * points, self.KERNEL_SIZE, padding=1)
        self.channel_offsets = DeGMixConv2d(2 * points, 2 * channels, self.KERNEL_SIZE, padding=1, groups=2)
        self.projection = DeGMixPointwiseConv(channels)

    def sampling_grid(self, hidden_states: Tensor) -> Tensor:
        """`(B, C, h, w)` -> where each channel is sampled, `(B, C, h, w, 2)` as (x, y) in [-1, 1] (`F.grid_sample`).

        Absolute positions and their offsets are as large as the map: half precision would round them to half pixels
        and more, so the whole path stays in float32 (float64 for a float64 model), under autocast too.
        """
        height, width = hidden_states.shape[-2:]
        device, dtype = hidden_states.device, torch.promote_types(hidden_states.dtype, torch.float32)
        with torch.autocast(device.type, enabled=False):
            rows = torch.arange(height, device=device, dtype=dtype).view(-1, 1).expand(-1, width)
            columns = torch.arange(width, device=device, dtype=dtype).expand(height, -1)
            steps = torch.arange(self.KERNEL_SIZE, device=device, dtype=dtype) - self.KERNEL_SIZE // 2
            position = torch.stack(((2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1))
            column_position, row_position = {
                "absolute": (columns + 1, rows + 1),
                "normalized": position,
                "none": torch.zeros_like(position),
            }[self.offset_position]
            # nine row steps (-1 -1 -1 0 0 0 1 1 1) and nine column steps (-1 0 1 -1 0 1 ...)
            row_steps = steps.repeat_interleave(self.KERNEL_SIZE).view(-1, 1, 1) + row_position
            column_steps = steps.repeat(self.KERNEL_SIZE).view(-1, 1, 1) + column_position
            weight, bias = (x.to(dtype) for x in self.point_offsets())
            points = F.conv2d(hidden_states.to(dtype), weight, bias, padding=1) + torch.cat((row_steps, column_steps))

            # The grid has fractions (x, y) of the map, not offsets (y, x) in pixels. Rather than 2C maps, the weights
            # are changed, and the pixel's own position is two more points that the middle of the kernel passes on.
            scale = 2 / torch.tensor([width, height], device=device, dtype=dtype)
            weight, bias = (x.to(dtype).unflatten(0, (-1, 2)).flip(1) for x in self.channel_offsets())
            weight, bias = weight * scale.view(2, 1, 1, 1), bias * scale
            middle = F.pad(torch.eye(2, device=device, dtype=dtype).view(2, 2, 1, 1), (1, 1, 1, 1))
            weight = torch.cat((weight, middle.expand(weight.shape[0], -1, -1, -1, -1)), dim=2).flatten(0, 1)
            position = position.expand(points.shape[0], -1, -1, -1)
            row_points, column_points = points.chunk(2, dim=1)
            points = torch.cat((row_points, position, column_points, position), dim=1)
            grid = F.conv2d(points, weight, bias.flatten(), padding=1, groups=2)
            return grid.unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(B, C, h, w)` -> `(B, C, h, w)`."""
        grid = self.sampling_grid(hidden_states)
        sampled = F.grid_sample(
            hidden_states.to(grid.dtype).flatten(0, 1).unsqueeze(1),
            grid.flatten(0, 1),
            mode="bilinear",
            padding_mode="zeros",
            align_corners=False,
        )
        return self.projection(sampled.view(hidden_states.shape).to(hidden_states.dtype))


class DeGMixMixerLayer(nn.Module):
    """One deformable mixer block: channel-aware mixing, then spatial-aware deformable mixing with a residual.

    Gradient checkpointing recomputes the deformable part only: recomputed, a BatchNorm would count its batch twice.
    """

    def __init__(self, config: DeGMixConfig):
        super().__init__()
        self.channel_mixing = DeGMixPointwiseConv(config.hidden_size)
        self.channel_norm = nn.BatchNorm2d(config.hidden_size)
        self.spatial_mixing = DeGMixDeformableConv(config)
        self.spatial_norm = nn.BatchNorm2d(config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(B, C, h, w)` -> `(B, C, h, w)`."""
        hidden_states = _gelu_and_norm(self.channel_mixing(hidden_states), self.channel_norm)
        return hidden_states + _gelu_and_norm(self.spatial_mixing(hidden_states), self.spatial_norm)


class DeGMixMixer(nn.Sequential):
    """Deformable mixer encoder of one task."""

    def __init__(self, config: DeGMixConfig):
        super().__init__(*(DeGMixMixerLayer(config) for _ in range(config.num_mixer_layers)))


def _gelu_and_norm(hidden_states: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """`norm(F.gelu(hidden_states))`, of which the backward pass recomputes the GELU instead of keeping it.

    Checkpointing both would count the batch twice in the BatchNorm. Captured graphs decide themselves what they keep.
    """
    activated = F.gelu(hidden_states)
    if torch.compiler.is_compiling():
        return norm(activated)
    identity = id(activated)  # the hooks stay, and would keep it
    with torch.autograd.graph.saved_tensors_hooks(
        lambda saved: None if id(saved) == identity else saved,
        lambda saved: F.gelu(hidden_states) if saved is None else saved,
    ):
        return norm(activated)


class DeGMixAttention(nn.Module):
    """Parameters of a multi-head attention and of the Linear and LayerNorm that follow it, merged for short sequences.

    The projections stay packed as in `nn.MultiheadAttention`: parameters that a scope or the softmax leave without
    influence (query and key in scope "token"; every key bias) get zero gradients instead of none, so that weight decay
    and distributed training treat them as the released code does.
    """

    def __init__(self, config: DeGMixConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.in_proj = DeGMixLinear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = DeGMixLinear(config.hidden_size, config.hidden_size)
        self.linear = DeGMixLinear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size)

    def merged_query(self) -> tuple[Tensor, Tensor]:
        """Query and key projections as one: `(heads * C, C)` and `(heads * C)`, scale included.

        A score is (Wq x + bq)^T (Wk z + bk) per head; bk adds the same to every score of a query and drops out of the
        softmax, so x can be mapped into the space of z once, instead of every z into the space of the keys.
        """
        (query, key, _), (query_bias, _, _) = (x.unflatten(0, (3, self.num_heads, -1)) for x in self.in_proj())
        scaled_key = key.transpose(1, 2) * key.shape[1] ** -0.5
        return (scaled_key @ query).flatten(0, 1), (scaled_key @ query_bias.unsqueeze(2)).flatten()

    def merged_value(self) -> tuple[Tensor, Tensor]:
        """Value, output projection and Linear as one: `(C, heads * C)` and `(C)`.

        All three are linear and attention weights sum to 1, so the tokens themselves can be averaged first.
        """
        value, value_bias = (x.chunk(3)[2] for x in self.in_proj())
        value = value.unflatten(0, (self.num_heads, -1))
        (out_weight, out_bias), (linear_weight, linear_bias) = self.out_proj(), self.linear()
        output = linear_weight @ out_weight
        weight = torch.einsum("chd,hde->che", output.unflatten(1, (self.num_heads, -1)), value)
        bias = output @ value_bias + F.linear(out_bias, linear_weight, linear_bias)
        return weight.flatten(1), bias

    @staticmethod
    def attend(query: Tensor, tokens: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Softmax attention of one task to all tasks at each pixel.

        Args:
            query: `(B, n, heads * C)`, mapped by `merged_query`.
            tokens: `(T, B, n, C)`, keys and values.
            weights: `(B, n, heads, T)`, if they are known; the query then does not matter.

        Returns:
            Averaged tokens `(B, n, heads * C)`, to be mapped by `merged_value`, and weights `(B, n, heads, T)`.
        """
        tokens = tokens.permute(1, 2, 0, 3)
        query = query.unflatten(-1, (-1, tokens.shape[-1]))
        if torch.compiler.is_dynamo_compiling():
            # Inductor fuses a product with its sum; batches of small matrix products it calls one by one.
            if weights is None:
                weights = (query.unsqueeze(-2) * tokens.unsqueeze(-3)).sum(dim=-1).softmax(dim=-1)
            return (weights.unsqueeze(-1) * tokens.unsqueeze(-3)).sum(dim=-2).flatten(-2), weights
        if weights is None:
            weights = (query @ tokens.mT).softmax(dim=-1)
        return (weights.to(tokens.dtype) @ tokens).flatten(-2), weights


def _eager_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **kwargs) -> tuple[Tensor, Tensor]:
    """Attention in plain products, `(B, heads, S, C / heads)` -> `(B, S, heads, C / heads)` and its weights."""
    weights = (query @ key.mT * query.shape[-1] ** -0.5).softmax(dim=-1)
    return (weights @ value).transpose(1, 2), weights


class DeGMixTaskInteraction(GradientCheckpointingLayer):
    """Task interaction block: LayerNorm(Linear(attention)) over the tokens of all tasks, within a scope."""

    def __init__(self, config: DeGMixConfig):
        super().__init__()
        self.config = config
        self.scope = config.interaction_scope
        self.reduction = config.interaction_reduction
        self.attention = DeGMixAttention(config)

    def prepare(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What the tokens of all pixels share, from the maps `(B, C, h, w)` of the tasks that they attend to."""
        attention = self.attention
        if self.scope == "image":
            return self.image_context(maps)
        weight, bias = attention.merged_value()
        if self.scope == "task":
            return *attention.merged_query(), weight, bias
        # Every head attends to the token itself, so that the heads' maps add up.
        return weight.unflatten(1, (attention.num_heads, -1)).sum(dim=1), bias

    def image_context(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens of an image, each averaged over `reduction` ** 2 pixels."""
        # Squares at the right and lower border may be cut off: average what is inside.
        pooled = [F.avg_pool2d(x, self.reduction, ceil_mode=True).flatten(2) for x in maps]
        context = torch.cat(pooled, dim=2).transpose(1, 2)
        _, *projections = zip(*(x.chunk(3) for x in self.attention.in_proj()))
        context = context.to(projections[0][0].device)  # where Accelerate puts this block
        key, value = (self.split_heads(F.linear(context, *projection)) for projection in projections)
        return key, value

    def split_heads(self, tokens: Tensor) -> Tensor:
        """`(B, S, C)` -> `(B, heads, S, C / heads)`."""
        return tokens.unflatten(-1, (self.attention.num_heads, -1)).transpose(1, 2)

    def forward(self, tokens: Tensor, attended: Tensor, *prepared: Tensor) -> Tensor:
        """Tokens of some pixels `(T, B, n, C)`.

        Args:
            tokens: of the tasks that ask.
            attended: of the tasks that they attend to.
            prepared: what `prepare` returned.

        Returns:
            Interaction tokens of the tasks that ask, `(T, B, n, C)`.
        """
        attention = self.attention
        if self.scope == "image":
            query = F.linear(tokens, *(x.chunk(3)[0] for x in attention.in_proj()))
            query = self.split_heads(query.transpose(0, 1).flatten(1, 2))
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, _eager_attention)
            answers = attend(self, query, *prepared, attention_mask=None, is_causal=False)[0].flatten(2)
            answers = answers.unflatten(1, (tokens.shape[0], -1)).transpose(0, 1)
            return attention.norm(attention.linear(attention.out_proj(answers)))
        *query_projection, weight, bias = prepared
        if self.scope == "task":
            queries = F.linear(tokens, *query_projection)
            tokens = torch.stack([attention.attend(query, attended)[0] for query in queries])
        return attention.norm(F.linear(tokens, weight, bias))


class DeGMixTaskQuery(GradientCheckpointingLayer):
    """Task query block: each task's token asks the interaction tokens of the tasks it attends to, at its pixel."""

    def __init__(self, config: DeGMixConfig):
        super().__init__()
        self.attentions = nn.ModuleDict({task: DeGMixAttention(config) for task in config.tasks})

    def prepare(self, tasks: Sequence[str]) -> list[Tensor]:
        """What all pixels share: weights and biases of the merged query, and of the merged value, of some tasks."""
        attentions = (self.attentions[task] for task in tasks)
        merged = ((*attention.merged_query(), *attention.merged_value()) for attention in attentions)
        return [torch.stack(parameters) for parameters in zip(*merged)]

    def forward(
        self, tasks: Sequence[str], tokens: Tensor, attended: Tensor, known: Sequence[Tensor | None], *prepared: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Some pixels of the tasks that ask.

        Args:
            tasks: their names.
            tokens: their tokens `(T, B, n, C)`.
            attended: interaction tokens `(S, B, n, C)` of the tasks that they attend to.
            known: for each of them attention weights `(B, n, heads, S)`, or `None` where they are to be computed.
            prepared: what `prepare` returned.

        Returns:
            Tokens `(T, B, n, C)` and attention weights `(T, B, n, heads, S)`.
        """
        outputs, attentions = [], []
        for task, x, weights, query_weight, query_bias, value_weight, value_bias in zip(
            tasks, tokens, known, *prepared
        ):
            attention = self.attentions[task]
            averaged, weights = attention.attend(F.linear(x, query_weight, query_bias), attended, weights)
            outputs.append(x + attention.norm(F.linear(averaged, value_weight, value_bias)))
            attentions.append(weights)
        return torch.stack(outputs), torch.stack(attentions)


class DeGMixGating(GradientCheckpointingLayer):
    """Task-aware gating, one module for all tasks: half of the channels are scaled by a linear map of the others."""

    def __init__(self, config: DeGMixConfig):
        super().__init__()
        half = config.gating_intermediate_size // 2
        self.norm = nn.LayerNorm(config.hidden_size)
        self.fc1 = nn.Linear(config.hidden_size, config.gating_intermediate_size)
        self.gate_norm = nn.LayerNorm(half)
        self.gate = nn.Linear(half, half)
        self.fc2 = nn.Linear(half, config.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """`(..., C)` -> `(..., C)`."""
        values, gates = F.gelu(self.fc1(self.norm(tokens))).chunk(2, dim=-1)
        return tokens + self.fc2(values * self.gate(self.gate_norm(gates)))


class DeGMixHead(nn.Module):
    """Predicts one task's map from its features."""

    def __init__(self, config: DeGMixConfig, head_hidden_size: int, num_labels: int):
        super().__init__()
        self.conv = nn.Conv2d(config.hidden_size, head_hidden_size, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(head_hidden_size)
        self.classifier = nn.Conv2d(head_hidden_size, num_labels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """`(B, C, h, w)` -> `(B, num_labels, h, w)`."""
        return self.classifier(F.relu(self.norm(self.conv(features))))


class DeGMixPreTrainedModel(PreTrainedModel):
    config: DeGMixConfig
    config_class = DeGMixConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True  # of the backbone, and in scope "image"; other attentions are too short to gain by it
    _no_split_modules = [
        "DeGMixFeatureFusion",
        "DeGMixMixerLayer",
        "DeGMixTaskInteraction",
        "DeGMixTaskQuery",
        "DeGMixGating",
        "DeGMixHead",
    ]

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False):
        # For classes outside Transformers the base class passes over modules without parameters of their own, in case
        # `_init_weights` overwrites loaded weights. Ours does not, and such modules know how their parts start.
        super()._initialize_weights(module)

    def train(self, mode: bool = True):
        """As in `nn.Module`, but what is frozen, parts without a parameter that takes gradients, keeps evaluating.

        Otherwise training would go on to change the statistics of its batch norms.
        """
        super().train(mode)
        for module in self.modules() if mode else ():
            parameters = list(module.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                module.eval()
        return self

    def load_state_dict(self, state_dict: dict[str, Tensor], strict: bool = True, assign: bool = False):
        """As in `nn.Module`; parameters may also have the names that they have in files of `save_pretrained`.

        For some backbones (Swin, in newer versions of Transformers) those differ, and `Trainer` hands files over as
        they are when it resumes or returns to its best model: parameters would silently keep their values.
        """
        own = self.state_dict()
        if any(name not in own for name in state_dict):
            names = {tensor.data_ptr(): name for name, tensor in own.items()}
            saved = revert_weight_conversion(self, own)
            renamed = {name: names.get(tensor.data_ptr()) for name, tensor in saved.items()}
            state_dict = {renamed.get(name) or name: tensor for name, tensor in state_dict.items()}
        return super().load_state_dict(state_dict, strict, assign)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """PyTorch's defaults, but for the attentions, offsets, gates and classifiers (released code)."""
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.reset_parameters()
        elif isinstance(module, DeGMixAttention):
            init.xavier_uniform_(module.in_proj.weight)
            init.zeros_(module.in_proj.bias)
            init.zeros_(module.out_proj.bias)
        elif isinstance(module, DeGMixDeformableConv):
            init.zeros_(module.point_offsets.weight)
        elif isinstance(module, DeGMixGating):
            init.zeros_(module.gate.weight)
            init.ones_(module.gate.bias)
        elif isinstance(module, DeGMixHead):
            init.normal_(module.classifier.weight, std=0.01)
            init.zeros_(module.classifier.bias)
        else:
            super()._init_weights(module)


class DeGMixModel(DeGMixPreTrainedModel):
    """DeGMix without task heads: backbone, fusion, deformable mixer encoder, task-aware gating transformer decoder."""

    CPU_PORTION = 1024  # pixels, see `decode`
    _keys_to_ignore_on_load_unexpected = [r"^heads\."]

    def __init__(self, config: DeGMixConfig):
        super().__init__(config)
        self.backbone = AutoBackbone.from_config(config.backbone_config)
        self.fusion = DeGMixFeatureFusion(config, self.backbone.channels)
        self.mixers = nn.ModuleDict({task: DeGMixMixer(config) for task in config.tasks})
        if config.use_decoder:
            self.interaction = DeGMixTaskInteraction(config)
            self.query = DeGMixTaskQuery(config)
            self.gating = DeGMixGating(config) if config.use_gating else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> DeGMixModelOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
                Normalised images, at least 32 x 32, any size above.
            output_hidden_states (`bool`, *optional*): whether to return the maps between the blocks.
            output_attentions (`bool`, *optional*): whether to return the task queries' attention over tasks.

        Raises:
            ValueError: `pixel_values` is not a batch of images of at least 32 x 32.
        """
        if pixel_values.ndim != 4 or min(pixel_values.shape[-2:]) < 32:
            raise ValueError(
                "`pixel_values` must have the shape (batch_size, num_channels, height, width) with height and width "
                f"of at least 32, got {tuple(pixel_values.shape)}"
            )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions

        feature_maps = self.backbone(pixel_values).feature_maps
        fused = self.fusion(feature_maps)
        features = {task: self.mixers[task](fused).to(fused.device) for task in self.config.tasks}
        hidden_states, attentions = None, None
        if output_hidden_states:
            features, stacked = _stack_tasks(features)
            hidden_states = (*feature_maps, fused, stacked)
        if self.config.use_decoder:
            mixed = features
            features, attentions = self.decode(mixed)
            if output_attentions and torch.is_grad_enabled():
                # Once more, by these weights: as in other models, gradients pass through those that are returned.
                features, _ = self.decode(mixed, attentions)
        if hidden_states:
            features, stacked = _stack_tasks(features)
            hidden_states += (stacked,)
        return DeGMixModelOutput(
            fused_features=fused,
            task_features=features,
            hidden_states=hidden_states,
            attentions=(attentions,) if output_attentions and attentions is not None else None,
        )

    def decode(self, features: dict[str, Tensor], known: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """Maps of each task `(B, C, h, w)` -> such maps, and attention weights `(B, T, heads, T, h, w)`.

        The weights are computed or, if they are known, those.

        Only the interaction looks beyond a pixel. On a CPU, pixels therefore go through all blocks in portions that
        stay in its cache; captured graphs have to hold for all sizes and take them at once.

        Tasks that attend to the same tasks go together, those that are attended to first. Nothing that is computed for
        them depends on other groups, not even the portions, so that it is the same to the last bit without these.
        """
        groups, names = self.config.attention_groups(), list(features)
        maps = [maps.flatten(2) for maps in features.values()]
        batch_size, _, height, width = features[names[0]].shape
        if known is not None:
            maps.append(known.flatten(4))
        portions: Iterable[Sequence[Tensor]] = [maps]
        if maps[0].device.type == "cpu" and not torch.compiler.is_compiling():
            portions = zip(*(x.split(max(1, self.CPU_PORTION // batch_size), dim=-1) for x in maps))
        prepared = [
            (self.interaction.prepare([features[task] for task in attended]), self.query.prepare(tasks))
            for tasks, attended in groups
        ]
        decoded, attentions = defaultdict(list), defaultdict(list)
        for portion in portions:
            tokens = {task: pixels.transpose(1, 2) for task, pixels in zip(names, portion)}  # (B, n, C)
            interaction_tokens: dict[str, Tensor] = {}
            for (tasks, attended), (interaction_prepared, query_prepared) in zip(groups, prepared):
                asking = torch.stack([tokens[task] for task in tasks])
                context = asking if tasks == attended else torch.stack([tokens[task] for task in attended])
                answers = self.interaction(asking, context, *interaction_prepared)
                interaction_tokens.update(zip(tasks, answers))
                if tasks != attended:
                    answers = torch.stack([interaction_tokens[task] for task in attended])
                rows, columns = ([names.index(task) for task in some] for some in (tasks, attended))
                given: Any = [None] * len(tasks)
                if known is not None:
                    given = portion[-1].permute(1, 0, 4, 2, 3)[rows][..., columns]
                queried, weights = self.query(tasks, asking, answers, given, *query_prepared)
                # Many cheap steps: their results, kept for the backward pass, take half of the decoder's memory.
                gated = checkpoint(self.gating, queried, use_reentrant=False, preserve_rng_state=False)
                if len(columns) < len(names):
                    seen, weights = weights, weights.new_zeros(*weights.shape[:-1], len(names))
                    weights[..., columns] = seen
                for task, pixels, pixel_weights in zip(tasks, gated, weights):
                    decoded[task].append(pixels)
                    attentions[task].append(pixel_weights)
        size = (height, width)
        weights = torch.stack([torch.cat(attentions[task], dim=1) for task in names], dim=1)
        return (
            {task: torch.cat(decoded[task], dim=1).unflatten(1, size).permute(0, 3, 1, 2) for task in names},
            weights.unflatten(2, size).permute(0, 1, 4, 5, 2, 3),
        )


def _stack_tasks(features: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Maps of each task `(B, C, h, w)` as one tensor `(B, T, C, h, w)`, and as parts of it, in their memory format."""
    stacked = torch.cat(list(features.values())).unflatten(0, (len(features), -1)).transpose(0, 1)
    return dict(zip(features, stacked.unbind(1))), stacked


class DeGMixForMultiTaskDensePrediction(DeGMixPreTrainedModel):
    """DeGMix with a head per task: one image in, one map per task out."""

    # `Trainer` takes the `**kwargs` of `forward` for a promise to divide by its `num_items_in_batch`.
    accepts_loss_kwargs = False

    def __init__(self, config: DeGMixConfig):
        super().__init__(config)
        self.model = DeGMixModel(config)
        self.heads = nn.ModuleDict({name: self.build_head(name) for name in config.tasks})
        self.post_init()

    def build_head(self, task: str) -> DeGMixHead:
        head_hidden_size = self.config.head_hidden_size or sum(self.model.backbone.channels) // 8
        return DeGMixHead(self.config, head_hidden_size, self.config.tasks[task]["num_labels"])

    def add_task(self, name: str, task: dict[str, Any], train_only_new: bool = True):
        """Gives the model a further task, with a mixer, a task query attention and a head of its own.

        The new task attends to all tasks, unless its `attends_to` says otherwise, and none of the others attends to
        it: their outputs stay the same to the last bit. The image processor needs to know too:
        `DeGMixImageProcessor.from_pretrained(path, tasks=model.config.tasks)`.

        Args:
            name: of the task.
            task: its fields, see [`DeGMixConfig`].
            train_only_new: whether everything else is frozen. A training on labels of the new task alone then leaves
                the other tasks' outputs as they are; `num_parameters(only_trainable=True)` counts what it trains.
                Of several new tasks that are to be trained together, only the first is added with `True`.

        Raises:
            ValueError: there is such a task, or a field has a value that is not allowed. The model is as it was.
        """
        config = self.config
        if name in config.tasks:
            raise ValueError(f"the model has a task {name!r}; its tasks are {list(config.tasks)}")
        closed = {other: {**fields, "attends_to": config.attended(other)} for other, fields in config.tasks.items()}
        config.tasks = complete_fields({**closed, name: task})
        if train_only_new:
            self.requires_grad_(False)
        new: list[nn.Module] = [DeGMixMixer(config), self.build_head(name), DeGMixAttention(config)]
        for modules, module in zip(self.task_modules(), new):
            module.apply(self._initialize_weights)
            modules[name] = module.to(self.device, self.dtype)
        self.train(self.training)

    def remove_task(self, name: str, keep_outputs: bool = True):
        """Takes a task from the model, with its mixer, task query attention and head.

        Args:
            name: of the task.
            keep_outputs: whether to refuse what would change the outputs of other tasks: that a task goes to which
                they attend. Outputs of tasks that do not attend to it stay the same to the last bit.

        Raises:
            ValueError: there is no such task or no other, or others attend to it and are to keep their outputs. The
                model is as it was.
        """
        config = self.config
        if name not in config.tasks:
            raise ValueError(f"the model has no task {name!r}; its tasks are {list(config.tasks)}")
        others = {other: config.attended(other) for other in config.tasks if other != name}
        dependent = [other for other, attended in others.items() if name in attended]
        if dependent and keep_outputs:
            raise ValueError(
                f"the tasks {dependent} attend to {name!r}, and their outputs would change without it; "
                "`keep_outputs=False` allows that"
            )
        config.tasks = complete_fields(
            {
                other: {**config.tasks[other], "attends_to": [task for task in attended if task != name]}
                for other, attended in others.items()
            }
        )
        for modules in self.task_modules():
            del modules[name]

    def task_modules(self) -> list[nn.ModuleDict]:
        """The modules that hold a part of each task."""
        modules = [self.model.mixers, self.heads]
        return [*modules, self.model.query.attentions] if self.config.use_decoder else modules

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: dict[str, Tensor] | None = None,
        pixel_counts: dict[str, Tensor] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> DeGMixDensePredictionOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
                Normalised images, at least 32 x 32, any size above.
            labels (`dict[str, torch.Tensor]`, *optional*):
                Ground truth of any of the tasks at the size of `pixel_values`, 255 = ignored pixel:
                `(batch_size, height, width)`, class ids for segmentation and saliency (0, 1), metres for depth,
                values in [0, 1] for boundaries; `(batch_size, 3, height, width)`, unit vectors, for normals.
            pixel_counts (`dict[str, torch.Tensor]`, *optional*):
                Where the images are part of a batch (gradient accumulation, several processes):
                [`~loss_degmix.count_pixels`] of the labels of all parts, with which the losses of the parts add up to
                that of the batch.
            output_hidden_states (`bool`, *optional*): whether to return the maps between the blocks.
            output_attentions (`bool`, *optional*): whether to return the task queries' attention over tasks.

        Raises:
            ValueError: images are smaller than 32 x 32, or labels are empty, of unknown tasks or of another size.

        Example:

        ```python
        >>> inputs = AutoImageProcessor.from_pretrained(path)(image, return_tensors="pt")
        >>> outputs = AutoModel.from_pretrained(path)(**inputs)
        >>> {task: tuple(logits.shape) for task, logits in outputs.logits.items()}
        ```
        """
        outputs = self.model(pixel_values, output_hidden_states, output_attentions, return_dict=True)
        size, device = pixel_values.shape[-2:], pixel_values.device
        logits = {task: head(outputs.task_features[task]).to(device) for task, head in self.heads.items()}
        logits = {
            task: F.interpolate(x, size=size, mode="bilinear", align_corners=False) for task, x in logits.items()
        }
        loss, losses = (
            (None, None) if labels is None else multi_task_loss(logits, labels, self.config.tasks, pixel_counts)
        )
        return DeGMixDensePredictionOutput(
            loss=loss,
            losses=losses,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = ["DeGMixForMultiTaskDensePrediction", "DeGMixModel", "DeGMixPreTrainedModel"]
