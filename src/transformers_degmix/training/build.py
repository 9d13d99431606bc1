"""What a training run is built from: model, image processor, optimiser and schedule."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import get_scheduler

from ..configuration_degmix import NYUD_TASKS, DeGMixConfig
from ..data.benchmarks import BENCHMARKS
from ..data.mapping import name_classes
from ..data.rooms import ROOMS_TASKS
from ..hub.shipped import find_model
from ..image_processing_pil_degmix import DeGMixImageProcessorPil
from ..modeling_degmix import DeGMixForMultiTaskDensePrediction
from .arguments import TrainingArguments
from .backbones import find_backbone
from .data import describe_split
from .sources import check_tasks, naming_errors


def build_model(args: TrainingArguments) -> tuple[DeGMixForMultiTaskDensePrediction, DeGMixImageProcessorPil]:
    """The model to train, random, with a pretrained backbone or wholly pretrained, and its image processor.

    Modules in `args.freeze` get no gradients. If only new tasks are trained, the rest of the model gets none either.

    Raises:
        ImportError: the pretrained backbone needs an extra that is not installed.
        OSError: there is no pretrained model or backbone of that name.
        ValueError: a task is unknown or lacks a field, `freeze` names a module that the model does not have, or the
            weights are for another backbone than the model's.
    """
    if args.pretrained:
        place = find_model(args.pretrained)
        with naming_errors(f"`pretrained`: {args.pretrained}: "):
            model = DeGMixForMultiTaskDensePrediction.from_pretrained(place)
        new_tasks = choose_tasks(args, args.new_tasks) if args.new_tasks else {}
        if new_tasks and args.train_only_new:
            model.requires_grad_(False)
        for name, task in new_tasks.items():
            model.add_task(name, task, train_only_new=False)
        check_tasks(args.sources, model.config.tasks)
        processor = DeGMixImageProcessorPil.from_pretrained(place, tasks=model.config.tasks, **args.image_processor)
    else:
        tasks, fields = choose_tasks(args, args.model.get("tasks")), {}
        if all(source.dataset == "rooms" for source in args.sources):
            # Rooms have the size of the run already. Photos are resized to the scale that the model has learnt.
            # A long strip must not grow to hundreds of megapixels.
            shortest = min(args.image_size)
            fields = {"do_resize": True, "size": {"shortest_edge": shortest, "longest_edge": 4 * shortest}}
        pretrained = find_backbone(args.pretrained_backbone) if args.pretrained_backbone else None
        if pretrained:
            fields |= pretrained.processor_fields
        backbone_config = {"backbone_config": pretrained.config} if pretrained else {}
        with naming_errors("`model`: "):
            config = DeGMixConfig(**{**backbone_config, **args.model, "tasks": tasks})
        model = DeGMixForMultiTaskDensePrediction(config)
        processor = DeGMixImageProcessorPil(**{**fields, **args.image_processor, "tasks": model.config.tasks})
        if pretrained:
            pretrained.load(model.model.backbone)
    freeze(args, model)
    return model, processor


def choose_tasks(args: TrainingArguments, given: dict[str, dict] | None) -> dict[str, dict]:
    """The tasks of the run's benchmark and of Rooms, with the given fields, as far as `args.tasks` selects them.

    Class names and numbers of classes come from the data sets where they are not given.
    """
    known, owner = known_tasks(args)
    tasks = complete_tasks(known, given, owner) if known else given or NYUD_TASKS
    if not args.pretrained:
        check_tasks(args.sources, tasks)
    if args.tasks is not None:
        unknown = [name for name in args.tasks if name not in tasks]
        if unknown or not args.tasks:
            raise ValueError(f"`tasks` must be some of {list(tasks)}, got {args.tasks}")
        tasks = {name: task for name, task in tasks.items() if name in args.tasks}
    return name_source_classes(args, tasks)


def known_tasks(args: TrainingArguments) -> tuple[dict[str, dict], str]:
    """The tasks of the run's benchmark and of Rooms, without classes, which the data has; and whose they are."""
    are_rooms = [source.dataset == "rooms" for source in args.sources]
    known, owners = {}, []
    if any(are_rooms):
        for name, task in ROOMS_TASKS.items():
            known[name] = {key: value for key, value in task.items() if key not in ("num_labels", "id2label")}
        owners.append("Rooms")
    if args.benchmark and not all(are_rooms):
        known |= BENCHMARKS[args.benchmark].task_fields()
        owners.append(args.benchmark)
    return known, " and ".join(owners)


def complete_tasks(known: dict[str, dict], given: dict[str, dict] | None, owner: str) -> dict[str, dict]:
    """The given tasks, completed with the fields of known ones; all known tasks if none are given.

    Raises:
        ValueError: a task is not known and has no `kind`.
    """
    if given is None:
        return known
    unknown = sorted(name for name in given if name not in known and "kind" not in given[name])
    if unknown:
        raise ValueError(f"{owner}: there are no tasks {unknown}, only {list(known)}; others need a `kind`")
    return {name: {**known.get(name, {}), **task} for name, task in given.items()}


def name_source_classes(args: TrainingArguments, tasks: dict[str, dict]) -> dict[str, dict]:
    """The tasks with the class names of the run's sources; see [`name_classes`].

    Sources that map the class ids of a task count only if all of its sources do.

    Raises:
        ValueError: two sources name different classes.
    """
    features = []
    for source in args.sources:
        with source.naming():
            features.append((source, describe_split(args, source, "train").features()))
    named = {}
    for name, task in tasks.items():
        labelling = [(source, own) for source, own in features if name in source.choose(tasks)]
        unmapped = [(source, own) for source, own in labelling if not source.maps_classes(name)]
        named[name], namer = task, None
        for source, own in unmapped or labelling:
            with source.naming():
                found = name_classes({name: task}, own, source.columns)[name]
            if found == task:
                continue
            if namer and found != named[name]:
                first, second = named[name]["id2label"], found["id2label"]
                other = next(index for index in {**first, **second} if first.get(index) != second.get(index))
                raise ValueError(
                    f"{name!r} has {len(first)} classes in the source {namer.name!r} and {len(second)} in "
                    f"{source.name!r}; class {other} is {first.get(other)!r} and {second.get(other)!r}: map the ids "
                    f"of one to those of the other with `columns: {{{name}: {{classes: ...}}}}` in the source, or "
                    "give the task's `num_labels` and `id2label`"
                )
            named[name], namer = found, source
    return named


def trained_tasks(args: TrainingArguments, model: DeGMixForMultiTaskDensePrediction) -> dict[str, dict]:
    """The tasks for which the run needs labels.

    Raises:
        ValueError: `single_task_scores` are given, but a task has none above 0, which the gain is relative to.
    """
    names = list(args.new_tasks if args.new_tasks and args.train_only_new else model.config.tasks)
    if args.single_task_scores is not None:
        without = [name for name in names if not args.single_task_scores.get(name, 0) > 0]
        if without:
            raise ValueError(f"`single_task_scores` needs a score above 0 for each of {names}; {without} have none")
    return {name: model.config.tasks[name] for name in names}


def freeze(args: TrainingArguments, model: nn.Module):
    """Freezes the modules that `args.freeze` names."""
    names = dict(model.named_modules())
    unknown = [name for name in args.freeze if name not in names]
    if unknown:
        raise ValueError(f"`freeze` names {unknown}; the model has modules such as {list(names)[1:12]}")
    for name in args.freeze:
        names[name].requires_grad_(False)


def build_average(args: TrainingArguments, model: DeGMixForMultiTaskDensePrediction) -> AveragedModel | None:
    """The moving average of a model's weights and of the statistics of its batch norms, if the run has one.

    At first it decays faster, so that it does not stay near the random weights at the start of a short run.
    """
    if not args.ema_decay:
        return None

    def update(averaged: Sequence[Tensor], current: Sequence[Tensor], num_averaged: Tensor | int):
        decay = min(args.ema_decay, float((1 + num_averaged) / (10 + num_averaged)))
        get_ema_multi_avg_fn(decay)(averaged, current, num_averaged)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)


def build_optimizer(
    args: TrainingArguments, model: DeGMixForMultiTaskDensePrediction, balancer: nn.Module
) -> torch.optim.Optimizer:
    """The optimiser, with one group each for the parameters of backbone, other parts and balancing."""
    backbone = [p for p in model.model.backbone.parameters() if p.requires_grad]
    in_backbone = {id(p) for p in backbone}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in in_backbone]
    backbone_rate = args.learning_rate if args.backbone_learning_rate is None else args.backbone_learning_rate
    groups: list[dict[str, Any]] = [
        {"params": backbone, "lr": backbone_rate},
        {"params": others},
        # No decay: it would draw all tasks to the same weight.
        {"params": list(balancer.parameters()), "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, args.learning_rate, args.momentum, weight_decay=args.weight_decay)
    return torch.optim.AdamW(groups, args.learning_rate, weight_decay=args.weight_decay)


def build_scheduler(args: TrainingArguments, optimizer: torch.optim.Optimizer) -> LRScheduler:
    names = {"constant": "constant_with_warmup"}
    options = {"polynomial": {"power": args.lr_power, "lr_end": 0.0}}
    return get_scheduler(
        names.get(args.lr_scheduler, args.lr_scheduler),
        optimizer,
        args.warmup_steps,
        args.max_steps,
        scheduler_specific_kwargs=options.get(args.lr_scheduler),
    )
