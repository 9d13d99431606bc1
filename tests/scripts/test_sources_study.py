"""The study of several data sets, in small: what is trained on what, and what comes out."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from commands import run_script
from datasets import Dataset
from huggingface_hub import ModelCard
from PIL import Image
from small_models import BACKBONES
from transformers import AutoModel

from transformers_degmix.data.benchmarks import BENCHMARKS, NYUD_CLASSES
from transformers_degmix.data.schema import features_for, named_tasks


RECIPE = {
    "output_dir": "o", "dataset": "data", "benchmark": "nyud", "image_size": [32, 48], "batch_size": 2, "max_steps": 2,
    "eval_steps": 2, "num_workers": 0, "num_logged_images": 0,
    "model": {"backbone_config": BACKBONES["resnet"].to_dict(), "hidden_size": 16, "gating_intermediate_size": 8},
}  # fmt: skip


def save_photographs(folder):
    """Six random images of NYUD-v2's schema to train with, and one to evaluate with."""
    rng, rows = np.random.default_rng(0), []
    for index in range(7):
        maps = {name: rng.integers(0, 2, (32, 48), np.uint8) for name in ("semseg", "edge")}
        maps["image"] = rng.integers(0, 256, (32, 48, 3), np.uint8)
        maps["normals"] = np.full((32, 48, 3), (128, 128, 255), np.uint8)
        maps["depth"] = rng.uniform(1, 9, (32, 48)).astype(np.float32)
        images = {name: Image.fromarray(values) for name, values in maps.items()}
        rows.append({"image_id": str(index), "semseg_classes": [0, 1], **images})
    tasks = named_tasks(BENCHMARKS["nyud"].tasks, {"semseg": NYUD_CLASSES})
    for split, part in (("train", rows[:6]), ("validation", rows[6:])):
        Dataset.from_list(part, features=features_for(tasks)).to_parquet(folder / f"{split}-00000-of-00001.parquet")


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Part of the study -> the scores that its table has, by model."""
    monkeypatch.chdir(tmp_path)
    save_photographs(tmp_path / "data")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))

    def run(part: str) -> dict[str, list[bool]]:
        options = ["--recipe", "recipe.yaml", "--seeds", 0, "--only", part, "--num_images", 6, "--num_rooms", 3]
        options += ["--output_dir", "study", "--learning_rate", "1e-4"]
        assert run_script(monkeypatch, "studies/sources.py", *options) is None
        table = [line.strip("| ").split(" | ") for line in (tmp_path / "study/study.md").read_text().splitlines()]
        return {model: [score != "-" for score in scores] for model, *scores in table[2:]}

    return run


@pytest.mark.slow
def test_thirds(study):
    assert study("thirds") == {
        "three tasks, all labels": [True, True, True, False],
        "three tasks, a third of the labels each": [True, True, True, False],
        "semseg alone, its third": [True, False, False, False],
        "depth alone, its third": [False, True, False, False],
        "normals alone, its third": [False, False, True, False],
    }
    folder = Path("study/seed_0/thirds")
    card = ModelCard.load(folder / "a_third_each/last/README.md").text
    for task, split in (("semseg", "train[0:2]"), ("depth", "train[2:4]"), ("normals", "train[4:6]")):
        assert f"labels of `{task}`\n  - training: split `{split}`" in card
        assert f"training: split `{split}`" in ModelCard.load(folder / f"{task}_alone/last/README.md").text
    # The same weights at the start, as far as there are the same parts
    whole = AutoModel.from_pretrained(folder / "all_labels/initial").state_dict()
    for name in ("depth_alone", "a_third_each"):
        weights = AutoModel.from_pretrained(folder / name / "initial").state_dict()
        assert all(value.equal(whole[key]) for key, value in weights.items())


@pytest.mark.slow
def test_photographs_with_rooms(study):
    every = [True, True, True, True]
    assert study("rooms") == {"photographs alone": every, "photographs with rooms": every}
    folder = Path("study/seed_0/rooms")
    scores = json.loads((folder / "with_rooms/result.json").read_text())["source_scores"]
    assert set(scores) == {"photographs", "rooms"} and "sal" in scores["rooms"]
    tasks = AutoModel.from_pretrained(folder / "with_rooms/last").config.tasks
    assert list(tasks["semseg"]["id2label"].values()) == list(NYUD_CLASSES)
    assert set(AutoModel.from_pretrained(folder / "alone/last").config.tasks) == set(BENCHMARKS["nyud"].tasks)
    assert Image.open(folder / "photographs.png").width > 1000
