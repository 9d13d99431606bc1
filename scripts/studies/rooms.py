"""Compares single-task models, plain multi-task learning, DeMT and DeGMix with each interaction scope on Rooms.

    python scripts/rooms_study.py [--seeds 0 1] [--output_dir DIR] [--field value ...]

All start from the same weights, as far as they have the same parts, and see the same batches in the same order; only
the model differs. What was finished before is not trained again. Fields are those of the recipe `rooms_study.yaml`.
"""

import argparse
import gc
import json
import time
from pathlib import Path
from statistics import mean, stdev

import torch
from accelerate.utils import set_seed
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils import logging

from transformers_degmix import DeGMixConfig, DeGMixForMultiTaskDensePrediction, DeGMixImageProcessorPil
from transformers_degmix.data.rooms import ROOMS_TASKS
from transformers_degmix.evaluation import METRICS
from transformers_degmix.evaluation.evaluator import multi_task_gain
from transformers_degmix.hub.model_directory import save_model_directory
from transformers_degmix.training.arguments import TrainingArguments, parse_arguments
from transformers_degmix.training.build import complete_tasks
from transformers_degmix.training.loop import train


RECIPE = Path(__file__).parents[1] / "src" / "transformers_degmix" / "recipes" / "rooms_study.yaml"
PLAIN = {"num_mixer_layers": 0, "use_decoder": False}
# Fields of DeGMixConfig. All are parts of the first DeGMix, so that they can start from its weights.
DEGMIX = {"num_mixer_layers": 2, "num_attention_heads": 2}
MULTI_TASK_MODELS = {
    "multi-task, no decoder": PLAIN,
    "DeMT": {"num_mixer_layers": 1, "num_attention_heads": 4, "use_gating": False},
    "DeGMix, scope token": DEGMIX,
    "DeGMix, scope task": {**DEGMIX, "interaction_scope": "task"},
    "DeGMix, scope image": {**DEGMIX, "interaction_scope": "image", "interaction_reduction": 4},
}
SINGLE_TASK = "single task"


def main():
    options, args, tasks = parse_study(study_parser(__doc__, "outputs/study"))

    results = {}
    for seed in options.seeds:
        for name, task in tasks.items():
            folder = options.output_dir / f"seed_{seed}" / f"single_{name}"
            results[SINGLE_TASK, name, seed] = run(folder, args, {name: task}, PLAIN, tasks, seed)
        for model, fields in MULTI_TASK_MODELS.items():
            folder = options.output_dir / f"seed_{seed}" / model.replace(", ", "_").replace(" ", "_")
            results[model, None, seed] = run(folder, args, tasks, fields, tasks, seed)
        table = draw_table(results, options.seeds[: options.seeds.index(seed) + 1], tasks)
    (options.output_dir / "study.md").write_text(table)
    print(f"\n{table}\nalso in {options.output_dir / 'study.md'}")


def study_parser(description: str, output_dir: str) -> argparse.ArgumentParser:
    """The options of all studies."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--output_dir", type=Path, default=Path(output_dir))
    return parser


def parse_study(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, TrainingArguments, dict]:
    """A study's options, the recipe with the fields that the command line changes, and all of its tasks."""
    options, overrides = parser.parse_known_args()
    logging.disable_progress_bar()  # of saving; there is one of training
    args = parse_arguments([str(RECIPE), *overrides])
    return options, args, complete_tasks(ROOMS_TASKS, args.model["tasks"], "Rooms")


def run(folder: Path, args: TrainingArguments, tasks: dict, fields: dict, all_tasks: dict, seed: int) -> dict:
    """Trains and scores one model from those of the common weights that it has."""
    initial = folder / "initial"
    if not initial.exists():
        set_seed(seed)
        whole = DeGMixForMultiTaskDensePrediction(DeGMixConfig(**{**args.model, **DEGMIX, "tasks": all_tasks}))
        model = DeGMixForMultiTaskDensePrediction(DeGMixConfig(**{**args.model, **fields, "tasks": tasks}))
        weights = whole.state_dict()
        model.load_state_dict({name: weights[name] for name in model.state_dict()})
        save_model_directory(initial, model, DeGMixImageProcessorPil(tasks=model.config.tasks))
    return tune(folder, args, initial, seed)


def tune(folder: Path, args: TrainingArguments, initial: Path, seed: int, **changes) -> dict:
    """Trains and scores the model of a directory; from `result.json` in `folder` if it was done before."""
    result = folder / "result.json"
    if result.exists():
        return json.loads(result.read_text())
    print(f"\n{folder}")
    changes |= {"output_dir": str(folder), "pretrained": str(initial), "model": {}, "seed": seed, "resume": True}
    start = time.process_time()
    scores = train(TrainingArguments(**{**vars(args), **changes}))
    model = DeGMixForMultiTaskDensePrediction.from_pretrained(folder / "last")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, *args.image_size))
    outcome = {
        "scores": scores,
        "cpu_seconds": time.process_time() - start,
        "parameters": model.num_parameters(),
        "gflops": counter.get_total_flops() / 1e9,
    }
    result.write_text(json.dumps(outcome))
    gc.collect()
    return outcome


def draw_table(results: dict, seeds: list[int], tasks: dict) -> str:
    """Markdown: mean over the seeds, and the deviation of the gain if there are several."""
    metrics = {name: METRICS[task["kind"]] for name, task in tasks.items()}
    main_scores = {
        name: mean(results[SINGLE_TASK, name, seed]["scores"][name][metric.main] for seed in seeds)
        for name, metric in metrics.items()
    }
    single = [[results[SINGLE_TASK, name, seed] for name in tasks] for seed in seeds]
    costs = [
        sum(mean(runs[index][cost] for runs in single) for index in range(len(tasks)))
        for cost in ("parameters", "gflops", "cpu_seconds")
    ]
    columns = [
        f"{name} {metric.main} {'up' if metric.higher_is_better else 'down'}" for name, metric in metrics.items()
    ]
    lines = [["model", *columns, "gain %", "parameters", "GFLOP", "CPU seconds"]]
    lines.append([f"{len(tasks)} single-task models", *map("{:.3f}".format, main_scores.values()), "0", *show(costs)])
    for model in MULTI_TASK_MODELS:
        runs = [results[model, None, seed] for seed in seeds]
        gains = [multi_task_gain(run["scores"], main_scores, tasks) for run in runs]
        spread = f" ± {stdev(gains):.1f}" if len(seeds) > 1 else ""
        scores = [mean(run["scores"][name][metric.main] for run in runs) for name, metric in metrics.items()]
        costs = [mean(run[cost] for run in runs) for cost in ("parameters", "gflops", "cpu_seconds")]
        lines.append([model, *map("{:.3f}".format, scores), f"{mean(gains):+.1f}{spread}", *show(costs)])
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def show(costs: list[float]) -> list[str]:
    parameters, gflops, seconds = costs
    return [f"{parameters / 1e6:.2f} M", f"{gflops:.2f}", f"{seconds:.0f}"]


if __name__ == "__main__":
    main()
