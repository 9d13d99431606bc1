"""Centred padding, and convolutions that are faster or more exact than PyTorch's own and otherwise the same."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .tasks import Maps


class DeGMixPointwiseConv(nn.Conv2d):
    """A 1 x 1 convolution as a matrix product, whose backward pass is faster than PyTorch's convolution on a CPU."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(B, c, h, w)` -> `(B, c', h, w)`."""
        weight = self.weight.flatten(1).expand(hidden_states.shape[0], -1, -1)
        pixels = hidden_states.flatten(2)
        product = weight @ pixels if self.bias is None else torch.baddbmm(self.bias[:, None], weight, pixels)
        return product.unflatten(2, hidden_states.shape[-2:])


class DeGMixOffsetConv(nn.Conv2d):
    """A convolution in float32 (float64 for float64 inputs), under autocast and with half-precision weights too.

    Positions and offsets are as large as the map: half precision would round them to half pixels and more.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(B, c, h, w)` -> `(B, c', h, w)`."""
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        # The meta device has no autocast.
        with nullcontext() if hidden_states.is_meta else torch.autocast(hidden_states.device.type, enabled=False):
            return self._conv_forward(hidden_states.to(dtype), self.weight.to(dtype), bias)


def pad_centred(maps: Tensor, size: Sequence[int], value: float = 0) -> Tensor:
    """Pads `(..., height, width)` to `size`, the odd pixel at the bottom and at the right."""
    vertical, horizontal = (outer - inner for outer, inner in zip(size, maps.shape[-2:]))
    top, left = vertical // 2, horizontal // 2
    return F.pad(maps, (left, horizontal - left, top, vertical - top), value=value)


def crop_centred(maps: Maps, size: Sequence[int]) -> Maps:
    """Undoes [`pad_centred`]: `(..., height, width)` -> `(..., *size)`."""
    top, left = ((outer - inner) // 2 for outer, inner in zip(maps.shape[-2:], size))
    return maps[..., top : top + size[0], left : left + size[1]]
