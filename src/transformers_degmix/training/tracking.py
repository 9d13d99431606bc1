"""What a run shows while it goes on: a progress bar, and numbers and pictures for the trackers."""

import time
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

from ..data.collator import DeGMixDataCollator
from ..evaluation.evaluator import Scores, format_main_scores, format_source_table
from ..images_degmix import to_photo
from ..modeling_degmix import DeGMixForMultiTaskDensePrediction
from ..visualization import draw_overview, stack
from .arguments import TrainingArguments


class RunTracker:
    """Shows the losses of each step, images per second and the time left, and logs to the trackers of `args.log_with`.

    Args:
        args: of the run.
        accelerator: whose main process writes.
        tasks: `DeGMixConfig.tasks`.
        step: steps made before the run was resumed.
    """

    def __init__(self, args: TrainingArguments, accelerator: Accelerator, tasks: dict[str, dict], step: int):
        self.args = args
        self.accelerator = accelerator
        self.tasks = tasks
        if args.log_with:
            config = {
                name: value if isinstance(value, int | float) else str(value) for name, value in vars(args).items()
            }
            accelerator.init_trackers("degmix", config)
        self.images_per_step = args.batch_size * args.gradient_accumulation_steps * accelerator.num_processes
        self.bar = tqdm(
            total=args.max_steps * self.images_per_step,
            initial=step * self.images_per_step,
            desc="train",
            unit="img",
            disable=not accelerator.is_local_main_process,
        )
        self.step, self.time = step, time.monotonic()

    def log_step(self, step: int, losses: dict[str, float], learning_rates: list[float]):
        """Shows a step, and logs every `logging_steps`-th to the trackers.

        Args:
            step: number of steps made.
            losses: of the whole batch, by task, without tasks that have no label in it.
            learning_rates: of the optimiser's groups, for the next step.
        """
        self.bar.update(self.images_per_step)
        shown = {task: f"{losses[task]:.3f}" if task in losses else "-" for task in self.tasks}
        self.bar.set_postfix(shown, refresh=False)
        if step % self.args.logging_steps == 0:
            now = time.monotonic()
            speed = (step - self.step) * self.images_per_step / (now - self.time)
            self.step, self.time = step, now
            values = {f"train/{task}": loss for task, loss in losses.items()}
            values |= {"train/loss": sum(losses.values()), "train/images_per_second": speed}
            values |= {f"train/learning_rate_{group}": rate for group, rate in enumerate(learning_rates)}
            self.accelerator.log(values, step)

    def log_evaluation(
        self,
        step: int,
        loss: float,
        scores: dict[str, Scores],
        source_scores: dict[str, dict[str, Scores]],
        picture: Image.Image | None,
    ):
        """Shows scores, and logs scores and picture to the trackers.

        Args:
            step: after which the model was evaluated.
            loss: sum over the tasks.
            scores: by task and name of the score.
            source_scores: source name -> its scores, by task and name.
            picture: of predictions.
        """
        self.bar.write(f"step {step}  loss {loss:.3f}  {format_main_scores(scores, self.tasks)}")
        values = {f"eval/{task}_{name}": score for task in scores for name, score in scores[task].items()}
        if len(source_scores) > 1:
            self.bar.write(format_source_table(source_scores, self.tasks), end="")
            values |= {
                f"eval/{source}/{task}_{name}": score
                for source, by_task in source_scores.items()
                for task in by_task
                for name, score in by_task[task].items()
            }
        self.accelerator.log({"eval/loss": loss, **values}, step)
        if picture:
            log_picture(self.accelerator, picture, step)
        self.step, self.time = step, time.monotonic()  # images per second are only of training

    def close(self):
        self.bar.close()
        self.accelerator.end_training()


def log_picture(accelerator: Accelerator, picture: Image.Image, step: int):
    """Logs a picture to every tracker, in the format that it takes."""
    pixels = np.asarray(picture)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"predictions": pixels[None]}, step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({"predictions": [pixels]}, step)
        else:
            import trackio

            tracker.log({"predictions": trackio.Image(pixels)}, step)


@torch.no_grad()
def draw_samples(model: DeGMixForMultiTaskDensePrediction, processor, rows: list[dict[str, Any]]) -> Image.Image:
    """Overviews of predictions and labels, one below the other.

    Args:
        model: in eval mode.
        processor: its image processor.
        rows: with `image` and labels of some of the tasks, as [`DeGMixDataCollator`] takes them.
    """
    tasks = model.config.tasks
    labelled = {name: tasks[name] for name in tasks if any(name in row for row in rows)}
    collator = DeGMixDataCollator(processor, tasks=labelled)
    overviews = []
    for row in rows:
        batch = collator([row])
        outputs = model(batch["pixel_values"].to(model.device))
        image = to_photo(row["image"])
        predictions = {
            task: values.cpu() for task, values in processor.post_process_dense_prediction(outputs)[0].items()
        }
        references = {task: label[0] for task, label in batch["labels"].items()}
        overviews.append(draw_overview(image, predictions, tasks, references=references))
    return stack(overviews)
