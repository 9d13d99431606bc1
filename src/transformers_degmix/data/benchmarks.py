"""The benchmarks of multi-task dense prediction: tasks, class names and input sizes of each data set."""

from dataclasses import dataclass
from typing import Any


NYUD_CLASSES = (
    "wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf",
    "picture", "counter", "blinds", "desk", "shelves", "curtain", "dresser", "pillow", "mirror", "floor mat",
    "clothes", "ceiling", "books", "refrigerator", "television", "paper", "towel", "shower curtain", "box",
    "whiteboard", "person", "night stand", "toilet", "sink", "lamp", "bathtub", "bag",
    "other structure", "other furniture", "other prop",
)  # fmt: skip

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "dining table", "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor",
)  # fmt: skip

HUMAN_PARTS = ("background", "head", "torso", "upper arm", "lower arm", "upper leg", "lower leg")

CITYSCAPES_CLASSES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip

CITYSCAPES_CATEGORIES = ("flat", "construction", "object", "nature", "sky", "human", "vehicle")

# The usual task names, with their kind and the fields of `DeGMixConfig.tasks` that are the same on every data set and
# differ from the kind's defaults.
TASKS: dict[str, dict[str, Any]] = {
    "semseg": {"kind": "segmentation"},
    "human_parts": {"kind": "segmentation", "loss_weight": 2.0, "ignore_empty": True},
    "sal": {"kind": "saliency"},
    "depth": {"kind": "depth"},
    "normals": {"kind": "normals"},
    "edge": {"kind": "boundary"},
}


@dataclass(frozen=True)
class Benchmark:
    """A data set and what is predicted on it.

    Attributes:
        tasks: names of the tasks in the order of the released models.
        input_size: (height, width) in pixels of training crops and of padded test images.
        classes: names of the classes of each segmentation task, one tuple per label set in use, the usual one first.
        edge_pos_weight: weight of boundary pixels in the loss; `None` without `edge`.
        edge_tolerance: `tolerance` of [`~transformers_degmix.evaluation.BoundaryMetric`]; `None` without `edge`.
    """

    tasks: tuple[str, ...]
    input_size: tuple[int, int]
    classes: dict[str, tuple[tuple[str, ...], ...]]
    edge_pos_weight: float | None = None
    edge_tolerance: float | None = None

    def task_fields(self) -> dict[str, dict[str, Any]]:
        """The tasks for `DeGMixConfig.tasks`, without classes, which come from the data."""
        tasks = {name: dict(TASKS[name]) for name in self.tasks}
        if "edge" in tasks:
            tasks["edge"]["pos_weight"] = self.edge_pos_weight
        return tasks


BENCHMARKS: dict[str, Benchmark] = {
    "nyud": Benchmark(
        tasks=("semseg", "depth", "normals", "edge"),
        input_size=(425, 560),
        classes={"semseg": (NYUD_CLASSES,)},
        edge_pos_weight=0.8,
        edge_tolerance=0.011,
    ),
    "pascal_context": Benchmark(
        tasks=("semseg", "human_parts", "sal", "normals", "edge"),
        input_size=(512, 512),
        classes={"semseg": (VOC_CLASSES,), "human_parts": (HUMAN_PARTS,)},
        edge_pos_weight=0.95,
        edge_tolerance=0.0075,
    ),
    # Half the size of the images: the authors give no input size.
    "cityscapes": Benchmark(
        tasks=("semseg", "depth"),
        input_size=(512, 1024),
        classes={"semseg": (CITYSCAPES_CLASSES, CITYSCAPES_CATEGORIES)},
    ),
}
