"""The study of recipes: a training takes every change, and a result is that of its change, whichever are chosen."""

import inspect
import runpy
from dataclasses import fields
from pathlib import Path

import pytest

from transformers_degmix import DeGMixConfig
from transformers_degmix.configuration_degmix import NYUD_TASKS
from transformers_degmix.training.arguments import TrainingArguments, merge_fields, parse_arguments


SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "scripts/studies/recipe.py"))
VARIANTS, train_variant = SCRIPT["VARIANTS"], SCRIPT["train_variant"]


@pytest.mark.parametrize("name", VARIANTS)
def test_changes_are_fields_that_change_something(name):
    args = vars(parse_arguments(["nyud_lite"]))
    args["model"] = {**args["model"], "tasks": NYUD_TASKS}
    known = {field.name for field in fields(TrainingArguments)}
    changes = {key: value for key, value in VARIANTS[name].items() if key in known}
    assert VARIANTS[name].keys() - changes.keys() <= inspect.signature(train_variant).parameters.keys()
    changed = TrainingArguments(**merge_fields(args, changes))
    DeGMixConfig(**changed.model)
    assert VARIANTS[name].keys() != changes.keys() or vars(changed) != args


def test_results_are_kept_by_change(monkeypatch, tmp_path):
    folders = []
    trained = {"scores": {"semseg": {"mean_iou": 0.5}}}
    for only in (["weight_decay: 0.01"], ["ema_decay: 0", "weight_decay: 0.01"]):

        def run_all(trainings, num_jobs):
            folders.append([training.args[0].name for training in trainings])
            return [trained] * len(trainings)

        main = SCRIPT["main"]
        monkeypatch.setitem(main.__globals__, "run_all", run_all)
        argv = ["recipe.py", "--recipe", "rooms_study", "--tasks", "[semseg]", "--seeds", "3", "--only", *only]
        monkeypatch.setattr("sys.argv", [*argv, "--output_dir", str(tmp_path)])
        main()
    assert folders[0][-1] == folders[1][-1] and len(set(folders[1])) == 3
