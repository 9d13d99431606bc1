"""Compares single-task models, plain multi-task learning, DeMT and DeGMix with each interaction scope.

    python scripts/studies/models.py [--recipe rooms_study] [--seeds 0 1] [--jobs 1] [--output_dir DIR]
        [--field value ...]

Parts that models have in common start from the same weights, and all models see the same batches in the same order.
Finished trainings are not repeated. `--field` changes a field of the recipe.
"""

from functools import partial
from statistics import mean, stdev

from transformers_degmix.cli import run_script
from transformers_degmix.evaluation import METRICS
from transformers_degmix.evaluation.evaluator import markdown_table, multi_task_gain
from transformers_degmix.training.study import DEGMIX, parse_study, run, run_all, score_columns, study_parser


PLAIN = {"num_mixer_layers": 0, "use_decoder": False}
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

    trainings = {}
    for seed in options.seeds:
        folder = options.output_dir / f"seed_{seed}"
        for model, fields in MULTI_TASK_MODELS.items():
            name = model.replace(", ", "_").replace(" ", "_")
            trainings[model, None, seed] = partial(run, folder / name, args, list(tasks), fields, seed)
        for name in tasks:
            trainings[SINGLE_TASK, name, seed] = partial(run, folder / f"single_{name}", args, [name], PLAIN, seed)
    results = dict(zip(trainings, run_all(list(trainings.values()), options.jobs)))
    table = draw_table(results, options.seeds, tasks)
    (options.output_dir / "study.md").write_text(table, encoding="utf-8")
    print(f"\n{table}\nalso in {options.output_dir / 'study.md'}")


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
    lines = [["model", *score_columns(tasks), "gain %", "parameters", "GFLOP", "CPU seconds"]]
    lines.append([f"{len(tasks)} single-task models", *map("{:.3f}".format, main_scores.values()), "0", *show(costs)])
    for model in MULTI_TASK_MODELS:
        runs = [results[model, None, seed] for seed in seeds]
        gains = [multi_task_gain(run["scores"], main_scores, tasks) for run in runs]
        spread = f" ± {stdev(gains):.1f}" if len(seeds) > 1 else ""
        scores = [mean(run["scores"][name][metric.main] for run in runs) for name, metric in metrics.items()]
        costs = [mean(run[cost] for run in runs) for cost in ("parameters", "gflops", "cpu_seconds")]
        lines.append([model, *map("{:.3f}".format, scores), f"{mean(gains):+.1f}{spread}", *show(costs)])
    return markdown_table(lines)


def show(costs: list[float]) -> list[str]:
    parameters, gflops, seconds = costs
    return [f"{parameters / 1e6:.2f} M", f"{gflops:.2f}", f"{seconds:.0f}"]


if __name__ == "__main__":
    run_script(main)
