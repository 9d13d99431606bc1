"""Compares changes to a recipe, one at a time, after a short training.

    python scripts/studies/recipe.py [--recipe nyud_lite] [--seeds 0 1] [--jobs 1] [--output_dir DIR] [--only NAME ...]
        [--field value ...]

The unchanged recipe comes first, with each seed: a change must exceed the differences between its scores. Changes are
tried with the first seed. Finished trainings are not repeated. Choose on images that are not trained on:
`--train_split "train[:635]" --eval_split "train[635:]"`. `--field` changes a field of the recipe.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed

from transformers_degmix.cli import run_script
from transformers_degmix.evaluation.evaluator import main_cells, markdown_table
from transformers_degmix.hub.model_directory import save_model_directory
from transformers_degmix.modeling_degmix import DeGMixDeformableConv
from transformers_degmix.modeling_efficientnet_lite import EfficientNetLiteConv
from transformers_degmix.training.arguments import TrainingArguments, merge_fields
from transformers_degmix.training.build import build_model
from transformers_degmix.training.study import Outcome, parse_study, run_all, score_columns, study_parser, tune


def of_task(name: str, **fields: Any) -> dict[str, Any]:
    return {"model": {"tasks": {name: fields}}}


# Entries that are not fields of the recipe are arguments of `train_variant`.
VARIANTS: dict[str, dict[str, Any]] = {
    "offset_position: absolute": {"model": {"offset_position": "absolute"}},
    "offset_position: normalized": {"model": {"offset_position": "normalized"}},
    "offsets 4 times as long at first": {"offset_factor": 4.0},
    "attention_norm_eps: 1": {"model": {"attention_norm_eps": 1.0}},
    "hidden_size: 96": {"model": {"hidden_size": 96, "gating_intermediate_size": 192}},
    "gating_intermediate_size: 256": {"model": {"gating_intermediate_size": 256}},
    "depth: log_loss": of_task("depth", log_loss=True),
    "depth: gradient_weight 0.1": of_task("depth", gradient_weight=0.1),
    "depth: gradient_weight 0.5": of_task("depth", gradient_weight=0.5),
    "depth: loss_weight 3": of_task("depth", loss_weight=3.0),
    "semseg: loss_weight 3": of_task("semseg", loss_weight=3.0),
    "edge: loss_weight 10": of_task("edge", loss_weight=10.0),
    "task_balancing: uncertainty": {"task_balancing": "uncertainty"},
    "task_balancing: dynamic_weight_average": {"task_balancing": "dynamic_weight_average"},
    "learning_rate: 2e-3": {"learning_rate": 2e-3},
    "learning_rate: 5e-4": {"learning_rate": 5e-4},
    "backbone_learning_rate: 1e-3": {"backbone_learning_rate": 1e-3},
    "backbone_learning_rate: 1e-4": {"backbone_learning_rate": 1e-4},
    "augmentation: scale 0.5 to 2": {"augmentation": {"scale": [0.5, 2.0]}},
    "augmentation: scale 1": {"augmentation": {"scale": [1.0, 1.0]}},
    "weak colours": {
        "augmentation": {"brightness": 16.0, "contrast": [0.75, 1.25], "saturation": [0.75, 1.25], "hue": 9.0}
    },
    "ema_decay: 0": {"ema_decay": 0.0},
    "weight_decay: 0.01": {"weight_decay": 0.01},
    "backbone's batch norms: momentum 0.1": {"norm_momentum": 0.1},
}


def main():
    parser = study_parser(__doc__, "outputs/recipe")
    parser.set_defaults(recipe="nyud_lite")
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=VARIANTS, help="changes to try (default: all)")
    options, args, tasks = parse_study(parser)
    args.model["tasks"] = {name: {} for name in tasks} | args.model.get("tasks", {})  # variants add fields to these

    trainings = {f"as it is, seed {seed}": ({}, seed) for seed in options.seeds}
    trainings |= {name: (VARIANTS[name], options.seeds[0]) for name in options.only}
    outcomes = run_all(
        [
            partial(train_variant, options.output_dir / re.sub(r"[^\w.-]+", "_", name), args, seed, **fields)
            for name, (fields, seed) in trainings.items()
        ],
        options.jobs,
    )
    table = draw_table(dict(zip(trainings, outcomes)), tasks)
    (options.output_dir / "study.md").write_text(table, encoding="utf-8")
    print(f"\n{table}\nalso in {options.output_dir / 'study.md'}")


def train_variant(
    folder: Path,
    args: TrainingArguments,
    seed: int,
    offset_factor: float = 1.0,
    norm_momentum: float = EfficientNetLiteConv.NORM_MOMENTUM,
    **fields: Any,
) -> Outcome:
    """Trains and scores a model by a recipe with changed fields.

    Args:
        offset_factor: by which the offsets of mixers are multiplied before the training.
        norm_momentum: of the batch norms in EfficientNet-Lite.
    """
    initial = folder / "initial"
    args = TrainingArguments(**merge_fields(vars(args), fields))
    if not initial.exists():
        set_seed(seed)
        model, processor = build_model(args)
        for module in model.modules():
            if isinstance(module, DeGMixDeformableConv):
                for parameter in module.channel_offsets.parameters():
                    with torch.no_grad():
                        parameter *= offset_factor
        save_model_directory(initial, model, processor)
    EfficientNetLiteConv.NORM_MOMENTUM = norm_momentum  # of this process, until its next training
    return tune(folder, args, initial, seed)


def draw_table(outcomes: dict[str, Outcome], tasks: dict[str, dict]) -> str:
    """Markdown: the scores of each training."""
    rows = [[change, *main_cells(outcome["scores"], tasks).values()] for change, outcome in outcomes.items()]
    return markdown_table([["change", *score_columns(tasks)], *rows])


if __name__ == "__main__":
    run_script(main)
