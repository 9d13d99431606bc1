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

Maps have the size of their image. (0, 0, 0) is free to mark unknown normals because it reads as (-1, -1, -1), far from
any unit vector; the code of the zero vector would be 127.5, which 8 bits do not have.
"""

from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import torch
from PIL import Image

from ..tasks import IGNORE_INDEX, TASK_KINDS
from .benchmarks import TASKS


UNKNOWN_NORMAL = (0, 0, 0)


class Source(Protocol):
    """What a data set is made from.

    Attributes:
        title: name of the data set.
        terms: where it comes from and under which terms, in words.
        columns: what is particular to the column of each task.
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
    """Tasks of this field by name, with the class names of those in `classes`."""
    tasks = {name: dict(TASKS[name]) for name in names}
    for name, labels in classes.items():
        tasks[name]["id2label"] = dict(enumerate(labels))
    return tasks


def features_for(tasks: dict[str, dict[str, Any]]) -> datasets.Features:
    """Columns of a data set with these tasks.

    Args:
        tasks: name -> `kind` and optionally `id2label`, as in `DeGMixConfig.tasks`.
    """
    return datasets.Features(
        {
            "image_id": datasets.Value("string"),
            **{name: datasets.Image() for name in ("image", *tasks)},
            **{
                f"{name}_classes": datasets.List(datasets.ClassLabel(names=list(task["id2label"].values())))
                for name, task in tasks.items()
                if "id2label" in task
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
        maps: task -> uint8 as the table above says, or for depth floating point metres, `(height, width)`; normals
            `(height, width, 3)`.
        tasks: as for [`features_for`].

    Raises:
        ValueError: the image is not RGB, or a map has another size, dtype or values; the message names the column.
    """
    with Image.open(BytesIO(image)) as picture:
        mode, size = picture.mode, (picture.height, picture.width)
    if mode != "RGB":
        raise ValueError(f"image: expected mode RGB, got {mode}")
    row = {"image_id": image_id, "image": {"bytes": image, "path": None}}
    for name, task in tasks.items():
        try:
            row[name] = {"bytes": _encode_map(maps[name], size, task), "path": None}
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if "id2label" in task:
            row[f"{name}_classes"] = np.setdiff1d(maps[name], IGNORE_INDEX).tolist()
    return row


def encode_normals(normals: np.ndarray) -> np.ndarray:
    """Unit vectors of any shape -> uint8."""
    return ((normals + 1) / 2 * 255).round().astype(np.uint8)


def _encode_map(values: np.ndarray, size: tuple[int, int], task: dict[str, Any]) -> bytes:
    kind = TASK_KINDS[task["kind"]]
    expected = size if kind.label_channels == 1 else (*size, kind.label_channels)
    if values.shape != expected:
        raise ValueError(f"expected the shape {expected} for an image of {size[0]} x {size[1]}, got {values.shape}")
    if kind.image_modes == ("F",):
        return _encode(Image.fromarray(_checked_depth(values)), "TIFF")
    if values.dtype != np.uint8:
        raise ValueError(f"expected 8-bit values, got {values.dtype}")
    if kind.label_dtype == torch.int64:
        num_labels = len(task["id2label"]) if "id2label" in task else kind.num_logits
        if num_labels is not None:
            _check_ids(values, num_labels)
    return _encode(Image.fromarray(values), "PNG")


def _checked_depth(depth: np.ndarray) -> np.ndarray:
    if not np.issubdtype(depth.dtype, np.floating):
        raise ValueError(f"expected floating point metres, got {depth.dtype}")
    if not np.isfinite(depth).all():
        raise ValueError("expected finite values, got NaN or infinity")
    if depth.min() < 0:
        raise ValueError(f"expected values of 0 or more, got {depth.min()}")
    # 255 itself would be taken for `IGNORE_INDEX`; the float32 below it is 0.015 mm away.
    depth = depth.astype(np.float32)
    return np.where(depth == IGNORE_INDEX, np.nextafter(np.float32(IGNORE_INDEX), np.float32(0)), depth)


def _check_ids(ids: np.ndarray, num_labels: int):
    outside = np.setdiff1d(ids, [*range(num_labels), IGNORE_INDEX])
    if outside.size:
        raise ValueError(f"expected class ids from 0 to {num_labels - 1} or {IGNORE_INDEX}, got {outside.tolist()}")


def _encode(image: Image.Image, file_format: str) -> bytes:
    file = BytesIO()
    image.save(file, file_format)
    return file.getvalue()
