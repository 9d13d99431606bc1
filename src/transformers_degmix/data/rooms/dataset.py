"""Renders rooms with their labels, and makes data sets of them.

A room, with random furniture and people, is a set of convex primitives. One ray through the centre of each pixel finds
what the pixel shows. All labels derive from this one hit, and therefore agree in every pixel.
"""

from typing import Any

import datasets
import numpy as np
from PIL import Image

from ..benchmarks import HUMAN_PARTS
from ..schema import encode_normals, encode_png, encode_row, features_for
from .objects import SEMSEG_CLASSES
from .raycast import dot, rotate, visible
from .scene import SPLITS, sample_room
from .shading import shade


ROOMS_TASKS: dict[str, dict[str, Any]] = {
    "semseg": {
        "kind": "segmentation",
        "num_labels": len(SEMSEG_CLASSES),
        "id2label": dict(enumerate(SEMSEG_CLASSES)),
    },
    "human_parts": {
        "kind": "segmentation",
        "num_labels": len(HUMAN_PARTS),
        "loss_weight": 2.0,
        "id2label": dict(enumerate(HUMAN_PARTS)),
        "ignore_empty": True,
    },
    "sal": {"kind": "saliency"},
    "depth": {"kind": "depth"},
    "normals": {"kind": "normals"},
    "edge": {"kind": "boundary", "pos_weight": 0.95},
}

# Part of the cache's key. Raise this with every change that alters a pixel.
RENDERER_VERSION = 1

_NOT_SALIENT = [
    SEMSEG_CLASSES.index(name) for name in ("wall", "floor", "ceiling", "door", "window", "picture", "rug")
]


def render_room(split: str, index: int, image_size: tuple[int, int] = (240, 320)) -> dict[str, np.ndarray]:
    """Renders one room and its labels. The room depends only on `split` and `index`.

    Args:
        split: "train", "validation" or "test".
        index: number of the room in its split, 0 or more.
        image_size: height and width in pixels, 32 or more each.

    Returns:
        A dictionary of arrays of that height and width:

        - `image`: RGB `(height, width, 3)` uint8.
        - `semseg`: uint8, positions in `SEMSEG_CLASSES`.
        - `human_parts`: uint8, positions in `HUMAN_PARTS`; above 0 exactly where `semseg` is "person".
        - `sal`: uint8, 1 on the salient objects: all people who cover at least 0.5 % of the image. Without such
          people, it is the one free-standing object (not the shell, a door, a window, a picture or a rug) that is
          largest if pixels are weighted by exp(-2 (x^2 + y^2)), with coordinates from -1 to 1 across the image.
        - `depth`: float32 metres above 0, along the optical axis. The depth of a window is that of its pane.
        - `normals`: `(height, width, 3)` float32 unit vectors that face the viewer, in the camera frame with x to the
          right, y down and z towards the camera: (0, 0, 1) for a wall that faces the camera, y < 0 for the floor.
          These are the axes of NYU Depth (Armeni et al. 2017, "Joint 2D-3D-Semantic Data for Indoor Scene
          Understanding", on surface normals: red to the right, green down, blue towards the camera).
        - `edge`: uint8, 1 on boundaries. If two neighbouring pixels (side by side, or one above the other) show
          different objects, the nearer pixel is a boundary, or at equal depth the left or upper one. Each wall, the
          floor and the ceiling are objects. The same applies where an object hides part of itself: two of its
          primitives meet in the image, and each pixel's point is more than 3 cm plus the width of two pixels away from
          the tangent plane of the other's.

    Raises:
        ValueError: an argument is invalid.
    """
    _check(split, image_size)
    if index < 0:
        raise ValueError(f"`index` must be 0 or more, got {index}")
    room = sample_room(split, index)
    camera = room.camera
    depth, hit = camera.cast([surface.shape for surface in room.surfaces], image_size)
    rays = camera.rays(image_size)
    normals = np.empty_like(rays)
    for k, pixels in visible(hit):
        normals[:, *pixels] = room.surfaces[k].shape.normals(camera.position, rays[:, *pixels], depth[pixels])
    points = camera.position.astype(np.float32)[:, None, None] + depth * rays

    image = shade(room, rays, points, normals, hit)
    noise = np.random.default_rng([SPLITS.index(split), index, 1]).standard_normal(image.shape, dtype=np.float32)
    image = np.clip(255 * image + 1.5 * noise, 0, 255).round().astype(np.uint8)

    semseg = np.array([surface.label for surface in room.surfaces], np.uint8)[hit]
    parts = np.array([surface.part for surface in room.surfaces], np.uint8)[hit]
    instance = np.array([surface.instance for surface in room.surfaces])[hit]
    pixel_width = depth / np.float32(camera.focal * max(image_size))
    in_camera = rotate(camera.rotation.T, normals) * np.array([1, 1, -1], np.float32)[:, None, None]
    return {
        "image": np.ascontiguousarray(np.moveaxis(image, 0, -1)),
        "semseg": semseg,
        "human_parts": parts,
        "sal": _salient(semseg, instance),
        "depth": depth,
        "normals": np.ascontiguousarray(np.moveaxis(in_camera, 0, -1)),
        "edge": _boundaries(depth, points, normals, hit, instance, pixel_width),
    }


def encode_room(room: dict[str, np.ndarray]) -> tuple[bytes, dict[str, np.ndarray]]:
    """What [`render_room`] gives -> the PNG of the image, and the maps for [`encode_row`]."""
    image = encode_png(Image.fromarray(room["image"]))["bytes"]
    return image, {**room, "normals": encode_normals(room["normals"]), "edge": 255 * room["edge"]}


def load_rooms(
    split: str,
    num_images: int,
    image_size: tuple[int, int] = (240, 320),
    num_proc: int | None = None,
    cache_dir: str | None = None,
) -> datasets.Dataset:
    """The first rooms of a split as a `datasets.Dataset`, rendered on the first call and then read from the cache.

    Args:
        split: "train", "validation" or "test".
        num_images: how many rooms, 1 or more.
        image_size: height and width in pixels, 32 or more each.
        num_proc: number of processes that render; it does not change the result.
        cache_dir: where to keep the data set; by default in the cache of `datasets`.

    Returns:
        A data set with the columns `image_id` and, as images of that size, the arrays of [`render_room`]:

        - `image` (RGB PNG), `semseg`, `human_parts`, `sal` (PNG of mode "L", with the values as they are).
        - `depth` (TIFF of mode "F", metres).
        - `normals` (RGB PNG, (n + 1) / 2 * 255 rounded, so that n = 2 * value / 255 - 1, as for NYU Depth).
        - `edge` (PNG of mode "L", 255 on boundaries and 0 elsewhere).
        - `semseg_classes`, `human_parts_classes`: lists of the classes present. Their feature holds all class names:
          `dataset.features["semseg_classes"].feature.names`.

    Raises:
        ValueError: an argument is invalid.
    """
    _check(split, image_size)
    if num_images < 1:
        raise ValueError(f"`num_images` must be 1 or more, got {num_images}")
    arguments = {
        "split": split,
        "indices": list(range(num_images)),  # `num_proc` divides lists
        "image_size": tuple(image_size),
        "version": RENDERER_VERSION,  # only for the cache
    }
    return datasets.Dataset.from_generator(
        _rows,
        features=features_for(ROOMS_TASKS),
        cache_dir=cache_dir,
        gen_kwargs=arguments,
        num_proc=None if num_proc is None else min(num_proc, num_images),
        split=datasets.NamedSplit(split),
    )


def _check(split, image_size):
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(map(repr, SPLITS))}, got {split!r}")
    if len(image_size) != 2 or min(image_size) < 32:
        raise ValueError(f"`image_size` must be a height and a width of 32 or more, got {image_size}")


def _rows(split, indices, image_size, version):
    for index in indices:
        yield encode_row(f"{split}_{index:06d}", *encode_room(render_room(split, index, image_size)), ROOMS_TASKS)


def _salient(semseg, instance):
    height, width = semseg.shape
    y, x = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)
    people = instance[semseg == SEMSEG_CLASSES.index("person")]
    seen = np.flatnonzero(np.bincount(people) >= 0.005 * semseg.size)
    if seen.size:
        return np.isin(instance, seen).astype(np.uint8)
    weight = np.where(np.isin(semseg, _NOT_SALIENT), 0, np.exp(-2 * (x * x + y * y)))
    prominence = np.bincount(instance.ravel(), weight.ravel())
    return ((instance == np.argmax(prominence)) & (weight > 0)).astype(np.uint8)


def _boundaries(depth, points, normals, hit, instance, pixel_width):
    edge = np.zeros(depth.shape, np.uint8)
    for a, b in ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1, :], np.s_[1:, :])):
        step = points[:, *b] - points[:, *a]
        offset = np.minimum(np.abs(dot(step, normals[:, *a])), np.abs(dot(step, normals[:, *b])))
        # Primitives are convex, so none of them hides part of itself.
        hides_itself = (hit[a] != hit[b]) & (offset > 0.03 + 2 * np.minimum(pixel_width[a], pixel_width[b]))
        boundary = (instance[a] != instance[b]) | hides_itself
        edge[a] |= boundary & (depth[a] <= depth[b])
        edge[b] |= boundary & (depth[a] > depth[b])
    return edge
