"""What studies share.

Parts that models have in common start from the same weights, and all models see the same batches in the same order.
Finished trainings are not repeated.
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
from ..files import write_whole
from ..hub.model_directory import save_model_directory
from ..modeling_degmix import DeGMixForMultiTaskDensePrediction
from .arguments import TrainingArguments, parse_arguments
from .build import build_model, choose_tasks
from .loop import train_to_end


# scores, scores by source, CPU seconds, parameters and GFLOP
Outcome = dict[str, Any]

# Fields of DeGMixConfig. The models of a study are parts of this one, so that they can start from its weights.
DEGMIX = {"num_mixer_layers": 2, "num_attention_heads": 2}


def study_parser(description: str | None, output_dir: str) -> argparse.ArgumentParser:
    """The options of all studies."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="rooms_study", help="gives data and schedule (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--output_dir", type=Path, default=Path(output_dir))
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, each a process (default: 1)")
    return parser


def parse_study(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, TrainingArguments, dict[str, dict]]:
    """A study's options, its recipe with the changes of the command line, and all tasks of the recipe."""
    options, overrides = parser.parse_known_args()
    logging.disable_progress_bar()  # of saving; training has its own
    args = parse_arguments([options.recipe, *overrides])
    return options, args, choose_tasks(args, args.model.get("tasks"))


def score_columns(tasks: dict[str, dict]) -> list[str]:
    """Titles of a table's columns: the main score of each task, and whether up or down is better."""
    metrics = {name: METRICS[task["kind"]] for name, task in tasks.items()}
    return [f"{name} {metric.main} {'up' if metric.higher_is_better else 'down'}" for name, metric in metrics.items()]


def run_all(trainings: Sequence[Callable[[], Outcome]], num_jobs: int) -> list[Outcome]:
    """Runs up to `num_jobs` trainings at a time, each a function that can be pickled; returns their outcomes in order.

    An exception in one of several processes is raised when the other trainings have ended.
    """
    if num_jobs == 1:
        return [training() for training in trainings]
    # CUDA does not work in forks of a process that uses it. Loaders in these processes start as in any other.
    start_loaders = partial(set_start_method, get_start_method(), force=True)
    with ProcessPoolExecutor(num_jobs, get_context("spawn"), start_loaders) as pool:
        futures = [pool.submit(training) for training in trainings]
    return [future.result() for future in futures]


def run(
    folder: Path, args: TrainingArguments, tasks: Iterable[str], fields: dict[str, Any], seed: int, **changes: Any
) -> Outcome:
    """Trains and scores a model of some tasks, with other `fields` of `DeGMixConfig`, from common weights.

    The common weights depend on `args` and the seed; `changes` are training arguments that do not affect them.
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
    """Trains and scores the model in the directory `initial`, or reads `result.json` in `folder` if it exists.

    If the training was interrupted, `cpu_seconds` is only the time since it was resumed.
    """
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
    write_whole(result, lambda file: file.write(json.dumps(outcome).encode()))
    gc.collect()
    return outcome
