"""What a training run is built from: model, image processor, optimiser and schedule."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import get_scheduler

from ..configuration_degmix import NYUD_TASKS, DeGMixConfig
from ..data.benchmarks import BENCHMARKS
from ..data.columns import name_classes
from ..data.rooms import ROOMS_TASKS
from ..hub.shipped import find_model
from ..image_processing_pil_degmix import DeGMixImageProcessorPil
from ..modeling_degmix import DeGMixForMultiTaskDensePrediction
from .arguments import TrainingArguments
from .backbones import find_backbone
from .data import describe_split


def build_model(args: TrainingArguments) -> tuple[DeGMixForMultiTaskDensePrediction, DeGMixImageProcessorPil]:
    """The model to train, from random, backbone or whole pretrained weights, and its image processor.

    What `args.freeze` names gets no gradients, nor does what was there before new tasks if only these are trained.

    Raises:
        ImportError: the pretrained backbone needs an extra that is not installed.
        OSError: there is no pretrained model or backbone of that name.
        ValueError: a task is unknown or lacks a field, `freeze` names what the model does not have, or the weights are
            those of another backbone than the model's.
    """
    if args.pretrained:
        place = find_model(args.pretrained)
        model = DeGMixForMultiTaskDensePrediction.from_pretrained(place)
        new_tasks = choose_tasks(args, args.new_tasks) if args.new_tasks else {}
        if new_tasks and args.train_only_new:
            model.requires_grad_(False)
        for name, task in new_tasks.items():
            model.add_task(name, task, train_only_new=False)
        processor = DeGMixImageProcessorPil.from_pretrained(place, tasks=model.config.tasks, **args.image_processor)
    else:
        tasks, fields = choose_tasks(args, args.model.get("tasks")), {}
        if args.dataset == "rooms":
            # They have the size of the run; photos are brought to the scale that the model has learnt.
            fields = {"do_resize": True, "size": {"shortest_edge": min(args.image_size)}}
        pretrained = find_backbone(args.pretrained_backbone) if args.pretrained_backbone else None
        if pretrained:
            fields |= pretrained.processor_fields
        backbone_config = {"backbone_config": pretrained.config} if pretrained else {}
        model = DeGMixForMultiTaskDensePrediction(DeGMixConfig(**{**backbone_config, **args.model, "tasks": tasks}))
        processor = DeGMixImageProcessorPil(**{**fields, **args.image_processor, "tasks": model.config.tasks})
        if pretrained:
            pretrained.load(model.model.backbone)
    freeze(args, model)
    return model, processor


def choose_tasks(args: TrainingArguments, given: dict[str, dict] | None) -> dict[str, dict]:
    """The tasks of the run: those of its benchmark or of Rooms, changed by what is given, chosen by `tasks`.

    Class names and numbers come from the data set where they are not given.
    """
    if args.dataset == "rooms":
        tasks = complete_tasks(ROOMS_TASKS, given, "Rooms")
    elif args.benchmark:
        tasks = complete_tasks(BENCHMARKS[args.benchmark].task_fields(), given, args.benchmark)
    else:
        tasks = given or NYUD_TASKS
    if args.tasks is not None:
        unknown = [name for name in args.tasks if name not in tasks]
        if unknown or not args.tasks:
            raise ValueError(f"`tasks` must be some of {list(tasks)}, got {args.tasks}")
        tasks = {name: task for name, task in tasks.items() if name in args.tasks}
    if args.dataset == "rooms":
        return tasks
    return name_classes(tasks, describe_split(args, "train").open().features, args.columns)


def complete_tasks(known: dict[str, dict], given: dict[str, dict] | None, owner: str) -> dict[str, dict]:
    """The tasks that are named, or all, with the fields that are given in place of their own."""
    if given is None:
        return known
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"the tasks {unknown} are none of {owner}: {list(known)}")
    return {name: {**known[name], **task} for name, task in given.items()}


def trained_tasks(args: TrainingArguments, model: DeGMixForMultiTaskDensePrediction) -> dict[str, dict]:
    """The tasks that the run needs labels of."""
    names = args.new_tasks if args.new_tasks and args.train_only_new else model.config.tasks
    return {name: model.config.tasks[name] for name in names}


def freeze(args: TrainingArguments, model: nn.Module):
    """Freezes the modules that `args.freeze` names."""
    names = dict(model.named_modules())
    unknown = [name for name in args.freeze if name not in names]
    if unknown:
        raise ValueError(f"`freeze` names {unknown}; the model has modules such as {list(names)[1:12]}")
    for name in args.freeze:
        names[name].requires_grad_(False)


def build_average(args: TrainingArguments, model: nn.Module) -> AveragedModel | None:
    """The moving average of a model's weights and of the statistics of its batch norms, if the run has one.

    At first it decays faster, so that it does not stay near the random weights at the start of a short run.
    """
    if not args.ema_decay:
        return None

    def update(averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor | int):
        decay = min(args.ema_decay, float((1 + num_averaged) / (10 + num_averaged)))
        get_ema_multi_avg_fn(decay)(averaged, current, num_averaged)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)


def build_optimizer(args: TrainingArguments, model: nn.Module, balancer: nn.Module) -> torch.optim.Optimizer:
    """Backbone, other and balancing parameters, in groups of their own."""
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
