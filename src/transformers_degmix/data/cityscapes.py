"""Cityscapes with fine annotations and disparity: 2975 training and 500 validation images.

leftImg8bit/SPLIT/CITY/ID_leftImg8bit.png     gtFine/SPLIT/CITY/ID_gtFine_labelIds.png
disparity/SPLIT/CITY/ID_disparity.png         and, if depth in metres is wanted, camera/SPLIT/CITY/ID_camera.json
"""

from pathlib import Path

import numpy as np

from ..tasks import IGNORE_INDEX
from .archives import find_root, read_bytes, read_image, read_json
from .benchmarks import CITYSCAPES_CATEGORIES, CITYSCAPES_CLASSES
from .schema import named_tasks


_SPLITS = {"train": "train", "validation": "val"}
_FILES = {
    "image": ("leftImg8bit", "_leftImg8bit.png"),
    "semseg": ("gtFine", "_gtFine_labelIds.png"),
    "disparity": ("disparity", "_disparity.png"),
    "camera": ("camera", "_camera.json"),
}

# All but the camera's are needed.
FOLDERS = ("leftImg8bit", "gtFine", "disparity")
# The archives on the page of Cityscapes. Each holds one of the folders.
PACKAGES = tuple(f"{folder}_trainvaltest.zip" for folder, _ in _FILES.values())

# The ids (0..33 in the label files) of the 19 training classes, in the order of the classes, and their categories.
# The benchmark scores the other ids (parking, tunnel, caravan, ...) neither as classes nor in their categories.
TRAIN_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
CATEGORY_OF_CLASS = (0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 4, 5, 5, 6, 6, 6, 6, 6, 6)
NUM_IDS = 34


class Cityscapes:
    """A [`Source`](schema.py) with the tasks `semseg` and `depth`, or `disparity` if there are no camera files.

    Args:
        folder: the unpacked archives.
        num_classes: 19 classes or 7 categories.

    Raises:
        ValueError: the folder has another layout, a split is empty, or `num_classes` is another number.
    """

    title = "Cityscapes"
    terms = (
        "Images, labels and disparity are from Cityscapes (Cordts et al., CVPR 2016). Its licence agreement offers "
        "them for non-commercial purposes (research, teaching, publications, personal experiments) to people who have "
        "registered on its page. They must not be passed on."
    )

    def __init__(self, folder: Path, num_classes: int = 19):
        self.root = find_root(folder, *FOLDERS)
        has_cameras = (self.root / "camera").is_dir()
        self.kinds = [name for name in _FILES if name != "camera" or has_cameras]
        self.tasks = named_tasks(("semseg",), {"semseg": _class_names(num_classes)})
        self.columns = {"semseg": f"{num_classes} classes; all labels that the benchmark does not score are 255"}
        if has_cameras:
            self.tasks["depth"] = {"kind": "depth"}
            self.columns["depth"] = "metres, baseline * fx / disparity; 0 is unknown"
        else:
            self.tasks["disparity"] = {"kind": "depth"}
            self.columns["disparity"] = (
                "pixels, not metres, because there is no camera; 0 is unknown. It can be trained as a task of kind "
                "`depth` without augmentation of scale, which would divide disparity instead of multiplying it"
            )
        self.ids = {split: self._find_ids(split) for split in _SPLITS}

    def _find_ids(self, split: str) -> list[str]:
        # All folders, so that an image is found whichever of its files is missing.
        ids = {
            path.name.removesuffix(ending)
            for folder, ending in (_FILES[kind] for kind in self.kinds)
            for path in (self.root / folder / _SPLITS[split]).glob(f"*/*{ending}")
        }
        if not ids:
            raise ValueError(f"{self.root / 'leftImg8bit' / _SPLITS[split]} has no images")
        return sorted(ids)

    def files(self, split: str, image_id: str) -> dict[str, Path]:
        city = image_id.partition("_")[0]
        return {
            kind: self.root / folder / _SPLITS[split] / city / f"{image_id}{ending}"
            for kind, (folder, ending) in _FILES.items()
            if kind in self.kinds
        }

    def read(self, split: str, image_id: str) -> tuple[bytes, dict[str, np.ndarray]]:
        files = self.files(split, image_id)
        ids = read_image(files["semseg"], "L")
        if ids.max() >= NUM_IDS:
            raise ValueError(f"{files['semseg']}: expected label ids from 0 to {NUM_IDS - 1}, got {ids.max()}")
        disparity = decode_disparity(read_image(files["disparity"], "I;16", "I"))
        maps = {"semseg": _class_table(len(self.tasks["semseg"]["id2label"]))[ids], "disparity": disparity}
        if "camera" in files:
            depth = np.zeros_like(disparity)
            maps["depth"] = np.divide(_depth_factor(files["camera"]), disparity, out=depth, where=disparity > 0)
        return read_bytes(files["image"]), maps


def decode_disparity(values: np.ndarray) -> np.ndarray:
    """16-bit values p -> float64 disparity (p - 1) / 256 in pixels; 0 (infinitely far) for p = 0 too."""
    return np.maximum(values.astype(np.float64) - 1, 0) / 256


def _depth_factor(camera: Path) -> float:
    """Baseline (metres) times focal length (pixels): the product of depth and disparity."""
    values = read_json(camera)
    try:
        factor = float(values["extrinsic"]["baseline"] * values["intrinsic"]["fx"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{camera} has no number extrinsic.baseline or intrinsic.fx") from error
    if not 0 < factor < np.inf:
        raise ValueError(f"{camera}: expected a baseline and a focal length above 0, got the product {factor}")
    return factor


def _class_names(num_classes: int) -> tuple[str, ...]:
    for names in (CITYSCAPES_CLASSES, CITYSCAPES_CATEGORIES):
        if len(names) == num_classes:
            return names
    raise ValueError(f"Cityscapes has 19 classes or 7 categories, not {num_classes}")


def _class_table(num_classes: int) -> np.ndarray:
    """uint8 `(34,)`: id in the label files -> class."""
    table = np.full(NUM_IDS, IGNORE_INDEX, np.uint8)
    table[list(TRAIN_IDS)] = range(19) if num_classes == len(CITYSCAPES_CLASSES) else CATEGORY_OF_CLASS
    return table
