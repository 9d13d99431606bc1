"""DeGMix as the paper's figures draw it, slow and plain: the oracle for the fast formulation of `modeling_degmix.py`.

Everything after the backbone, computed from a model's own parameters: maps are upsampled before they are projected,
tokens go through `nn.MultiheadAttention`, and the deformable convolution is a loop over channels and pixels.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def textbook_forward(model, pixel_values: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Logits of each task and query attention `(B, T, heads, T, h, w)` of a `DeGMixForMultiTaskDensePrediction`."""
    base, config = model.model, model.config
    maps = base.backbone(pixel_values).feature_maps
    size = maps[0].shape[-2:]
    fused = torch.cat([F.interpolate(m, size=size, mode="bilinear", align_corners=False) for m in maps], dim=1)
    fused = base.fusion.norm(base.fusion.projection(fused.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)

    tokens = []
    for mixer in base.mixers.values():
        x = fused
        for block in mixer:
            y = block.channel_norm(F.gelu(block.channel_mixing(x)))
            x = y + block.spatial_norm(F.gelu(deformable(block.spatial_mixing, y)))
        tokens.append(x.flatten(2).transpose(1, 2))  # (B, N, C)

    interaction = interact(base.interaction, tokens, config, size)
    num_tasks, (batch_size, num_pixels, channels) = len(tokens), tokens[0].shape
    logits, attentions = {}, []
    for task, x in zip(config.tasks, tokens):
        attention = base.query.attentions[task]
        query = x.reshape(1, batch_size * num_pixels, channels)
        context = torch.stack(interaction).reshape(num_tasks, batch_size * num_pixels, channels)
        answer, weights = multi_head(attention)(query, context, context, average_attn_weights=False)
        attentions.append(weights.view(batch_size, *size, config.num_attention_heads, num_tasks))
        x = x + attention.norm(attention.linear(answer.view(x.shape)))
        if config.use_gating:
            gating = base.gating
            u, v = F.gelu(gating.fc1(gating.norm(x))).split(config.gating_intermediate_size // 2, dim=-1)
            x = x + gating.fc2(u * (gating.gate_norm(v) @ gating.gate.weight.T + gating.gate.bias))
        head = model.heads[task]
        features = x.transpose(1, 2).view(batch_size, channels, *size)
        predicted = head.classifier(F.relu(head.norm(head.conv(features))))
        logits[task] = F.interpolate(predicted, size=pixel_values.shape[-2:], mode="bilinear", align_corners=False)
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
        mixed = attention(query, context, context)[0].transpose(0, 1).chunk(len(tokens), dim=1)
    elif config.interaction_scope == "task":
        sequence = torch.stack(tokens).flatten(1, 2)
        mixed = attention(sequence, sequence, sequence)[0].view(len(tokens), *tokens[0].shape)
    else:
        sequence = torch.stack(tokens).view(1, -1, channels)
        mixed = attention(sequence, sequence, sequence)[0].view(len(tokens), *tokens[0].shape)
    return [block.attention.norm(block.attention.linear(x)) for x in mixed]


def multi_head(attention) -> nn.MultiheadAttention:
    """`nn.MultiheadAttention` over sequences (length, batch, C) with the parameters of a `DeGMixAttention`."""
    module = nn.MultiheadAttention(attention.out_proj.in_features, attention.num_heads)
    module.in_proj_weight, module.in_proj_bias = attention.in_proj.weight, attention.in_proj.bias
    module.out_proj.weight, module.out_proj.bias = attention.out_proj.weight, attention.out_proj.bias
    return module


def deformable(module, y: Tensor) -> Tensor:
    """The deformable part of a mixer block, one sample at a time."""
    batch_size, channels, height, width = y.shape
    p = module.point_offsets(y)
    position = torch.zeros_like(p[0])
    for k in range(9):
        for row in range(height):
            for column in range(width):
                position[k, row, column] = (k // 3 - 1) + row + 1
                position[9 + k, row, column] = (k % 3 - 1) + column + 1
    offsets = module.channel_offsets(p + position)
    samples = [
        bilinear(y[b, c], row + offsets[b, 2 * c, row, column], column + offsets[b, 2 * c + 1, row, column])
        for b in range(batch_size)
        for c in range(channels)
        for row in range(height)
        for column in range(width)
    ]
    return module.projection(torch.stack(samples).view(y.shape))


def bilinear(image: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """One value of an (h, w) map at a fractional position, zero outside."""
    value = image.new_zeros(())
    top, left = math.floor(row.item()), math.floor(column.item())
    for i in (top, top + 1):
        for j in (left, left + 1):
            if 0 <= i < image.shape[0] and 0 <= j < image.shape[1]:
                value = value + (1 - (row - i).abs()) * (1 - (column - j).abs()) * image[i, j]
    return value
