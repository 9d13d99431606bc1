"""Materials of the Rooms data set: palettes and procedural patterns. Colours are sRGB in 0..1."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


WALLS = [(0.93, 0.91, 0.87), (0.86, 0.88, 0.86), (0.8, 0.84, 0.88), (0.91, 0.86, 0.78), (0.78, 0.82, 0.75)]
WALLS += [(0.89, 0.81, 0.78), (0.72, 0.78, 0.83), (0.95, 0.95, 0.93), (0.5, 0.6, 0.62), (0.85, 0.74, 0.6)]
WOODS = [(0.74, 0.56, 0.37), (0.48, 0.32, 0.2), (0.83, 0.67, 0.45), (0.34, 0.23, 0.16), (0.91, 0.9, 0.87)]
WOODS += [(0.64, 0.58, 0.51), (0.62, 0.42, 0.26)]
FABRICS = [(0.36, 0.43, 0.52), (0.6, 0.29, 0.25), (0.25, 0.42, 0.39), (0.76, 0.66, 0.51), (0.46, 0.46, 0.47)]
FABRICS += [(0.75, 0.53, 0.25), (0.2, 0.26, 0.4), (0.82, 0.79, 0.74), (0.54, 0.36, 0.46), (0.4, 0.52, 0.3)]
BRIGHT = [(0.85, 0.2, 0.17), (0.95, 0.75, 0.15), (0.15, 0.45, 0.75), (0.2, 0.6, 0.35), (0.95, 0.5, 0.15)]
BRIGHT += [(0.93, 0.92, 0.9), (0.6, 0.3, 0.6), (0.12, 0.13, 0.16)]
SHIRTS = [color for color in BRIGHT + FABRICS if color != (0.76, 0.66, 0.51)]  # without a colour like skin
SKINS = [(0.93, 0.75, 0.64), (0.84, 0.63, 0.48), (0.65, 0.45, 0.32), (0.45, 0.3, 0.21), (0.96, 0.8, 0.7)]
HAIRS = [(0.1, 0.08, 0.07), (0.3, 0.19, 0.11), (0.6, 0.45, 0.25), (0.45, 0.43, 0.42), (0.42, 0.2, 0.1)]


@dataclass(frozen=True)
class Material:
    """What a surface looks like.

    Attributes:
        pattern: surface coordinates `(2, n)` in metres -> linear RGB `(3, n)`.
        gloss: in 0..1, scales highlights.
        emission: emitted radiance, per albedo.
        grain: whether the first coordinate runs along a face's longer side.
    """

    pattern: Callable[[np.ndarray], np.ndarray]
    gloss: float = 0.0
    emission: float = 0.0
    grain: bool = False


def _cloud_table() -> np.ndarray:
    """Periodic 1/f noise of unit variance, `(512, 512)` float32."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(512), np.fft.fftfreq(512)))
    frequency[0, 0] = np.inf
    noise = np.fft.ifft2(np.fft.fft2(np.random.default_rng(0).standard_normal((512, 512))) / frequency**1.1).real
    return (noise / noise.std()).astype(np.float32)


_CLOUDS = _cloud_table()
_DICE = np.random.default_rng(1).random((64, 64), dtype=np.float32)


def _clouds(u, v):
    """1/f noise around 0, with a period of 1 in u and in v."""
    return _CLOUDS[(v * 512).astype(np.int32) & 511, (u * 512).astype(np.int32) & 511]


def _dice(i, j=0):
    """A random number in 0..1 for each pair of integers."""
    return _DICE[np.asarray(j).astype(np.int32) & 63, i.astype(np.int32) & 63]


def _linear(color):
    return np.array(color, np.float32)[:, None] ** 2.2


def _mix(a, b, share):
    return a + (b - a) * share


def plain(color, grain=0.03, gloss=0.0, emission=0.0) -> Material:
    color = _linear(color)
    return Material(lambda uv: color * (1 + grain * _clouds(uv[0] * 0.7, uv[1] * 0.7)), gloss, emission)


def fabric(color) -> Material:
    color = _linear(color)
    return Material(lambda uv: color * (1 + 0.05 * _clouds(uv[0], uv[1]) + 0.06 * _clouds(uv[0] * 9, uv[1] * 9)))


def wood(color, gloss=0.25, plank=None) -> Material:
    """Wood with its grain along u, or floor boards of width `plank`."""
    color = _linear(color)

    def albedo(uv):
        u, v = uv
        shade = 1.0
        if plank is not None:
            row = np.floor(v / plank)
            u = u + 7 * _dice(row)
            board = np.floor(u / 1.4)
            gap = (v / plank - row < 0.03) | (u / 1.4 - board < 0.004)
            shade = (0.82 + 0.36 * _dice(row, board)) * np.where(gap, 0.6, 1)
            u = u + 3 * board
        return color * (shade * (1 + 0.1 * _clouds(u * 0.25, v * 3) + 0.03 * _clouds(u * 0.6, v * 9)))

    return Material(lambda uv: albedo(uv).astype(np.float32), gloss, grain=True)


def tiles(color, other, size) -> Material:
    """Square tiles in two alternating colours, with light joints."""
    color, other, joint = _linear(color), _linear(other), _linear((0.7, 0.69, 0.66))

    def albedo(uv):
        cell = np.floor(uv / np.float32(size))
        inner = uv / np.float32(size) - cell
        tile = _mix(color, other, (cell[0] + cell[1]) % 2) * (0.95 + 0.1 * _dice(*cell))
        return np.where(np.min(inner, axis=0) < 0.02, joint, tile * (1 + 0.04 * _clouds(*uv)))

    return Material(albedo, 0.3)


def stripes(color, other, period) -> Material:
    color, other = _linear(color), _linear(other)
    return Material(lambda uv: _mix(color, other, np.floor(uv[0] * np.float32(2 / period)) % 2))


def carpet(color, other, half) -> Material:
    """A woven rug of half extents `half` with a border and diamonds."""
    color, other = _linear(color), _linear(other)

    def albedo(uv):
        margin = np.minimum(half[0] - np.abs(uv[0]), half[1] - np.abs(uv[1]))
        border = (margin > 0.06) & (margin < 0.14)
        diamonds = (np.abs((uv[0] / 0.3) % 1 - 0.5) + np.abs((uv[1] / 0.3) % 1 - 0.5) < 0.3) & (margin > 0.2)
        weave = 1 + 0.1 * _clouds(uv[0] * 6, uv[1] * 6)
        return _mix(color, other, (border | diamonds).astype(np.float32)) * weave.astype(np.float32)

    return Material(albedo)


def painting(rng, half) -> Material:
    """A landscape or an abstract composition on a canvas of half extents `half`."""
    colors = [_linear(color) for color in rng.permutation(BRIGHT + FABRICS + WALLS)[:6]]
    shift, landscape = rng.random(2), rng.random() < 0.5
    centres, sizes = rng.uniform(-0.8, 0.8, (5, 2)), rng.uniform(0.15, 0.6, (5, 2))

    def albedo(uv):
        x, y = uv[0] / np.float32(half[0]), uv[1] / np.float32(half[1])
        if landscape:
            result = _mix(_linear((0.95, 0.9, 0.8)), _linear((0.5, 0.68, 0.85)), np.clip(y * 0.5 + 0.5, 0, 1))
            for k, height in enumerate((0.3, 0.0, -0.4)):
                slow, fast = np.sin(2 * x + 9 * (shift[0] + k)), np.sin(5 * x + 9 * (shift[1] + k))
                ridge = height + 0.12 * slow + 0.06 * fast
                result = np.where(y < ridge, colors[k] * (1 + 0.1 * _clouds(x * 0.5, y * 0.5)), result)
            return result.astype(np.float32)
        result = colors[0] * np.ones_like(x)
        for k, ((cx, cy), (w, h)) in enumerate(zip(centres, sizes)):
            inside = (np.abs(x - cx) < w) & (np.abs(y - cy) < h) if k % 2 else np.hypot(x - cx, y - cy) < w
            result = np.where(inside, colors[k + 1], result)
        return result.astype(np.float32)

    return Material(albedo, 0.1)


def outdoors(rng, brightness) -> Material:
    """What a window shows: sky above trees, emitted by the pane."""
    shift = rng.random(2)

    def albedo(uv):
        sky = _mix(_linear((0.95, 0.96, 0.97)), _linear((0.62, 0.78, 0.95)), np.clip(uv[1] * 0.8 + 0.5, 0, 1))
        tree_line = -0.25 + 0.1 * _clouds(uv[0] * 0.1 + shift[0], np.full_like(uv[0], shift[1]))
        leaves = _linear((0.42, 0.55, 0.3)) * (1 + 0.3 * _clouds(uv[0] * 0.8, uv[1] * 0.8))
        return np.where(uv[1] < tree_line, leaves, sky).astype(np.float32)

    return Material(albedo, 0.3, brightness)
