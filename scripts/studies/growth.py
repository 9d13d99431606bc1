"""Adds surface normals to models that were trained on Rooms without them, and compares with training from scratch.

    python scripts/studies/growth.py [--seeds 0 1] [--output_dir DIR] [--field value ...]

Finished trainings are not repeated. `--field` changes a field of the recipe `rooms_study`.
"""

from pathlib import Path
from statistics import mean, stdev

import torch
from accelerate import Accelerator

from transformers_degmix.cli import run_script
from transformers_degmix.evaluation.evaluator import markdown_table
from transformers_degmix.hub.model_directory import load_model_directory
from transformers_degmix.training.arguments import TrainingArguments
from transformers_degmix.training.data import build_eval_loader
from transformers_degmix.training.study import DEGMIX, parse_study, run, study_parser, tune


NEW = "normals"


def main():
    options, args, tasks = parse_study(study_parser(__doc__, "outputs/growth"))
    old = [name for name in tasks if name != NEW]

    results = []
    for seed in options.seeds:
        folder = options.output_dir / f"seed_{seed}"
        base = run(folder / "without", args, old, DEGMIX, seed)
        new_tasks = {NEW: args.model["tasks"][NEW]}
        added = tune(folder / "added", args, folder / "without" / "last", seed, new_tasks=new_tasks)
        changed = count_changed_values(folder / "without" / "last", folder / "added" / "last", args)
        together = run(folder / "together", args, tasks, DEGMIX, seed)
        alone = run(folder / "alone", args, [NEW], DEGMIX, seed)
        results.append({"added": added, "together": together, "alone": alone})
        share = 1 - base["parameters"] / added["parameters"]
        print(f"seed {seed}: {share:.2%} of the parameters are new; values of other tasks that changed: {changed}")
    table = draw_table(results)
    (options.output_dir / "study.md").write_text(table, encoding="utf-8")
    print(f"\n{table}\nalso in {options.output_dir / 'study.md'}")


@torch.no_grad()
def count_changed_values(before: Path, after: Path, args: TrainingArguments) -> int:
    """How many logits of a model's tasks on the evaluation split changed when it got another task."""
    (model, processor), (grown, _) = load_model_directory(before), load_model_directory(after)
    loader = build_eval_loader(args, args.sources[0], processor, model.config.tasks, Accelerator())
    changed = 0
    for batch in loader:
        logits = grown(batch["pixel_values"]).logits
        for task, maps in model(batch["pixel_values"]).logits.items():
            changed += int((logits[task] != maps).sum())
    return changed


def draw_table(results: list[dict]) -> str:
    """Markdown: means over the seeds, with the deviation if there are several."""

    def show(values: list[float], digits: int) -> str:
        spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{mean(values):.{digits}f}{spread}"

    lines = [["model", "normals degrees down", "CPU seconds"]]
    for name, description in (
        ("added", "normals added, only the new parts trained"),
        ("together", "all six tasks from scratch"),
        ("alone", "normals alone from scratch"),
    ):
        runs = [result[name] for result in results]
        angles, seconds = [run["scores"][NEW]["mean_angle"] for run in runs], [run["cpu_seconds"] for run in runs]
        lines.append([description, show(angles, 1), show(seconds, 0)])
    return markdown_table(lines)


if __name__ == "__main__":
    run_script(main)
