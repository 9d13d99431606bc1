"""What the backward pass computes a second time instead of keeping it, to save memory."""

import weakref
from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def _is_transformed() -> bool:
    """Whether a transform of `torch.func` is active. Transforms do not allow hooks on saved tensors."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _may_recompute() -> bool:
    """Whether we decide what is kept. Captured graphs decide it themselves."""
    return not torch.compiler.is_compiling() and not _is_transformed()


def outside_transforms(checkpoint_function: Callable) -> Callable:
    """Wraps a function like `torch.utils.checkpoint.checkpoint`: inside `torch.func` transforms, it just calls."""

    @wraps(checkpoint_function)
    def call(function: Callable, *args):
        return function(*args) if _is_transformed() else checkpoint_function(function, *args)

    return call


def recomputed(module: nn.Module, inputs: Tensor) -> Tensor:
    """`module(inputs)`. Only the inputs are kept for the backward pass. The module must be deterministic."""
    if not _may_recompute():
        return module(inputs)
    return checkpoint(module, inputs, use_reentrant=False, preserve_rng_state=False)


def gelu_and_norm(inputs: Tensor, norm: nn.Module) -> Tensor:
    """`norm(F.gelu(inputs))`. The backward pass recomputes the GELU, which is not kept.

    Checkpointing both would count the batch twice in a BatchNorm.
    """
    activated = F.gelu(inputs)
    if not _may_recompute():
        return norm(activated)
    reference = weakref.ref(activated)  # the hooks live as long as the graph, and would keep it
    with torch.autograd.graph.saved_tensors_hooks(
        lambda saved: None if saved is reference() else saved,
        lambda saved: F.gelu(inputs) if saved is None else saved,
    ):
        return norm(activated)
