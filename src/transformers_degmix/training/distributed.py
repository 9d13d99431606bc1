"""Batch norm over all processes, on the CPU too."""

import torch
from torch import Tensor, nn
from torch.autograd import Function


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


class CpuSyncBatchNorm(nn.BatchNorm2d):
    """`nn.SyncBatchNorm` for CPUs, which PyTorch's does not support: mean and variance are over all processes.

    Slow: three exchanges forward and two backward. It makes runs without a GPU equal to runs with one.
    """

    # Not None, as they can be in the base class.
    num_batches_tracked: Tensor
    running_mean: Tensor
    running_var: Tensor
    momentum: float

    def forward(self, inputs: Tensor) -> Tensor:
        """`(B, C, h, w)` -> `(B, C, h, w)` of the same dtype; any B, h and w in each process."""
        if not self.training:
            return super().forward(inputs)
        dtype, inputs = inputs.dtype, inputs.to(self.weight.dtype)  # autocast gives fewer bits
        count = SumOverProcesses.apply(inputs.new_tensor(inputs.numel() / inputs.shape[1]))
        mean = SumOverProcesses.apply(inputs.sum(dim=(0, 2, 3))) / count
        centred = inputs - mean.view(-1, 1, 1)
        variance = SumOverProcesses.apply(centred.square().sum(dim=(0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return torch.addcmul(self.bias.view(-1, 1, 1), centred, scale.view(-1, 1, 1)).to(dtype)


def convert_sync_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """The module with all `BatchNorm2d` in it changed to work over all processes; their weights stay."""
    if device.type != "cpu":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for child in module.modules():
        if type(child) is nn.BatchNorm2d:
            child.__class__ = CpuSyncBatchNorm
    return module
