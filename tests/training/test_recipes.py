"""Every recipe builds the model that it says, and trains two steps of it, smaller, on miniature data."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Array2D, Array3D, Dataset, Features
from PIL import Image
from small_models import BACKBONES

from transformers_degmix import DeGMixForMultiTaskDensePrediction
from transformers_degmix.data.benchmarks import BENCHMARKS
from transformers_degmix.data.schema import encode_normals, encode_row, features_for, named_tasks
from transformers_degmix.hub.shipped import find_model
from transformers_degmix.tasks import TASK_KINDS
from transformers_degmix.training.arguments import RECIPES, parse_arguments
from transformers_degmix.training.build import build_model
from transformers_degmix.training.loop import train


NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
# Each benchmark with a larger backbone, and each of these once: their combinations differ in nothing else.
TRIED = ("cityscapes_swin_large", "nyud_swin_base", "pascal_context_swin_small", "nyud_demt_swin_small")
TRIED = [name for name in NAMES if ("_swin_" not in name or name in TRIED) and name != "nyud_surface"]
# Those with backbones of timm
VISION = ("nyud_demt_hrnet18",)
SIZE = (64, 96)
SHORT = "--max_steps 2 --eval_steps 2 --warmup_steps 0 --batch_size 2 --num_workers 0 --num_logged_images 0".split()
SHORT += ["--image_size", str(list(SIZE))]


def recipe_params(names):
    return [pytest.param(name, marks=pytest.mark.vision) if name in VISION else name for name in names]


def make_benchmark(folder: Path, name: str):
    """Three images of a benchmark in the schema of the converters."""
    benchmark, rng = BENCHMARKS[name], np.random.default_rng(0)
    tasks = named_tasks(benchmark.tasks, {task: classes[0] for task, classes in benchmark.classes.items()})
    rows = []
    for index in range(3):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (*SIZE, 3), np.uint8)).save(file, "PNG")
        maps = {}
        for task, fields in tasks.items():
            kind = TASK_KINDS[fields["kind"]]
            if kind.label_channels == 3:
                vectors = rng.normal(size=(*SIZE, 3))
                maps[task] = encode_normals(vectors / np.linalg.norm(vectors, axis=2, keepdims=True))
            elif kind.image_modes == ("F",):
                maps[task] = rng.uniform(0.5, 9, SIZE)
            else:
                num_labels = len(fields.get("id2label", ())) or kind.num_logits
                maps[task] = rng.integers(0, num_labels, SIZE, np.uint8)
        rows.append(encode_row(f"image{index}", file.getvalue(), maps, tasks))
    save(folder, Dataset.from_list(rows, features=features_for(tasks)), "validation")


def make_tanganke(folder: Path):
    """Three images as tanganke/nyuv2 stores them, smaller."""
    rng, (height, width) = np.random.default_rng(0), SIZE
    features = {
        "image": Array3D((3, height, width), "float32"),
        "segmentation": Array2D((height, width), "int64"),
        "depth": Array3D((1, height, width), "float32"),
        "normal": Array3D((3, height, width), "float32"),
    }
    normals = rng.normal(size=(3, 3, height, width))
    columns = {
        "image": rng.random((3, 3, height, width)),
        "segmentation": rng.integers(-1, 13, (3, height, width)),
        "depth": rng.uniform(0, 5, (3, 1, height, width)),
        "normal": normals / np.linalg.norm(normals, axis=1, keepdims=True),
    }
    save(folder, Dataset.from_dict(columns, Features(features)), "val")


def save(folder: Path, data: Dataset, eval_split: str):
    for split in ("train", eval_split):
        data.to_parquet(folder / f"{split}-00000-of-00001.parquet")


def test_there_are_recipes_of_all_benchmarks_and_backbones():
    expected = {f"{name}{size}" for name in BENCHMARKS for size in ("", "_swin_small", "_swin_base", "_swin_large")}
    assert expected <= set(NAMES)


@pytest.mark.parametrize("name", recipe_params(TRIED))
def test_recipe(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    args = parse_arguments([name])
    assert args.output_dir.startswith("outputs/")
    overrides = [*SHORT, "--pretrained_backbone", "null"]
    if args.dataset == "rooms":
        overrides += ["--num_train_images", "2", "--num_eval_images", "2"]
    elif args.benchmark:
        make_benchmark(tmp_path / "data", args.benchmark)
        overrides += ["--dataset", str(tmp_path / "data")]
    else:
        make_tanganke(tmp_path / "data")
        # In local files, `datasets` takes "val" for an abbreviation.
        overrides += ["--dataset", str(tmp_path / "data"), "--eval_split", "validation"]
    as_written = parse_arguments([name, *overrides])
    with torch.device("meta"):
        model, _ = build_model(as_written)
    overrides += ["--model.backbone_config", json.dumps(BACKBONES["resnet"].to_dict())]
    overrides += ["--model.hidden_size", "16", "--model.gating_intermediate_size", "8"]
    scores = train(parse_arguments([name, *overrides]))
    assert list(scores) == list(model.config.tasks)
    if args.benchmark and not args.tasks:
        assert tuple(scores) == BENCHMARKS[args.benchmark].tasks
        height, width = BENCHMARKS[args.benchmark].input_size
        assert args.image_size == ([height // 2, width // 2] if name == "nyud_lite" else [height, width])


def test_a_task_is_added_to_the_shipped_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_benchmark(tmp_path / "data", "nyud")
    size = ["--image_processor", "{size: {shortest_edge: 64}}"]
    args = parse_arguments(["nyud_surface", *SHORT, *size, "--dataset", "data", "--train_split", "train"])
    before = DeGMixForMultiTaskDensePrediction.from_pretrained(find_model(args.pretrained))
    assert list(train(args)) == ["surface"]
    after = DeGMixForMultiTaskDensePrediction.from_pretrained(tmp_path / args.output_dir / "last")
    assert list(after.config.tasks) == [*before.config.tasks, "surface"]
    image = torch.rand(1, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        old, new = before(image).logits, after(image).logits
    assert new["surface"].shape[1] == 4
    for name, logits in old.items():
        assert torch.equal(new[name], logits), name


PUBLISHED = {
    "nyud": 33_198_779,
    "nyud_swin_small": 54_516_683,
    "nyud_swin_base": 93_102_117,
    "nyud_swin_large": 202_713_305,
    "nyud_demt_hrnet18": 4_764_730,
}


@pytest.mark.parametrize("name", recipe_params(PUBLISHED))
def test_models_have_the_published_number_of_parameters(tmp_path, name):
    make_benchmark(tmp_path, "nyud")
    args = parse_arguments([name, "--dataset", str(tmp_path), "--pretrained_backbone", "null"])
    with torch.device("meta"):
        model, _ = build_model(args)
    assert isinstance(model, DeGMixForMultiTaskDensePrediction)
    # Without the last LayerNorm of SwinBackbone, which nothing reads.
    unread = sum(p.numel() for key, p in model.named_parameters() if key.startswith("model.backbone.swin.layernorm."))
    assert model.num_parameters() - unread == PUBLISHED[name]
