"""What a training run is made of, read from a YAML file and the command line."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from ..data.augmentation import Augmentation


@strict
@dataclass(kw_only=True)
class TrainingArguments:
    """A training run. The defaults are the published recipe (NYUD-v2; SGD, polynomial decay, 40,000 iterations).

    Attributes:
        output_dir: receives `best` and `last`, two model directories.
        dataset: `"rooms"` (rendered here), or what `datasets.load_dataset` takes: a folder or Hub id with a column
            of images and one per task, in which null means that there is no label.
        columns: `"image"` or task -> name of its column, or the fields of [`~data.columns.Column`], with which the
            values stored there become the expected ones. A task that is not mentioned has a column of its name.
        streaming: whether samples are read while they arrive rather than downloaded before; their order is then
            random only within `shuffle_buffer_size` samples.
        shuffle_buffer_size: samples that each loader process holds in memory for `streaming`, as they are stored.
        train_split, eval_split: names of its splits.
        num_train_images, num_eval_images: the first so many; all by default. Rooms must know how many to render.
        image_size: height and width of training crops, by default NYUD-v2's; Rooms are rendered in this size.
        augmentation: fields of [`~data.augmentation.Augmentation`] to change; null turns it off.
        model: fields of `DeGMixConfig`. For Rooms, `tasks` defaults to all six of them, and names with no or some
            fields (`depth: {loss_weight: 5}`) choose among them and change them.
        pretrained: model directory or Hub id to fine-tune; `model` then is its configuration's.
        pretrained_backbone: directory or Hub id with the backbone's weights, for example ImageNet's.
        max_steps: optimiser steps.
        batch_size: images per step and process.
        optimizer: `"sgd"` or `"adamw"`.
        learning_rate: at the start.
        momentum: of SGD.
        weight_decay: on every parameter.
        lr_scheduler: `"polynomial"`, `"cosine"` or `"constant"`, down to zero at `max_steps`.
        lr_power: exponent of the polynomial.
        warmup_steps: linear, from zero.
        max_grad_norm: gradients are scaled down to it; 0 turns that off.
        mixed_precision: `"no"`, `"bf16"` or `"fp16"`.
        eval_steps: steps between two evaluations; there is always one at the end.
        num_workers: loader processes.
        seed: of initialisation, order and augmentation.
    """

    output_dir: str
    dataset: str = "rooms"
    columns: dict[str, Any] = field(default_factory=dict)
    streaming: bool = False
    shuffle_buffer_size: int = 256
    train_split: str = "train"
    eval_split: str = "validation"
    num_train_images: int | None = None
    num_eval_images: int | None = None
    image_size: list[int] = field(default_factory=lambda: [425, 560])
    augmentation: dict[str, Any] | None = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    pretrained: str | None = None
    pretrained_backbone: str | None = None
    max_steps: int = 40_000
    batch_size: int = 8
    optimizer: str = "sgd"
    learning_rate: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 5e-4
    lr_scheduler: str = "polynomial"
    lr_power: float = 0.9
    warmup_steps: int = 0
    max_grad_norm: float = 0.0
    mixed_precision: str = "no"
    eval_steps: int = 2_000
    num_workers: int = 1
    seed: int = 0

    def __post_init__(self):
        for name, allowed in (
            ("optimizer", ("sgd", "adamw")),
            ("lr_scheduler", ("polynomial", "cosine", "constant")),
            ("mixed_precision", ("no", "bf16", "fp16")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {allowed}, got {getattr(self, name)!r}")
        for name in ("max_steps", "batch_size", "eval_steps", "shuffle_buffer_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "momentum", "weight_decay", "warmup_steps", "max_grad_norm", "num_workers"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}")
        if self.dataset == "rooms" and (self.streaming or self.columns):
            raise ValueError("`streaming` and `columns` are for data sets that are read; rooms are rendered")
        tasks = self.model.get("tasks", {})
        if not isinstance(tasks, dict) or not all(isinstance(task, dict) for task in tasks.values()):
            raise ValueError(f"`model.tasks` must have the fields of each task under its name, got {tasks!r}")
        _check_augmentation(self.augmentation or {})
        if self.pretrained and (self.model or self.pretrained_backbone):
            raise ValueError("`pretrained` brings its own `model` and backbone: give only one of them")


def _check_augmentation(given: dict[str, Any]):
    known = [f.name for f in fields(Augmentation)]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"`augmentation` has the fields {unknown}; allowed are {known}")


def parse_arguments(argv: Sequence[str] | None = None) -> TrainingArguments:
    """Reads `CONFIG.yaml [--field value ...]`; values are YAML, dots reach inside (`--model.hidden_size 64`).

    Raises:
        ValueError: the file or the command line has an unknown field or a value that does not fit.
        OSError: the file cannot be read.
    """
    parser = argparse.ArgumentParser(
        usage="%(prog)s CONFIG.yaml [--field value ...]",
        description=TrainingArguments.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="YAML file with the fields of TrainingArguments")
    parsed, overrides = parser.parse_known_args(argv)
    try:
        values = yaml.safe_load(parsed.config.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{parsed.config} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{parsed.config} must hold `field: value` lines, got a {type(values).__name__}")
    if len(overrides) % 2 or not all(name.startswith("--") for name in overrides[::2]):
        raise ValueError(f"expected `--field value` pairs after the file, got {' '.join(overrides)}")
    for name, value in zip(overrides[::2], overrides[1::2]):
        *parents, leaf = name[2:].split(".")
        node = values
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = yaml.safe_load(value)

    types = {f.name: f.type for f in fields(TrainingArguments)}
    unknown = sorted(set(values) - set(types))
    if unknown:
        raise ValueError(f"unknown fields {unknown}; accepted are {sorted(types)}")
    # YAML reads 1e-3 as text and 1 as an integer.
    for name in values:
        if types[name] is float:
            try:
                values[name] = float(values[name])
            except (TypeError, ValueError):
                raise ValueError(f"`{name}` must be a number, got {values[name]!r}") from None
    try:
        return TrainingArguments(**values)
    except (TypeError, StrictDataclassError) as error:  # a field is missing or of another type
        raise ValueError(str(error)) from error
