"""DeGMix as the paper's figures draw it, slow and plain: the oracle for the fast formulation of `modeling_degmix.py`.

Everything after the backbone, computed from a model's own parameters: maps are upsampled before they are projected,
tokens go through `nn.MultiheadAttention`, tasks are a loop. The model's speed is measured against it, by
`scripts/benchmarks/speed.py`.
"""

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def textbook_forward(model, pixel_values: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Logits of each task and query attention `(B, T, heads, T, h, w)` of a `DeGMixForMultiTaskDensePrediction`."""
    return textbook_head(model, model.model.backbone(pixel_values).feature_maps, pixel_values.shape[-2:])


def textbook_head(model, maps: tuple[Tensor, ...], image_size: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
    """`textbook_forward` from the backbone's maps on."""
    base, config = model.model, model.config
    size = maps[0].shape[-2:]
    fused = torch.cat([F.interpolate(m, size=size, mode="bilinear", align_corners=False) for m in maps], dim=1)
    weight = torch.cat([projection.weight.flatten(1) for projection in base.fusion.projections], dim=1)
    fused = F.linear(fused.permute(0, 2, 3, 1), weight, base.fusion.projections[0].bias)
    fused = base.fusion.norm(fused).permute(0, 3, 1, 2)

    tokens = []
    for mixer in base.mixers.values():
        x = fused
        for block in mixer:
            y = block.channel_norm(F.gelu(block.channel_mixing(x)))
            x = y + block.spatial_norm(F.gelu(deformable(block.spatial_mixing, y, config.offset_position)))
        tokens.append(x.flatten(2).transpose(1, 2))  # (B, N, C)

    interaction = interact(base.interaction, tokens, config, size)
    num_tasks, (batch_size, num_pixels, channels) = len(tokens), tokens[0].shape
    logits, attentions = {}, []
    for task, x in zip(config.tasks, tokens):
        attention = base.query.attentions[task]
        query = x.reshape(1, batch_size * num_pixels, channels)
        context = torch.stack(interaction).reshape(num_tasks, batch_size * num_pixels, channels)
        mask = hidden_tasks(config, x.device)[[list(config.tasks).index(task)]]
        answer, weights = multi_head(attention)(query, context, context, attn_mask=mask, average_attn_weights=False)
        attentions.append(weights.view(batch_size, *size, config.num_attention_heads, num_tasks))
        x = x + attention.norm(attention.linear(answer.view(x.shape)))
        if config.use_gating:
            gating = base.gating
            u, v = F.gelu(gating.fc1(gating.norm(x))).split(config.gating_intermediate_size // 2, dim=-1)
            x = x + gating.fc2(u * (gating.gate_norm(v) @ gating.gate.weight.T + gating.gate.bias))
        head = model.heads[task]
        features = x.transpose(1, 2).view(batch_size, channels, *size)
        predicted = head.classifier(F.relu(head.norm(head.conv(features))))
        logits[task] = F.interpolate(predicted, size=image_size, mode="bilinear", align_corners=False)
    return logits, torch.stack(attentions, dim=1).permute(0, 1, 4, 5, 2, 3)


def interact(block, tokens: list[Tensor], config, size) -> list[Tensor]:
    """The task interaction block on a list of `(B, N, C)`."""
    attention = multi_head(block.attention)
    batch_size, num_pixels, channels = tokens[0].shape
    if config.interaction_scope == "image":
        r = config.interaction_reduction
        maps = [x.transpose(1, 2).view(batch_size, channels, *size) for x in tokens]
        cells = [
            torch.stack(
                [
                    m[:, :, i : i + r, j : j + r].mean(dim=(2, 3))
                    for i in range(0, size[0], r)
                    for j in range(0, size[1], r)
                ]
            )
            for m in maps
        ]
        query, context = torch.cat(tokens, dim=1).transpose(0, 1), torch.cat(cells)
        mask = (
            hidden_tasks(config, context.device).repeat_interleave(num_pixels, 0).repeat_interleave(len(cells[0]), 1)
        )
        mixed = attention(query, context, context, attn_mask=mask)[0].transpose(0, 1).chunk(len(tokens), dim=1)
    elif config.interaction_scope == "task":
        sequence = torch.stack(tokens).flatten(1, 2)
        mixed = attention(sequence, sequence, sequence, attn_mask=hidden_tasks(config, sequence.device))[0]
        mixed = mixed.view(len(tokens), *tokens[0].shape)
    else:
        sequence = torch.stack(tokens).view(1, -1, channels)
        mixed = attention(sequence, sequence, sequence)[0].view(len(tokens), *tokens[0].shape)
    return [block.attention.norm(block.attention.linear(x)) for x in mixed]


def hidden_tasks(config, device: torch.device) -> Tensor:
    """`(T, T)`, True where the task of the row does not attend to that of the column."""
    return torch.tensor(
        [[other not in config.attended(task) for other in config.tasks] for task in config.tasks], device=device
    )


def multi_head(attention) -> nn.MultiheadAttention:
    """`nn.MultiheadAttention` over sequences (length, batch, C) with the parameters of a `DeGMixAttention`."""
    module = nn.MultiheadAttention(attention.out_proj.in_features, attention.num_heads)
    module.in_proj_weight, module.in_proj_bias = attention.in_proj.weight, attention.in_proj.bias
    module.out_proj.weight, module.out_proj.bias = attention.out_proj.weight, attention.out_proj.bias
    return module


def deformable(module, y: Tensor, offset_position: str) -> Tensor:
    """The deformable part of a mixer block."""
    height, width = y.shape[-2:]
    rows, columns = torch.meshgrid(torch.arange(height).to(y), torch.arange(width).to(y), indexing="ij")
    seen = {
        "absolute": (rows + 1, columns + 1),
        "normalized": ((rows + 0.5) / height * 2 - 1, (columns + 0.5) / width * 2 - 1),
        "none": (0 * rows, 0 * columns),
    }[offset_position]
    points = [k // 3 - 1 + seen[0] for k in range(9)] + [k % 3 - 1 + seen[1] for k in range(9)]
    offsets = module.channel_offsets(module.point_offsets(y) + torch.stack(points))
    sampled = sample_channels(y, rows + offsets[:, 1::2], columns + offsets[:, 0::2])
    return module.projection(sampled)


def sample_channels(y: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Every channel of `(B, C, h, w)` at its own positions, `(B, C, h, w)` each; zero outside."""
    height, width = y.shape[-2:]
    grid = torch.stack(((2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1), dim=-1)
    sampled = F.grid_sample(y.flatten(0, 1).unsqueeze(1), grid.flatten(0, 1), align_corners=False)
    return sampled.view(y.shape)


def sample_channels_one_by_one(y: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """`sample_channels` as its definition, a sum over the pixels around each position."""
    sampled = torch.zeros_like(rows)
    for b, c, i, j in itertools.product(*map(range, y.shape)):
        row, column = rows[b, c, i, j], columns[b, c, i, j]
        top, left = math.floor(row), math.floor(column)
        for m, n in itertools.product((top, top + 1), (left, left + 1)):
            if 0 <= m < y.shape[2] and 0 <= n < y.shape[3]:
                sampled[b, c, i, j] += (1 - (row - m).abs()) * (1 - (column - n).abs()) * y[b, c, m, n]
    return sampled
