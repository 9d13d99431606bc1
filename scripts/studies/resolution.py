"""Compares the positions that sampling offsets can depend on, at the training size and at other sizes, on Rooms.

    python scripts/studies/resolution.py [--seeds 0 1] [--factors 0.5 1 1.5 2] [--output_dir DIR] [--field value ...]

For each `offset_position`, one model is trained at one scale, like the demo, and one at random scales from 0.5 to 2,
like the published recipe. They are scored on the same rooms, rendered at several sizes and not resized. Random scales
teach a model that an image of twice the size is seen from half as far: its depth is scaled back.

Finished trainings are not repeated. `--field` changes a field of the recipe `rooms_study`.
"""

import json
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import torch
from accelerate import Accelerator

from transformers_degmix.cli import run_script
from transformers_degmix.configuration_degmix import OFFSET_POSITIONS
from transformers_degmix.evaluation import METRICS
from transformers_degmix.evaluation.evaluator import markdown_table, multi_task_gain
from transformers_degmix.hub.model_directory import load_model_directory
from transformers_degmix.tasks import TASK_KINDS
from transformers_degmix.training.arguments import TrainingArguments
from transformers_degmix.training.data import build_eval_loader
from transformers_degmix.training.study import DEGMIX, parse_study, run, study_parser


# name -> range of random scales in training
TRAININGS = {"one scale": [1, 1], "scales 0.5 to 2": [0.5, 2]}


def main():
    parser = study_parser(__doc__, "outputs/resolution")
    parser.add_argument("--factors", type=float, nargs="+", default=[0.5, 1, 1.5, 2])
    options, args, tasks = parse_study(parser)

    results = {}
    for seed in options.seeds:
        for training, scale in TRAININGS.items():
            changed = replace(args, augmentation={**args.augmentation, "scale": scale})
            for position in OFFSET_POSITIONS:
                folder = options.output_dir / f"seed_{seed}" / training.replace(" ", "_") / position
                run(folder, changed, tasks, {**DEGMIX, "offset_position": position}, seed)
                for factor in options.factors:
                    nearness = 1 if scale == [1, 1] else factor
                    results[training, position, factor, seed] = score(folder, args, factor, nearness)
    table = draw_tables(results, options.seeds, options.factors, tasks)
    (options.output_dir / "study.md").write_text(table, encoding="utf-8")
    print(f"\n{table}\nalso in {options.output_dir / 'study.md'}")


@torch.no_grad()
def score(folder: Path, args: TrainingArguments, factor: float, nearness: float) -> dict[str, dict[str, float]]:
    """Scores on the evaluation rooms at `factor` times the training size; depths are multiplied by `nearness`."""
    result = folder / f"scores_{factor:g}.json"
    if result.exists():
        return json.loads(result.read_text())
    model, processor = load_model_directory(folder / "last")
    processor.do_resize = False
    tasks, size = model.config.tasks, [round(factor * length) for length in args.image_size]
    metrics = {name: METRICS[task["kind"]](task) for name, task in tasks.items()}
    sized = replace(args, image_size=size)
    for batch in build_eval_loader(sized, sized.sources[0], processor, tasks, Accelerator()):
        logits = model(batch["pixel_values"]).logits
        for name, metric in metrics.items():
            kind = TASK_KINDS[tasks[name]["kind"]]
            metric.update(kind.rescale(kind.activation(logits[name]), 1 / nearness), batch["labels"][name])
    scores = {name: metric.compute() for name, metric in metrics.items()}
    result.write_text(json.dumps(scores))
    return scores


def draw_tables(results: dict, seeds: list[int], factors: list[float], tasks: dict) -> str:
    """Markdown: per training, the gain over `absolute` at the training size and every score; means over the seeds."""
    mains = {name: METRICS[task["kind"]].main for name, task in tasks.items()}
    blocks = []
    for training in TRAININGS:
        base = {
            name: mean(results[training, "absolute", 1, seed][name][main] for seed in seeds)
            for name, main in mains.items()
        }
        gains = [["gain %", *(f"{factor:g}x" for factor in factors)]]
        scores = [["score", "size", *(f"{name} {main}" for name, main in mains.items())]]
        for position in OFFSET_POSITIONS:
            row = [position]
            for factor in factors:
                runs = [results[training, position, factor, seed] for seed in seeds]
                values = [multi_task_gain(run, base, tasks) for run in runs]
                row.append(f"{mean(values):+.1f}" + (f" ± {stdev(values):.1f}" if len(seeds) > 1 else ""))
                means = [f"{mean(run[name][main] for run in runs):.3f}" for name, main in mains.items()]
                scores.append([position, f"{factor:g}x", *means])
            gains.append(row)
        blocks += [f"Trained at {training}:\n", markdown_table(gains), markdown_table(scores)]
    return "\n".join(blocks)


if __name__ == "__main__":
    run_script(main)
