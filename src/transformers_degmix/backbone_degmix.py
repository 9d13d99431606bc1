"""What a model has to know of its backbone."""

import torch
from torch import nn


def find_unread_parameters(backbone: nn.Module) -> list[str]:
    """Names of the parameters that a backbone's maps do not depend on.

    Swin ends in a LayerNorm that is not applied to the maps; stages may follow the last one that is fused.
    """
    size = getattr(backbone.config, "image_size", 64)
    height, width = (size, size) if isinstance(size, int) else size
    # Zeros in place of the weights, which may be on the meta device, and the graph of one pass, which tells all.
    with torch.device("cpu"), torch.inference_mode(False), torch.enable_grad():
        parameters = {
            name: torch.zeros((), dtype=x.dtype).expand(x.shape).requires_grad_()
            for name, x in backbone.named_parameters()
        }
        buffers = {name: torch.zeros_like(x, device="cpu") for name, x in backbone.named_buffers()}
        pixel_values = torch.zeros(1, getattr(backbone.config, "num_channels", 3), height, width)
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
