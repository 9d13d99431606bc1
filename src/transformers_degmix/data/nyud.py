"""NYUD-v2 from the archive that is used in multi-task learning: 795 training and 654 test images of 425 x 560 pixels.

NYUDv2/{images,segmentation,edge,normals}/ID.png  depth/ID.npy  gt_sets/{train,val}.txt

An older archive has images/ID.jpg, edge/ID.npy (strengths from 0 to 1) and normals/ID.npy (vectors).
"""

from pathlib import Path

import numpy as np

from .archives import find_root, read_bytes, read_image, read_npy, read_splits
from .benchmarks import BENCHMARKS, NYUD_CLASSES
from .schema import UNKNOWN_NORMAL, encode_normals, named_tasks


_FILES = {
    "image": ("images/{}.png", "images/{}.jpg"),
    "semseg": ("segmentation/{}.png",),
    "depth": ("depth/{}.npy",),
    "normals": ("normals/{}.png", "normals/{}.npy"),
    "edge": ("edge/{}.png", "edge/{}.npy"),
}


class NYUD:
    """A [`Source`](schema.py). Normals and boundaries keep the values of their files.

    Args:
        folder: the unpacked archive.

    Raises:
        ValueError: the folder has another layout, or a split is empty.
    """

    title = "NYUD-v2"
    terms = (
        "Images and depth come from NYU Depth V2 (Silberman, Hoiem, Kohli and Fergus, ECCV 2012), the 40 classes from "
        "Gupta et al. (CVPR 2013), in the split and files that multi-task learning uses. No licence of NYU Depth V2 "
        "is known here: ask its authors before any use other than research, or before passing it on."
    )
    columns = {
        "semseg": "40 classes; unlabelled pixels are 255",
        "depth": "metres; 0 is unknown",
        "normals": "values of the source's files: n = 2 * value / 255 - 1; (0, 0, 0) is unknown",
        "edge": "values of the source's files: strength times 255",
    }

    def __init__(self, folder: Path):
        self.root = find_root(folder, "gt_sets")
        self.tasks = named_tasks(BENCHMARKS["nyud"].tasks, {"semseg": NYUD_CLASSES})
        self.ids = read_splits(self.root / "gt_sets")

    def files(self, split: str, image_id: str) -> dict[str, Path]:
        paths = {
            name: [self.root / pattern.format(image_id) for pattern in patterns] for name, patterns in _FILES.items()
        }
        return {name: next(filter(Path.is_file, found), found[0]) for name, found in paths.items()}

    def read(self, split: str, image_id: str) -> tuple[bytes, dict[str, np.ndarray]]:
        files = self.files(split, image_id)
        return read_bytes(files["image"]), {
            # 0 is unlabelled; in 8 bits, 0 - 1 is 255.
            "semseg": read_image(files["semseg"], "L", "P") - np.uint8(1),
            "depth": read_npy(files["depth"]),
            "normals": _read_normals(files["normals"]),
            "edge": _read_edge(files["edge"]),
        }


def _read_normals(path: Path) -> np.ndarray:
    if path.suffix != ".npy":
        return read_image(path, "RGB")
    normals = _read_values(path, -1)
    known = normals.any(axis=-1, keepdims=True)
    return np.where(known, encode_normals(normals), np.array(UNKNOWN_NORMAL, np.uint8))


def _read_edge(path: Path) -> np.ndarray:
    if path.suffix != ".npy":
        return read_image(path, "L")
    return np.rint(255 * _read_values(path, 0)).astype(np.uint8)


def _read_values(path: Path, lowest: int) -> np.ndarray:
    """Numbers from `lowest` to 1, up to rounding. Others cannot be coded in 8 bits."""
    values = read_npy(path).astype(np.float32)
    if not ((values > lowest - 1e-3) & (values < 1 + 1e-3)).all():
        raise ValueError(f"{path}: expected values from {lowest} to 1, got {values.min()} to {values.max()}")
    return values.clip(lowest, 1)
