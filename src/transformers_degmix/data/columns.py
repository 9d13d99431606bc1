"""Reads rows of any data set for training: an image, and a label map or `None` per task.

The mapping is given as data (`TrainingArguments.columns`), for example

    image: {scale: 255}                             # floats in 0..1
    semseg: {column: segmentation, ignore: -1}      # -1 marks pixels without a class
    depth: {scale: 0.001, invalid: 0}               # 16-bit PNG in millimetres, 0 where nothing was measured
    normals: {channel_order: [2, 1, 0]}             # stored as z, y, x
    parts: {classes: {7: 0, 8: 1}, resize: true}    # only ids 7 and 8 are classes; the map has another size
    things: {colors: [[0, 0, 0], [128, 64, 128]]}   # classes 0 and 1 as colours

and is applied to each row when it is read.
"""

import math
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from errno import ENAMETOOLONG
from io import BytesIO
from typing import Any

import numpy as np
import torch
from datasets import Features
from datasets.utils.file_utils import xopen
from PIL import Image
from torch import Tensor

from ..images_degmix import Size, decode_image, image_size, nearest, orientation_of, stored_values, to_label, to_pixels
from ..tasks import IGNORE_INDEX, TASK_KINDS, TaskKind, format_fields
from .collator import read_label


_NOT_NUMBERS = ("colors", "classes", "resize", "ignore_orientation")
# Fields that users cannot give
_CONCLUDED = {"rounds", "expected"}
# Errors of a cell that cannot be read later either, unlike those of connections and disks
_LASTING = (
    *(ValueError, TypeError, KeyError),
    *(FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError),
)


@dataclass(frozen=True)
class Column:
    """The column of a task's maps, or of the images, and the meaning of its values.

    Attributes:
        column: name of the column.
        ignore: stored values, usually class ids, of pixels without a label.
        invalid: the same, usually for measurements. Both become the unknown label of the task's kind: 0 for depth, the
            zero vector for normals, otherwise 255. A pixel of normals must have the value in all three channels.
        scale, offset: the value is the stored one (decoded by [`to_label`] in 8-bit maps) times `scale` plus `offset`;
            one number, or one per channel. Class ids are rounded. A stored unknown label stays unknown. An exception
            is 255, which is a value if decoding or `scale` turns it into one that a label can have.
        channel_order: for each of the three channels, its position among the stored ones; `(2, 1, 0)` reads BGR.
            The shape tells whether channels come first or last.
        colors: (red, green, blue) of each class id, in order. Other colours are refused. `ignore` and `classes` then
            refer to these ids.
        classes: stored id -> class id. Pixels with other ids have no label. `scale` and `offset` then apply to the
            class ids.
        resize: whether maps are resized to the size of their image, by taking the nearest pixels.
        ignore_orientation: for images, whether the orientation in their EXIF data is ignored.
        rounds: for class ids, whether `scale` or `offset` is given, even as 1 or 0. Otherwise fractions are refused.
        expected: the only stored values that are accepted, if other fields were concluded from samples, not given.
    """

    column: str
    ignore: tuple[float, ...] = ()
    invalid: tuple[float, ...] = ()
    scale: tuple[float, ...] = (1.0,)
    offset: tuple[float, ...] = (0.0,)
    channel_order: tuple[int, ...] = (0, 1, 2)
    colors: tuple[tuple[int, ...], ...] = ()
    classes: dict[int, int] = field(default_factory=dict)
    resize: bool = False
    ignore_orientation: bool = False
    rounds: bool = False
    expected: tuple[float, ...] = ()

    @property
    def changes_values(self) -> bool:
        return self != Column(self.column)

    def mended(self, setting: dict[str, Any]) -> "Column":
        """This column with the setting of a [`Suspicion`], which applies to the values that this column gives."""
        scale, offset = (np.array(setting.get(name, default)) for name, default in (("scale", 1.0), ("offset", 0.0)))
        order = list(setting.get("channel_order", (0, 1, 2)))
        own_scale, own_offset = (
            np.array(numbers)[order if len(numbers) == 3 else [0]] for numbers in (self.scale, self.offset)
        )
        stored = {
            name: getattr(self, name) + tuple((value - self.offset[0]) / self.scale[0] for value in setting[name])
            for name in {"ignore", "invalid"} & set(setting)
        }
        return replace(
            self,
            scale=tuple((own_scale * scale).ravel().tolist()),
            offset=tuple((own_offset * scale + offset).ravel().tolist()),
            channel_order=tuple(self.channel_order[index] for index in order),
            ignore_orientation=setting.get("ignore_orientation", self.ignore_orientation),
            **stored,
        )

    def given(self, name: str) -> dict[str, Any]:
        """What `columns` must say under `name` for this column."""
        plain = Column(name)
        given = {
            field.name: getattr(self, field.name)
            for field in fields(Column)
            if field.name not in _CONCLUDED and getattr(self, field.name) != getattr(plain, field.name)
        }
        # Either of the two rounds.
        return given | ({"scale": self.scale} if self.rounds and "offset" not in given else {})

    def apply(self, values: Tensor) -> Tensor:
        """Puts values `(channels, height, width)` into the right order, scale and offset."""
        if len(values) == len(self.channel_order):
            values = values[list(self.channel_order)]
        if self.scale == (1.0,) and self.offset == (0.0,):
            return values
        scale, offset = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (self.scale, self.offset))
        return values * scale + offset


def parse_columns(columns: dict[str, Any], tasks: dict[str, dict[str, Any]]) -> dict[str, Column]:
    """`"image"` or task -> its column. Columns that are not mentioned have the name of the task.

    Args:
        columns: `"image"` or task -> column name, or fields of [`Column`], or one. Other tasks are left out.
        tasks: `DeGMixConfig.tasks`.

    Raises:
        ValueError: a field or a value is not allowed; the message names it and what is allowed.
    """
    kinds = {"image": None, **{name: TASK_KINDS[task["kind"]] for name, task in tasks.items()}}
    parsed = {name: _parse_column(name, columns.get(name, name), kind) for name, kind in kinds.items()}
    for name, task in tasks.items():
        num_labels = TASK_KINDS[task["kind"]].num_logits or task.get("num_labels") or IGNORE_INDEX
        _check_tables(name, parsed[name], num_labels)
    return parsed


def _check_tables(name: str, column: Column, num_labels: int):
    """Raises ValueError if `classes` or `colors` make class ids that the task does not have."""
    table = "classes" if column.classes else "colors"
    absent = column.ignore + column.invalid
    ids = column.classes or {index: index for index in range(len(column.colors)) if index not in absent}
    for stored, meant in ids.items():
        made = round(meant * column.scale[0] + column.offset[0])
        if meant != IGNORE_INDEX and not 0 <= made < num_labels:
            raise ValueError(
                f"`columns[{name!r}]` turns {stored} in `{table}` into the class id {made}, but the task has "
                f"{num_labels} classes: expected ids from 0 to {num_labels - 1}, or 255 for pixels without a label"
            )


def _parse_column(name: str, given: str | dict[str, Any] | Column, kind: TaskKind | None) -> Column:
    where = f"`columns[{name!r}]`"
    if isinstance(given, Column):
        return given
    if isinstance(given, str):
        return Column(given)
    if not isinstance(given, dict):
        raise ValueError(f"{where} must be the name of a column or a dictionary, got {given!r}")
    num_channels = kind.label_channels if kind else 3
    refused = _CONCLUDED | ({"ignore_orientation"} if kind else {"ignore", "invalid", "resize"})
    are_ids = kind is not None and kind.has_class_ids
    if not are_ids:
        refused |= {"colors", "classes"}
    if num_channels == 1:
        refused.add("channel_order")
    check_fields(where, given, [field.name for field in fields(Column) if field.name not in refused])
    column = given.get("column", name)
    if not isinstance(column, str):
        raise ValueError(f"{where} must have the name of a column as `column`, got {column!r}")
    others: dict[str, Any] = {key: given[key] for key in _NOT_NUMBERS if key in given}
    numbers: dict[str, Any] = {
        key: _numbers(where, key, given[key]) for key in given if key != "column" and key not in others
    }
    for key in {"scale", "offset"} & set(numbers):
        if len(numbers[key]) not in (1, num_channels) or not all(map(math.isfinite, numbers[key])):
            raise ValueError(f"{where} must have 1 or {num_channels} finite numbers as `{key}`, got {given[key]!r}")
    if "channel_order" in numbers:
        if sorted(numbers["channel_order"]) != [0, 1, 2]:
            raise ValueError(f"{where} must have 0, 1 and 2 as `channel_order`, got {given['channel_order']!r}")
        numbers["channel_order"] = tuple(int(index) for index in numbers["channel_order"])
    for flag in {"resize", "ignore_orientation"} & set(others):
        if not isinstance(others[flag], bool):
            raise ValueError(f"{where} must have true or false as `{flag}`, got {others[flag]!r}")
    try:
        if "colors" in others:
            others["colors"] = tuple(tuple(map(_integer, color)) for color in others["colors"])
            if any(len(color) != 3 or not 0 <= min(color) <= max(color) <= 255 for color in others["colors"]):
                raise ValueError
            if len(set(others["colors"])) < len(others["colors"]):
                raise ValueError
        if "classes" in others:
            others["classes"] = {_integer(stored): _integer(meant) for stored, meant in others["classes"].items()}
    except (AttributeError, TypeError, ValueError):
        raise ValueError(
            f"{where} must have different colours as `colors`, such as [[0, 0, 0], [128, 64, 128]], and a table as "
            f"`classes`, such as {{7: 0, 8: 1}}, got {given!r}"
        ) from None
    return Column(column, rounds=are_ids and not {"scale", "offset"}.isdisjoint(given), **numbers, **others)


def check_fields(where: str, given: Iterable[str], allowed: Collection[str]):
    """Raises ValueError if some of the given fields are not allowed. `where` is the subject of its message."""
    unknown = [name for name in given if name not in allowed]
    if unknown:
        raise ValueError(f"{where} has unknown fields {unknown}; allowed are {list(allowed)}")


def _numbers(where: str, field: str, value: Any) -> tuple[float, ...]:
    """A number or a list of them, as a tuple."""
    try:
        return tuple(map(_number, value if isinstance(value, list) else [value]))
    except (TypeError, ValueError):
        raise ValueError(f"{where} must have a number or a list of them as `{field}`, got {value!r}") from None


def _number(value: Any) -> float:
    """Raises TypeError or ValueError for everything else, booleans included. Texts are allowed, such as "1e-3"."""
    if isinstance(value, bool):
        raise TypeError
    return float(value)


def _integer(value: Any) -> int:
    """The same for whole numbers."""
    number = _number(value)
    if not number.is_integer():
        raise ValueError
    return int(number)


def describe_column(name: str, column: Column) -> str:
    return f"column {column.column!r}" + ("" if name == column.column else f" (for {name!r})")


class RowReader:
    """Row of a data set -> `{"image": ..., task: ..., "image_id": ...}`.

    Images and maps that the mapping does not change stay images or arrays, which the collator checks. Other images
    become float32 arrays `(channels, height, width)`. Other labels become tensors of `TaskKind.label_dtype`,
    `(height, width)` or, for normals, `(3, height, width)`. A label that is null is `None`.

    Args:
        tasks: `DeGMixConfig.tasks`.
        columns: `TrainingArguments.columns`.
        features: of the data set; they tell the dtype of its arrays, and how to decode its images.
    """

    def __init__(
        self, tasks: dict[str, dict[str, Any]], columns: dict[str, Any] | None = None, features: Features | None = None
    ):
        self.tasks = tasks
        self.kinds = {name: TASK_KINDS[task["kind"]] for name, task in tasks.items()}
        self.columns = parse_columns(columns or {}, tasks)
        # Columns whose values the user has explained.
        self.explained = {
            name
            for name, given in (columns or {}).items()
            if isinstance(given, dict) and set(given) - {"column", "resize"}
        }
        # Tasks of two classes for which neither the user nor a sample has told whether 255 is class 1 or unlabelled.
        self.ambiguous: set[str] = set()
        self.features = features or {}

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Image and labels of a row.

        Raises:
            ValueError: a value cannot be read as the mapping says; the message names column, task and `image_id`.
        """
        image = self.read_image(row)
        size = image_size(image)
        labels = {task: self.read_label(row, task, size) for task in self.kinds}
        for task, label in labels.items():
            if label is not None and (self.columns[task].changes_values or task in self.ambiguous):
                with self._naming(row, task):
                    self._check(label, task, size)  # the collator does not know what was stored
        image_id = row.get("image_id")
        return {"image": image, **labels, **({} if image_id is None else {"image_id": str(image_id)})}

    def read_image(self, row: dict[str, Any]) -> Image.Image | np.ndarray:
        """The image of a row.

        Raises:
            ValueError: there is no image, or an array does not have the shape of an image.
        """
        column = self.columns["image"]
        with self._naming(row, "image"):
            stored = self._stored(row, column)
            if stored is None:
                raise ValueError("there is no image")
            if not column.changes_values:
                return stored
            pixels = to_pixels(stored, do_convert_rgb=True)
            return column.apply(torch.from_numpy(pixels)).numpy()

    def read_file(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """The `bytes` and `path` of the image file in a row, or `None` if the row has an array or nothing.

        Raises:
            ValueError: there is no such file, or it must not be read.
            OSError: it cannot be read now, for example because a connection is lost.
        """
        stored: Any = row.get(self.columns["image"].column)
        if not _is_file(stored):
            return None
        with self._naming(row, "image"):
            try:
                content = _read_file(stored)
            except Exception as error:  # file systems raise any type
                # For lost connections too, fsspec raises FileNotFoundError.
                reason = error.__cause__ if isinstance(error.__cause__, OSError) else error
                is_lasting = isinstance(reason, _LASTING) or getattr(reason, "errno", None) == ENAMETOOLONG
                raise (ValueError if is_lasting else OSError)(f"cannot read the image: {error}") from error
        if content.startswith(np.lib.format.MAGIC_PREFIX):
            return None
        return {"bytes": content, "path": stored.get("path") if isinstance(stored, dict) else None}

    def file_facts(self, row: dict[str, Any], name: str) -> tuple[str | None, int]:
        """Format (`None` if it is not an image file) and EXIF orientation (1 is upright) of what a column holds."""
        try:
            image = Image.open(BytesIO(_read_file(row[self.columns[name].column])))
        except Exception:  # PIL's decoders raise any type
            return None, 1
        return image.format, orientation_of(image)

    def read_label(self, row: dict[str, Any], task: str, size: Size) -> Image.Image | np.ndarray | Tensor | None:
        """The label map of a task, for an image of `size`, or `None`.

        Raises:
            ValueError: the mapping changes its values, and it has another size, another number of channels, or NaN or
                infinite values that are not `invalid`.
        """
        column, kind = self.columns[task], self.kinds[task]
        with self._naming(row, task):
            stored = self._stored(row, column)
            if stored is None or not column.changes_values:
                return stored
            return _change_label(stored, column, kind, size, self.tasks[task].get("num_labels") or IGNORE_INDEX)

    def read_checked(self, row: dict[str, Any], task: str, size: Size) -> np.ndarray | None:
        """The label of a task for an image of `size`, as [`~data.collator.read_label`] gives it, or `None`.

        Raises:
            ValueError: training would refuse it.
        """
        label = self.read_label(row, task, size)
        if label is None:
            return None
        with self._naming(row, task):
            return self._check(label, task, size)

    def _check(self, label: Image.Image | np.ndarray | Tensor, task: str, size: Size) -> np.ndarray:
        fields, column, kind = self.tasks[task], self.columns[task], self.kinds[task]

        def describe(setting: dict[str, Any]) -> str:
            return format_fields(column.mended(setting).given(column.column))

        checked = read_label(label, fields["kind"], size, fields.get("num_labels"), describe)
        for suspicion in kind.find_suspicions([checked], 2) if task in self.ambiguous else ():
            if suspicion.only:
                raise ValueError(
                    "0 and 255 are the only values, and the samples read first do not tell what 255 means: say in "
                    f"`columns` `{describe(suspicion.setting)}` if it is class 1, or "
                    f"`{describe({'ignore': [IGNORE_INDEX]})}` if it is unlabelled"
                )
        return checked

    def _stored(self, row: dict[str, Any], column: Column) -> Image.Image | np.ndarray | None:
        """What a row has in a column: an image, an array, or nothing."""
        stored, feature = row.get(column.column), self.features.get(column.column)
        # `datasets` makes NaN of null in NumPy's format.
        is_nan = isinstance(stored, np.ndarray) and stored.dtype.kind == "f" and np.isnan(stored).all()
        if stored is None or is_nan:
            return None
        if isinstance(stored, dict) and all(value is None for value in stored.values()):
            return None
        if _is_file(stored):
            # Columns without the feature `Image` can hold files too.
            stored = _decode(stored, column.ignore_orientation)
            mode = getattr(feature, "mode", None)
            stored = stored.convert(mode) if mode and isinstance(stored, Image.Image) else stored
        elif isinstance(stored, list | np.ndarray):
            # Lists have no dtype, and NumPy's format widens integers: 8-bit maps would not be recognised.
            dtype = getattr(leaf_feature(feature), "dtype", None)
            stored = np.asarray(stored, dtype=None if dtype in ("binary", "string", "null") else dtype)
            if stored.dtype.kind not in "biuf":
                raise ValueError(f"expected an array of numbers, got one of {stored.dtype}")
        elif isinstance(stored, str):
            raise ValueError(
                f"expected an image or an array, got the text {stored[:40]!r}. If it is the name of a file, call the "
                f"column {column.column + '_file_name'!r} in metadata.jsonl, or save the data set after "
                f"`cast_column({column.column!r}, datasets.Image())`; if it is base64, store the bytes"
            )
        elif not isinstance(stored, Image.Image):
            raise ValueError(
                f"expected an image, an array, or a file as bytes or {{bytes, path}}, got a {type(stored).__name__}"
            )
        if isinstance(stored, np.ndarray) and stored.ndim not in (2, 3):
            raise ValueError(f"expected an array with height and width, got one of the shape {stored.shape}")
        return stored

    @contextmanager
    def _naming(self, row: dict[str, Any], name: str) -> Iterator[None]:
        """Errors inside name the column, and the row if it has an `image_id`."""
        try:
            yield
        except (TypeError, ValueError) as error:
            where = "" if row.get("image_id") is None else f"{str(row['image_id'])!r}, "
            raise ValueError(f"{where}{describe_column(name, self.columns[name])}: {error}") from error


def _is_file(stored: Any) -> bool:
    """Whether a cell holds a file, or says where it is."""
    is_dict = isinstance(stored, dict)
    return isinstance(stored, bytes) or (is_dict and any(stored.get(key) is not None for key in ("bytes", "path")))


def _decode(stored: bytes | dict[str, Any], ignore_orientation: bool) -> Image.Image | np.ndarray:
    """The image or NumPy array in the file of a cell."""
    try:
        content = _read_file(stored)
        if content.startswith(np.lib.format.MAGIC_PREFIX):
            return np.load(BytesIO(content), allow_pickle=False)
        return decode_image(BytesIO(content), ignore_orientation=ignore_orientation)
    except Exception as error:  # file systems raise any type
        source = f" {stored['path']}" if isinstance(stored, dict) and stored.get("path") else ""
        raise ValueError(f"cannot read the image{source}: {error}") from error


def _read_file(stored: bytes | dict[str, Any]) -> bytes:
    if isinstance(stored, bytes):
        return stored
    if stored.get("bytes") is not None:
        return stored["bytes"]
    with xopen(stored["path"], "rb") as file:
        return file.read()


def _change_label(
    stored: Image.Image | np.ndarray, column: Column, kind: TaskKind, size: Size, num_labels: int
) -> Tensor:
    """Stored map -> label of an image of `size`, `(height, width)` or `(3, height, width)`."""
    if column.colors:
        values = _ids_of_colors(stored, column.colors)
    else:
        values = stored_values(stored, kind)
        if isinstance(stored, Image.Image) and values.ndim != (2 if kind.label_channels == 1 else 3):
            raise ValueError(f"expected {kind.label_channels} channel(s), got an image of mode {stored.mode}")
    if column.resize:
        is_first = values.ndim == 3 and values.shape[0] == kind.label_channels
        height, width = values.shape[1:] if is_first else values.shape[:2]
        rows, columns = nearest(height, size[0])[:, None], nearest(width, size[1])
        values = values[:, rows, columns] if is_first else values[rows, columns]
    if column.expected:
        if values.dtype == bool:
            return to_label(values, kind, size)[0]
        others = values[~_equals_any(values, column.expected)]
        if len(others):
            expected = " or ".join(f"{value:g}" for value in column.expected)
            raise ValueError(
                f"expected only {expected}, as in the samples read first, got {others[0]:g}; say in `columns` "
                "what the values mean, such as `ignore: 255` or `scale: 1`"
            )
    absent = _equals_any(values, column.ignore + column.invalid)
    if column.classes:
        found, is_known = _find(values, np.array([*column.classes]))
        absent |= ~is_known
        values = np.array([*column.classes.values()])[found]
    # Absent values may be unreadable, such as NaN, so 0 replaces them. Ids are rounded after `scale` and `offset`.
    exact = replace(kind, label_dtype=torch.float64) if column.rounds else kind
    decoded = to_label(np.where(absent, values.dtype.type(0), values), exact, size)
    label = column.apply(decoded)
    if kind.has_class_ids:
        label = label.round()
    unlabelled = to_label(absent, kind, size).bool().all(dim=0)
    # The unknown label stays unknown, but 255 is a value if decoding or `scale` turns it into one.
    code = to_label(np.full((kind.label_channels, 1, 1), IGNORE_INDEX, values.dtype), kind, (1, 1))
    largest = num_labels - 1 if kind.largest is None else kind.largest
    is_code = to_label(values == IGNORE_INDEX, kind, size).bool()
    unlabelled |= kind.unknown(decoded.masked_fill(is_code, 1))[0]
    if ((code == IGNORE_INDEX).any() and column.scale == (1.0,)) or column.apply(code).abs().max() > largest + 0.5:
        unlabelled |= is_code.any(dim=0)
    label = label.masked_fill(unlabelled, kind.label_padding).to(kind.label_dtype)
    return label if kind.label_channels > 1 else label[0]


def _ids_of_colors(stored: Image.Image | np.ndarray, colors: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """Image or array of colours -> the index of each pixel's colour, `(height, width)`."""
    pixels = np.asarray(stored.convert("RGB") if isinstance(stored, Image.Image) else stored)
    if pixels.ndim == 3 and pixels.shape[0] == 3:
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim != 3 or pixels.shape[-1] != 3:
        raise ValueError(f"expected three channels of colours, got the shape {pixels.shape}")
    weights = np.array([65536, 256, 1])
    ids, is_known = _find(pixels @ weights, np.array(colors) @ weights)
    if not is_known.all():
        raise ValueError(
            f"the colour {pixels[~is_known][0].tolist()} is not one of the {len(colors)} `colors`; "
            f"{1 - is_known.mean():.1%} of the pixels have such colours; if it means unlabelled, add it, and its "
            "index to `ignore`"
        )
    return ids


def _find(values: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The index of each value in a table without duplicates, and whether it is there; if not, any index."""
    order = np.argsort(table)
    found = order[np.searchsorted(table, values, sorter=order).clip(max=len(table) - 1)]
    return found, table[found] == values


def _equals_any(values: np.ndarray, numbers: tuple[float, ...]) -> np.ndarray:
    """Boolean array: where `values` are one of the numbers, NaN included."""
    found = np.zeros(values.shape, bool)
    for number in numbers:
        found |= np.isnan(values) if math.isnan(number) else values == number
    return found


def leaf_feature(feature: Any) -> Any:
    """The feature inside nested lists."""
    while hasattr(feature, "feature"):
        feature = feature.feature
    return feature
