"""What studies share.

Their models start from the same weights, as far as they have the same parts, and see the same batches in the same
order. What was finished before is not trained again.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context, get_start_method, set_start_method
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils import logging

from ..configuration_degmix import DeGMixConfig
from ..evaluation import METRICS
from ..hub.model_directory import save_model_directory
from ..modeling_degmix import DeGMixForMultiTaskDensePrediction
from .arguments import TrainingArguments, parse_arguments
from .build import build_model, choose_tasks
from .loop import train_to_end


# scores, those of each source, CPU seconds, parameters and GFLOP
Outcome = dict[str, Any]

# Fields of DeGMixConfig. The models of a study are parts of this one, so that they can start from its weights.
DEGMIX = {"num_mixer_layers": 2, "num_attention_heads": 2}


def study_parser(description: str | None, output_dir: str) -> argparse.ArgumentParser:
    """The options of all studies."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="rooms_study", help="whose data and schedule (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--output_dir", type=Path, default=Path(output_dir))
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, each a process (default: 1)")
    return parser


def parse_study(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, TrainingArguments, dict[str, dict]]:
    """A study's options, the recipe with the fields that the command line changes, and all of its tasks."""
    options, overrides = parser.parse_known_args()
    logging.disable_progress_bar()  # of saving; there is one of training
    args = parse_arguments([options.recipe, *overrides])
    return options, args, choose_tasks(args, args.model.get("tasks"))


def score_columns(tasks: dict[str, dict]) -> list[str]:
    """Of a table: each task's score of the paper's tables, and which way is better."""
    metrics = {name: METRICS[task["kind"]] for name, task in tasks.items()}
    return [f"{name} {metric.main} {'up' if metric.higher_is_better else 'down'}" for name, metric in metrics.items()]


def run_all(trainings: Sequence[Callable[[], Outcome]], num_jobs: int) -> list[Outcome]:
    """The outcomes of trainings, [`partial`]s of [`run`] or [`tune`], of which some run at a time.

    An exception in one of them is raised when the others have ended.
    """
    if num_jobs == 1:
        return [training() for training in trainings]
    # CUDA does not survive a fork of the process that uses it. The loaders in each process start as they do elsewhere.
    start_loaders = partial(set_start_method, get_start_method(), force=True)
    with ProcessPoolExecutor(num_jobs, get_context("spawn"), start_loaders) as pool:
        futures = [pool.submit(training) for training in trainings]
    return [future.result() for future in futures]


def run(
    folder: Path, args: TrainingArguments, tasks: Iterable[str], fields: dict[str, Any], seed: int, **changes: Any
) -> Outcome:
    """Trains and scores the model of some tasks with these fields, from those of the common weights that it has.

    The common weights are those of `args` and the seed; `changes` are fields of the training alone.
    """
    initial = folder / "initial"
    if not initial.exists():
        set_seed(seed)
        whole, processor = build_model(replace(args, model={**args.model, **DEGMIX}))
        chosen = {name: whole.config.tasks[name] for name in tasks}
        model = DeGMixForMultiTaskDensePrediction(
            DeGMixConfig(**{**args.model, "backbone_config": whole.config.backbone_config, **fields, "tasks": chosen})
        )
        weights = whole.state_dict()
        model.load_state_dict({name: weights[name] for name in model.state_dict()})
        processor.tasks = chosen
        save_model_directory(initial, model, processor)
    return tune(folder, args, initial, seed, **changes)


def tune(folder: Path, args: TrainingArguments, initial: Path, seed: int, **changes: Any) -> Outcome:
    """Trains and scores the model of a directory; from `result.json` in `folder` if it was done before."""
    result = folder / "result.json"
    if result.exists():
        return json.loads(result.read_text())
    print(f"\n{folder}")
    changes |= {"output_dir": str(folder), "seed": seed, "resume": True}
    changes |= {"pretrained": str(initial), "pretrained_backbone": None, "model": {}, "tasks": None}
    start = time.process_time()
    progress = train_to_end(replace(args, **changes))
    model = DeGMixForMultiTaskDensePrediction.from_pretrained(folder / "last")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, *args.image_size))
    outcome = {
        "scores": progress.scores,
        "source_scores": progress.source_scores,
        "cpu_seconds": time.process_time() - start,
        "parameters": model.num_parameters(),
        "gflops": counter.get_total_flops() / 1e9,
    }
    result.write_text(json.dumps(outcome))
    gc.collect()
    return outcome
