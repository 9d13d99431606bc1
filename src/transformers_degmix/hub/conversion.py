"""Checkpoints of the authors' released code (DeGMix, there called DeMTG, and DeMT with Swin backbones) -> this model.

The architecture is read off names and shapes. Then every released tensor must have its place in the model, and every
parameter of the model its tensor.
"""

import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from itertools import chain
from math import isqrt
from os import PathLike
from pathlib import Path
from statistics import multimode
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import SwinConfig
from transformers.utils import logging

from ..configuration_degmix import DeGMixConfig
from ..data.benchmarks import BENCHMARKS, TASKS, Benchmark
from ..modeling_degmix import DeGMixForMultiTaskDensePrediction
from ..tasks import TASK_KINDS


logger = logging.get_logger(__name__)

# Names listed in an error, per kind of defect.
MAX_LISTED = 20

# Constants of the windows, and a parameter that the released code holds but does not use.
UNUSED_KEYS = re.compile(r"\.(relative_position_index|offset)$")
FINAL_LOGITS = re.compile(r"head\.final_logits\.(\w+)\.")

# Transformers' Swin ends in a LayerNorm that the release lacks and nothing reads.
UNUSED_MODULE = "model.backbone.swin.layernorm."
NUM_STAGES = 4


class Layout(NamedTuple):
    """How the release stores one of our parameters: our shape -> its shape there, and its tensor -> ours."""

    released_shape: Callable[[torch.Size], tuple[int, ...]]
    restore: Callable[[Tensor], Tensor]


def _packed(index: int) -> Layout:
    """One of query, key and value (0, 1, 2), stacked along the rows."""
    return Layout(lambda shape: (3 * shape[0], *shape[1:]), lambda packed: packed.chunk(3)[index])


def _fusion_level(level: int) -> Layout:
    """One backbone map's columns in the projection of all. Each map of Swin has twice the channels of the last."""
    before, own, total = 2**level - 1, 2**level, 2**NUM_STAGES - 1

    def restore(weight: Tensor) -> Tensor:
        channels = weight.shape[1] // total
        return weight[:, before * channels :][:, : own * channels, None, None]

    return Layout(lambda shape: (shape[0], shape[1] * total // own), restore)


def _regroup_merged_patches(merged: Tensor) -> Tensor:
    """Last axis from `nn.Unfold`'s channel * 4 + 2 * y + x to Transformers' (2 * x + y) * channels + channel."""
    return merged.unflatten(-1, (-1, 2, 2)).transpose(-3, -1).flatten(-3)


AS_IS = Layout(tuple, lambda tensor: tensor)
MERGED_PATCHES = Layout(tuple, _regroup_merged_patches)
# From (y, x) to the (x, y) of `F.grid_sample`
SWAPPED_PAIRS = Layout(tuple, lambda offsets: offsets.unflatten(0, (-1, 2)).flip(1).flatten(0, 1))
POINTWISE_CONV = Layout(lambda shape: (*shape, 1), lambda kernel: kernel.squeeze(-1))


class Place(NamedTuple):
    """Where the release keeps a module: both are the start of a key, the rest of the key is the same."""

    ours: str
    released: str
    layout: Layout = AS_IS


# `{task}` is a task's name, `{index}` its number. The first row that fits a key counts.
_SWIN_LAYER = ("model.backbone.swin.encoder.layers.{stage}.", "backbone.stages.{stage}.")
_SWIN_BLOCK = tuple(prefix + "blocks.{block}." for prefix in _SWIN_LAYER)
_MIXER = ("model.mixers.{task}.{layer}.", "head.defor_mixers.{index}.blocks.{layer}.")
_QUERY = "model.query.attentions.{task}."
_GATING = ("model.gating.", "head.gmlps.gating.0.fn.")

PLACES = (
    Place("model.backbone.swin.embeddings.patch_embeddings.projection.", "backbone.patch_embed.projection."),
    Place("model.backbone.swin.embeddings.norm.", "backbone.patch_embed.norm."),
    Place(_SWIN_BLOCK[0] + "layernorm_before.", _SWIN_BLOCK[1] + "norm1."),
    Place(_SWIN_BLOCK[0] + "attention.q_proj.", _SWIN_BLOCK[1] + "attn.w_msa.qkv.", _packed(0)),
    Place(_SWIN_BLOCK[0] + "attention.k_proj.", _SWIN_BLOCK[1] + "attn.w_msa.qkv.", _packed(1)),
    Place(_SWIN_BLOCK[0] + "attention.v_proj.", _SWIN_BLOCK[1] + "attn.w_msa.qkv.", _packed(2)),
    Place(_SWIN_BLOCK[0] + "attention.o_proj.", _SWIN_BLOCK[1] + "attn.w_msa.proj."),
    Place(_SWIN_BLOCK[0] + "attention.relative_position_bias.", _SWIN_BLOCK[1] + "attn.w_msa."),
    Place(_SWIN_BLOCK[0] + "layernorm_after.", _SWIN_BLOCK[1] + "norm2."),
    Place(_SWIN_BLOCK[0] + "mlp.fc1.", _SWIN_BLOCK[1] + "ffn.layers.0.0."),
    Place(_SWIN_BLOCK[0] + "mlp.fc2.", _SWIN_BLOCK[1] + "ffn.layers.1."),
    Place(_SWIN_LAYER[0] + "downsample.", _SWIN_LAYER[1] + "downsample.", MERGED_PATCHES),
    *(Place(f"model.backbone.hidden_states_norms.stage{i + 1}.", f"backbone.norm{i}.") for i in range(NUM_STAGES)),
    Place("model.fusion.projections.0.bias", "head.linear1.0.bias"),
    *(
        Place(f"model.fusion.projections.{i}.weight", "head.linear1.0.weight", _fusion_level(i))
        for i in range(NUM_STAGES)
    ),
    Place("model.fusion.norm.", "head.linear1.1."),
    Place(_MIXER[0] + "channel_mixing.", _MIXER[1] + "0."),
    Place(_MIXER[0] + "channel_norm.", _MIXER[1] + "2."),
    Place(_MIXER[0] + "spatial_mixing.point_offsets.", _MIXER[1] + "3.fn.0.get_offset.p_conv."),
    Place(_MIXER[0] + "spatial_mixing.channel_offsets.", _MIXER[1] + "3.fn.0.get_offset.opt.", SWAPPED_PAIRS),
    Place(_MIXER[0] + "spatial_mixing.projection.", _MIXER[1] + "3.fn.0."),
    Place(_MIXER[0] + "spatial_norm.", _MIXER[1] + "3.fn.2."),
    Place("model.interaction.attention.in_proj.", "head.task_fusion.in_proj_"),
    Place("model.interaction.attention.out_proj.", "head.task_fusion.out_proj."),
    Place("model.interaction.attention.linear.", "head.smlp.0."),
    Place("model.interaction.attention.norm.", "head.smlp.1."),
    Place(_QUERY + "in_proj.", "head.task_querys.{index}.in_proj_"),
    Place(_QUERY + "out_proj.", "head.task_querys.{index}.out_proj."),
    Place(_QUERY + "linear.", "head.smlp2.{index}.0."),
    Place(_QUERY + "norm.", "head.smlp2.{index}.1."),
    Place(_GATING[0] + "norm.", _GATING[1] + "ln1_0."),
    Place(_GATING[0] + "fc1.", _GATING[1] + "fc1_0."),
    Place(_GATING[0] + "gate_norm.", _GATING[1] + "sgu_0.ln."),
    Place(_GATING[0] + "gate.weight", _GATING[1] + "sgu_0.proj.weight", POINTWISE_CONV),
    Place(_GATING[0] + "gate.bias", _GATING[1] + "sgu_0.proj.bias"),
    Place(_GATING[0] + "fc2.", _GATING[1] + "fc2_0."),
    Place("heads.{task}.conv.", "head.bottleneck.{task}.conv."),
    Place("heads.{task}.norm.", "head.bottleneck.{task}.bn."),
    Place("heads.{task}.classifier.", "head.final_logits.{task}."),
)


def convert_checkpoint(path: str | PathLike, dataset: str | None = None) -> DeGMixForMultiTaskDensePrediction:
    """The model of a released checkpoint, in eval mode.

    Args:
        path: see [`load_released_checkpoint`].
        dataset: see [`convert_state_dict`].

    Raises:
        OSError: the file cannot be read.
        ValueError: it does not hold a released DeGMix or DeMT, or not one of `dataset`; the message says what differs.
    """
    config, parameters = convert_state_dict(load_released_checkpoint(path), dataset)
    model = DeGMixForMultiTaskDensePrediction(config)
    # The model's own state dict fills in what the release lacks, so that names and shapes can be checked strictly.
    model.load_state_dict({**model.state_dict(), **parameters})
    return model.eval()


def load_released_checkpoint(path: str | PathLike) -> dict[str, Tensor]:
    """Reads tensors, and never code, from a Lightning checkpoint, a plain state dict or a safetensors file.

    Args:
        path: a file written by `torch.save`, or `*.safetensors`. Safetensors files do not keep the order of tensors:
            the order of the tasks is then known only if they are a benchmark's.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, holds no state dict, or could run code.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    try:
        with torch.serialization.safe_globals(_lightning_stand_ins(path)):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged, or holds more than tensors and could run code when it is read. If you trust it, keep "
            "its tensors only: torch.save(torch.load(path, weights_only=False)['state_dict'], new_path)"
        ) from error
    except (RuntimeError, EOFError, ValueError, LookupError) as error:
        raise ValueError(f"{path} is not a file written by torch.save, or it is damaged") from error
    state_dict = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(state_dict, dict):
        raise ValueError(f"{path} holds neither a state dict nor a Lightning checkpoint")
    return {key: value for key, value in state_dict.items() if isinstance(key, str) and isinstance(value, Tensor)}


class _LightningObject:
    """An empty dictionary in place of any object that Lightning stores beside the tensors."""

    def __new__(cls, *args):
        return OrderedDict()


def _lightning_stand_ins(path: Path) -> list[Callable | tuple[Callable, str]]:
    """Lightning 1.1 names callbacks by their classes and keeps hyperparameters in a class of its own.

    The stand-ins let `weights_only` reading pass over them, on machines without Lightning too, and run nothing.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except ValueError:  # not a file of PyTorch 1.6 or later; loading it gives a better error
        return []
    return [
        (_LightningObject, name) for name in names if name.startswith(("pytorch_lightning.", "argparse.Namespace"))
    ]


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        released = _released_part(safetensors.torch.load_file(path))
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or it is damaged") from error
    names = _task_names(released)
    order = next((benchmark.tasks for benchmark in BENCHMARKS.values() if set(benchmark.tasks) == set(names)), None)
    if order is None:
        raise ValueError(
            f"{path} does not keep the order of its tasks {sorted(names)}, and no benchmark has these tasks: save the "
            "state dict with torch.save instead"
        )
    return dict(sorted(released.items(), key=lambda item: _rank(item[0], order)))


def _rank(key: str, tasks: tuple[str, ...]) -> int:
    match = FINAL_LOGITS.match(key)
    return tasks.index(match[1]) if match else -1


def convert_state_dict(
    state_dict: dict[str, Tensor], dataset: str | None = None
) -> tuple[DeGMixConfig, dict[str, Tensor]]:
    """Configuration and parameters of this model for a released state dict.

    Args:
        state_dict: keys `backbone.*` and `head.*`, perhaps after a common prefix, in their original order. Other keys
            (metrics, criteria) are ignored.
        dataset: `"nyud"`, `"pascal_context"` or `"cityscapes"`: gives the names of the classes and the weight of
            boundary pixels in the loss, which tensors do not show. By default the only data set whose tasks and class
            counts fit, if there is one.

    Returns:
        The configuration, and tensors under the names of `DeGMixForMultiTaskDensePrediction.state_dict()`, all except
        the two of the backbone's final LayerNorm.

    Raises:
        ValueError: tensors are missing, unexpected or misshapen, each of them named, or do not belong to `dataset`.
    """
    released = _released_part(state_dict)
    config = _infer_config(released, dataset)
    with torch.device("meta"):
        model = DeGMixForMultiTaskDensePrediction(config)
    sources = {
        name: _source(name, tensor.shape, list(config.tasks))
        for name, tensor in model.state_dict().items()
        if not name.startswith(UNUSED_MODULE)
    }
    _check_fit(released, {source.key: source.shape for source in sources.values()})
    return config, {name: source.restore(released[source.key]) for name, source in sources.items()}


def _released_part(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's and the head's tensors under their released names, in order."""
    prefixes = {match[1] for key in state_dict if (match := re.match(r"(|.*\.)head\.final_logits\.", key))}
    if not prefixes:
        raise ValueError("not a released DeGMix or DeMT: there is no tensor like 'head.final_logits.semseg.weight'")
    if len(prefixes) > 1:
        raise ValueError(
            f"the checkpoint holds several models, under the prefixes {sorted(prefixes)}: keep one of them"
        )
    prefix = prefixes.pop()
    wanted = (prefix + "backbone.", prefix + "head.")
    return {
        key.removeprefix(prefix): tensor
        for key, tensor in state_dict.items()
        if key.startswith(wanted) and not UNUSED_KEYS.search(key)
    }


class Source(NamedTuple):
    """Where one of our parameters comes from: the released key, its expected shape, and its tensor -> ours."""

    key: str
    shape: tuple[int, ...]
    restore: Callable[[Tensor], Tensor]


def _source(name: str, shape: torch.Size, tasks: list[str]) -> Source:
    """Looks a parameter or buffer up in `PLACES` by our name and shape."""
    for place in PLACES:
        if match := _pattern(place.ours).match(name):
            fields = match.groupdict()
            if "task" in fields:
                fields["index"] = tasks.index(fields["task"])
            key = place.released.format(**fields) + name[match.end() :]
            return Source(key, place.layout.released_shape(shape), place.layout.restore)
    raise LookupError(f"`PLACES` has no row for {name!r}")


@cache
def _pattern(template: str) -> re.Pattern:
    """`"a.{task}."` -> a pattern that matches `"a.depth."` and captures `task`."""
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\w+)", re.escape(template)))


def _check_fit(released: dict[str, Tensor], expected: dict[str, tuple[int, ...]]):
    """Raises ValueError unless all expected tensors are there with their shapes, and no others."""
    found = {key: tuple(tensor.shape) for key, tensor in released.items()}
    defects = {
        "missing": [f"{key} {expected[key]}" for key in expected if key not in found],
        "unexpected": [f"{key} {found[key]}" for key in found if key not in expected],
        "misshapen": [
            f"{key} {found[key]}, expected {expected[key]}"
            for key in expected
            if key in found and found[key] != expected[key]
        ],
    }
    if any(defects.values()):
        raise ValueError(
            "the checkpoint does not fit the architecture that most of its tensors show. "
            + ". ".join(f"{defect.capitalize()}: {_listed(keys)}" for defect, keys in defects.items() if keys)
        )


def _listed(keys: list[str]) -> str:
    more = len(keys) - MAX_LISTED
    return "; ".join(keys[:MAX_LISTED]) + (f"; and {more} more" if more > 0 else "")


def _infer_config(released: dict[str, Tensor], dataset: str | None) -> DeGMixConfig:
    """The architecture; `_check_fit` checks that the checkpoint fits it."""
    tasks = _infer_tasks(released, dataset)
    gating = {}
    if any(key.startswith("head.gmlps.") for key in released):
        gate = [f"{_GATING[1]}sgu_0.{name}" for name in ("ln.weight", "ln.bias", "proj.weight", "proj.bias")]
        gating = {"gating_intermediate_size": 2 * _common_size(released, gate)}
    head = [f"head.bottleneck.{task}.{name}" for task in tasks for name in ("conv.weight", "bn.weight", "bn.bias")]
    return DeGMixConfig(
        backbone_config=_infer_swin(released),
        tasks=tasks,
        hidden_size=_common_size(released, _weight_and_bias("head.linear1.0", "head.linear1.1")),
        num_mixer_layers=_count(released, "head.defor_mixers.0.blocks."),
        # Packed projections do not show the number of heads: these are the released configurations'.
        num_attention_heads=2 if gating else 4,
        use_gating=bool(gating),
        head_hidden_size=_common_size(released, head),
        **gating,
    )


def _infer_swin(released: dict[str, Tensor]) -> SwinConfig:
    """Drop path, which leaves no trace in tensors, keeps `SwinConfig`'s default."""
    embed_dim = _common_size(
        released, _weight_and_bias("backbone.patch_embed.projection", "backbone.patch_embed.norm")
    )
    depths = [_count(released, f"backbone.stages.{stage}.blocks.") for stage in range(NUM_STAGES)]
    blocks = [
        [f"backbone.stages.{stage}.blocks.{block}." for block in range(depth)] for stage, depth in enumerate(depths)
    ]
    bias_tables = [[block + "attn.w_msa.relative_position_bias_table" for block in stage] for stage in blocks]
    num_heads = [_common_size(released, tables, axis=1) for tables in bias_tables]
    for stage, (heads, tables) in enumerate(zip(num_heads, bias_tables)):
        if embed_dim * 2**stage % heads:
            found = tuple(released[tables[0]].shape)
            raise ValueError(f"{tables[0]} {found}: {heads} heads do not divide {embed_dim * 2**stage} channels")
    return SwinConfig(
        patch_size=_common_size(released, ["backbone.patch_embed.projection.weight"], axis=3),
        embed_dim=embed_dim,
        depths=depths,
        num_heads=num_heads,
        # A table has a row for each offset within a window, (2 * window_size - 1) ** 2 of them.
        window_size=(isqrt(_common_size(released, list(chain(*bias_tables)))) + 1) // 2,
        mlp_ratio=_common_size(released, _weight_and_bias(*(b + "ffn.layers.0.0" for b in blocks[0]))) / embed_dim,
        qkv_bias=any(key.endswith(".qkv.bias") for key in released),
        out_features=[f"stage{stage + 1}" for stage in range(NUM_STAGES)],
    )


def _infer_tasks(released: dict[str, Tensor], dataset: str | None) -> dict[str, dict[str, Any]]:
    """`DeGMixConfig.tasks`, in the checkpoint's order."""
    names = _task_names(released)
    num_labels = {
        name: _common_size(released, _weight_and_bias(f"head.final_logits.{name}"))
        for name in names
        if TASK_KINDS[TASKS[name]["kind"]].num_logits is None
    }
    benchmark = _find_benchmark(names, num_labels, dataset)
    tasks = {name: dict(TASKS[name]) for name in names}
    for name, count in num_labels.items():
        tasks[name]["num_labels"] = count
        if benchmark is not None:
            classes = next(classes for classes in benchmark.classes[name] if len(classes) == count)
            tasks[name]["id2label"] = dict(enumerate(classes))
    if benchmark is not None and "edge" in tasks:
        tasks["edge"]["pos_weight"] = benchmark.edge_pos_weight
    return tasks


def _find_benchmark(names: list[str], num_labels: dict[str, int], dataset: str | None) -> Benchmark | None:
    if dataset is not None:
        if dataset not in BENCHMARKS:
            raise ValueError(f"`dataset` must be one of {list(BENCHMARKS)}, got {dataset!r}")
        if mismatch := _mismatch(dataset, names, num_labels):
            raise ValueError(f"the checkpoint is not one of {dataset!r}: {mismatch}")
        return BENCHMARKS[dataset]
    fitting = [name for name in BENCHMARKS if not _mismatch(name, names, num_labels)]
    if len(fitting) == 1:
        return BENCHMARKS[fitting[0]]
    logger.warning(
        f"The tasks {names} with {num_labels} classes fit these data sets: {', '.join(fitting) or 'none'}. Without "
        "`dataset`, classes have no names and boundaries the default `pos_weight`."
    )
    return None


def _mismatch(dataset: str, names: list[str], num_labels: dict[str, int]) -> str | None:
    """Why the tasks are not those of a data set, or `None`."""
    benchmark = BENCHMARKS[dataset]
    if foreign := [name for name in names if name not in benchmark.tasks]:
        return f"it has the tasks {foreign}, the data set only {list(benchmark.tasks)}"
    for name, count in num_labels.items():
        known = [len(classes) for classes in benchmark.classes[name]]
        if count not in known:
            return f"it has {count} {name} classes, the data set {' or '.join(map(str, known))}"
    return None


def _task_names(released: dict[str, Tensor]) -> list[str]:
    names = list(dict.fromkeys(match[1] for key in released if (match := FINAL_LOGITS.match(key))))
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise ValueError(f"head.final_logits has the unknown tasks {unknown}; known are {list(TASKS)}")
    return names


def _weight_and_bias(*modules: str) -> list[str]:
    return [f"{module}.{name}" for module in modules for name in ("weight", "bias")]


def _count(released: dict[str, Tensor], prefix: str) -> int:
    """Number of modules in a list, at least one: an empty list is then reported as missing tensors."""
    numbers = {key.removeprefix(prefix).split(".")[0] for key in released if key.startswith(prefix)}
    return max(len(numbers), 1)


def _common_size(released: dict[str, Tensor], keys: list[str], axis: int = 0) -> int:
    """The most frequent size of tensors that should agree; `_check_fit` then names those that differ."""
    shapes = {key: tuple(released[key].shape) for key in keys if key in released}
    sizes = multimode(shape[axis] for shape in shapes.values() if len(shape) > axis and shape[axis] > 0)
    if not shapes:
        raise ValueError(f"the checkpoint does not show its architecture. Missing: {_listed(keys)}")
    if len(sizes) != 1:
        raise ValueError(
            f"the checkpoint does not show its architecture. Sizes of axis {axis} do not agree: "
            + _listed([f"{key} {shape}" for key, shape in shapes.items()])
        )
    return sizes[0]
