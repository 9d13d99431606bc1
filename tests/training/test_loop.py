import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.utils import set_seed
from datasets import ClassLabel, Dataset, List
from datasets import config as datasets_config
from PIL import Image
from small_models import BACKBONES
from torch.utils.data import DataLoader
from transformers import AutoModel, pipeline

from transformers_degmix.data.rooms import ROOMS_TASKS, load_rooms
from transformers_degmix.training.arguments import TrainingArguments, parse_arguments
from transformers_degmix.training.collator import DeGMixDataCollator
from transformers_degmix.training.loop import (
    build_augmentation,
    build_model,
    build_optimizer,
    build_scheduler,
    endless,
    load_split,
    train,
)


MODEL = {"backbone_config": BACKBONES["swin"].to_dict(), "hidden_size": 16, "gating_intermediate_size": 8}


def arguments(tmp_path, **fields):
    defaults = {
        "output_dir": str(tmp_path / "run"),
        "image_size": [32, 48],
        "num_train_images": 4,
        "num_eval_images": 3,
        "model": MODEL,
        "max_steps": 4,
        "batch_size": 2,
        "eval_steps": 2,
        "num_workers": 0,
    }
    return TrainingArguments(**{**defaults, **fields})


def test_a_run_ends_in_models_that_the_pipeline_loads(tmp_path):
    args = arguments(tmp_path, optimizer="adamw", learning_rate=3e-3, lr_scheduler="cosine", max_grad_norm=1.0)
    scores = train(args)
    assert set(scores) == set(ROOMS_TASKS)
    assert set(scores["depth"]) == {"rmse", "abs_rel"}
    for name in ("best", "last"):
        predict = pipeline("multi-task-dense-prediction", model=str(tmp_path / "run" / name))
        prediction = predict(Image.new("RGB", (50, 40)))
        assert prediction["normals"].shape == (3, 40, 50)
        assert predict.model.config.tasks["semseg"]["id2label"] == ROOMS_TASKS["semseg"]["id2label"]


def test_training_lowers_the_loss(tmp_path):
    args = arguments(tmp_path, optimizer="adamw", learning_rate=3e-3, lr_scheduler="constant", max_steps=25)
    batch = DeGMixDataCollator(build_model(args)[1])(list(load_rooms("train", 4, (32, 48))))
    torch.manual_seed(args.seed)
    untrained, _ = build_model(args)
    train(args)
    trained = AutoModel.from_pretrained(tmp_path / "run" / "last")
    with torch.no_grad():
        assert trained(**batch).loss < 0.8 * untrained.eval()(**batch).loss


def test_steps_are_those_of_a_plain_loop(tmp_path):
    backbone = {**MODEL["backbone_config"], "drop_path_rate": 0.0}
    args = arguments(
        tmp_path,
        model={**MODEL, "backbone_config": backbone},
        num_train_images=2,  # one batch, in any order
        max_steps=3,
        augmentation=None,
    )
    train(args)
    trained = AutoModel.from_pretrained(tmp_path / "run" / "last")

    set_seed(args.seed)
    model, processor = build_model(args)
    batch = DeGMixDataCollator(processor, tasks=model.config.tasks)(list(load_rooms("train", 2, (32, 48))))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, weight_decay=5e-4)
    model.train()
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / 3) ** 0.9
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    for (name, ours), plain in zip(trained.named_parameters(), model.parameters()):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_every_epoch_is_augmented_in_its_own_way(tmp_path):
    args = arguments(tmp_path)
    collator = DeGMixDataCollator(build_model(args)[1], build_augmentation(args), args.seed)
    batches = endless(DataLoader(load_rooms("train", 1, (32, 48)), collate_fn=collator), collator)
    first, second = (next(batches)["pixel_values"] for _ in range(2))
    assert not torch.equal(first, second)


def test_runs_with_the_same_seed_are_equal(tmp_path):
    weights = []
    for name in ("one", "two"):
        train(arguments(tmp_path, output_dir=str(tmp_path / name)))
        weights.append(AutoModel.from_pretrained(tmp_path / name / "last").state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_published_schedule_and_optimizer(tmp_path):
    args = arguments(tmp_path, max_steps=40)
    optimizer = build_optimizer(args, torch.nn.Linear(2, 2))
    scheduler = build_scheduler(args, optimizer)
    rates = []
    for _ in range(40):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([1e-3 * (1 - step / 40) ** 0.9 for step in range(40)])
    assert type(optimizer) is torch.optim.SGD
    assert (optimizer.defaults["momentum"], optimizer.defaults["weight_decay"]) == (0.9, 5e-4)


def test_fine_tuning_starts_from_the_pretrained_weights(tmp_path):
    train(arguments(tmp_path))
    start = tmp_path / "run" / "last"
    train(
        arguments(tmp_path, output_dir=str(tmp_path / "tuned"), model={}, pretrained=str(start), learning_rate=1e-30)
    )
    before, after = (AutoModel.from_pretrained(path) for path in (start, tmp_path / "tuned" / "last"))
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))


def test_pretrained_backbone(tmp_path):
    model, _ = build_model(arguments(tmp_path))
    model.model.backbone.save_pretrained(tmp_path / "backbone")
    torch.manual_seed(1)
    other, _ = build_model(arguments(tmp_path, pretrained_backbone=str(tmp_path / "backbone")))
    same = [torch.equal(a, b) for a, b in zip(model.model.backbone.parameters(), other.model.backbone.parameters())]
    assert all(same)
    assert not torch.equal(model.heads["depth"].conv.weight, other.heads["depth"].conv.weight)


def test_data_set_on_disk(tmp_path):
    rooms = load_rooms("train", 4, (32, 48)).select_columns(["image", "depth", "semseg"])
    for split in ("train", "validation"):
        rooms.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    tasks = {"depth": {"kind": "depth"}, "semseg": ROOMS_TASKS["semseg"]}
    fields = {"dataset": str(tmp_path / "data"), "num_train_images": None, "num_eval_images": 2}
    scores = train(arguments(tmp_path, model={**MODEL, "tasks": tasks}, **fields))
    assert list(scores) == ["depth", "semseg"]

    tasks["parts"] = {"kind": "segmentation", "num_labels": 2}
    with pytest.raises(ValueError, match=r"data', split 'train'.*lacks the columns 'parts'; it has.*'depth'"):
        train(arguments(tmp_path, model={**MODEL, "tasks": tasks}, **fields))


def save_splits(folder: Path, data: Dataset, splits=("train", "validation")) -> dict:
    """Writes a data set; fields of a run that reads it."""
    for split in splits:
        data.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return {"dataset": str(folder), "num_train_images": None, "num_eval_images": None}


README = Path(__file__).parents[2] / "README.md"


def test_own_data_as_in_the_readme(tmp_path, monkeypatch):
    text = re.search(r"## Your own data.*?```yaml\n(.*?)```", README.read_text(), re.DOTALL)[1]
    assert len(text.splitlines()) <= 15
    (tmp_path / "mine.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("validation", 3)):
        folder = tmp_path / "my_data" / split
        folder.mkdir(parents=True)
        with open(folder / "metadata.jsonl", "w") as metadata:
            for index in range(count):
                row = {"file_name": f"{index}.jpg"}
                maps = {
                    "image": rng.integers(0, 256, (32, 48, 3), np.uint8),
                    "parts": rng.integers(0, 3, (32, 48), np.uint8),
                    "materials": rng.integers(0, 3, (32, 48), np.uint8),
                    "depth": rng.integers(0, 3000, (32, 48), np.uint16),
                }
                Image.fromarray(maps.pop("image")).save(folder / row["file_name"])
                # Each has a sample without it: null, and not even that.
                for position, (name, values) in enumerate(maps.items()):
                    if index == position:
                        row |= {f"{name}_file_name": None} if position else {}
                        continue
                    row[f"{name}_file_name"] = f"{index}_{name}.png"
                    Image.fromarray(values).save(folder / row[f"{name}_file_name"])
                metadata.write(json.dumps(row) + "\n")
    fast = ["--max_steps", "3", "--batch_size", "2", "--num_workers", "0", "--pretrained_backbone", "null"]
    fast += ["--model.hidden_size", "16", "--model.backbone_config", json.dumps(BACKBONES["resnet"].to_dict())]
    args = parse_arguments(["mine.yaml", *fast])
    data = load_split(args, "train", build_model(args)[0].config.tasks)
    assert [name for name in ("parts", "materials", "distance") if data[1][name] is None] == ["materials"]
    assert data[0]["parts"] is None and data[1]["distance"].max() < 3
    assert set(data[1]["parts"].unique().tolist()) == {0, 1, 255}

    scores = train(args)
    assert list(scores) == ["parts", "materials", "distance"]
    assert 0 < scores["distance"]["rmse"] < 10  # metres
    config = AutoModel.from_pretrained("outputs/mine/best").config
    assert config.tasks["parts"]["id2label"] == {0: "blade", 1: "handle"}


@pytest.fixture
def no_pause(monkeypatch):
    """`datasets` waits 5 seconds at the end of each shuffled stream."""
    monkeypatch.setattr(datasets_config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.01)


def test_streaming(tmp_path, no_pause):
    rooms = load_rooms("train", 5, (32, 48)).select_columns(["image", "depth", "semseg", "semseg_classes", "image_id"])
    tasks = {"depth": {"kind": "depth"}, "semseg": {"kind": "segmentation"}}
    fields = save_splits(tmp_path / "data", rooms)
    args = arguments(tmp_path, streaming=True, model={**MODEL, "tasks": tasks}, max_steps=5, **fields)
    train(args)  # through the end of the data: two whole batches an epoch
    tasks = AutoModel.from_pretrained(tmp_path / "run" / "last").config.tasks
    assert tasks["semseg"] == {**ROOMS_TASKS["semseg"], "loss_weight": 1.0}

    stream = load_split(args, "train", tasks)
    orders = []
    for epoch in range(2):
        stream.set_epoch(epoch)
        orders.append([row["image_id"] for row in stream])
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1]) == rooms["image_id"][:]
    assert [row["image_id"] for row in load_split(args, "eval", tasks)] == rooms["image_id"][:]
    args.num_eval_images = 2
    assert len(list(load_split(args, "eval", tasks))) == 2


def test_streams_are_scored_as_data_sets_are(tmp_path, no_pause):
    fields = save_splits(tmp_path / "data", load_rooms("train", 3, (32, 48)).select_columns(["image", "depth"]))
    fields["model"] = {**MODEL, "tasks": {"depth": {"kind": "depth"}}}
    frozen = {"learning_rate": 1e-30, "weight_decay": 0.0, "batch_size": 3, "max_steps": 1}
    scores = [train(arguments(tmp_path, streaming=streaming, **fields, **frozen)) for streaming in (False, True)]
    assert scores[0]["depth"] == pytest.approx(scores[1]["depth"], rel=1e-4)


def test_less_than_a_batch_in_a_stream(tmp_path):
    fields = save_splits(tmp_path / "data", load_rooms("train", 3, (32, 48)).select_columns(["image", "depth"]))
    fields["model"] = {**MODEL, "tasks": {"depth": {"kind": "depth"}}}
    with pytest.raises(ValueError, match="3 training images do not fill one batch: `batch_size` is 4"):
        train(arguments(tmp_path, streaming=True, batch_size=4, **fields))


def test_classes_come_from_the_data(tmp_path):
    names = ClassLabel(names=["floor", "wall"])
    rows = Dataset.from_dict({"image": [Image.new("RGB", (48, 32))], "ids": [Image.new("L", (48, 32))]})
    rows = rows.add_column("ids_classes", [[0]]).cast_column("ids_classes", List(names))
    fields = save_splits(tmp_path / "data", rows)
    fields["model"] = {**MODEL, "tasks": {"surface": {"kind": "segmentation"}}}
    model, _ = build_model(arguments(tmp_path, columns={"surface": "ids"}, **fields))
    assert model.config.tasks["surface"]["id2label"] == {0: "floor", 1: "wall"}
    with pytest.raises(ValueError, match=r"tasks\['surface'\]\['num_labels'\].*got None"):
        build_model(arguments(tmp_path, columns={"surface": "image"}, **fields))


def test_splits_that_cannot_be_used(tmp_path):
    data = Dataset.from_dict({"image": [Image.new("RGB", (48, 32))], "depth": [Image.new("F", (48, 32), 1.0)]})
    fields = save_splits(tmp_path / "data", data, ["train"])
    data.select([]).to_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet")
    tasks = {"depth": {"kind": "depth"}}
    fields["model"] = {**MODEL, "tasks": tasks}
    with pytest.raises(ValueError, match="data', split 'validation'.* no data"):
        load_split(arguments(tmp_path, **fields), "eval", tasks)
    with pytest.raises(ValueError, match="`num_train_images` is 2, but .*data' has 1 in 'train'"):
        load_split(arguments(tmp_path, **{**fields, "num_train_images": 2}), "train", tasks)
    with pytest.raises(ValueError, match=r"`columns` has the keys \['dept'\]; allowed are \['image', 'depth'\]"):
        load_split(arguments(tmp_path, columns={"dept": "d"}, **fields), "train", tasks)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    rows = {"image": [Image.new("RGB", (32, 32))] * 2, "depth": [Image.new("F", (32, 32), 1e38)] * 2}
    for split in ("train", "validation"):
        Dataset.from_dict(rows).to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    fields = {"dataset": str(tmp_path / "data"), "model": {**MODEL, "tasks": {"depth": {"kind": "depth"}}}}
    with pytest.raises(ValueError, match="not finite at step 1.*depth.*inf"):
        train(arguments(tmp_path, **fields, num_train_images=None, num_eval_images=None))
    assert not any((tmp_path / "run").iterdir())


def test_output_that_cannot_be_written_stops_the_run_at_once(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        train(arguments(tmp_path, output_dir=str(tmp_path / "file" / "run"), max_steps=10_000_000))


def test_rooms_must_be_counted(tmp_path):
    with pytest.raises(ValueError, match="`num_train_images`"):
        train(arguments(tmp_path, num_train_images=None))


def test_tasks_of_rooms_can_be_chosen_and_changed(tmp_path):
    model, processor = build_model(
        arguments(tmp_path, model={**MODEL, "tasks": {"sal": {}, "depth": {"loss_weight": 5}}})
    )
    assert list(model.config.tasks) == list(processor.tasks) == ["sal", "depth"]
    assert [task["loss_weight"] for task in model.config.tasks.values()] == [5, 5]
    with pytest.raises(ValueError, match=r"\['flow'\].*'depth'"):
        build_model(arguments(tmp_path, model={**MODEL, "tasks": {"flow": {}}}))


def test_less_than_a_batch(tmp_path):
    with pytest.raises(ValueError, match="4 training images.*`batch_size` is 5"):
        train(arguments(tmp_path, batch_size=5))


@pytest.mark.parametrize("num_processes", [1, 2])
def test_script(tmp_path, num_processes):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(vars(arguments(tmp_path, max_steps=2))))
    script = Path(__file__).parents[2] / "scripts" / "train.py"
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(num_processes)]
    command = [sys.executable, *(launch if num_processes > 1 else []), str(script), str(config), "--batch_size", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "rmse" in done.stdout and str(tmp_path / "run") in done.stdout
    assert (
        AutoModel.from_pretrained(tmp_path / "run" / "best").config.tasks
        == AutoModel.from_pretrained(tmp_path / "run" / "last").config.tasks
    )

    refused = subprocess.run([sys.executable, str(script), str(config), "--optimizer", "adam"], capture_output=True)
    assert refused.returncode == 1 and b"Traceback" not in refused.stderr and b"adamw" in refused.stderr
