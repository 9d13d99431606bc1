"""The table of task kinds: everything that depends on what a dense prediction task predicts, one row per kind.

A *task* is a name, a kind and a few numbers (see [`DeGMixConfig`]); a *kind* says what its maps mean. Configuration,
losses, image processing, augmentation and pictures look their rules up here, so that a new kind is one row, one loss
(`loss_degmix.py`) and one metric (`evaluation/`).
"""

from collections.abc import Callable
from colorsys import hsv_to_rgb
from dataclasses import dataclass, field
from itertools import permutations, product
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


Maps = TypeVar("Maps", Tensor, np.ndarray)

# Pixels with this label take no part in losses and metrics, for every kind.
IGNORE_INDEX = 255

# PIL modes of 8-bit maps of one channel
_8_BIT = ("1", "L", "P")

# Anchors of the perceptually uniform "viridis" colour map, interpolated linearly.
_VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


@dataclass(frozen=True)
class Suspicion:
    """What looks wrong in several label maps together.

    Attributes:
        what: in words, the same for all maps that it applies to.
        shares: for each map, the share of its pixels that this is about.
        setting: fields of [`~data.columns.Column`] that would mend it, in addition to the fields that the column has;
            empty if no setting can.
        detail: what it is based on.
        only: the values that occur, if they make sense only with this setting.
    """

    what: str
    shares: list[float]
    setting: dict[str, Any] = field(default_factory=dict)
    detail: str = ""
    only: tuple[float, ...] = ()


def format_fields(fields: dict[str, Any]) -> str:
    """Fields of a column as YAML reads them: numbers, lists and tables of them, texts."""

    def text(value: Any) -> str:
        if isinstance(value, list | tuple):
            return text(value[0]) if len(value) == 1 else f"[{', '.join(map(text, value))}]"
        if isinstance(value, dict):
            return f"{{{format_fields(value)}}}"
        if isinstance(value, bool | str):
            return str(value).lower() if isinstance(value, bool) else value
        return format_number(value)

    return ", ".join(f"{name}: {text(value)}" for name, value in fields.items())


def format_number(value: float) -> str:
    """A stored value: whole numbers in full, because single precision keeps only seven digits."""
    if abs(value) < 2**53 and value == int(value):
        return str(int(value))
    return np.format_float_positional(np.float32(value), trim="-")


def _unchanged(maps: Maps, *_) -> Maps:
    return maps


def _is_ignored(label: Maps) -> Maps:
    return label == IGNORE_INDEX


@dataclass(frozen=True, kw_only=True)
class TaskKind:
    """What the maps of one kind of task mean. Maps are `(..., channels, height, width)`.

    Labels are NumPy arrays until they are batched, because PyTorch takes ten times as long to compare and mask them.

    Attributes:
        num_logits: channels that the model predicts; `None` if the task's `num_labels` says it.
        label_dtype: dtype of labels, `(batch, height, width)`, or `(batch, 3, height, width)` for normals.
        label_channels: 3 for normals, else 1.
        defaults: fields a task of this kind may set, with their defaults; `loss_weight` is the paper's.
        label_padding: label of the pixels that padding adds.
        activation: logits `(batch, num_logits, height, width)` -> prediction, `(batch, height, width)` or
            `(batch, 3, height, width)`.
        confidence: logits -> `(batch, height, width)` float32 in [0, 1], larger where smaller errors are expected.
        confidence_is_probability: whether `confidence` is the model's probability that the class, or side, is
            right. If not, it only orders pixels.
        decode: an 8-bit label image as stored in data sets -> label values, `IGNORE_INDEX` kept where the kind has it.
        image_modes: PIL modes of label images in data sets.
        offences: label `(channels, height, width)` as stored, 8-bit labels not decoded, and number of classes ->
            the impossible values, `(n,)`.
        expected: the possible values, in words; `{highest}` stands for the largest class id.
        largest: largest value of a label; `None` for the largest class id.
        find_suspicions: labels `(channels, height, width)` as for `offences`, and number of classes -> what looks
            wrong in all labels together: impossible values, and possible values that are unlikely to be meant.
        unknown: label values, array or tensor -> boolean mask, broadcastable to them, of pixels that carry no
            measurement.
        flip: values of a map, array or tensor, that was mirrored left to right.
        rescale: values of a map, array or tensor, whose image was enlarged by a factor.
        colorize: prediction `(height, width)` or `(3, height, width)`, and the values shown as first and last
            colour -> uint8 `(3, height, width)`.
        value_range: the values of first and last colour by default; `None` takes them from the map.
        legend: what explains the colours: `"classes"`, `"scale"` or `"directions"`.
        unit: of the values on a scale, "" where they have none.
        prediction: what a pixel of the prediction says, in words.
        pipeline_tag: what the Hub calls tasks of this kind.
        mode_hint: what to do if an image has another mode.
        thin: whether the map shows thin lines, which must not get lost in smaller pictures.
    """

    num_logits: int | None
    label_dtype: torch.dtype
    label_channels: int = 1
    defaults: dict[str, Any]
    label_padding: float = IGNORE_INDEX
    activation: Callable[[Tensor], Tensor]
    confidence: Callable[[Tensor], Tensor]
    confidence_is_probability: bool
    decode: Callable[[np.ndarray], np.ndarray] = _unchanged
    image_modes: tuple[str, ...]
    offences: Callable[[np.ndarray, int], np.ndarray]
    expected: str
    largest: float | None
    find_suspicions: Callable[[list[np.ndarray], int], list[Suspicion]]
    unknown: Callable[[Maps], Maps] = _is_ignored
    flip: Callable[[Maps], Maps] = _unchanged
    rescale: Callable[[Maps, float], Maps] = _unchanged
    colorize: Callable[[Tensor, tuple[float, float]], Tensor]
    value_range: tuple[float, float] | None
    legend: str
    prediction: str
    pipeline_tag: str
    unit: str = ""
    mode_hint: str = ""
    thin: bool = False

    def __reduce__(self) -> tuple:
        """Pickled by name: processes that are not forked, such as loaders on macOS, have their own table."""
        return _get_kind, (next(name for name, kind in TASK_KINDS.items() if kind is self),)

    @property
    def has_class_ids(self) -> bool:
        """Whether labels are class ids; others are measured or graded."""
        return not self.label_dtype.is_floating_point

    @property
    def array_dtype(self) -> np.dtype:
        """NumPy's `label_dtype`."""
        return torch.empty(0, dtype=self.label_dtype).numpy().dtype


def _get_kind(name: str) -> TaskKind:
    return TASK_KINDS[name]


def _outside(label: np.ndarray, lowest: float, highest: float) -> np.ndarray:
    return label[((label < lowest) | (label > highest)) & (label != IGNORE_INDEX)]


def _wrong_lengths(normals: np.ndarray, _) -> np.ndarray:
    """Lengths far from 0 and 1, if more than 5 % of all vectors have them.

    Maps that were resized have shorter vectors at creases; 8-bit maps hold the zero vector to 1/255 only.
    """
    normals = normals[:, ::4, ::4]  # enough for a share
    if normals.dtype == np.uint8:
        normals = _decode_normals(normals)
    lengths = np.sqrt(np.square(normals).sum(axis=0))
    is_wrong = (np.abs(lengths - 1) > 0.2) & (lengths > 0.01)
    wrong = lengths[is_wrong][(normals[:, is_wrong] != IGNORE_INDEX).all(axis=0)]
    return wrong if len(wrong) > 0.05 * lengths.size else wrong[:0]


def _decode_normals(image: np.ndarray) -> np.ndarray:
    """8-bit codes `(3, height, width)` -> vectors.

    (0, 0, 0), far from the code of any unit vector, is the zero vector. So are the codes around 127.5, which mean it
    in many data sets.
    """
    normals = image.astype(np.float32)
    normals /= 127.5
    normals -= 1
    red, green, blue = image
    np.copyto(normals, 0, where=(red | green | blue) == 0)
    red, green, blue = image - np.uint8(126)  # below 126, it wraps around
    np.copyto(normals, 0, where=(red | green | blue) < 4)
    return normals


def _is_unknown_normal(normals: Maps) -> Maps:
    # Joined pairwise: a reduction over the channels takes three times as long.
    x, y, z = (normals[..., i : i + 1, :, :] for i in range(3))
    is_zero = (x == 0) & (y == 0) & (z == 0)
    return is_zero | (x == IGNORE_INDEX) | (y == IGNORE_INDEX) | (z == IGNORE_INDEX)


def _mirror_x(normals: Maps) -> Maps:
    """Negates the x component, the first of the three channels."""
    mirrored: Maps = 1 * normals  # a copy
    mirrored[..., 0, :, :] *= -1
    return mirrored


def _mean_around(maps: Tensor, share: float) -> Tensor:
    """Mean of `(..., height, width)` in a square window around each pixel, as wide as a share of the longer side.

    From running sums, whose cost does not depend on the window; pooling takes a minute for 12 megapixels.
    """
    reach = round(share * max(maps.shape[-2:]) / 2)
    for dim, margin in ((-1, (1, 0)), (-2, (0, 0, 1, 0))):
        length = maps.shape[dim]
        sums = F.pad(maps.cumsum(dim), margin)
        position = torch.arange(length, device=maps.device)
        start, end = (position - reach).clamp(min=0), (position + reach + 1).clamp(max=length)
        count = (end - start).view(-1, *[1] * (-1 - dim))
        maps = (sums.index_select(dim, end) - sums.index_select(dim, start)) / count
    return maps


def _nearness_and_evenness(logits: Tensor) -> Tensor:
    """1 / (1 + m + 4 s), with mean m and deviation s of the predicted metres within a fifth of the longer side.

    Far surfaces, and surfaces beside a jump in depth, have larger errors. Nothing else that was tried on Rooms (depth,
    its gradient, Laplacian, range, deviation, maximum, and sums of them, in windows of several sizes) ordered errors
    notably better.
    """
    depth = logits[:, 0].clamp(min=0)
    mean, mean_square = (_mean_around(values, 0.2) for values in (depth, depth**2))
    return 1 / (1 + mean + 4 * (mean_square - mean**2).clamp(min=0).sqrt())


def _smoothness(logits: Tensor) -> Tensor:
    """1 - s / 90 degrees, where cos s is the length of the mean unit vector within 1/25 of the longer side.

    For small s, this is the vectors' root mean square angle to their mean. It ordered errors on Rooms a little better
    than the length of the logits.
    """
    length = _mean_around(F.normalize(logits, dim=1), 0.04).norm(dim=1)
    return 1 - length.clamp(max=1).acos() / (torch.pi / 2)


def label_palette(num_labels: int) -> Tensor:
    """Colours of class ids, the same whatever the number of classes; black only for `IGNORE_INDEX`.

    Slate for class 0 (background, wall); then hues that turn by the golden angle, so that neighbours differ most, in
    alternating saturations and values.

    Returns:
        uint8 tensor `(num_labels, 3)`.
    """
    colors = [(0.4, 0.4, 0.47)]
    for index in range(1, IGNORE_INDEX):
        saturation, value = (0.75, 0.75, 0.55)[index % 3], (0.7, 0.8, 0.9, 0.6, 0.9)[index % 5]
        colors.append(hsv_to_rgb(index * 0.618034 % 1, saturation, value))
    return torch.tensor([*colors, (0, 0, 0)]).mul(255).round().to(torch.uint8)[:num_labels]


def _color_labels(prediction: Tensor, _) -> Tensor:
    return label_palette(256)[prediction.long()].permute(2, 0, 1)


def _unit(prediction: Tensor, value_range: tuple[float, float]) -> Tensor:
    low, high = value_range
    return ((prediction.float() - low) / max(high - low, 1e-6)).clamp(0, 1)


def _color_gray(prediction: Tensor, value_range: tuple[float, float]) -> Tensor:
    return (_unit(prediction, value_range) * 255).round().to(torch.uint8).expand(3, *prediction.shape)


def _color_viridis(prediction: Tensor, value_range: tuple[float, float]) -> Tensor:
    anchors = torch.tensor(_VIRIDIS, dtype=torch.float32)
    position = _unit(prediction, value_range) * (len(anchors) - 1)
    left = position.long().clamp(max=len(anchors) - 2)
    color = torch.lerp(anchors[left], anchors[left + 1], (position - left).unsqueeze(-1))
    return color.round().to(torch.uint8).permute(2, 0, 1)


def _color_normals(prediction: Tensor, value_range: tuple[float, float]) -> Tensor:
    return (_unit(prediction, value_range) * 255).round().to(torch.uint8)


# In metres. The median depth of an indoor or street scene is never this large; in millimetres, it always is.
FARTHEST_MEDIAN = 100
# In this many maps or more, classes that are missing are suspicious.
ENOUGH_MAPS = 16
# The 48 orders and signs of the components of normals, the fewest changes first.
_CONVENTIONS = sorted(
    product(permutations(range(3)), product((1, -1), repeat=3)),
    key=lambda c: (c[0] != (0, 1, 2), c[0] != (2, 1, 0), c[1].count(-1)),
)
_FULL_16_BITS = 65535 / np.array([1, 100, 256, 1000, 5000])
# For grey levels. 255 times this scale is not above 1.
_LEVELS = {"scale": 0.00392}
JPEG_IDS = Suspicion("JPEG, which changes class ids", [1.0], detail="save maps as PNG")
TWO_LEVELS = "0 and 255 are the only values, and 255 can hardly mean unlabelled"


def _shares(masks: list[np.ndarray]) -> list[float]:
    return [float(mask.mean()) for mask in masks]


def _values(labels: list[np.ndarray]) -> list[float]:
    """The different values of all maps, in order."""
    return np.unique(np.concatenate([np.unique(label) for label in labels])).tolist()


def _suspicious_ids(labels: list[np.ndarray], num_labels: int) -> list[Suspicion]:
    stored = _values(labels)
    known = [value for value in stored if value != IGNORE_INDEX]
    if known and not 0 <= known[0] <= known[-1] < num_labels:
        wrong = [((label < 0) | (label >= num_labels)) & (label != IGNORE_INDEX) for label in labels]
        values = [value for value in known if not 0 <= value < num_labels]
        setting: dict[str, Any] = {}
        detail = ", ".join(map(format_number, values[:5])) + ", ..." * (len(values) > 5)
        if values == [num_labels]:
            setting = {"offset": -1} | ({"ignore": [0]} if known[0] == 0 else {})
            detail += f", if classes count from 1; else `num_labels` is {num_labels + 1}"
        elif num_labels == 2 and known[0] >= 0 and 200 < stored[-1] < 256:
            levels = [value for value in stored if 0 < value < stored[-1]]
            setting = ({"ignore": levels} if len(levels) == 1 else {}) | _LEVELS
        elif num_labels == 2 and known[0] == 0 and len(known) == 2:
            setting = {"scale": 1 / known[1]}
        elif len(values) <= 2 and all(value < 0 or value > 200 for value in values):
            setting = {"ignore": values}
        else:
            detail += "; `classes` in `columns`, such as {7: 0, 8: 1}, turns stored ids into class ids"
        return [Suspicion("not class ids", _shares(wrong), setting, detail)]
    found = []
    if stored == [0, IGNORE_INDEX]:
        shares = _shares([label == IGNORE_INDEX for label in labels])
        found.append(Suspicion(TWO_LEVELS, shares, _LEVELS, only=(0, IGNORE_INDEX) if num_labels == 2 else ()))
    between = [_count_between(label[0]) for label in labels]
    if sum(inside for inside, _ in between) > 0.08 * max(1, sum(total for _, total in between)):
        shares = [inside / label.size for (inside, _), label in zip(between, labels)]
        if np.mean(shares) > 0.001:
            what = "ids between the ids of their neighbours, as JPEG and smooth resizing make them"
            found.append(Suspicion(what, shares, detail="save maps as PNG, and resize them to the nearest"))
    is_given = num_labels < IGNORE_INDEX
    if len(labels) >= ENOUGH_MAPS and is_given and known and 2 * (known[-1] + 1) <= num_labels:
        detail = f"the largest is {known[-1]}, `num_labels` is {num_labels}"
        found.append(Suspicion("most class ids do not occur", [1.0] * len(labels), detail=detail))
    return found


def _count_between(ids: np.ndarray) -> tuple[int, int]:
    """How many pixels of `(height, width)` have a value strictly between two different opposite neighbours.

    Second, how many have two different opposite neighbours. True class ids are in order by chance only.
    """
    inside = total = 0
    ids = ids.astype(np.int32)
    for one, middle, other in ((ids[:, :-2], ids[:, 1:-1], ids[:, 2:]), (ids[:-2], ids[1:-1], ids[2:])):
        differ = (one != other) & (np.maximum(np.maximum(one, middle), other) != IGNORE_INDEX)
        total += int(differ.sum())
        inside += int((differ & ((one < middle) == (middle < other)) & (one != middle) & (middle != other)).sum())
    return inside, total


def _suspicious_depth(labels: list[np.ndarray], _) -> list[Suspicion]:
    wrong = [depth < 0 for depth in labels]
    negative = _values([depth[mask] for depth, mask in zip(labels, wrong)])
    if negative:
        setting = {"invalid": negative} if len(negative) <= 2 else {}
        return [Suspicion("depths below 0", _shares(wrong), setting, f"{negative[0]:g}")]
    far, backgrounds, medians = [0.0] * len(labels), [], [0.0] * len(labels)
    for index, depth in enumerate(labels):
        values, counts = np.unique(depth[(depth != 0) & (depth != IGNORE_INDEX)], return_counts=True)
        is_repeated = len(values) > 1 and counts[-1] > 0.005 * counts.sum()
        # or the largest number of 16 bits, in one of the usual units
        if is_repeated and (values[-1] > max(3 * values[-2], 50) or np.isclose(values[-1], _FULL_16_BITS).any()):
            far[index] = counts[-1].item() / depth.size
            backgrounds.append(values[-1].item())
            values, counts = values[:-1], counts[:-1]
        if len(values):
            medians[index] = values[np.searchsorted(counts.cumsum(), counts.sum() / 2)].item()
    found = []
    if backgrounds:
        setting = {"invalid": sorted(set(backgrounds))} if len(set(backgrounds)) <= 2 else {}
        what = "a depth far beyond all others, as of a background"
        found.append(Suspicion(what, far, setting, f"{backgrounds[0]:.7g}"))
    largest = max(medians)
    if largest > FARTHEST_MEDIAN:
        unit = {"scale": 0.001 if largest > 800 else 0.01}
        what = "not in metres? (`scale` is 0.001 for millimetres, 0.01 for centimetres)"
        shares = [float(median > FARTHEST_MEDIAN) for median in medians]
        found.append(Suspicion(what, shares, unit, f"the largest median is {largest:.6g}"))
    return found


def _suspicious_normals(labels: list[np.ndarray], _) -> list[Suspicion]:
    maps = [_decode_normals(label) if label.dtype == np.uint8 else label for label in labels]
    known = [~_is_unknown_normal(normals)[0] for normals in maps]
    lengths = [np.sqrt(np.square(normals).sum(axis=0)) for normals in maps]
    medians = [np.median(length[mask]) if mask.any() else 1.0 for length, mask in zip(lengths, known)]
    wrong = [mask & (np.abs(length - 1) > 0.2) for length, mask in zip(lengths, known)]
    # Maps that were resized have shorter vectors at creases; 8 bits keep length 1 to within 0.01.
    worst = float(max(medians, key=lambda median: abs(median - 1)))
    if abs(worst - 1) > 0.05 or np.mean(_shares(wrong)) > 0.01:
        off = [mask & (np.abs(length - 1) > 0.05) for length, mask in zip(lengths, known)]
        setting, detail = _length_setting(labels, off), f"a map's median length is {worst:.4g}"
        return [Suspicion("vectors are not of length 1", _shares(off), setting, detail)]
    turned_away = {convention: np.zeros(len(maps)) for convention in _CONVENTIONS}
    for index, (normals, mask) in enumerate(zip(maps, known)):
        rays = np.indices(mask.shape) - (np.array(mask.shape).reshape(2, 1, 1) - 1) / 2
        y, x = rays / max(mask.shape) * 2 * np.tan(np.pi / 6)  # across 60 degrees, about as most cameras have
        step = max(1, max(mask.shape) // 64)
        part = (slice(None, None, step),) * 2
        normals, mask, x, y = normals[(slice(None), *part)], mask[part], x[part], y[part]
        for order, signs in _CONVENTIONS:
            to_right, down, to_camera = (sign * normals[channel] for channel, sign in zip(order, signs))
            # Visible surfaces face the camera.
            turned_away[order, signs][index] = (mask & (to_camera - to_right * x - down * y < -0.1)).mean()
    own = turned_away[_CONVENTIONS[0]]
    order, signs = min(_CONVENTIONS, key=lambda convention: round(float(turned_away[convention].mean()), 3))
    if own.mean() > 0.01 and turned_away[order, signs].mean() < own.mean() / 3:
        what = "vectors that face away from the camera: x must point to the right, y down, z towards the camera"
        setting = {} if order == (0, 1, 2) else {"channel_order": list(order)}
        setting |= {} if min(signs) > 0 else {"scale": list(signs)}
        return [Suspicion(what, own.tolist(), setting)]
    return []


def _length_setting(labels: list[np.ndarray], wrong: list[np.ndarray]) -> dict[str, Any]:
    """The setting that gives the wrong vectors length 1, or leaves them out."""
    vectors = np.concatenate([label[:, mask] for label, mask in zip(labels, wrong)], axis=1)
    if vectors.dtype != np.uint8:
        for white in (1, 255, 65535):
            setting = {"scale": 2 / white, "offset": -1.0}
            lengths = np.linalg.norm(setting["scale"] * vectors + setting["offset"], axis=0)
            if abs(np.median(lengths) - 1) < 0.05:
                return setting
    values, counts = np.unique(vectors, axis=1, return_counts=True)
    most = values[:, counts.argmax()]
    # `invalid` is one value for all channels.
    return {"invalid": [most[0].item()]} if (most == most[0]).all() and counts.max() > counts.sum() / 2 else {}


def _suspicious_strengths(labels: list[np.ndarray], _) -> list[Suspicion]:
    values = _values(labels)
    known = [value for value in values if value != IGNORE_INDEX]
    smallest, largest = (known[0], known[-1]) if known else (0, 0)
    positive = _shares([label > 0 for label in labels])
    if labels[0].dtype != np.uint8:
        if not 0 <= smallest <= largest <= 1:
            wrong = _shares([((label < 0) | (label > 1)) & (label != IGNORE_INDEX) for label in labels])
            return [Suspicion("not strengths", wrong, _LEVELS if 0 <= smallest <= largest < 256 else {})]
        if values == [0, IGNORE_INDEX]:
            return [Suspicion(TWO_LEVELS, positive, _LEVELS, only=(0, IGNORE_INDEX))]
        full = 1
    else:
        if 0 < largest <= 25:
            setting, detail = {"scale": 255 // largest}, f"the largest is {largest:g} of 255"
            return [Suspicion("weak strengths", positive, setting, detail, (0, 1) if values == [0, 1] else ())]
        full = 255
    inverted = [(label > full / 2) & (label <= full) for label in labels]
    if np.mean(_shares(inverted)) > 0.5:
        return [Suspicion("most pixels are on boundaries", _shares(inverted), {"scale": -1, "offset": 1})]
    return []


TASK_KINDS: dict[str, TaskKind] = {
    # class ids: int64, argmax over the classes
    "segmentation": TaskKind(
        num_logits=None,
        label_dtype=torch.int64,
        defaults={"loss_weight": 1.0, "id2label": None, "ignore_empty": False},
        activation=lambda logits: logits.argmax(dim=1),
        confidence=lambda logits: logits.softmax(dim=1).amax(dim=1),
        confidence_is_probability=True,
        image_modes=_8_BIT,
        mode_hint="classes as colours need `colors` in their column",
        offences=lambda label, num_labels: _outside(label, 0, num_labels - 1),
        expected="class ids from 0 to {highest}, or 255",
        largest=None,
        find_suspicions=_suspicious_ids,
        colorize=_color_labels,
        value_range=(0, 255),
        legend="classes",
        prediction="class of each pixel",
        pipeline_tag="image-segmentation",
    ),
    # 0 background, 1 salient; predicted as the probability of 1
    "saliency": TaskKind(
        num_logits=2,
        label_dtype=torch.int64,
        defaults={"loss_weight": 5.0},
        activation=lambda logits: logits.softmax(dim=1)[:, 1],
        confidence=lambda logits: logits.softmax(dim=1).amax(dim=1),
        confidence_is_probability=True,
        image_modes=_8_BIT,
        mode_hint="classes as colours need `colors` in their column",
        offences=lambda label, _: _outside(label, 0, 1),
        expected="0, 1 or 255",
        largest=1,
        find_suspicions=lambda labels, _: _suspicious_ids(labels, 2),
        colorize=_color_gray,
        value_range=(0, 1),
        legend="scale",
        prediction="probability that a pixel is salient",
        pipeline_tag="image-segmentation",
    ),
    # metres along the optical axis; 0 is unknown. An image enlarged twice shows what would be seen from half as far.
    "depth": TaskKind(
        num_logits=1,
        label_dtype=torch.float32,
        defaults={"loss_weight": 1.0, "log_loss": False, "gradient_weight": 0.0},
        label_padding=0.0,
        activation=lambda logits: logits[:, 0].clamp(min=0),
        confidence=_nearness_and_evenness,
        confidence_is_probability=False,
        image_modes=("F",),  # the unit of integers would be unknown
        mode_hint="integers need the `scale` of their column: 0.001 (millimetres), 0.01 (centimetres), 0.00390625 "
        "(1/256, as in KITTI) or 0.0002 (1/5000, as in TUM)",
        offences=lambda depth, _: depth[depth < 0],
        expected="metres of at least 0",
        largest=float("inf"),
        find_suspicions=_suspicious_depth,
        unknown=lambda depth: (depth == 0) | (depth == IGNORE_INDEX),
        rescale=lambda depth, scale: depth / scale,
        colorize=_color_viridis,
        value_range=None,
        legend="scale",
        prediction="metres",
        pipeline_tag="depth-estimation",
        unit="m",
    ),
    # unit vectors in the camera frame; 8-bit images hold (n + 1) / 2 * 255; zero vectors, there (0, 0, 0), are unknown
    "normals": TaskKind(
        num_logits=3,
        label_dtype=torch.float32,
        label_channels=3,
        defaults={"loss_weight": 10.0},
        label_padding=0.0,
        activation=lambda logits: F.normalize(logits, dim=1),
        confidence=_smoothness,
        confidence_is_probability=False,
        decode=_decode_normals,
        image_modes=("RGB",),
        offences=_wrong_lengths,
        expected="vectors of length 1 or 0",
        largest=1,
        find_suspicions=_suspicious_normals,
        unknown=_is_unknown_normal,
        flip=_mirror_x,
        colorize=_color_normals,
        value_range=(-1, 1),
        legend="directions",
        prediction="unit vectors in the camera frame",
        pipeline_tag="image-to-image",
    ),
    # boundary strength in [0, 1]; 8-bit images hold it times 255
    "boundary": TaskKind(
        num_logits=1,
        label_dtype=torch.float32,
        defaults={"loss_weight": 50.0, "pos_weight": 0.95},
        activation=lambda logits: logits[:, 0].sigmoid(),
        confidence=lambda logits: logits[:, 0].abs().sigmoid(),
        confidence_is_probability=True,
        decode=lambda image: image / np.float32(255),
        image_modes=(*_8_BIT, "F"),
        mode_hint="16 bits need the `scale` 0.000015259 in their column",
        offences=lambda strength, _: _outside(strength, 0, 255 if strength.dtype == np.uint8 else 1),
        expected="strengths from 0 to 1, or 255",
        largest=1,
        find_suspicions=_suspicious_strengths,
        colorize=_color_gray,
        value_range=(0, 1),
        legend="scale",
        prediction="probability that a pixel is on a boundary",
        pipeline_tag="image-to-image",
        thin=True,
    ),
}


def task_of_kind(kind: str, kinds: dict[str, str], task: str | None, setting: str) -> str:
    """The only task of a kind, or the chosen one of several.

    Args:
        kind: of the task.
        kinds: task -> kind, of all tasks.
        task: the chosen task, or `None`.
        setting: name of the setting that chooses it.

    Raises:
        ValueError: no task is of this kind, or several are and none is chosen, or the chosen one is of another kind.
    """
    candidates = [name for name, other in kinds.items() if other == kind]
    if not candidates:
        raise ValueError(f"no task is of the kind {kind!r}; the tasks and their kinds are {kinds}")
    if task is None and len(candidates) == 1:
        return candidates[0]
    if task not in candidates:
        raise ValueError(f"`{setting}` must be one of the tasks of the kind {kind!r}, {candidates}, got {task!r}")
    return task
