"""The training loop: data -> batches -> losses -> steps -> evaluation -> the best and the last model."""

import platform
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from io import BytesIO
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from huggingface_hub import create_repo
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..evaluation.evaluator import evaluate_model, multi_task_gain
from ..files import hub_errors, remove_unfinished
from ..hub.model_directory import push_model_directory, save_model_directory
from ..image_processing_pil_degmix import DeGMixImageProcessorPil
from ..loss_degmix import count_pixels
from ..modeling_degmix import DeGMixForMultiTaskDensePrediction
from .arguments import TrainingArguments
from .balancing import TASK_BALANCING
from .build import build_average, build_model, build_optimizer, build_scheduler, trained_tasks
from .card import PICTURE, run_card
from .checkpoint import load_checkpoint, save_checkpoint, writing
from .data import TrainBatches, build_eval_loader
from .distributed import convert_sync_batch_norm
from .tracking import RunTracker, draw_samples


class TrainingTerminated(Exception):
    """The run was asked to stop by SIGTERM, and has written a checkpoint."""


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: the last one that was made.
        scores: of the last evaluation, by task and name of the score.
        qualities: step -> quality of the best models, the best first; see [`model_quality`].
        num_evaluations_without_gain: since the best model.
        seconds: that the run took, evaluations included, before and after it was resumed.
    """

    step: int = 0
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    qualities: dict[int, float] = field(default_factory=dict)
    num_evaluations_without_gain: int = 0
    seconds: float = 0.0

    def state_dict(self) -> dict:
        return asdict(self)

    def load_state_dict(self, state: dict):
        self.__dict__.update(state)


def train(args: TrainingArguments) -> dict[str, dict[str, float]]:
    """Trains a model and writes it, with a card of the run, to `args.output_dir / "best"` and `/ "last"`.

    Returns:
        Scores of the last model on the evaluation split, by task and name of the score.

    Raises:
        ValueError: the data set lacks a task's column or is smaller than a batch, a loss is not finite, or the
            checkpoint to resume from is damaged or of another run.
        OSError: the output directory cannot be written, or has a checkpoint and `resume` is not set; or the Hub fails.
        TrainingTerminated: on SIGTERM, at the end of the step.
    """
    output_dir = Path(args.output_dir)
    checkpoint_path = output_dir / "checkpoint.pt"
    if checkpoint_path.exists() and not args.resume:
        raise FileExistsError(f"{checkpoint_path} exists: go on from it with `resume`, or choose another `output_dir`")
    # Backbones may hold parameters that nothing reads, such as the last LayerNorm of SwinBackbone.
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=args.log_with or None,
        project_dir=output_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    set_seed(args.seed)
    with accelerator.main_process_first():  # it renders, downloads and converts
        plain_model, processor = build_model(args)
        tasks = trained_tasks(args, plain_model)
        train_batches = TrainBatches(args, processor, tasks, accelerator)
        eval_loader = build_eval_loader(args, processor, tasks, accelerator)
    if accelerator.num_processes > 1:
        convert_sync_batch_norm(plain_model, accelerator.device)
    if args.compile:
        plain_model.compile()
    balancer = TASK_BALANCING[args.task_balancing](len(tasks)).to(accelerator.device)
    optimizer = build_optimizer(args, plain_model, balancer)
    scheduler = build_scheduler(args, optimizer)
    model, optimizer = accelerator.prepare(plain_model, optimizer)
    averaged = build_average(args, plain_model)
    evaluated = averaged.module if averaged else plain_model

    progress = Progress()
    parts = {
        "model": plain_model,
        "averaged": averaged,
        "balancer": balancer,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "scaler": accelerator.scaler,
        "batches": train_batches,
        "progress": progress,
    }
    parts = {name: part for name, part in parts.items() if part is not None}
    arguments = {**args.decisive(), "num_processes": accelerator.num_processes}
    output_dir.mkdir(parents=True, exist_ok=True)  # now rather than after hours, if it cannot be written
    if accelerator.is_main_process:
        remove_unfinished(output_dir)
        if args.push_to_hub:
            with hub_errors():
                create_repo(args.push_to_hub, private=args.hub_private, exist_ok=True)
    if checkpoint_path.exists():
        load_checkpoint(checkpoint_path, parts, arguments, accelerator)

    start = time.monotonic() - progress.seconds
    tracker = RunTracker(args, accelerator, tasks, progress.step)
    batches = iter(train_batches)
    with catch_sigterm() as terminated:
        while progress.step < args.max_steps and not stops_early(args, progress):
            model.train()
            losses = accumulate_gradients(model, balancer, batches, args, accelerator)
            # Of all processes: whether one was terminated, and the epoch, which streams may end at different steps.
            others = losses.new_tensor([terminated.is_set(), train_batches.epoch])
            sums = accelerator.reduce(torch.cat([losses, others]), "sum")
            losses, (num_terminated, epochs) = sums.split([len(tasks), 2])
            if not losses.isfinite().all():
                losses = dict(zip(tasks, losses.tolist()))
                raise ValueError(f"the loss is not finite at step {progress.step + 1}: {losses}")
            if args.max_grad_norm:
                accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            balancer.observe(losses, int(epochs / accelerator.num_processes))
            if averaged:
                averaged.update_parameters(plain_model)
            progress.step += 1
            tracker.log_step(progress.step, losses, scheduler.get_last_lr())
            progress.seconds = time.monotonic() - start

            if progress.step % args.eval_steps == 0 or progress.step == args.max_steps:
                loss, progress.scores = evaluate_model(evaluated, eval_loader, tasks, accelerator)
                quality = model_quality(args, loss, progress.scores, tasks)
                update_best(args, progress, quality)
                if accelerator.is_main_process:
                    tracker.log_evaluation(
                        progress.step, loss, progress.scores, evaluated, processor, eval_loader.dataset
                    )
                    card = make_card(args, progress, evaluated, processor, train_batches, eval_loader, accelerator)
                    save_models(args, progress, evaluated, processor, card)
            finished = progress.step == args.max_steps or stops_early(args, progress)
            if progress.step % args.checkpoint_steps == 0 or num_terminated or finished:
                save_checkpoint(checkpoint_path, parts, arguments, accelerator)
            if num_terminated and not finished:
                tracker.close()
                raise TrainingTerminated(f"stopped by SIGTERM after step {progress.step}; go on with `resume`")
    accelerator.wait_for_everyone()
    tracker.close()
    if args.push_to_hub and accelerator.is_main_process:
        push_model_directory(output_dir / "best", args.push_to_hub, args.hub_private)
    return progress.scores


def accumulate_gradients(
    model: nn.Module, balancer: nn.Module, batches, args: TrainingArguments, accelerator: Accelerator
) -> Tensor:
    """Adds the gradients of one step, those of all its passes and processes as of one batch.

    Returns:
        This process's share of each task's loss, `(num_tasks,)`: the shares add up to it.
    """
    num_passes, num_processes = args.gradient_accumulation_steps, accelerator.num_processes
    passes = [next(batches) for _ in range(num_passes)]
    counts = [count_pixels(batch["labels"]) for batch in passes]
    counts = accelerator.reduce({task: sum(count[task] for count in counts) for task in counts[0]}, "sum")
    total = 0
    for index, batch in enumerate(passes):
        with nullcontext() if index + 1 == num_passes else accelerator.no_sync(model):
            losses = torch.stack(list(model(**batch, pixel_counts=counts).losses.values()))
            # Gradients become the mean over processes, but the losses are shares of a sum.
            objective = num_processes * balancer(losses, share=1 / (num_passes * num_processes))
            accelerator.backward(objective)
        total = total + losses.detach()
    for parameter in balancer.parameters():
        parameter.grad = accelerator.reduce(parameter.grad, "mean")
    return total


def model_quality(args: TrainingArguments, loss: float, scores: dict, tasks: dict[str, dict]) -> float:
    """Highest for the best model: its multi-task gain if single-task scores are given, else minus its loss."""
    if args.single_task_scores is None:
        return -loss
    return multi_task_gain(scores, args.single_task_scores, tasks)


def update_best(args: TrainingArguments, progress: Progress, quality: float):
    """Takes the model of this step among the best if it is one of them."""
    is_better = all(quality > other for other in progress.qualities.values())
    progress.num_evaluations_without_gain = 0 if is_better else progress.num_evaluations_without_gain + 1
    ranked = sorted({**progress.qualities, progress.step: quality}.items(), key=lambda item: (-item[1], item[0]))
    progress.qualities = dict(ranked[: args.num_best_models])


def stops_early(args: TrainingArguments, progress: Progress) -> bool:
    patience = args.early_stopping_patience
    return patience is not None and progress.num_evaluations_without_gain >= patience


def make_card(
    args: TrainingArguments,
    progress: Progress,
    model: DeGMixForMultiTaskDensePrediction,
    processor: DeGMixImageProcessorPil,
    train_batches: TrainBatches,
    eval_loader: DataLoader,
    accelerator: Accelerator,
) -> dict[str, bytes]:
    """The files of the card of the model of this step: the card itself and a picture of predictions, by name."""
    files = {}
    if args.num_logged_images:
        file = BytesIO()
        draw_samples(model, processor, list(islice(eval_loader.dataset, args.num_logged_images))).save(file, "JPEG")
        files[PICTURE] = file.getvalue()
    on_gpu = accelerator.device.type == "cuda"
    device = (
        torch.cuda.get_device_name() if on_gpu else f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    )
    fingerprints = {}
    if not args.streaming:
        # Evaluation is of a subset in each process.
        data = {"train": train_batches.loader.dataset, "eval": eval_loader.dataset.dataset}
        fingerprints = {part: mapped.data._fingerprint for part, mapped in data.items()}
    environment = f"{progress.seconds / 3600:.2g} hours on {accelerator.num_processes} x {device}."
    card = run_card(args, model, progress.scores, progress.step, fingerprints, environment, has_picture=bool(files))
    return {"README.md": str(card).encode(), **files}


def save_models(args: TrainingArguments, progress: Progress, model: nn.Module, processor, card: dict[str, bytes]):
    """Writes the model of this step as the last one, and among the best if it is one of them."""
    output_dir = Path(args.output_dir)
    names = ["last"]
    if progress.step in progress.qualities and args.num_best_models > 1:
        names.append(f"best_models/step_{progress.step}")
    if next(iter(progress.qualities)) == progress.step:
        names.append("best")
    for name in names:
        with writing(output_dir / name):
            save_model_directory(output_dir / name, model, processor, overwrite=True, more=card)
    kept = [f"step_{step}" for step in progress.qualities]
    for directory in output_dir.glob("best_models/step_*"):
        if directory.name not in kept:
            shutil.rmtree(directory)


@contextmanager
def catch_sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets inside of the block, where signals can be handled: in the main thread.

    Child processes that are forked inside inherit this, and cannot be ended by SIGTERM.
    """
    terminated = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield terminated
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: terminated.set())
    try:
        yield terminated
    finally:
        signal.signal(signal.SIGTERM, previous)
