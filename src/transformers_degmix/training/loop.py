"""The training loop: data -> batches -> losses -> steps -> evaluation -> the best and the last model."""

import platform
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, set_seed
from huggingface_hub import create_repo
from PIL import Image
from torch import Tensor, nn
from transformers.utils import logging

from ..data.splits import PROCESS_TIMEOUT
from ..evaluation.evaluator import Scores, evaluate_model, mean_over_sources, multi_task_gain
from ..files import hub_errors, locked, remove_unfinished
from ..hub.model_directory import push_model_directory, save_model_directory
from ..loss_degmix import count_pixels
from .arguments import TrainingArguments
from .balancing import TASK_BALANCING
from .build import build_average, build_model, build_optimizer, build_scheduler, trained_tasks
from .card import PICTURE, run_card
from .checkpoint import load_checkpoint, save_checkpoint, writing
from .data import TrainBatches, build_eval_loader, find_sources
from .distributed import convert_sync_batch_norm
from .tracking import RunTracker, draw_samples


logger = logging.get_logger(__name__)

CHECKPOINT = "checkpoint.pt"


class TrainingTerminated(Exception):
    """The run was asked to stop by SIGTERM, and has written a checkpoint."""


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: number of steps made.
        evaluated_step: after which the model was evaluated last, 0 before the first time.
        scores: of the last evaluation, by task and name of the score: means over the sources that label the task.
        source_scores: source name -> its scores, by task and name. Without `datasets`, the only name is "".
        qualities: step -> quality of the best models, the best first; see [`model_quality`].
        num_evaluations_without_gain: evaluations since the best model.
        seconds: time of the run, including evaluations and the time before it was resumed.
    """

    step: int = 0
    evaluated_step: int = 0
    scores: dict[str, Scores] = field(default_factory=dict)
    source_scores: dict[str, dict[str, Scores]] = field(default_factory=dict)
    qualities: dict[int, float] = field(default_factory=dict)
    num_evaluations_without_gain: int = 0
    seconds: float = 0.0

    def state_dict(self) -> dict:
        return asdict(self)

    def load_state_dict(self, state: dict):
        self.__dict__.update(state)


def train(args: TrainingArguments) -> dict[str, Scores]:
    """Trains a model and writes it, with a card of the run, to `args.output_dir / "best"` and `/ "last"`.

    Returns:
        Scores of the last model on the evaluation split, by task and name of the score. With several sources, they
        are means over the sources that label the task.

    Raises:
        ImportError: a tracker of `log_with` is not installed.
        ValueError: a data set lacks a task's column or is smaller than a batch, a loss is not finite, or the
            checkpoint to resume from is damaged or of another run, or another process is writing the output directory.
        OSError: the output directory cannot be written, or has another run's checkpoint or models and `resume` is not
            set; or the Hub fails.
        TrainingTerminated: on SIGTERM, at the end of the step.
    """
    return train_to_end(args).scores


def train_to_end(args: TrainingArguments) -> Progress:
    """The same as [`train`], but returns the whole [`Progress`] of the run."""
    for path in (Path(args.output_dir, name) for name in (CHECKPOINT, "best", "last")):
        if path.exists() and not args.resume:
            found = "go on from it with `resume`" if path.name == CHECKPOINT else "replace it with `resume`"
            raise FileExistsError(f"{path} exists: {found}, or choose another `output_dir`")
    run = Run(args)
    progress = run.progress
    with run.started(), catch_sigterm() as terminated:
        while not run.is_finished():
            if run.must_evaluate():
                run.evaluate()
                run.save_checkpoint()
                continue
            is_terminated = run.step(terminated)
            # Before an evaluation too, because it can fail.
            if progress.step % args.checkpoint_steps == 0 or is_terminated or run.must_evaluate():
                run.save_checkpoint()
            if is_terminated:
                run.tracker.close()
                raise TrainingTerminated(f"stopped by SIGTERM after step {progress.step}; go on with `resume`")
        run.accelerator.wait_for_everyone()
    run.tracker.close()
    if args.push_to_hub and run.accelerator.is_main_process:
        push_model_directory(Path(args.output_dir) / "best", args.push_to_hub, args.hub_private)
    return progress


class Run:
    """The parts of a training run."""

    def __init__(self, args: TrainingArguments):
        self.args = args
        self.accelerator = accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # by itself, Accelerate would let torchrun's processes run apart
            mixed_precision=args.mixed_precision,
            log_with=args.log_with or None,
            project_dir=args.output_dir,
            kwargs_handlers=[
                # Backbones can have parameters that nothing reads, such as the last LayerNorm of SwinBackbone.
                DistributedDataParallelKwargs(find_unused_parameters=True),
                InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT),
            ],
        )
        missing = sorted(set(args.log_with) - set(map(str, accelerator.log_with)))
        if missing:  # Accelerate leaves them out
            raise ImportError(f"`log_with` needs packages that are not installed: pip install {' '.join(missing)}")
        set_seed(args.seed)
        with accelerator.main_process_first():  # which renders, downloads and converts
            self.plain_model, self.processor = build_model(args)
            self.tasks = trained_tasks(args, self.plain_model)
            self.sources = find_sources(args, self.tasks)
            self.train_batches = TrainBatches(args, self.sources, self.processor, self.tasks, accelerator)
            self.eval_loaders: list[Any] = [
                build_eval_loader(args, source, self.processor, self.tasks, accelerator)
                for source in self.train_batches.sources
            ]
        if accelerator.num_processes > 1:
            convert_sync_batch_norm(self.plain_model, accelerator.device)
        if args.compile:
            self.plain_model.compile()
        self.balancer = TASK_BALANCING[args.task_balancing](len(self.tasks)).to(accelerator.device)
        self.optimizer = build_optimizer(args, self.plain_model, self.balancer)
        self.scheduler = build_scheduler(args, self.optimizer)
        self.model, self.optimizer = accelerator.prepare(self.plain_model, self.optimizer)
        self.averaged = build_average(args, self.plain_model)
        self.evaluated: Any = self.averaged.module if self.averaged else self.plain_model
        self.progress = Progress()

    @contextmanager
    def started(self) -> Iterator[None]:
        """The run in the state of its checkpoint, if there is one. No other run can write its directory meanwhile."""
        args, accelerator, output_dir = self.args, self.accelerator, Path(self.args.output_dir)
        with locked(output_dir) if accelerator.is_main_process else nullcontext():
            if accelerator.is_main_process:
                remove_unfinished(output_dir, CHECKPOINT, "best", "last", "best_models/step_*")
                if args.push_to_hub:
                    with hub_errors():
                        create_repo(args.push_to_hub, private=args.hub_private, exist_ok=True)
            if (output_dir / CHECKPOINT).exists():
                load_checkpoint(output_dir / CHECKPOINT, self._parts(), self._arguments(), accelerator)
            self.start = time.monotonic() - self.progress.seconds
            self.tracker = RunTracker(args, accelerator, self.tasks, self.progress.step)
            self.batches = iter(self.train_batches)
            yield

    def _parts(self) -> dict[str, Any]:
        """The objects whose state a checkpoint holds, by name."""
        parts = {
            "model": self.plain_model,
            "averaged": self.averaged,
            "balancer": self.balancer,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.accelerator.scaler,
            "batches": self.train_batches,
            "progress": self.progress,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def _arguments(self) -> dict[str, Any]:
        return {**self.args.decisive(), "num_processes": self.accelerator.num_processes}

    def save_checkpoint(self):
        path = Path(self.args.output_dir) / CHECKPOINT
        save_checkpoint(path, self._parts(), self._arguments(), self.accelerator)

    def is_finished(self) -> bool:
        patience = self.args.early_stopping_patience
        stops_early = patience is not None and self.progress.num_evaluations_without_gain >= patience
        return stops_early or (self.progress.step == self.args.max_steps and not self.must_evaluate())

    def must_evaluate(self) -> bool:
        """Whether an evaluation is due after this step and was not made yet."""
        step, args = self.progress.step, self.args
        return (step % args.eval_steps == 0 or step == args.max_steps) and step != self.progress.evaluated_step

    def step(self, terminated: threading.Event) -> bool:
        """Makes an optimiser step; returns whether any process has received SIGTERM."""
        args, accelerator, progress = self.args, self.accelerator, self.progress
        self.model.train()
        losses, labelled = accumulate_gradients(self.model, self.balancer, self.batches, args, accelerator)
        # Processes can receive SIGTERM, and streams can end their epoch, at different steps: they must agree.
        others = losses.new_tensor([terminated.is_set(), self.train_batches.epoch])
        sums = accelerator.reduce(torch.cat([losses, others]), "sum")
        losses, (num_terminated, epochs) = sums.split([len(self.tasks), 2])
        if not losses.isfinite().all():
            named = dict(zip(self.tasks, losses.tolist()))
            raise ValueError(f"the loss is not finite at step {progress.step + 1}: {named}")
        if labelled.any():  # otherwise there are no gradients, and the scaler of fp16 needs some
            if args.max_grad_norm:
                accelerator.clip_grad_norm_(self.model.parameters(), args.max_grad_norm)
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.balancer.observe(losses, labelled, int(epochs / accelerator.num_processes))
        if self.averaged:
            self.averaged.update_parameters(self.plain_model)
        progress.step += 1
        known = {task: loss for task, loss, known in zip(self.tasks, losses.tolist(), labelled.tolist()) if known}
        self.tracker.log_step(progress.step, known, [float(rate) for rate in self.scheduler.get_last_lr()])
        progress.seconds = time.monotonic() - self.start
        return bool(num_terminated)

    def evaluate(self):
        """Scores the model and writes it as the last one, and among the best if it is one of them."""
        args, progress = self.args, self.progress
        losses = []
        for source, loader in zip(self.sources, self.eval_loaders):
            with source.naming():
                own, scores = evaluate_model(self.evaluated, loader, source.choose(self.tasks), self.accelerator)
            losses.append(own)
            progress.source_scores[source.name or ""] = scores
        loss = sum(mean_over_sources(losses).values())
        progress.scores, progress.evaluated_step = mean_scores(self.tasks, progress.source_scores), progress.step
        update_best(args, progress, model_quality(args, progress, loss, self.tasks))
        if self.accelerator.is_main_process:
            picture = self._draw_samples() if args.num_logged_images else None
            self.tracker.log_evaluation(progress.step, loss, progress.scores, progress.source_scores, picture)
            save_models(args, progress, self.evaluated, self.processor, self._make_card(picture))

    def _draw_samples(self) -> Image.Image:
        """Predictions above labels, for the first samples of each source."""
        samples = [row for loader in self.eval_loaders for row in islice(loader.dataset, self.args.num_logged_images)]
        return draw_samples(self.evaluated, self.processor, samples)

    def _make_card(self, picture: Image.Image | None) -> dict[str, bytes]:
        """The model card of this step and its picture: file name -> content."""
        args, progress, device = self.args, self.progress, self.accelerator.device
        files = {}
        if picture:
            file = BytesIO()
            picture.save(file, "JPEG")
            files[PICTURE] = file.getvalue()
        machine = (
            torch.cuda.get_device_name()
            if device.type == "cuda"
            else f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
        )
        fingerprints = []
        if not args.streaming:
            # Each process evaluates a `Subset`.
            evaluated = [loader.dataset.dataset for loader in self.eval_loaders]
            trained: Any = self.train_batches.data
            for train_data, eval_data in zip(trained.parts, evaluated):
                fingerprints.append({"train": train_data.data._fingerprint, "eval": eval_data.data._fingerprint})
        environment = f"{progress.seconds / 3600:.2g} hours on {self.accelerator.num_processes} x {machine}."
        card = run_card(
            args,
            self.sources,
            self.evaluated,
            progress.scores,
            progress.source_scores,
            progress.step,
            fingerprints,
            environment,
            has_picture=bool(picture),
        )
        return {"README.md": str(card).encode(), **files}


def accumulate_gradients(
    model: nn.Module, balancer: nn.Module, batches, args: TrainingArguments, accelerator: Accelerator
) -> tuple[Tensor, Tensor]:
    """Accumulates the gradients of one step, whose passes and processes count as one batch.

    Parameters that no label reaches get no gradient: with one of zero, momentum and weight decay would move them.

    Returns:
        This process's share of each task's loss, `(num_tasks,)`; the shares of all processes add up to the loss. And
        whether any process has a label of the task in this step, `(num_tasks,)`, bool.
    """
    num_passes, num_processes = args.gradient_accumulation_steps, accelerator.num_processes
    passes = [next(batches) for _ in range(num_passes)]
    counts = [count_pixels(batch["labels"]) for batch in passes]
    counts = accelerator.reduce({task: sum(count[task] for count in counts) for task in counts[0]}, "sum")
    total: Any = 0
    for index, batch in enumerate(passes):
        with nullcontext() if index + 1 == num_passes else accelerator.no_sync(model):
            by_task = model(**batch, pixel_counts=counts).losses
            losses = torch.stack(list(by_task.values()))
            labelled = torch.stack([counts[task][0] > 0 for task in by_task])
            # Gradients are averaged over processes, but the losses are shares of a sum.
            objective = num_processes * balancer(losses, labelled, share=1 / (num_passes * num_processes))
            accelerator.backward(objective)
        total = total + losses.detach()
    for parameter in balancer.parameters():
        parameter.grad = accelerator.reduce(parameter.grad, "mean")
    if not labelled.all():
        # The loss of a task without labels is 0 but has a graph: without it, processes would wait for each other.
        drop_zero_gradients([*model.parameters(), *balancer.parameters()])
    return total, labelled


def drop_zero_gradients(parameters: Iterable[nn.Parameter]):
    """Removes gradients that are zero everywhere, so that optimisers skip these parameters."""
    gradients = {parameter: parameter.grad for parameter in parameters if parameter.grad is not None}
    reached = torch.stack([gradient.any() for gradient in gradients.values()]).tolist()
    for parameter, is_reached in zip(gradients, reached):
        if not is_reached:
            parameter.grad = None


def mean_scores(tasks: Iterable[str], source_scores: dict[str, dict[str, Scores]]) -> dict[str, Scores]:
    """By task, the mean of each score over the sources that label it."""
    by_task = {task: [scores[task] for scores in source_scores.values() if task in scores] for task in tasks}
    return {task: mean_over_sources(scores) for task, scores in by_task.items() if scores}


def model_quality(args: TrainingArguments, progress: Progress, loss: float, tasks: dict[str, dict]) -> float:
    """Highest for the best model: its multi-task gain if single-task scores are given, else minus its loss.

    Without any label, nothing can be compared: it grows from step to step.
    """
    if not progress.scores:
        logger.warning_once("there is no label to evaluate with: the newest model counts as the best one")
        return progress.step
    if args.single_task_scores is None:
        return -loss
    return multi_task_gain(progress.scores, args.single_task_scores, tasks)


def update_best(args: TrainingArguments, progress: Progress, quality: float):
    """Adds the model of this step to the best ones if it is one of them."""
    is_better = all(quality > other for other in progress.qualities.values())
    progress.num_evaluations_without_gain = 0 if is_better else progress.num_evaluations_without_gain + 1
    ranked = sorted({**progress.qualities, progress.step: quality}.items(), key=lambda item: (-item[1], item[0]))
    progress.qualities = dict(ranked[: args.num_best_models])


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
    """An event that SIGTERM sets inside the block. Only the main thread can handle signals; others never set it.

    Child processes that are forked inside the block inherit the handler: SIGTERM does not end them.
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
