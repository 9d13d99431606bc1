"""The settings of a training run, from a YAML file and the command line."""

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import yaml
from huggingface_hub.dataclasses import strict, validate_typed_dict

from ..configuration_degmix import DeGMixConfig
from ..data.augmentation import Augmentation
from ..data.benchmarks import BENCHMARKS
from ..data.columns import check_fields
from .balancing import TASK_BALANCING
from .sources import Source, naming_errors, parse_sources


if TYPE_CHECKING:
    ImageSize = list[int]  # as it is after `__post_init__`
else:
    ImageSize = list[int] | None

RECIPES = Path(__file__).parents[1] / "recipes"

TRACKERS = ("tensorboard", "trackio", "wandb")

# Lowest allowed value -> fields.
LOWEST = {
    0: (
        "learning_rate", "backbone_learning_rate", "momentum", "weight_decay", "warmup_steps", "max_grad_norm",
        "ema_decay", "num_workers", "num_logged_images", "seed",
    ),
    1: (
        "max_steps", "batch_size", "gradient_accumulation_steps", "eval_steps", "checkpoint_steps", "logging_steps",
        "early_stopping_patience", "num_best_models", "shuffle_buffer_size",
    ),
}  # fmt: skip

# These may change when a run is resumed. They do not change its weights, except that `compile` changes their rounding.
# `skip_unreadable` lets a run finish that otherwise could not.
FREE_TO_CHANGE = (
    "output_dir", "resume", "num_workers", "compile", "checkpoint_steps", "log_with", "logging_steps",
    "num_logged_images", "push_to_hub", "hub_private", "skip_unreadable", "max_unreadable",
)  # fmt: skip


class ProcessorFields(TypedDict, total=False):
    """Fields of `image_processor`; null is the default. `tasks` is not one: it comes from the model."""

    do_convert_rgb: bool
    do_resize: bool
    size: int | list[int] | dict[str, int]
    resample: Any  # the processor checks it
    do_rescale: bool
    rescale_factor: int | float
    do_normalize: bool
    image_mean: int | float | list[int | float]
    image_std: int | float | list[int | float]
    do_pad: bool
    pad_size: int | list[int] | dict[str, int]
    size_divisor: int


@strict
@dataclass(kw_only=True)
class TrainingArguments:
    """A training run. The defaults are the published recipe (SGD, polynomial decay, 40,000 iterations).

    Attributes:
        output_dir: receives the model directories `best` and `last`, `checkpoint.pt`, and the files of trackers.
        resume: whether to continue from `checkpoint.pt` if it exists. Otherwise, there must be none, and no models.

        dataset: `"rooms"` (rendered here), or what `datasets.load_dataset` takes: a folder or Hub id with a column
            of images and one per task, in which null means that there is no label. The default is rooms.
        datasets: several data sets to learn from together instead of `dataset`, each labelled for some of the tasks:
            a list of sources with the fields of [`~training.sources.Source`], at least `name` and `dataset`. A source
            without `columns`, `eval_split`, `num_train_images` or `num_eval_images` has the values below.
        benchmark: `"nyud"`, `"pascal_context"` or `"cityscapes"`, for a data set made by `degmix prepare`. It gives
            the defaults of tasks, loss weights and image size.
        columns: `"image"` or task -> name of its column, or the fields of [`~data.columns.Column`], which turn stored
            values into the expected ones. By default, columns have the names of their tasks.
        streaming: whether samples are read while they arrive rather than downloaded first. Their order is then random
            only within `shuffle_buffer_size` samples.
        shuffle_buffer_size: samples that each loader process holds in memory for `streaming`, as they are stored.
        train_split, eval_split: names of the data set's splits.
        num_train_images, num_eval_images: how many images of a split to use, from its start; all by default. Rooms
            need a number to render.
        image_size: height and width of training crops, by default the benchmark's or NYUD-v2's; Rooms are rendered in
            this size.
        augmentation: fields of [`~data.augmentation.Augmentation`] to change; null turns it off.
        num_workers: loader processes. A stream of which a number of images is used has one at most.
        skip_unreadable: whether to leave out samples whose image or label is unreadable or refused, rather than end
            the run. All samples are then read before the first step, and a list says which are left out.
        max_unreadable: the run does not start if a larger share of a split would be left out.

        model: fields of `DeGMixConfig`. With a benchmark or Rooms, all of their tasks are the default of `tasks`. If
            some are given (`depth: {loss_weight: 5}`, `normals: {}`), the model has only these, with changed fields.
        tasks: names of the tasks to train; all by default.
        pretrained: model directory, Hub id or a name of [`~hub.shipped.SHIPPED_MODELS`] to fine-tune. It brings its
            own `model`.
        new_tasks: tasks to add to the `pretrained` model, name -> fields. A task of a benchmark or of Rooms needs no
            fields (`normals: {}`). The model's other tasks do not attend to new ones, see its `add_task`.
        train_only_new: whether to freeze everything except the parts of the new tasks; only these then need labels.
        pretrained_backbone: weights of a backbone, for example ImageNet's: directory or Hub id of a model of
            Transformers or timm (`timm/resnet18.a1_in1k`), or `efficientnet_lite0`, whose weights are in the extra
            `lite`. It brings its `backbone_config` and `image_processor`, where these are not given. The former has up
            to four maps; a single saved one counts as no choice.
        image_processor: fields of `DeGMixImageProcessor` to change, such as `image_mean`. By default, the fields that
            change values of pixels are as the initial weights need them.
        freeze: modules that are not trained, for example `[model.backbone]`; statistics of their batch norms stay.
        compile: whether to train with `torch.compile`.

        max_steps: optimiser steps.
        batch_size: images per process and pass. A step has `batch_size * gradient_accumulation_steps` images of each
            process, and its losses are over all these images together.
        gradient_accumulation_steps: passes per step. Batch norms see one pass (of all processes) at a time.
        optimizer: `"sgd"` or `"adamw"`.
        learning_rate: at the start, after `warmup_steps`.
        backbone_learning_rate: the backbone's, by default `learning_rate`.
        momentum: of SGD.
        weight_decay: on every parameter.
        lr_scheduler: `"polynomial"` or `"cosine"`, down to zero at `max_steps`, or `"constant"`.
        lr_power: exponent of the polynomial.
        warmup_steps: linear, from zero.
        max_grad_norm: gradients with a larger norm are scaled down to it; 0 turns that off.
        mixed_precision: `"no"`, `"bf16"` or `"fp16"`.
        task_balancing: `"fixed"` (the tasks' `loss_weight` alone), `"uncertainty"` or `"dynamic_weight_average"`, see
            `training/balancing.py`.
        ema_decay: of an exponential moving average of weights and statistics, which is evaluated and saved instead of
            them; after n steps at most (1 + n) / (10 + n). 0 turns it off.
        seed: of initialisation, order and augmentation.

        eval_steps: steps between two evaluations; there is always one at the end.
        single_task_scores: task -> score of a model for that task alone, above 0, for each trained task. If given, the
            best model is the one with the highest multi-task gain over these scores, otherwise the one with the lowest
            evaluation loss. Without any label to evaluate with, it is the newest. With several `datasets`, each task's
            score and loss are means over the sources that label it.
        early_stopping_patience: the run ends after so many evaluations without a higher gain; never by default.
        num_best_models: how many of the best models to keep. The best is in `best`; if there are more, all are in
            `best_models/step_<step>`.
        checkpoint_steps: steps between two checkpoints; there is always one before and after an evaluation, and on
            SIGTERM.
        log_with: trackers of Accelerate: `tensorboard`, `trackio` or `wandb`.
        logging_steps: steps between two entries in the trackers: losses of the tasks that have labels in the step and
            their sum, learning rate, images per second.
        num_logged_images: how many evaluation images of each source are drawn with their predictions at each
            evaluation, for trackers and model cards.
        push_to_hub: Hub id to which the best model is uploaded at the end.
        hub_private: whether that repository is private if it is new.
    """

    output_dir: str
    resume: bool = False

    dataset: str | None = None
    datasets: list[dict[str, Any]] | None = None
    benchmark: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    streaming: bool = False
    shuffle_buffer_size: int = 256
    train_split: str = "train"
    eval_split: str = "validation"
    num_train_images: int | None = None
    num_eval_images: int | None = None
    image_size: ImageSize = None  # type: ignore[assignment]
    augmentation: dict[str, Any] | None = field(default_factory=dict)
    num_workers: int = 1
    skip_unreadable: bool = False
    max_unreadable: float = 0.25

    model: dict[str, Any] = field(default_factory=dict)
    tasks: list[str] | None = None
    pretrained: str | None = None
    new_tasks: dict[str, Any] = field(default_factory=dict)
    train_only_new: bool = True
    pretrained_backbone: str | None = None
    image_processor: dict[str, Any] = field(default_factory=dict)
    freeze: list[str] = field(default_factory=list)
    compile: bool = False

    max_steps: int = 40_000
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    optimizer: str = "sgd"
    learning_rate: float = 1e-3
    backbone_learning_rate: float | None = None
    momentum: float = 0.9
    weight_decay: float = 5e-4
    lr_scheduler: str = "polynomial"
    lr_power: float = 0.9
    warmup_steps: int = 0
    max_grad_norm: float = 0.0
    mixed_precision: str = "no"
    task_balancing: str = "fixed"
    ema_decay: float = 0.0
    seed: int = 0

    eval_steps: int = 2_000
    single_task_scores: dict[str, int | float] | None = None
    early_stopping_patience: int | None = None
    num_best_models: int = 1
    checkpoint_steps: int = 1_000
    log_with: list[str] = field(default_factory=list)
    logging_steps: int = 10
    num_logged_images: int = 4
    push_to_hub: str | None = None
    hub_private: bool = False

    def __post_init__(self):
        for name, allowed in (
            ("optimizer", ("sgd", "adamw")),
            ("lr_scheduler", ("polynomial", "cosine", "constant")),
            ("mixed_precision", ("no", "bf16", "fp16")),
            ("task_balancing", tuple(TASK_BALANCING)),
            ("benchmark", (None, *BENCHMARKS)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {allowed}, got {getattr(self, name)!r}")
        unknown = [tracker for tracker in self.log_with if tracker not in TRACKERS]
        if unknown:
            raise ValueError(f"`log_with` must be some of {TRACKERS}, got {unknown}")
        for lowest, names in LOWEST.items():
            for name in names:
                value = getattr(self, name)
                if value is not None and not value >= lowest:
                    raise ValueError(f"`{name}` must be at least {lowest}, got {value}")
        if not self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be below 1, got {self.ema_decay}")
        if self.early_stopping_patience is not None and self.single_task_scores is None:
            raise ValueError(
                "`early_stopping_patience` is about the multi-task gain, which needs `single_task_scores`"
            )
        if self.image_size is None:
            self.image_size = list(BENCHMARKS[self.benchmark or "nyud"].input_size)
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise ValueError(f"`image_size` must be a height and a width of at least 1, got {self.image_size}")
        if self.skip_unreadable and self.streaming:
            raise ValueError("`skip_unreadable` reads all samples before the first step, which `streaming` avoids")
        if not 0 <= self.max_unreadable < 1:
            raise ValueError(f"`max_unreadable` must be at least 0 and below 1, got {self.max_unreadable}")
        if self.datasets is None:
            self.dataset = self.dataset or "rooms"
        elif self.dataset is not None or self.train_split != "train":
            raise ValueError("`dataset` and `train_split` are for a single data set: each of `datasets` has its own")
        for source in self.sources:
            if source.dataset == "rooms" and self.streaming:
                raise ValueError(f"{source.title}`streaming` is not for rooms, which are rendered")
        for name, tasks in (("model.tasks", self.model.get("tasks", {})), ("new_tasks", self.new_tasks)):
            if not isinstance(tasks, dict) or not all(isinstance(task, dict) for task in tasks.values()):
                raise ValueError(f"`{name}` must map names of tasks to their fields, got {tasks!r}")
        if self.new_tasks and not self.pretrained:
            raise ValueError("`new_tasks` are for a `pretrained` model; a new one has its tasks in `model.tasks`")
        check_fields("`model`", self.model, DeGMixConfig.__annotations__)
        check_fields("`augmentation`", self.augmentation or {}, [f.name for f in fields(Augmentation)])
        check_fields("`image_processor`", self.image_processor, ProcessorFields.__annotations__)
        with naming_errors("`augmentation`: "):
            self.build_augmentation()
        with naming_errors("`image_processor`: "):
            given = {name: value for name, value in self.image_processor.items() if value is not None}
            validate_typed_dict(ProcessorFields, given)
            for name, lowest in (("image_mean", -math.inf), ("image_std", 0)):
                value = given.get(name, 1)
                numbers = value if isinstance(value, list) else [value]
                if len(numbers) not in (1, 3) or not all(lowest < number < math.inf for number in numbers):
                    above = " above 0" if lowest == 0 else ""
                    raise ValueError(f"`{name}` must be 1 or 3 finite numbers{above}, got {value!r}")
        if self.pretrained and (self.model or self.pretrained_backbone or self.tasks):
            raise ValueError("`pretrained` brings its own `model`, `tasks` and backbone: do not give these too")

    @property
    def sources(self) -> list[Source]:
        """The data sets of the run, or the only one."""
        shared = ("dataset", "columns", "train_split", "eval_split", "num_train_images", "num_eval_images")
        return parse_sources(self.datasets, {name: getattr(self, name) for name in shared})

    def build_augmentation(self) -> Augmentation | None:
        """The augmentation of training images, unless the run has none."""
        if self.augmentation is None:
            return None
        return Augmentation(**{"size": tuple(self.image_size), **self.augmentation})

    def decisive(self) -> dict[str, Any]:
        """The fields that determine the weights. A run can be resumed only with the same values."""
        # Which rows of a stream form a batch depends on who reads them.
        free = set(FREE_TO_CHANGE) - ({"num_workers"} if self.streaming else set())
        return {name: value for name, value in asdict(self).items() if name not in free}


class RecipeLoader(yaml.SafeLoader):
    """YAML as people write it: only `true` and `false` are booleans, `1e-3` is a number, and dates are texts.

    YAML 1.1 reads `no` as false, `010` as 8 and `1:30` as 90, and numbers with an exponent only if they have a point
    and the exponent has a sign. Of fields that are given twice, PyYAML would take the last.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node, seen = super().compose_mapping_node(anchor), []
        for key, _ in node.value:
            if (key.tag, key.value) in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
            seen.append((key.tag, key.value))
        return node


RecipeLoader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":int", ":float", ":timestamp"))
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(true|false)$", re.IGNORECASE), list("tTfF"))
RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile("[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))
RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    # Integers would match too, but their own pattern is tried first.
    re.compile(r"([-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)(e[-+]?[0-9]+)?|[-+]?\.inf|\.nan)$", re.IGNORECASE),
    list("-+.0123456789"),
)


def parse_yaml(text: str | bytes, where: str) -> Any:
    """The value that a recipe or a field of the command line gives.

    Raises:
        ValueError: it is not YAML; the message begins with `where` and has one line.
    """
    try:
        return yaml.load(text, RecipeLoader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: such as `!!int x`
        raise ValueError(f"{where} is not YAML: {' '.join(str(error).split())}") from error


def find_recipe(name: str, folder: Path = Path()) -> Path:
    """The file of a recipe: one that comes with the package, by its name without `.yaml`, or any by its path.

    Args:
        name: either.
        folder: that a path is relative to.

    Raises:
        FileNotFoundError: there is neither.
    """
    known = {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}
    path = known.get(name, folder / name)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}, and the recipes of the package are {', '.join(known)}")
    return path


def parse_arguments(argv: Sequence[str] | None = None, **given: Any) -> TrainingArguments:
    """Reads `RECIPE [--field value ...]`, where dots reach inside (`--model.hidden_size 64`); `given` overrides both.

    Values are YAML. Those of text fields, such as `output_dir`, are taken as they are, except `null` if it is allowed.
    `--resume` is short for `--resume true`. A file can name other recipes as `base`, one or a list: names of the
    package's, or paths relative to itself. Their fields are its defaults; later ones override earlier ones.

    Raises:
        ValueError: the file or the command line has an unknown field or a value that does not fit.
        OSError: the file cannot be read.
    """
    parser = argparse.ArgumentParser(
        usage="%(prog)s RECIPE [--field value ...]",
        description=TrainingArguments.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    recipes = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    parser.add_argument("recipe", help=f"a YAML file of these fields, or one that comes with the package: {recipes}")
    parsed, overrides = parser.parse_known_args(argv)
    values, types = read_config(find_recipe(parsed.recipe)), {f.name: f.type for f in fields(TrainingArguments)}
    if "--resume" in overrides:
        after = overrides.index("--resume") + 1
        if not overrides[after:] or overrides[after].startswith("--"):
            overrides.insert(after, "true")
    if len(overrides) % 2 or not all(name.startswith("--") for name in overrides[::2]):
        raise ValueError(f"expected `--field value` pairs after the recipe, got {' '.join(overrides)}")
    # Not by jsonargparse: in a dictionary, it takes `model.hidden_size` but not `model.tasks.depth.loss_weight`.
    for name, value in zip(overrides[::2], overrides[1::2]):
        *parents, leaf = name[2:].split(".")
        node = values
        for parent in parents:
            if node.get(parent) is None:
                node[parent] = {}
            node = node[parent]
            if not isinstance(node, dict):
                raise ValueError(f"`{name}`: `{parent}` is {node!r}, which has no fields")
        is_text = not parents and (types.get(leaf) is str or (types.get(leaf) == str | None and value != "null"))
        node[leaf] = value if is_text else parse_yaml(value, f"`{name}`")

    values |= given
    check_fields("the run", values, types)
    if "output_dir" not in values:
        raise ValueError("the run needs an `output_dir`, in the recipe or on the command line")
    for name, value in values.items():
        if types[name] in (float, float | None) and type(value) is int:
            values[name] = float(value)
    with naming_errors():
        return TrainingArguments(**values)


def read_config(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The fields in a YAML file and in the files that it names as `base`.

    Args:
        path: of the file.
        above: the files that led to it, each named by the one before.

    Raises:
        ValueError: a file is not YAML, does not hold fields, or has itself as a `base`, perhaps through other files.
        OSError: a file cannot be read.
    """
    above = (*above, path.resolve())
    if above[-1] in above[:-1]:
        raise ValueError(f"{path} is its own `base`: {' -> '.join(map(str, above))}")
    own = parse_yaml(path.read_bytes(), str(path)) or {}
    if not isinstance(own, dict):
        raise ValueError(f"{path} must hold `field: value` lines, got a {type(own).__name__}")
    bases = own.pop("base", [])
    values = {}
    for base in bases if isinstance(bases, list) else [bases]:
        values = merge_fields(values, read_config(find_recipe(str(base), path.parent), above))
    return merge_fields(values, own)


def merge_fields(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """All fields, with the values of `second` where both have one; dictionaries in them are merged likewise."""
    merged = dict(first)
    for name, value in second.items():
        inside = isinstance(value, dict) and isinstance(first.get(name), dict)
        merged[name] = merge_fields(first[name], value) if inside else value
    return merged
