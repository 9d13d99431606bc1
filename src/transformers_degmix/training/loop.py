"""The training loop: data -> batches -> losses -> steps -> evaluation -> the best and the last model."""

import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from datasets import Dataset, IterableDataset, load_dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_scheduler

from ..configuration_degmix import NYUD_TASKS, DeGMixConfig
from ..data.augmentation import Augmentation
from ..data.columns import MappedDataset, map_columns, name_classes
from ..data.rooms import ROOMS_TASKS, load_rooms
from ..evaluation.evaluator import evaluate_model, format_main_scores
from ..image_processing_pil_degmix import DeGMixImageProcessorPil
from ..modeling_degmix import DeGMixForMultiTaskDensePrediction
from ..saving import save_model_directory
from .arguments import TrainingArguments
from .collator import DeGMixDataCollator


def train(args: TrainingArguments) -> dict[str, dict[str, float]]:
    """Trains a model and writes it to `args.output_dir / "best"` (lowest evaluation loss) and `/ "last"`.

    Returns:
        Scores of the last model on the evaluation split, by task and name of the score.

    Raises:
        ValueError: the data set lacks a task's column or is smaller than a batch, or a loss is not finite.
        OSError: the output directory cannot be written.
    """
    # Backbones may hold parameters that nothing reads, such as the last LayerNorm of SwinBackbone.
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    set_seed(args.seed)
    model, processor = build_model(args)
    tasks = model.config.tasks
    train_data, eval_data = (load_split(args, part, tasks) for part in ("train", "eval"))
    num_images = args.batch_size * accelerator.num_processes
    # Streams have no length.
    found = sum(1 for _ in open_split(args, "train").take(num_images)) if args.streaming else len(train_data)
    if found < num_images:
        raise ValueError(
            f"{found} training images do not fill one batch: `batch_size` is {args.batch_size}, "
            f"processes are {accelerator.num_processes}"
        )
    train_collator = DeGMixDataCollator(processor, build_augmentation(args), args.seed, tasks)
    # A short last batch would make the steps of different processes differ.
    train_loader, eval_loader = (
        DataLoader(
            data,
            args.batch_size,
            shuffle=training and not args.streaming,  # streams come in random order
            drop_last=training,
            num_workers=args.num_workers,
            persistent_workers=args.num_workers > 0,
            collate_fn=collator,
        )
        for data, collator, training in (
            (train_data, train_collator, True),
            (eval_data, DeGMixDataCollator(processor, tasks=tasks), False),
        )
    )
    optimizer = build_optimizer(args, model)
    scheduler = build_scheduler(args, optimizer)
    model, optimizer, train_loader, eval_loader = accelerator.prepare(model, optimizer, train_loader, eval_loader)

    output_dir, best_loss = Path(args.output_dir), float("inf")
    output_dir.mkdir(parents=True, exist_ok=True)  # now rather than after hours, if it cannot be written
    progress = tqdm(total=args.max_steps, desc="train", disable=not accelerator.is_local_main_process)
    batches = endless(train_loader, train_collator)
    for step in range(1, args.max_steps + 1):
        model.train()
        outputs = model(**next(batches))
        if not outputs.loss.isfinite():
            losses = {task: loss.item() for task, loss in outputs.losses.items()}
            raise ValueError(f"the loss is not finite at step {step}: {losses}")
        accelerator.backward(outputs.loss)
        if args.max_grad_norm:
            accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        progress.update()
        progress.set_postfix({task: f"{loss.item():.3f}" for task, loss in outputs.losses.items()}, refresh=False)

        if step % args.eval_steps == 0 or step == args.max_steps:
            loss, scores = evaluate_model(model, eval_loader, tasks, accelerator)
            if accelerator.is_main_process:
                progress.write(f"step {step}  loss {loss:.3f}  {format_main_scores(scores, tasks)}")
                unwrapped = accelerator.unwrap_model(model)
                for name in ("best", "last") if loss < best_loss else ("last",):
                    save_model_directory(output_dir / name, unwrapped, processor, overwrite=True)
            best_loss = min(best_loss, loss)
    progress.close()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return scores


def build_model(args: TrainingArguments) -> tuple[DeGMixForMultiTaskDensePrediction, DeGMixImageProcessorPil]:
    """The model to train, from random, backbone or whole pretrained weights, and its image processor."""
    if args.pretrained:
        model = DeGMixForMultiTaskDensePrediction.from_pretrained(args.pretrained)
        return model, DeGMixImageProcessorPil.from_pretrained(args.pretrained)
    fields, processing = args.model, {}
    if args.dataset == "rooms":
        fields = {**args.model, "tasks": rooms_tasks(args.model.get("tasks", dict.fromkeys(ROOMS_TASKS, {})))}
        # Rooms have this size already; photos are brought to the scale that the model has learnt.
        processing = {"do_resize": True, "size": {"shortest_edge": min(args.image_size)}}
    else:
        tasks = args.model.get("tasks", NYUD_TASKS)
        fields = {**args.model, "tasks": name_classes(tasks, open_split(args, "train").features, args.columns)}
    config = DeGMixConfig(**fields)
    model = DeGMixForMultiTaskDensePrediction(config)
    if args.pretrained_backbone:
        # The class rather than AutoBackbone, which takes no local directory.
        backbone_class = type(model.model.backbone)
        model.model.backbone = backbone_class.from_pretrained(args.pretrained_backbone, config=config.backbone_config)
    return model, DeGMixImageProcessorPil(tasks=config.tasks, **processing)


def rooms_tasks(tasks: dict[str, dict]) -> dict[str, dict]:
    """The tasks of Rooms that are named, with the fields that are given in place of their own."""
    unknown = sorted(set(tasks) - set(ROOMS_TASKS))
    if unknown:
        raise ValueError(f"Rooms have no labels of {unknown}, only of {list(ROOMS_TASKS)}")
    return {name: {**ROOMS_TASKS[name], **task} for name, task in tasks.items()}


def load_split(args: TrainingArguments, part: str, tasks: dict[str, dict]) -> MappedDataset | IterableDataset:
    """The `"train"` or `"eval"` part of the run's data set, with the columns `image` and one per task.

    Labels are `None` where a sample has none. A training stream comes in another random order in each epoch.

    Raises:
        ValueError: it is empty, smaller than it should be, or lacks a column.
    """
    data = open_split(args, part)
    buffer_size = args.shuffle_buffer_size if part == "train" else 0
    try:
        return map_columns(data, tasks, args.columns, buffer_size, args.seed)
    except ValueError as error:
        raise ValueError(f"{args.dataset!r}, split {getattr(args, f'{part}_split')!r}: {error}") from error


def open_split(args: TrainingArguments, part: str) -> Dataset | IterableDataset:
    """The `"train"` or `"eval"` part of the run's data set as it is."""
    split, num_images = getattr(args, f"{part}_split"), getattr(args, f"num_{part}_images")
    if args.dataset == "rooms":
        if num_images is None:
            raise ValueError(f"`num_{part}_images` must say how many rooms to render")
        return load_rooms(split, num_images, tuple(args.image_size), num_proc=os.cpu_count())
    try:
        data = load_dataset(args.dataset, split=split, streaming=args.streaming)
    except ValueError as error:  # there is no such split, or nothing in it
        raise ValueError(f"{args.dataset!r}, split {split!r}: {error}") from error
    if num_images is None:
        return data
    if not args.streaming and num_images > len(data):
        raise ValueError(f"`num_{part}_images` is {num_images}, but {args.dataset!r} has {len(data)} in {split!r}")
    return data.take(num_images)


def build_optimizer(args: TrainingArguments, model: torch.nn.Module) -> torch.optim.Optimizer:
    if args.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), args.learning_rate, args.momentum, weight_decay=args.weight_decay)
    return torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=args.weight_decay)


def build_scheduler(args: TrainingArguments, optimizer: torch.optim.Optimizer):
    names = {"constant": "constant_with_warmup"}
    options = {"polynomial": {"power": args.lr_power, "lr_end": 0.0}}
    return get_scheduler(
        names.get(args.lr_scheduler, args.lr_scheduler),
        optimizer,
        args.warmup_steps,
        args.max_steps,
        scheduler_specific_kwargs=options.get(args.lr_scheduler),
    )


def build_augmentation(args: TrainingArguments) -> Augmentation | None:
    """The published augmentation, with the fields that the run changes, or none."""
    return None if args.augmentation is None else Augmentation(**{"size": tuple(args.image_size), **args.augmentation})


def endless(loader: DataLoader, collator: DeGMixDataCollator) -> Iterator[dict]:
    """Epoch after epoch, each augmented in its own way."""
    for epoch in count():
        collator.set_epoch(epoch)
        yield from loader
