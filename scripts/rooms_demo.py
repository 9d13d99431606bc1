"""Predicts a photograph with the model that comes with the package, and trains a small one on Rooms.

The small model starts from scratch and is scored on held-out rooms. Its predictions for some of them are drawn.

    python scripts/rooms_demo.py [--quick] [--output_dir DIR]

`--quick` is a few steps on a few images: it shows that everything works, not what the model can learn.
"""

import argparse
import os
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from skimage.data import coffee
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import pipeline
from transformers.utils import logging

from transformers_degmix import DeGMixForMultiTaskDensePrediction, DeGMixImageProcessor
from transformers_degmix.cli import run_script
from transformers_degmix.data.collator import DeGMixDataCollator
from transformers_degmix.data.rooms import load_rooms
from transformers_degmix.evaluation import METRICS
from transformers_degmix.evaluation.evaluator import evaluate_model
from transformers_degmix.evaluation.metric import compute_scores, valid_pixels
from transformers_degmix.training.arguments import parse_arguments
from transformers_degmix.training.loop import train
from transformers_degmix.training.tracking import draw_samples
from transformers_degmix.visualization import draw_overview


QUICK = "--num_train_images 16 --num_eval_images 8 --max_steps 4 --eval_steps 2 --warmup_steps 1".split()
NUM_DRAWN = 4


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps only")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"), help="receives models and picture")
    options = parser.parse_args()
    logging.disable_progress_bar()  # of saving; training has its own
    # `--resume` allows for models of an earlier demo.
    overrides = ["--output_dir", str(options.output_dir), *(QUICK if options.quick else []), "--resume"]

    start = time.monotonic()
    args = parse_arguments(["rooms_demo", *overrides])
    options.output_dir.mkdir(parents=True, exist_ok=True)
    (options.output_dir / "checkpoint.pt").unlink(missing_ok=True)  # of an earlier demo
    predict_photo(options.output_dir / "photo.png")
    train(args)
    model = DeGMixForMultiTaskDensePrediction.from_pretrained(options.output_dir / "best")
    processor = DeGMixImageProcessor.from_pretrained(options.output_dir / "best")

    tasks = model.config.tasks

    def rooms(split: str, num_images: int) -> DataLoader:
        data = load_rooms(split, num_images, tuple(args.image_size), num_proc=os.cpu_count())
        return DataLoader(data, args.batch_size, collate_fn=DeGMixDataCollator(processor, tasks=tasks))

    # The training compared models on the validation rooms. The test rooms are new to it.
    held_out = rooms("test", args.num_eval_images)
    scores = {
        "DeGMix": evaluate_model(model, held_out, tasks, Accelerator())[1],
        "constant": constant_scores(tasks, rooms("train", args.num_train_images), held_out),
    }
    print_scores(scores, tasks, args.num_eval_images)
    picture = options.output_dir / "held_out_rooms.png"
    draw_samples(model, processor, list(held_out.dataset.select(range(NUM_DRAWN)))).save(picture)
    print(f"model: {options.output_dir / 'best'}   picture: {picture}   {time.monotonic() - start:.0f} s in all")


def predict_photo(path: Path):
    """Draws what the shipped model sees in a photograph that scikit-image has (CC0)."""
    photo = Image.fromarray(coffee())
    predict = pipeline("multi-task-dense-prediction")
    draw_overview(photo, predict(photo), predict.model.config.tasks).save(path)
    print(f"a photograph, by the model that comes with the package: {path}")


def best_constant(kind: str, labels: Tensor) -> Tensor:
    """A constant prediction to compare models with, one value or one vector.

    Args:
        kind: of the task.
        labels: valid ones, `(pixels,)` or `(3, pixels)`.
    """
    if kind == "segmentation":
        return labels.mode().values
    if kind == "depth":
        return labels.median()
    if kind == "normals":
        return F.normalize(labels.mean(dim=1), dim=0)
    # Every pixel is salient, or boundary: full recall, precision by chance.
    return torch.ones(())


def constant_scores(
    tasks: dict[str, dict], train_batches: Iterable[dict], eval_batches: Iterable[dict]
) -> dict[str, dict[str, float]]:
    """Scores of constant predictions, by task and name of the score; only of tasks with labels in both.

    Args:
        tasks: `DeGMixConfig.tasks`.
        train_batches: batches with `labels`, from which the constants are computed; all are kept in memory.
        eval_batches: batches with `labels`, on which the constants are scored.
    """
    train_labels = [batch["labels"] for batch in train_batches]
    metrics, constants = {}, {}
    for name, task in tasks.items():
        labels = torch.cat([maps[name] for maps in train_labels])
        valid = valid_pixels(task["kind"], labels)
        if valid.any():
            metrics[name] = METRICS[task["kind"]](task)
            values = labels[valid] if labels.ndim == 3 else labels.transpose(0, 1)[:, valid]
            constants[name] = best_constant(task["kind"], values)
    for batch in eval_batches:
        for name, metric in metrics.items():
            label = batch["labels"][name]
            metric.update(constants[name][..., None, None].expand_as(label), label)
    return compute_scores(metrics)


def print_scores(scores: dict[str, dict], tasks: dict[str, dict], num_images: int):
    print(f"\n{num_images} held-out rooms {'':12} {'DeGMix':>10} {'constant':>10} {'ratio':>8}")
    for name in scores["constant"]:  # some rooms have no person
        metric = METRICS[tasks[name]["kind"]]
        ours, constant = (scores[predictor][name][metric.main] for predictor in ("DeGMix", "constant"))
        arrow = "up" if metric.higher_is_better else "down"
        print(f"{name:14} {metric.main:11} {arrow:6} {ours:10.4f} {constant:10.4f} {ours / constant:8.2f}")
    print()


if __name__ == "__main__":
    run_script(main)
