"""Released-layout state dicts made by the fixtures' weights rule, and the fixtures themselves.

`tests/fixtures/*.npz` hold what the authors' released code computes with these weights; no weight file is needed.
"""

import json
import math
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


FIXTURES = Path(__file__).parent / "fixtures"

_SHAPES = json.loads((FIXTURES / "released_state_dict_shapes.json").read_text())
_NYUD_SHAPES, _PASCAL_SHAPES = (
    next(shapes for name, shapes in _SHAPES.items() if name.startswith(prefix)) for prefix in ("degmix_n", "degmix_p")
)
# DeMT: no gating, one mixer block per task.
_DEMT_SHAPES = {
    key: shape
    for key, shape in _NYUD_SHAPES.items()
    if not re.search(r"\.gmlps\.|\.defor_mixers\.\d+\.blocks\.1\.", key)
}

# fixture -> (released shapes, seed, data set)
MODELS = {
    "degmix_nyud_49x63_seed0": (_NYUD_SHAPES, 0, "nyud"),
    "degmix_pascal_64x64_seed1": (_PASCAL_SHAPES, 1, "pascal_context"),
    "demt_nyud_49x63_seed2": (_DEMT_SHAPES, 2, "nyud"),
}


def load_fixture(name: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return dict(arrays)


def released_state_dict(name: str) -> dict[str, Tensor]:
    """The state dict of a fixture's model, in the released order of keys."""
    shapes, seed, _ = MODELS[name]
    return draw_weights(shapes, seed)


def draw_weights(shapes: dict[str, list[int]], seed: int) -> dict[str, Tensor]:
    """The weights rule of the fixtures."""
    numbers = {key: number for number, key in enumerate(sorted(shapes))}
    return {key: _draw(key, shape, np.random.RandomState(1000 * seed + numbers[key])) for key, shape in shapes.items()}


def _draw(key: str, shape: list[int], rng: np.random.RandomState) -> Tensor:
    if key.endswith((".num_batches_tracked", ".relative_position_index")):
        return torch.zeros(shape, dtype=torch.int64)
    if key.endswith(".offset"):
        return torch.zeros(shape)
    if key.endswith("running_var"):
        values = rng.uniform(0.5, 1.5, shape)
    elif len(shape) > 1:
        values = rng.standard_normal(shape) / math.sqrt(math.prod(shape[1:]))
        if "p_conv" in key or ".opt." in key:
            values = values * 0.1
    elif key.endswith("weight"):
        values = rng.uniform(0.5, 1.5, shape)
    else:
        values = rng.standard_normal(shape) * 0.1
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def nyud_shapes(
    embed_dim: int, depths: tuple[int, ...], num_heads: tuple[int, ...], window_size: int
) -> dict[str, list[int]]:
    """Keys and shapes of NYUD's released DeGMix with another Swin, made from the fixture's (24 channels, 1 block)."""
    channels = [embed_dim * 2**stage for stage in range(4)]
    tables = {"relative_position_index": [window_size**2] * 2}
    shapes = {}
    for key, shape in _NYUD_SHAPES.items():
        if key.startswith("head."):
            resized = {45: sum(channels) // 8, 360: sum(channels)}
            shapes[key] = [resized.get(size, size) for size in shape]
        elif match := re.match(r"backbone\.stages\.(\d)\.blocks\.0\.(.*)", key):
            stage = int(match[1])
            tables["relative_position_bias_table"] = [(2 * window_size - 1) ** 2, num_heads[stage]]
            for block in range(depths[stage]):
                shapes[f"backbone.stages.{stage}.blocks.{block}.{match[2]}"] = tables.get(
                    key.rsplit(".", 1)[1], _rescale(shape, embed_dim)
                )
        elif ".blocks." not in key:
            shapes[key] = _rescale(shape, embed_dim)
    return shapes


def _rescale(shape: list[int], embed_dim: int) -> list[int]:
    return [size * embed_dim // 24 if size % 24 == 0 else size for size in shape]
