"""A model as a `torch.export` program and as an ONNX file, for batches and images of any size.

Layers round sizes up. With dynamic sizes this makes nested quotients and remainders, over which a tracer reasons for
minutes. Swin in Transformers also branches on them in Python: it pads only if there is a remainder. Here the sizes
between stages are measured when the graph runs ([`_measured`]), and Swin always pads, if only by 0.
"""

import copy
import json
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F
from transformers.models.swin.modeling_swin import SwinLayer, SwinPatchEmbeddings, SwinPatchMerging, SwinStage

from .. import DeGMixConfig, DeGMixImageProcessor
from ..files import write_whole
from ..modeling_degmix import DeGMixDensePredictionOutput, DeGMixForMultiTaskDensePrediction


# Modules of timm with paddings that depend on the size, over which a tracer reasons for hours.
_ENDLESS = ("timm.layers.conv2d_same", "timm.models.swin_transformer", "timm.models.swin_transformer_v2")

# Larger than any map, and small enough that products do not overflow.
_LARGEST = 2**20


class _Logits(nn.Module):
    """The model with a dictionary as output instead of a dataclass."""

    def __init__(self, model: DeGMixForMultiTaskDensePrediction):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return self.model(pixel_values).logits


def export_program(model: DeGMixForMultiTaskDensePrediction) -> ExportedProgram:
    """The model in eval mode, `pixel_values` -> `{task: logits}`, with dynamic batch size, height and width.

    Raises:
        ValueError: the backbone cannot be captured; the message is one line.
    """
    backbone_config: Any = model.config.backbone_config
    name = getattr(backbone_config, "backbone", backbone_config.model_type)
    endless = {type(module).__module__ for module in model.modules()}.intersection(_ENDLESS)
    if endless:
        raise ValueError(
            f"a model with timm's backbone {name!r} cannot be captured with dynamic sizes, because of the paddings in "
            f"{endless.pop()}; one with 'swin' or 'efficientnet_lite' as `model_type` can"
        )
    model = _measure_sizes(copy.deepcopy(model).float().cpu().eval())
    # neither multiples of anything nor equal, so that no coincidence is taken for a rule
    pixel_values = torch.zeros(2, 3, 263, 301)
    shapes = {"pixel_values": {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}}
    try:
        return torch.export.export(_Logits(model), (pixel_values,), dynamic_shapes=shapes)
    except Exception as error:  # of many types: what a tracer cannot follow depends on the backbone
        raise ValueError(
            f"a model with the backbone {name!r} cannot be captured with dynamic sizes: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error


def _measure_sizes(model: DeGMixForMultiTaskDensePrediction) -> DeGMixForMultiTaskDensePrediction:
    """Changes the model so that no size is traced through more than one stage."""
    model.model.backbone.register_forward_hook(_measure_feature_maps)
    for module in model.modules():
        if isinstance(module, SwinStage):
            module.register_forward_pre_hook(_measure_tokens)
        elif isinstance(module, SwinPatchEmbeddings):
            module.maybe_pad = _pad_to_patches.__get__(module)
        elif isinstance(module, SwinPatchMerging):
            module.maybe_pad = _pad_to_pairs
        elif isinstance(module, SwinLayer):
            module.maybe_pad = _pad_to_windows.__get__(module)
            # The fused kernel must know more about sizes than is known here.
            module.attention.config._attn_implementation = "eager"
    return model


def _measured(size: int) -> int:
    """The same number, as a new symbol instead of an expression."""
    measured: Any = torch.scalar_tensor(size, dtype=torch.int64).item()
    torch._check(measured >= 1)
    torch._check(measured <= _LARGEST)
    return measured


def _quotient(size: int, divisor: int) -> int:
    """Rounded up, without negative numbers, which ONNX rounds the other way."""
    return (size + divisor - 1) // divisor


def _measure_feature_maps(backbone: nn.Module, args: Any, outputs: Any) -> Any:
    feature_maps = []
    for feature_map in outputs.feature_maps:
        for dim in (2, 3):
            size = _measured(feature_map.shape[dim])
            torch._check(size <= feature_map.shape[dim])
            feature_map = feature_map.narrow(dim, 0, size)
        feature_maps.append(feature_map)
    outputs.feature_maps = tuple(feature_maps)
    return outputs


def _measure_tokens(stage: SwinStage, args: tuple) -> tuple:
    tokens, (height, width), *others = args
    height, width = _measured(height), _measured(width)
    torch._check(height * width <= tokens.shape[1])
    return tokens.narrow(1, 0, height * width), (height, width), *others


def _pad_to_patches(self: SwinPatchEmbeddings, pixel_values: Tensor, height: int, width: int) -> Tensor:
    rows, columns = (_measured(_quotient(size, patch)) for size, patch in zip((height, width), self.patch_size))
    return F.pad(pixel_values, (0, self.patch_size[1] * columns - width, 0, self.patch_size[0] * rows - height))


def _pad_to_pairs(tokens: Tensor, height: int, width: int) -> Tensor:
    return F.pad(tokens, (0, 0, 0, width % 2, 0, height % 2))


def _pad_to_windows(self: SwinLayer, tokens: Tensor, height: int, width: int) -> tuple[Tensor, tuple[int, ...]]:
    window = self.window_size
    rows, columns = _measured(_quotient(height, window)), _measured(_quotient(width, window))
    torch._check(height <= window * rows)
    torch._check(width <= window * columns)
    tokens = F.pad(tokens, (0, 0, 0, window * columns - width, 0, window * rows - height))
    # What is returned second tells the layer to crop.
    return tokens, (0, 0, 0, 1, 0, 1)


def export_onnx(
    model: DeGMixForMultiTaskDensePrediction, path: str | PathLike, processor=None, opset: int | None = None
) -> list[tuple[tuple[int, ...], dict[str, float]]]:
    """Writes the model as one ONNX file, after comparing it with PyTorch.

    Input `pixel_values` `(batch, 3, height, width)`, any sizes from 32 x 32; one output `(batch, num_labels, height,
    width)` per task, under its name. The file's metadata has, as JSON, the `tasks`, the number of `parameters` and,
    with `processor`, the preprocessing as `preprocessor`.

    Returns:
        As [`compare`].

    Raises:
        ImportError: the extra `onnx` is not installed.
        ValueError: `path` has another suffix than .onnx, the model cannot be captured, or the file does not agree with
            it. Nothing is written then.
    """
    if not str(path).endswith(".onnx"):
        raise ValueError(f"{path} must end in .onnx, by which `load_model_directory` knows such a file")
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  torch.onnx imports it late
    except ImportError as error:
        raise _missing_extra(error) from error

    model = copy.deepcopy(model).float().cpu().eval()
    config = model.config.to_dict()
    program: Any = torch.onnx.export(
        export_program(model),
        dynamo=True,
        input_names=["pixel_values"],
        output_names=list(model.config.tasks),
        opset_version=opset,
        verbose=False,
    )
    proto = program.model_proto
    metadata = {"tasks": json.dumps(config["tasks"]), "parameters": json.dumps(model.num_parameters())}
    if processor is not None:
        metadata["preprocessor"] = json.dumps(processor.to_dict())
    onnx.helper.set_model_props(proto, metadata)
    serialized = proto.SerializeToString()
    session = onnxruntime.InferenceSession(serialized, providers=["CPUExecutionProvider"])
    differences = compare(model, session)
    write_whole(Path(path), lambda file: file.write(serialized))
    return differences


# Batch size, height and width: none of them traced, one image and several, with and without remainders.
SIZES = ((1, 256, 320), (3, 64, 96), (1, 301, 270), (2, 33, 47), (1, 425, 560))


@torch.no_grad()
def compare(
    model: DeGMixForMultiTaskDensePrediction, session, tolerance: float = 1e-4
) -> list[tuple[tuple[int, ...], dict[str, float]]]:
    """For each of [`SIZES`], the largest difference of the logits of each task between onnxruntime and PyTorch.

    Differences are divided by the task's largest logit in PyTorch where that is above 1.

    Raises:
        ValueError: one exceeds `tolerance`; the message names the size and the task.
    """
    generator = torch.Generator().manual_seed(0)
    names = [output.name for output in session.get_outputs()]
    differences: list[tuple[tuple[int, ...], dict[str, float]]] = []
    for batch_size, height, width in SIZES:
        pixel_values = torch.randn(batch_size, 3, height, width, generator=generator)
        expected = model(pixel_values).logits
        actual = dict(zip(names, session.run(None, {"pixel_values": pixel_values.numpy()})))
        found = {}
        for task, logits in expected.items():
            error = (torch.from_numpy(actual[task]) - logits).abs().max() / logits.abs().max().clamp(min=1)
            if not error <= tolerance:
                raise ValueError(
                    f"the logits of {task!r} differ by {error:.2g} for images of {height} x {width} "
                    f"in a batch of {batch_size}; {tolerance:g} is allowed"
                )
            found[task] = float(error)
        differences.append(((batch_size, height, width), found))
    return differences


def quantize_onnx(path: str | PathLike, output: str | PathLike, batches: Iterable[Tensor]):
    """Writes a copy of a file of [`export_onnx`], with convolutions and matrix products in 8 bits.

    The mixers' sampling positions stay in float32: they span many pixels, and fractions of a pixel count.

    Args:
        batches: `pixel_values` of typical images, as the processor makes them. Their extremes become the ranges.

    Raises:
        ImportError: the extra `onnx` is not installed.
    """
    try:
        import onnx
        from onnxruntime.quantization import quantize_static
    except ImportError as error:
        raise _missing_extra(error) from error

    inputs = ({"pixel_values": batch.numpy()} for batch in batches)
    with TemporaryDirectory() as folder:
        quantized = Path(folder, "model.onnx")
        quantize_static(
            path,
            quantized,
            SimpleNamespace(get_next=lambda: next(inputs, None)),
            per_channel=True,
            op_types_to_quantize=["Conv", "MatMul"],
            nodes_to_exclude=_sampling_positions(onnx.load(path).graph),
        )
        serialized = quantized.read_bytes()
    write_whole(Path(output), lambda file: file.write(serialized))


def _sampling_positions(graph) -> list[str]:
    """The names of the nodes that compute sampling positions from the maps that are sampled."""
    producers = {name: node for node in graph.node for name in node.output}

    def nodes_before(tensor: str) -> set[str]:
        found, tensors = set(), [tensor]
        while tensors:
            node = producers.get(tensors.pop())
            if node is not None and node.name not in found:
                found.add(node.name)
                tensors += node.input
        return found

    samplings = [node.input for node in graph.node if node.op_type == "GridSample"]
    return sorted(set().union(*(nodes_before(positions) - nodes_before(maps) for maps, positions in samplings)))


class OnnxModel:
    """A file of [`export_onnx`] or [`quantize_onnx`], called as the model is: `pixel_values` -> `outputs.logits`.

    Raises:
        ImportError: the extra `onnx` is not installed.
        ValueError: the file is not one of these, or was written without processor.
    """

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, path: str | PathLike):
        try:
            import onnxruntime
        except ImportError as error:
            raise _missing_extra(error) from error

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        metadata = self.session.get_modelmeta().custom_metadata_map
        missing = [key for key in ("tasks", "preprocessor", "parameters") if key not in metadata]
        if missing:
            raise ValueError(f"its metadata lack {missing}, which `degmix export` writes")
        # It returns no attentions, so that to callers it is a model without decoder.
        self.config = SimpleNamespace(tasks=DeGMixConfig(tasks=json.loads(metadata["tasks"])).tasks, use_decoder=False)
        self.processor = DeGMixImageProcessor.from_dict(json.loads(metadata["preprocessor"]))
        self.num_parameters = lambda: json.loads(metadata["parameters"])

    def __call__(self, pixel_values: Tensor, **kwargs) -> DeGMixDensePredictionOutput:
        logits = self.session.run(list(self.config.tasks), {"pixel_values": pixel_values.numpy()})
        return DeGMixDensePredictionOutput(logits=dict(zip(self.config.tasks, map(torch.from_numpy, logits))))


def _missing_extra(error: ImportError) -> ImportError:
    return ImportError(f"{error.name} is missing: pip install transformers-degmix[onnx]")
