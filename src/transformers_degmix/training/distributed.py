"""Batch norm over all processes, on the CPU too."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules.batchnorm import _BatchNorm


class SumOverProcesses(Function):
    """The sum of a tensor over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, inputs: Tensor) -> Tensor:
        total = inputs.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        torch.distributed.all_reduce(gradient)
        return gradient


class CpuSyncBatchNorm(_BatchNorm):
    """`nn.SyncBatchNorm` for CPUs, which PyTorch's does not support: mean and variance are over all processes.

    Slow: three exchanges forward and two backward. It makes runs without a GPU equal to runs with one.
    """

    # Not None, as they can be in the base class.
    num_batches_tracked: Tensor
    running_mean: Tensor
    running_var: Tensor
    momentum: float

    def _check_input_dim(self, _):
        """Any number of dimensions is right."""

    def forward(self, inputs: Tensor) -> Tensor:
        """`(B, C, ...)` -> `(B, C, ...)` of the same dtype; any B and any further dimensions in each process."""
        if not self.training:
            return super().forward(inputs)
        others, by_channel = [0, *range(2, inputs.ndim)], (-1, *[1] * (inputs.ndim - 2))
        dtype, inputs = inputs.dtype, inputs.to(self.weight.dtype)  # autocast gives fewer bits
        count = SumOverProcesses.apply(inputs.new_tensor(inputs.numel() / inputs.shape[1]))
        mean = SumOverProcesses.apply(inputs.sum(dim=others)) / count
        centred = inputs - mean.view(by_channel)
        variance = SumOverProcesses.apply(centred.square().sum(dim=others)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return torch.addcmul(self.bias.view(by_channel), centred, scale.view(by_channel)).to(dtype)


def convert_sync_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """The module with all batch norms in it changed to work over all processes; their weights stay.

    Raises:
        ValueError: one is of a class of its own, of which nobody knows what else it does.
    """
    for name, child in module.named_modules():
        if not isinstance(child, _BatchNorm):
            continue
        kind = type(child)
        if kind.__name__ == "BatchNormAct2d":  # of timm
            child.register_forward_hook(_activate)
        elif kind not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            raise ValueError(
                f"{name!r} is a {kind.__name__}, a batch norm that cannot work over several processes: train in one "
                "process, or choose another backbone"
            )
        child.__class__ = CpuSyncBatchNorm if device.type == "cpu" else nn.SyncBatchNorm
        child.process_group = None  # type: ignore[assignment]  # all, for `SyncBatchNorm`
    return module


def _activate(norm: Any, _, outputs: Tensor) -> Tensor:
    """What timm's `BatchNormAct2d` does after the batch norm."""
    return norm.act(norm.drop(outputs))
