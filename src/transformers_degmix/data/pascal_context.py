"""PASCAL-Context with the five tasks of multi-task learning: 4998 training and 5105 test images.

PASCALContext/JPEGImages/ID.jpg  semseg/{VOC12,pascal-context}/ID.png  pascal-context/trainval/ID.mat
human_parts/ID.mat  normals_distill/ID.png  sal_distill/ID.png  ImageSets/Context/{train,val}.txt
"""

from pathlib import Path

import numpy as np
from scipy.ndimage import laplace
from skimage.morphology import thin

from .archives import find_root, read_bytes, read_image, read_mat, read_splits
from .benchmarks import BENCHMARKS, HUMAN_PARTS, VOC_CLASSES
from .schema import UNKNOWN_NORMAL, named_tasks


_FILES = {
    "image": "JPEGImages/{}.jpg",
    "label_map": "pascal-context/trainval/{}.mat",
    "human_parts": "human_parts/{}.mat",
    "sal": "sal_distill/{}.png",
    "normals": "normals_distill/{}.png",
}

# The 24 parts of a person in PASCAL-Part, merged to the names in `HUMAN_PARTS`: left and right (l, r), a limb with its
# hand or foot, the head with the face, and the torso with the neck.
MERGED_PARTS = {
    "head": "head hair nose mouth leye reye lear rear lebrow rebrow",
    "torso": "torso neck",
    "upper arm": "luarm ruarm",
    "lower arm": "llarm rlarm lhand rhand",
    "upper leg": "luleg ruleg",
    "lower leg": "llleg rlleg lfoot rfoot",
}
_PART_IDS = {part: HUMAN_PARTS.index(name) for name, parts in MERGED_PARTS.items() for part in parts.split()}

NUM_LABELS = 459

# The normals were predicted by a network trained on NYUD-v2, and are meaningful only on objects that it has seen. Of
# the 459 labels of PASCAL-Context, these are spelt exactly like one of the 894 object names in the raw annotations of
# NYU Depth V2 (from which its 40 classes are made); only "tvmonitor" is called "television" there. "fridge"
# ("refridgerator" in NYU), "ground" and "cloth" are therefore missing. "car" and "pig" (toys in NYU) are included. The
# published numbers were measured with this choice (Maninis et al., CVPR 2019).
# fmt: off
LABELS_IN_NYU = {
    3: "air conditioner", 4: "antenna", 6: "ashtray", 9: "bag", 10: "ball", 11: "balloon", 13: "barrel", 15: "basket",
    17: "bathtub", 18: "bed", 22: "bench", 23: "bicycle", 29: "blackboard", 30: "board", 33: "book", 34: "bottle",
    36: "bowl", 37: "box", 38: "bracelet", 39: "brick", 41: "broom", 43: "bucket", 46: "cabinet", 49: "cake",
    50: "calculator", 51: "calendar", 53: "camera", 55: "can", 56: "candle", 59: "car", 61: "cart", 62: "case",
    65: "cat", 66: "cd", 68: "ceiling", 69: "cell phone", 72: "chair", 73: "chessboard", 78: "clock",
    83: "coffee machine", 84: "comb", 85: "computer", 87: "cone", 88: "container", 95: "corkscrew", 96: "counter",
    101: "crate", 104: "cup", 105: "curtain", 107: "cutting board", 111: "dishwasher", 113: "dog", 115: "door",
    122: "drum", 124: "duck", 135: "envelope", 141: "fan", 142: "faucet", 143: "fax machine", 146: "fire extinguisher",
    150: "fish tank", 154: "flag", 157: "flashlight", 158: "floor", 159: "flower", 165: "fork", 172: "fruit",
    174: "furnace", 181: "glass", 183: "globe", 184: "glove", 191: "guitar", 193: "hammer", 195: "handle",
    197: "hanger", 199: "hat", 202: "heater", 213: "ipod", 215: "ironing board", 216: "jar", 219: "key",
    220: "keyboard", 223: "knife", 225: "ladder", 228: "laptop", 230: "lid", 232: "light", 233: "light bulb",
    238: "lock", 239: "machine", 242: "map", 243: "mask", 246: "mattress", 250: "microphone", 251: "microwave",
    252: "mirror", 255: "money", 260: "mouse", 261: "mouse pad", 263: "napkin", 269: "oven", 272: "pan", 273: "paper",
    275: "paper cutter", 281: "pen", 283: "pencil", 284: "person", 285: "photo", 286: "piano", 287: "picture",
    288: "pig", 290: "pillow", 291: "pipe", 292: "pitcher", 293: "plant", 295: "plate", 304: "pool table", 307: "pot",
    309: "printer", 310: "projector", 314: "radiator", 315: "radio", 319: "range hood", 323: "remote control",
    329: "rope", 330: "rug", 331: "ruler", 336: "scale", 342: "sculpture", 345: "sewing machine", 349: "shelves",
    350: "shoe", 351: "shopping cart", 352: "shovel", 355: "sign", 357: "sink", 368: "sofa", 370: "spatula",
    371: "speaker", 374: "spoon", 379: "stapler", 380: "stick", 383: "stool", 384: "stove", 397: "table", 401: "tape",
    403: "telephone", 405: "tent", 407: "toaster", 408: "toilet", 411: "toothbrush", 412: "towel", 413: "toy",
    414: "toy car", 417: "trampoline", 419: "tray", 421: "tricycle", 423: "trophy", 427: "tvmonitor",
    429: "typewriter", 430: "umbrella", 432: "vacuum cleaner", 440: "wall", 441: "wallet", 442: "wardrobe",
    443: "washing machine", 444: "watch", 446: "water dispenser", 454: "window", 457: "wire",
}
# fmt: on


class PASCALContext:
    """A [`Source`](schema.py).

    Args:
        folder: the unpacked archive.

    Raises:
        ValueError: the folder has another layout, or a split is empty.
    """

    title = "PASCAL-Context, five tasks"
    terms = (
        "Images are from PASCAL VOC 2010 (Everingham et al.). They came from flickr, and their use must respect "
        "flickr's terms of use. Labels come from PASCAL-Context (Mottaghi et al., CVPR 2014), PASCAL-Part (Chen et "
        "al., CVPR 2014) and PASCAL VOC 2012; saliency and normals were distilled from networks by Maninis et al. "
        "(CVPR 2019, ASTMT), whose code is under CC BY-NC 4.0. See the pages of these projects for their terms before "
        "any use other than research, or before passing it on."
    )
    columns = {
        "semseg": "21 classes of PASCAL VOC, from VOC 2012 where it has the image, else from PASCAL-Context",
        "human_parts": "PASCAL-Part's parts merged to six: "
        + "; ".join(f"{name} = {parts.replace(' ', ', ')}" for name, parts in MERGED_PARTS.items())
        + ". An image without people is background everywhere",
        "sal": "distilled; 1 where the source's value is above one half",
        "normals": "distilled, values of the source's files: n = 2 * value / 255 - 1; (0, 0, 0) is unknown, where the "
        "pixel's PASCAL-Context label is not a class of NYU Depth V2",
        "edge": "0 or 255: where the Laplacian of the map of 459 labels is not 0, thinned",
    }

    def __init__(self, folder: Path):
        self.root = find_root(folder, "ImageSets/Context")
        self.tasks = named_tasks(
            BENCHMARKS["pascal_context"].tasks, {"semseg": VOC_CLASSES, "human_parts": HUMAN_PARTS}
        )
        self.ids = read_splits(self.root / "ImageSets" / "Context")

    def files(self, split: str, image_id: str) -> dict[str, Path]:
        voc, context = (self.root / "semseg" / name / f"{image_id}.png" for name in ("VOC12", "pascal-context"))
        files = {name: self.root / pattern.format(image_id) for name, pattern in _FILES.items()}
        return {**files, "semseg": voc if voc.exists() else context}

    def read(self, split: str, image_id: str) -> tuple[bytes, dict[str, np.ndarray]]:
        files = self.files(split, image_id)
        labels = read_mat(files["label_map"], "LabelMap")
        outside = np.setdiff1d(labels, range(NUM_LABELS + 1))
        if outside.size:
            raise ValueError(f"{files['label_map']}: expected labels from 0 to {NUM_LABELS}, got {outside[0]}")
        normals = read_image(files["normals"], "RGB")
        _check_size(labels, files["label_map"], normals.shape[:2])
        normals[~np.isin(labels, list(LABELS_IN_NYU))] = UNKNOWN_NORMAL
        return read_bytes(files["image"]), {
            "semseg": read_image(files["semseg"], "L", "P"),
            "human_parts": read_parts(files["human_parts"], labels.shape),
            "sal": (read_image(files["sal"], "L") > 127).astype(np.uint8),
            "normals": normals,
            "edge": label_boundaries(labels),
        }


def read_parts(path: Path, size: tuple[int, int]) -> np.ndarray:
    """The parts of all people in a file of PASCAL-Part, as uint8 ids in `HUMAN_PARTS`; later parts cover earlier ones.

    The file's `anno.objects` are structs with `class` and `parts`, and parts are structs with `part_name` and `mask`.

    Args:
        path: the .mat file.
        size: height and width of the image.

    Raises:
        ValueError: the file is missing, damaged or of another structure, names an unknown part, or has a mask of
            another size.
    """
    ids = np.zeros(size, np.uint8)
    try:
        for thing in np.atleast_1d(read_mat(path, "anno")["objects"]):
            for part in np.atleast_1d(thing["parts"]) if thing["class"] == "person" else ():
                _check_size(part["mask"], path, size)
                ids[part["mask"] > 0] = _PART_IDS[part["part_name"]]
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} is not of PASCAL-Part, or has an unknown part: {error!r}") from error
    return ids


def label_boundaries(labels: np.ndarray) -> np.ndarray:
    """255 where the Laplacian of a map of labels `(height, width)` is not 0, thinned to one pixel, and 0 elsewhere.

    The Laplacian is the difference from the four neighbours; the image is mirrored at its border.
    """
    return 255 * thin(laplace(labels.astype(np.float64), mode="mirror") != 0).astype(np.uint8)


def _check_size(values: np.ndarray, path: Path, size: tuple[int, int]):
    if values.shape != size:
        raise ValueError(f"{path}: expected the shape {size} of the image's other labels, got {values.shape}")
