"""PyTorch DeGMix model: shared backbone, deformable mixers per task, task-aware gating transformer, heads per task.

Shapes: B images, T tasks, C = `config.hidden_size` channels, h x w the size of the backbone's first map, N = h * w.
Maps are of the padded image, see `DeGMixConfig.size_divisor`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .backbone_degmix import build_backbone, extract_feature_maps, find_unread_parameters
from .configuration_degmix import DeGMixConfig
from .growth_degmix import GrowingTasksMixin
from .layers_degmix import DeGMixOffsetConv, DeGMixPointwiseConv, crop_centred
from .loss_degmix import multi_task_loss
from .recomputation_degmix import gelu_and_norm, outside_transforms, recomputed


@dataclass
class DeGMixModelOutput(ModelOutput):
    """Output of [`DeGMixModel`].

    Args:
        fused_features (`torch.Tensor` of shape `(batch_size, hidden_size, h, w)`):
            The backbone's maps fused at the resolution of the first.
        task_features (`dict[str, torch.Tensor]`, each of shape `(batch_size, hidden_size, h, w)`):
            Features of each task after the decoder.
        hidden_states (`tuple[torch.Tensor]`, *optional*, with `output_hidden_states`):
            The backbone's feature maps, then the fused features, then the features of all tasks,
            `(batch_size, num_tasks, hidden_size, h, w)`, after the mixers and after the decoder. `None` in place of
            maps that were not asked for.
        attentions (`tuple[torch.Tensor]`, *optional*, with `output_attentions=True`):
            One tensor `(batch_size, num_tasks, num_attention_heads, num_tasks, h, w)`: how much the query of a task
            (second axis) takes from each task (fourth axis, sums to 1, 0 for tasks that it does not attend to) at each
            pixel. `None` without decoder.
    """

    fused_features: Tensor | None = None
    task_features: dict[str, Tensor] | None = None
    hidden_states: tuple[Tensor | None, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class DeGMixDensePredictionOutput(ModelOutput):
    """Output of [`DeGMixForMultiTaskDensePrediction`].

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
    logits: dict[str, Tensor] = None  # type: ignore[assignment]
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class DeGMixFeatureFusion(nn.Module):
    """Concatenation of all backbone maps at the first one's size, Linear and LayerNorm per pixel.

    The linear map commutes with bilinear upsampling. Each map is therefore projected at its own resolution, by a
    convolution that holds its columns of the linear map, then upsampled and added.
    """

    def __init__(self, config: DeGMixConfig, channels: list[int]):
        super().__init__()
        self.projections = nn.ModuleList(
            nn.Conv2d(num_channels, config.hidden_size, 1, bias=level == 0)
            for level, num_channels in enumerate(channels)
        )
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, feature_maps: tuple[Tensor, ...]) -> Tensor:
        """Maps `(B, c_i, h_i, w_i)` -> `(B, C, h, w)`."""
        first, *others = (projection(x) for projection, x in zip(self.projections, feature_maps))
        for x in others:
            first = first + F.interpolate(x, size=first.shape[-2:], mode="bilinear", align_corners=False)
        return self.norm(first.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


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
        self.point_offsets = DeGMixOffsetConv(channels, 2 * points, self.KERNEL_SIZE, padding=1)
        self.channel_offsets = DeGMixOffsetConv(2 * points, 2 * channels, self.KERNEL_SIZE, padding=1, groups=2)
        self.projection = DeGMixPointwiseConv(channels, channels, 1)

    def sampling_grid(self, hidden_states: Tensor) -> Tensor:
        """`(B, C, h, w)` -> where channels are sampled, `(B, C, h, w, 2)`, (x, y) in [-1, 1] as in `F.grid_sample`."""
        height, width = hidden_states.shape[-2:]
        points = self.point_offsets(hidden_states)
        columns, rows = (torch.arange(n).to(points) for n in (width, height))
        columns, rows = columns.expand(height, -1), rows[:, None].expand(-1, width)
        centres = torch.stack(((2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1))
        column_position, row_position = {
            "absolute": torch.stack((columns + 1, rows + 1)),
            "normalized": centres,
            "none": torch.zeros_like(centres),
        }[self.offset_position]
        steps = torch.arange(self.KERNEL_SIZE).to(points) - self.KERNEL_SIZE // 2
        # nine row steps (-1 -1 -1 0 0 0 1 1 1) and nine column steps (-1 0 1 -1 0 1 ...)
        row_points = row_position + steps.repeat_interleave(self.KERNEL_SIZE).view(-1, 1, 1)
        column_points = column_position + steps.repeat(self.KERNEL_SIZE).view(-1, 1, 1)
        points = points + torch.cat((row_points, column_points))
        # In pixels (x, y); `F.grid_sample` counts from -1 to 1.
        offsets = self.channel_offsets(points).unflatten(1, (-1, 2))
        scale = 2 / torch.tensor([width, height]).to(offsets)
        return torch.addcmul(centres, offsets, scale.view(2, 1, 1)).permute(0, 1, 3, 4, 2)

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

    Gradient checkpointing recomputes the deformable part only: a recomputed BatchNorm would count its batch twice.
    """

    def __init__(self, config: DeGMixConfig):
        super().__init__()
        self.channel_mixing = DeGMixPointwiseConv(config.hidden_size, config.hidden_size, 1)
        self.channel_norm = nn.BatchNorm2d(config.hidden_size)
        self.spatial_mixing = DeGMixDeformableConv(config)
        self.spatial_norm = nn.BatchNorm2d(config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(B, C, h, w)` -> `(B, C, h, w)`."""
        hidden_states = gelu_and_norm(self.channel_mixing(hidden_states), self.channel_norm)
        return hidden_states + gelu_and_norm(self.spatial_mixing(hidden_states), self.spatial_norm)


class DeGMixMixer(nn.Sequential):
    """Deformable mixer encoder of one task."""

    def __init__(self, config: DeGMixConfig):
        super().__init__(*(DeGMixMixerLayer(config) for _ in range(config.num_mixer_layers)))


def _linear_part(layer: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs `(n, c')` of a layer without its bias, for inputs `(n, c)`, and the bias `(c')`, its output for zero.

    The layer is called, its weights are not read, so that adapters, quantisers and offloading keep working.
    """
    outputs = layer(torch.cat((inputs, torch.zeros_like(inputs[:1]))))
    return outputs[:-1] - outputs[-1], outputs[-1]


class DeGMixAttention(nn.Module):
    """A multi-head attention, and the Linear and LayerNorm that follow it, for the few tokens of a pixel.

    With a token per task, projections of all tokens to keys and values would cost far more than the attention itself.
    All projections are linear, so they are merged into one before the softmax and one after it.

    The projections stay packed as in `nn.MultiheadAttention`: query and key of scope "token", which have no influence,
    get zero gradients instead of none, so that weight decay and distributed training treat them as the released code
    does.
    """

    def __init__(self, config: DeGMixConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.in_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.linear = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.attention_norm_eps)

    def input_projections(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Weights `(3, heads, C / heads, C)` and biases `(3, heads, C / heads)` of query, key and value.

        Args:
            like: any tensor of the inputs' type and device.
        """
        weight, bias = _linear_part(self.in_proj, torch.eye(self.in_proj.in_features).to(like))
        return weight.T.unflatten(0, (3, self.num_heads, -1)), bias.unflatten(0, (3, self.num_heads, -1))

    def merged_projections(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query and key as one, then value, output projection and Linear as one.

        A score is (Wq x + bq)^T (Wk z + bk) per head. bk adds the same to every score of a query and drops out of the
        softmax, so x can be mapped into the space of z once, instead of every z into the space of the keys. Attention
        weights sum to 1, so the tokens z can be averaged before the other projections.

        Returns:
            Weights `(heads * C, C)` and biases `(heads * C)` of the query, the softmax's scale included; weights
            `(C, heads * C)` and biases `(C)` for the averaged tokens of all heads.
        """
        (query, key, value), (query_bias, _, value_bias) = self.input_projections(like)
        scaled_key = key.mT * key.shape[1] ** -0.5
        query_weight = (scaled_key @ query).flatten(0, 1)
        query_bias = (scaled_key @ query_bias.unsqueeze(2)).flatten()

        # The values of a unit vector in one head, zero in the others; last, the values' bias
        heads = torch.eye(self.num_heads).to(value)
        values = (value.mT.unsqueeze(2) * heads[:, None, :, None]).flatten(2).flatten(0, 1)
        outputs, out_bias = _linear_part(self.out_proj, torch.cat((values, value_bias.view(1, -1))))
        outputs = torch.cat((outputs[:-1], outputs[-1:] + out_bias))
        outputs, linear_bias = _linear_part(self.linear, outputs)
        return query_weight, query_bias, outputs[:-1].T, outputs[-1] + linear_bias

    def weigh(self, query: Tensor, tokens: Tensor) -> Tensor:
        """Attention weights `(B, h, w, heads, S)` of queries `(B, h, w, heads * C)` over tokens `(B, h, w, S, C)`."""
        query = query.unflatten(-1, (self.num_heads, -1))
        if torch.compiler.is_dynamo_compiling():
            # Inductor fuses a product with its sum; it calls batches of small matrix products one by one.
            return (query.unsqueeze(-2) * tokens.unsqueeze(-3)).sum(dim=-1).softmax(dim=-1)
        return (query @ tokens.mT).softmax(dim=-1)

    def forward(self, weights: Tensor, tokens: Tensor, value_weight: Tensor, value_bias: Tensor) -> Tensor:
        """Tokens `(B, h, w, S, C)`, averaged by `weights` `(B, h, w, heads, S)` and projected: `(B, h, w, C)`."""
        if torch.compiler.is_dynamo_compiling():
            averaged = (weights.unsqueeze(-1) * tokens.unsqueeze(-3)).sum(dim=-2)
        else:
            averaged = weights.to(tokens.dtype) @ tokens
        return self.norm(F.linear(averaged.flatten(-2), value_weight, value_bias))


def _eager_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **kwargs) -> tuple[Tensor, Tensor]:
    """Attention in plain products, `(B, heads, S, C / heads)` -> `(B, S, heads, C / heads)` and its weights."""
    weights = (query @ key.mT * query.shape[-1] ** -0.5).softmax(dim=-1)
    return (weights @ value).transpose(1, 2), weights


class DeGMixTaskInteraction(GradientCheckpointingLayer):
    """Task interaction block: LayerNorm(Linear(attention)) over the tokens of all tasks, within a scope."""

    def __init__(self, config: DeGMixConfig):
        super().__init__()
        self.config = config
        self.attention = DeGMixAttention(config)

    def prepare(self, maps: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """What all pixels share, from the maps `(B, C, h, w)` of all tasks."""
        if self.config.interaction_scope == "image":
            return self.image_context(maps)
        *query_projection, weight, bias = self.attention.merged_projections(next(iter(maps.values())))
        if self.config.interaction_scope == "task":
            return *query_projection, weight, bias
        # Every head attends to the token itself, so that the heads' maps add up.
        return weight.unflatten(1, (self.attention.num_heads, -1)).sum(dim=1), bias

    def image_context(self, maps: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Weight and bias of the query, then for each task the keys and values that it attends to.

        There is a key and a value `(B, heads, S, C / heads)` for each square of `interaction_reduction` ** 2 pixels.
        """
        side, num_heads = self.config.interaction_reduction, self.attention.num_heads
        weights, biases = self.attention.input_projections(next(iter(maps.values())))
        # Squares at the right and lower border may be cut off: average what is inside.
        pooled = {task: F.avg_pool2d(x, side, ceil_mode=True).flatten(2).mT for task, x in maps.items()}
        contexts = {}
        for names in {tuple(self.config.attended(task)) for task in maps}:
            tokens = torch.cat([pooled[name] for name in names], dim=1).to(weights.device)  # where Accelerate puts it
            packed = F.linear(tokens, weights[1:].flatten(0, 2), biases[1:].flatten())
            contexts[names] = packed.unflatten(-1, (2, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        return (
            weights[0].flatten(0, 1),
            biases[0].flatten(),
            *(x for task in maps for x in contexts[tuple(self.config.attended(task))]),
        )

    def forward(self, tokens: Tensor, *prepared: Tensor) -> Tensor:
        """Tokens of all tasks in some rows `(T, B, h, w, C)`, what `prepare` returned -> interaction tokens."""
        attention = self.attention
        if self.config.interaction_scope == "token":
            return torch.stack([attention.norm(F.linear(x, *prepared)) for x in tokens])
        weight, bias, *others = prepared
        queries = [F.linear(x, weight, bias) for x in tokens]
        if self.config.interaction_scope == "task":
            contexts = (tokens[columns].movedim(0, -2) for columns in self.config.attended_columns())
            answers = [
                attention(attention.weigh(query, context), context, *others)
                for query, context in zip(queries, contexts)
            ]
        else:
            answers = [self.attend_to_image(*x) for x in zip(queries, others[::2], others[1::2])]
        return torch.stack(answers)

    def attend_to_image(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Queries `(B, h, w, C)`, keys and values `(B, heads, S, C / heads)` -> `(B, h, w, C)`."""
        attention = self.attention
        split = query.flatten(1, 2).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, _eager_attention)
        answers = attend(self, split, key, value, attention_mask=None, is_causal=False)[0]
        return attention.norm(attention.linear(attention.out_proj(answers.reshape(query.shape))))


class DeGMixTaskQuery(GradientCheckpointingLayer):
    """Task query block: each task's token asks the interaction tokens of the tasks it attends to, at its pixel.

    Tasks without an attention do not ask. In a single-task model, only its task has one.
    """

    def __init__(self, config: DeGMixConfig):
        super().__init__()
        self.config = config
        self.attentions = nn.ModuleDict({task: DeGMixAttention(config) for task in config.tasks})

    def prepare(self, maps: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """What all pixels share, from the maps `(B, C, h, w)` of all tasks: `merged_projections`, task after task."""
        return tuple(x for task in self.attentions for x in self.attentions[task].merged_projections(maps[task]))

    def forward(self, tokens: Tensor, answers: Tensor, *prepared: Tensor) -> tuple[Tensor, ...]:
        """Some rows of the map.

        Args:
            tokens: of all tasks `(T, B, h, w, C)`.
            answers: interaction tokens of all tasks `(T, B, h, w, C)`.
            prepared: what `prepare` returned.

        Returns:
            Of the tasks that ask: attention weights `(B, T, heads, T, h, w)` and the tokens of each `(B, h, w, C)`.
        """
        asking = [list(self.config.tasks).index(task) for task in self.attentions]
        attentions, columns = list(self.attentions.values()), self.config.attended_columns()
        askers, columns = [tokens[i] for i in asking], [columns[i] for i in asking]
        contexts = [answers[attended].movedim(0, -2) for attended in columns]
        weights = [
            attentions[i].weigh(F.linear(x, *prepared[4 * i : 4 * i + 2]), contexts[i]) for i, x in enumerate(askers)
        ]
        # zero for the tasks that a task does not attend to
        spread = torch.eye(len(answers)).to(weights[0])
        weights = [x if attended == slice(None) else x @ spread[attended] for x, attended in zip(weights, columns)]
        # Tokens are averaged by the weights that are returned, so that gradients pass through them.
        returned = torch.stack(weights, dim=1).permute(0, 1, 4, 5, 2, 3)
        weights = [x.permute(0, 3, 4, 1, 2)[..., attended] for x, attended in zip(returned.unbind(1), columns)]
        queried = [
            x + attentions[i](weights[i], contexts[i], *prepared[4 * i + 2 : 4 * i + 4]) for i, x in enumerate(askers)
        ]
        return returned, *queried


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
    _supports_sdpa = True  # for the backbone, and in scope "image"; other attentions are too short to gain by it
    _no_split_modules = [
        "DeGMixFeatureFusion",
        "DeGMixMixerLayer",
        "DeGMixTaskInteraction",
        "DeGMixTaskQuery",
        "DeGMixGating",
        "DeGMixHead",
    ]

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False):
        # For classes outside Transformers the base class skips modules without parameters of their own, in case
        # `_init_weights` overwrites loaded weights. Ours does not, and it initialises the parts of such modules.
        super()._initialize_weights(module)

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func=checkpoint, **kwargs):
        super()._set_gradient_checkpointing(enable, outside_transforms(gradient_checkpointing_func), **kwargs)

    def train(self, mode: bool = True):
        """As in `nn.Module`, but frozen parts, in which no parameter takes gradients, stay in eval mode.

        Otherwise training would still change the statistics of their batch norms. Parameters of the backbone that
        nothing reads never take gradients.
        """
        super().train(mode)
        # Here too, because `from_pretrained` replaces parameters before it calls this.
        self.base_model.freeze_unread_parameters()
        if mode:
            _evaluate_frozen(self)
        return self

    def load_state_dict(self, state_dict: dict[str, Tensor], strict: bool = True, assign: bool = False):
        """As in `nn.Module`, but also takes parameters under their names in files of `save_pretrained`.

        For some backbones (Swin in newer versions of Transformers) these differ, and `Trainer` hands files over as
        they are when it resumes or returns to its best model: parameters would silently keep their values. Not needed
        once the oldest supported version has https://github.com/huggingface/transformers/pull/49022, which fixes issue
        48805; 5.24 does not have it.
        """
        own = self.state_dict()
        if any(name not in own for name in state_dict):
            names = {id(tensor): name for name, tensor in own.items()}
            saved = revert_weight_conversion(self, own)
            renamed = {name: names.get(id(tensor)) for name, tensor in saved.items()}
            state_dict = {renamed.get(name) or name: tensor for name, tensor in state_dict.items()}
        return super().load_state_dict(state_dict, strict, assign)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """PyTorch's defaults, except for the attentions, offsets, gates and classifiers (released code)."""
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.reset_parameters()
        elif isinstance(module, DeGMixFeatureFusion):
            # As one linear layer over all maps
            bound = sum(projection.in_channels for projection in module.projections) ** -0.5
            for parameter in module.projections.parameters():
                init.uniform_(parameter, -bound, bound)
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


def _evaluate_frozen(module: nn.Module) -> set[bool]:
    """Puts parts whose parameters are all frozen into eval mode; returns which values `requires_grad` has."""
    found = {parameter.requires_grad for parameter in module.parameters(recurse=False)}
    found.update(*(_evaluate_frozen(child) for child in module.children()))
    if found == {False}:
        module.eval()
    return found


class DeGMixModel(DeGMixPreTrainedModel):
    """DeGMix without task heads: backbone, fusion, deformable mixer encoder, task-aware gating transformer decoder."""

    CPU_PORTION = 4096  # pixels, see `decode`
    _keys_to_ignore_on_load_unexpected = [r"^heads\."]

    def __init__(self, config: DeGMixConfig):
        super().__init__(config)
        self.backbone = build_backbone(config)
        self.fusion = DeGMixFeatureFusion(config, self.backbone.channels)
        self.mixers = nn.ModuleDict({task: DeGMixMixer(config) for task in config.tasks})
        if config.use_decoder:
            self.interaction = DeGMixTaskInteraction(config)
            self.query = DeGMixTaskQuery(config)
            self.gating = DeGMixGating(config) if config.use_gating else nn.Identity()
        self.unread_parameters = find_unread_parameters(self.backbone, config.padded_size((64, 64)))
        self.freeze_unread_parameters()
        self.post_init()

    def freeze_unread_parameters(self):
        """Freezes backbone parameters that nothing reads: distributed training would wait for their gradients."""
        for name in self.unread_parameters:
            self.backbone.get_parameter(name).requires_grad_(False)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> DeGMixModelOutput:
        """The features of all tasks.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
                Normalised images, at least 32 x 32, any size above.
            output_hidden_states (`bool`, `int` or `list[int]`, *optional*):
                Whether to return the maps between the blocks, or which of them.
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

        feature_maps = extract_feature_maps(self.backbone, pixel_values, self.config)
        fused = self.fusion(feature_maps)
        features = {task: self.mixers[task](fused).to(fused.device) for task in self.config.tasks}
        hidden_states = [*feature_maps, fused]
        if output_hidden_states:
            features, stacked = _stack_tasks(features)
            hidden_states.append(stacked)
        attentions = None
        if self.config.use_decoder:
            features, attentions = self.decode(features, output_attentions)
        if output_hidden_states:
            features, stacked = _stack_tasks(features)
            hidden_states.append(stacked)
        return DeGMixModelOutput(
            fused_features=fused,
            task_features=features,
            hidden_states=_select(hidden_states, output_hidden_states) if output_hidden_states else None,
            attentions=(attentions,) if output_attentions and attentions is not None else None,
        )

    def decode(self, features: dict[str, Tensor], output_attentions: bool) -> tuple[dict[str, Tensor], Tensor]:
        """Maps of each task `(B, C, h, w)` -> decoded maps of the same shape, and attentions `(B, T, heads, T, h, w)`.

        Only the interaction looks beyond a pixel. On a CPU, a few rows at a time therefore go through all blocks and
        stay in its cache. Captured graphs must hold for all sizes, and attentions through which gradients pass must be
        one tensor: both cases take all rows at once.
        """
        prepared = self.interaction.prepare(features), self.query.prepare(features)
        first, *_ = features.values()
        portions: Iterable[Sequence[Tensor]] = [list(features.values())]
        if (
            first.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and not (output_attentions and torch.is_grad_enabled())
        ):
            num_rows = max(1, self.CPU_PORTION // (first.shape[0] * first.shape[-1]))
            portions = zip(*(maps.split(num_rows, dim=2) for maps in features.values()))
        attentions, *decoded = zip(*(self.decode_rows(rows, *prepared) for rows in portions))
        return {task: _join(decoded.pop(0), dim=2) for task in self.query.attentions}, _join(attentions, dim=-2)

    def decode_rows(
        self, maps: Sequence[Tensor], interaction: tuple[Tensor, ...], query: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """`decode` of some rows, given what the blocks' `prepare` returned: attention weights and each task's map."""
        tokens = torch.stack([x.permute(0, 2, 3, 1) for x in maps])
        answers = self.interaction(tokens, *interaction)
        attentions, *queried = self.query(tokens, answers, *query)
        # Kept for the backward pass, results of the gating's cheap steps would take half of the decoder's memory.
        gated = (recomputed(self.gating, x) for x in queried)
        # Not channels last: convolutions of such maps have slow backward passes on a CPU.
        return attentions, *(x.permute(0, 3, 1, 2).contiguous() for x in gated)


def _join(parts: tuple[Tensor, ...], dim: int) -> Tensor:
    """Parts of a tensor along an axis -> the tensor; a single part is returned itself, not a copy."""
    return torch.cat(parts, dim=dim) if len(parts) > 1 else parts[0]


def _select(hidden_states: list[Tensor], selection: bool | int | list[int]) -> tuple[Tensor | None, ...]:
    """All hidden states, or those at some indices and `None` for the others, as in Transformers."""
    if selection is True:
        return tuple(hidden_states)
    indices = [selection] if isinstance(selection, int) else selection
    count = len(hidden_states)
    return tuple(x if i in indices or i - count in indices else None for i, x in enumerate(hidden_states))


def _stack_tasks(features: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Maps of each task `(B, C, h, w)` as parts of one tensor, in their memory format; and the tensor."""
    stacked = torch.cat(list(features.values())).unflatten(0, (len(features), -1)).transpose(0, 1)
    return dict(zip(features, stacked.unbind(1))), stacked


class DeGMixForMultiTaskDensePrediction(GrowingTasksMixin, DeGMixPreTrainedModel):
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

    def task_parts(self) -> list[tuple[nn.ModuleDict, Callable[[str], nn.Module]]]:
        """The modules that hold a part of each task, each with what builds such a part."""
        parts = [(self.model.mixers, lambda task: DeGMixMixer(self.config)), (self.heads, self.build_head)]
        if self.config.use_decoder:
            parts.append((self.model.query.attentions, lambda task: DeGMixAttention(self.config)))
        return parts

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: dict[str, Tensor] | None = None,
        pixel_counts: dict[str, Tensor] | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> DeGMixDensePredictionOutput:
        """The maps of all tasks and, with labels, the losses.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
                Normalised images, at least 32 x 32, any size above.
            labels (`dict[str, torch.Tensor]`, *optional*):
                Ground truth of any of the tasks at the size of `pixel_values`, 255 = ignored pixel:
                `(batch_size, height, width)`, class ids for segmentation and saliency (0, 1), metres for depth,
                values in [0, 1] for boundaries; `(batch_size, 3, height, width)`, unit vectors, for normals.
            pixel_counts (`dict[str, torch.Tensor]`, *optional*):
                Where the images are part of a batch (gradient accumulation, several processes):
                [`~loss_degmix.count_pixels`] of the labels of all parts. The losses of the parts then add up to the
                batch's.
            output_hidden_states (`bool`, `int` or `list[int]`, *optional*):
                Whether to return the maps between the blocks, or which of them.
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
        padded, logits = self.config.padded_size(size), {}
        for task, head in self.heads.items():
            maps = head(outputs.task_features[task]).to(device)
            logits[task] = crop_centred(F.interpolate(maps, size=padded, mode="bilinear", align_corners=False), size)
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
