"""Models small enough for tests: any backbone, any tasks, every parameter of influence."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import ConvNextV2Config, Dinov2Config, PreTrainedModel, ResNetConfig, SwinConfig

from transformers_degmix import (
    DeGMixConfig,
    DeGMixForMultiTaskDensePrediction,
    DeGMixImageProcessorPil,
    EfficientNetLiteConfig,
)
from transformers_degmix.hub.model_directory import save_model_directory


STAGES = ["stage1", "stage2", "stage3", "stage4"]

BACKBONES = {
    "swin": SwinConfig(embed_dim=8, depths=[1, 1, 2, 1], num_heads=[1, 1, 2, 2], out_features=STAGES),
    "convnextv2": ConvNextV2Config(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=STAGES),
    "resnet": ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=STAGES,
    ),
    "dinov2": Dinov2Config(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        mlp_ratio=2,
        patch_size=14,
        image_size=56,
        out_features=STAGES,
        reshape_hidden_states=True,
    ),
    "efficientnet_lite": EfficientNetLiteConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8, 12, 12, 16], depths=[1, 2, 1, 1, 1, 1, 1], out_features=STAGES
    ),
}

ALL_KINDS = {
    "semseg": {"kind": "segmentation", "num_labels": 5, "id2label": {i: f"class {i}" for i in range(5)}},
    "human_parts": {"kind": "segmentation", "num_labels": 3, "loss_weight": 2.0},
    "sal": {"kind": "saliency"},
    "depth": {"kind": "depth"},
    "normals": {"kind": "normals"},
    "edge": {"kind": "boundary", "pos_weight": 0.8},
}


def small_config(**fields) -> DeGMixConfig:
    defaults = {
        "backbone_config": BACKBONES["swin"],
        "tasks": ALL_KINDS,
        "hidden_size": 16,
        "gating_intermediate_size": 12,
    }
    # A copy: models change their backbone's configuration, which all tests share.
    return DeGMixConfig(**copy.deepcopy({**defaults, **fields}))


def small_model(seed: int = 0, **fields) -> DeGMixForMultiTaskDensePrediction:
    """A model in eval mode whose parameters and statistics are random, those that start at zero included."""
    return randomize(DeGMixForMultiTaskDensePrediction(small_config(**fields)).eval(), seed)


def save_small_model(path: Path, **fields) -> Path:
    """A directory of a [`small_model`] and its image processor."""
    model = small_model(**fields)
    save_model_directory(path, model, DeGMixImageProcessorPil(tasks=model.config.tasks))
    return path


def save_small_onnx(path: Path, **metadata: Any) -> Path:
    """A file like those of `export_onnx`, whose normals are the pixels. `None` leaves metadata out."""
    import onnx
    from onnx import TensorProto, helper

    shape = ["batch", 3, "height", "width"]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("pixel_values", "normals")]
    nodes = [helper.make_node("Identity", ["pixel_values"], ["normals"])]
    graph = helper.make_graph(nodes, "pixels", values[:1], values[1:])
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 18)])
    tasks = [{"name": "normals", "kind": "normals"}]
    properties = {"tasks": tasks, "preprocessor": {"size_divisor": 32}, "parameters": 0, **metadata}
    written = {name: json.dumps(value) for name, value in properties.items() if value is not None}
    helper.set_model_props(model, written)
    onnx.save(model, path)
    return path


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """The same model with random parameters and statistics, which leave values between its layers in proportion."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if not parameter.is_floating_point():
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("running_var") or (parameter.ndim == 1 and name.endswith("weight")):
                parameter.copy_(1 + 0.3 * noise.clamp(-2, 2))
            elif parameter.ndim > 1:
                scale = 0.1 if "_offsets" in name else 1.0
                parameter.copy_(scale * noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.1 * noise)
    return model


def random_labels(tasks: dict, batch_size: int, height: int, width: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Labels of every task in range, about a fifth of the pixels ignored."""
    generator = torch.Generator().manual_seed(seed)
    labels = {}
    for name, task in tasks.items():
        shape = (batch_size, height, width)
        if task["kind"] in ("segmentation", "saliency"):
            num_labels = task.get("num_labels", 2)
            label = torch.randint(num_labels, shape, generator=generator)
        elif task["kind"] == "normals":
            label = torch.nn.functional.normalize(
                torch.randn(batch_size, 3, height, width, generator=generator), dim=1
            )
        else:
            label = torch.rand(shape, generator=generator)
        ignored = torch.rand(shape, generator=generator) < 0.2
        label[ignored.unsqueeze(1).expand_as(label) if label.ndim == 4 else ignored] = 255
        labels[name] = label
    return labels


def enable_checkpointing(model: PreTrainedModel, use_reentrant: bool | None = None):
    """Gradient checkpointing, under either of the names that it has in the supported range of Transformers."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(None if use_reentrant is None else {"use_reentrant": use_reentrant})
