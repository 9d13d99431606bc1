"""The schema of all data sets: one row per image, with a column for each task under the task's name.

| column | content |
| --- | --- |
| `image_id` | string, unique within its split |
| `image` | RGB image |
| a task of kind `segmentation` or `saliency` | PNG of mode L: class ids, 255 = ignored |
| `depth` | TIFF of mode F: 32-bit float metres, 0 = unknown |
| `normals` | RGB PNG: (n + 1) / 2 * 255 for the x, y and z component, (0, 0, 0) = unknown |
| `boundary` | PNG of mode L: strength times 255 |
| `<task>_classes` | segmentation with class names only: list of the classes present; its feature holds the names |

Predictions can be arrays of float16 in NumPy's file format (`.npy`): normals, where the zero vector is unknown; and
strengths of boundaries with unknown pixels, where 255 is unknown, because 8 bits have no code for it.
`<task>_confidence` is a PNG of mode L: confidence times 255.

Maps have the size of the upright image. (0, 0, 0) can mark unknown normals because it would mean (-1, -1, -1), far
from any unit vector. The code of the zero vector would be 127.5, which 8 bits do not have.
"""

from collections.abc import Collection
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
from PIL import Image

from ..images_degmix import orientation_of
from ..tasks import IGNORE_INDEX, TASK_KINDS, TaskKind
from .benchmarks import TASKS


UNKNOWN_NORMAL = (0, 0, 0)
# PIL's default
DEFAULT_COMPRESS_LEVEL = 6


class Source(Protocol):
    """What a data set is made from.

    Attributes:
        title: name of the data set.
        terms: where it comes from and under which terms, in words.
        columns: task -> what its column holds.
        tasks: name -> `kind` and, for segmentation, `id2label`.
        ids: split ("train", "validation") -> image ids.
    """

    title: str
    terms: str
    columns: dict[str, str]
    tasks: dict[str, dict[str, Any]]
    ids: dict[str, list[str]]

    def files(self, split: str, image_id: str) -> dict[str, Path]:
        """The files that belong to an image, whether they exist or not."""

    def read(self, split: str, image_id: str) -> tuple[bytes, dict[str, np.ndarray]]:
        """The encoded image, and per task the array for [`encode_row`].

        Raises:
            OSError: a file is missing or cannot be read.
            ValueError: a file is not what it should be; the message names it.
        """


def named_tasks(names: tuple[str, ...], classes: dict[str, tuple[str, ...]]) -> dict[str, dict[str, Any]]:
    """Entries of [`TASKS`] by name, with the class names from `classes`."""
    tasks = {name: dict(TASKS[name]) for name in names}
    for name, labels in classes.items():
        tasks[name]["id2label"] = dict(enumerate(labels))
    return tasks


def features_for(tasks: dict[str, dict[str, Any]], arrays: Collection[str] = ()) -> datasets.Features:
    """Columns of a data set with these tasks.

    Args:
        tasks: name -> `kind` and optionally `id2label`, as in `DeGMixConfig.tasks`.
        arrays: names of columns that hold float16 arrays.
    """
    return datasets.Features(
        {
            "image_id": datasets.Value("string"),
            **{name: datasets.Value("binary") if name in arrays else datasets.Image() for name in ("image", *tasks)},
            **{
                f"{name}_classes": datasets.List(datasets.ClassLabel(names=list(task["id2label"].values())))
                for name, task in tasks.items()
                if task.get("id2label")
            },
        }
    )


def encode_row(
    image_id: str, image: bytes, maps: dict[str, np.ndarray], tasks: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """A row of [`features_for`].

    Args:
        image_id: id of the image.
        image: an encoded RGB image, which is stored as it is.
        maps, tasks: as for [`encode_maps`].

    Raises:
        ValueError: the image is not RGB or, as its EXIF says, not upright, or a map has another size, dtype or values;
            the message names the column.
    """
    with Image.open(BytesIO(image)) as picture:
        mode, size, orientation = picture.mode, (picture.height, picture.width), orientation_of(picture)
    if mode != "RGB":
        raise ValueError(f"image: expected mode RGB, got {mode}")
    if orientation != 1:
        raise ValueError(f"image: expected EXIF orientation 1, got {orientation}: readers turn images, but not maps")
    return {"image_id": image_id, "image": {"bytes": image, "path": None}, **encode_maps(maps, size, tasks)}


def encode_maps(
    maps: dict[str, np.ndarray],
    size: tuple[int, int],
    tasks: dict[str, dict[str, Any]],
    compress_level: int = DEFAULT_COMPRESS_LEVEL,
) -> dict[str, Any]:
    """The columns of the tasks in a row of [`features_for`].

    Args:
        maps: task -> `(height, width)`, or `(height, width, 3)` for normals: uint8 as in the table above, or floating
            point metres for depth. Maps of float16 are stored as arrays.
        size: (height, width) of the image.
        tasks: as for [`features_for`].
        compress_level: of the PNG files, 0 to 9.

    Raises:
        ValueError: a map has another size, dtype or values; the message names the column.
    """
    row = {}
    for name, task in tasks.items():
        try:
            encoded = _encode_map(maps[name], size, task, compress_level)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        row[name] = encoded if encoded.startswith(np.lib.format.MAGIC_PREFIX) else {"bytes": encoded, "path": None}
        if task.get("id2label"):
            row[f"{name}_classes"] = np.setdiff1d(maps[name], IGNORE_INDEX).tolist()
    return row


def stored_prediction(prediction: np.ndarray, kind: TaskKind, unknown: np.ndarray, as_array: bool) -> np.ndarray:
    """A prediction as a label for [`encode_maps`].

    Args:
        prediction: `(height, width)` or `(3, height, width)`, see [`TaskKind`]. Probabilities of two classes become
            the likelier class.
        unknown: boolean `(height, width)`: pixels to mark as unknown. There must be none if the kind [`lacks_unknown`]
            and `as_array` is not set.
        as_array: whether to keep the values as float16 rather than code them in 8 bits.
    """
    values = prediction if kind.label_channels == 1 else np.moveaxis(prediction, 0, -1)
    if as_array:
        values = values.astype(np.float16)
    elif kind.has_class_ids:
        values = values.round().astype(np.uint8)
    elif kind.value_range and not stores_numbers(kind):
        low, high = kind.value_range
        values = ((values - low) / (high - low) * 255).round().astype(np.uint8)
    # The padding of normals is (0, 0, 0), like `UNKNOWN_NORMAL`.
    unknown = unknown.reshape(unknown.shape + (1,) * (values.ndim - 2))
    return np.where(unknown, values.dtype.type(kind.label_padding), values)


def lacks_unknown(kind: TaskKind) -> bool:
    """Whether 8-bit maps of a kind cannot say that a pixel is unknown."""
    return not kind.has_class_ids and kind.label_channels == 1 and not stores_numbers(kind)


def encode_confidence(confidence: np.ndarray, compress_level: int = DEFAULT_COMPRESS_LEVEL) -> dict[str, Any]:
    """`(height, width)` in [0, 1] -> the cell of `<task>_confidence`."""
    return encode_png(Image.fromarray((255 * confidence).round().astype(np.uint8)), compress_level)


def encode_png(image: Image.Image, compress_level: int = DEFAULT_COMPRESS_LEVEL) -> dict[str, Any]:
    """8-bit image -> a cell of [`features_for`]."""
    return {"bytes": _encode(image, "PNG", compress_level=compress_level), "path": None}


def stores_numbers(kind: TaskKind) -> bool:
    """Whether maps are stored as 32-bit numbers, without a code."""
    return kind.image_modes == ("F",)


def encode_normals(normals: np.ndarray) -> np.ndarray:
    """Unit vectors of any shape -> uint8."""
    return ((normals + 1) / 2 * 255).round().astype(np.uint8)


def _encode_map(values: np.ndarray, size: tuple[int, int], task: dict[str, Any], compress_level: int) -> bytes:
    kind = TASK_KINDS[task["kind"]]
    expected = size if kind.label_channels == 1 else (*size, kind.label_channels)
    if values.shape != expected:
        raise ValueError(f"expected the shape {expected} for an image of {size[0]} x {size[1]}, got {values.shape}")
    if values.dtype == np.float16:
        file = BytesIO()
        np.save(file, values)
        return file.getvalue()
    if stores_numbers(kind):
        return _encode(Image.fromarray(_checked_depth(values)), "TIFF")
    if values.dtype != np.uint8:
        raise ValueError(f"expected 8-bit values, got {values.dtype}")
    if kind.has_class_ids:
        num_labels = len(task["id2label"]) if task.get("id2label") else kind.num_logits
        if num_labels is not None:
            _check_ids(values, num_labels)
    return _encode(Image.fromarray(values), "PNG", compress_level=compress_level)


def _checked_depth(depth: np.ndarray) -> np.ndarray:
    if not np.issubdtype(depth.dtype, np.floating):
        raise ValueError(f"expected floating point metres, got {depth.dtype}")
    if not np.isfinite(depth).all():
        raise ValueError("expected finite values, got NaN or infinity")
    if depth.min() < 0:
        raise ValueError(f"expected values of 0 or more, got {depth.min()}")
    # 255 itself would be read as `IGNORE_INDEX`; the next smaller float32 is 0.015 mm away.
    depth = depth.astype(np.float32)
    return np.where(depth == IGNORE_INDEX, np.nextafter(np.float32(IGNORE_INDEX), np.float32(0)), depth)


def _check_ids(ids: np.ndarray, num_labels: int):
    outside = np.setdiff1d(ids, [*range(num_labels), IGNORE_INDEX])
    if outside.size:
        raise ValueError(f"expected class ids from 0 to {num_labels - 1} or {IGNORE_INDEX}, got {outside.tolist()}")


def _encode(image: Image.Image, file_format: str, **options) -> bytes:
    file = BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()
