import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
from functools import partialmethod
from io import BytesIO
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import LoggerType, set_seed
from commands import DEGMIX, run_command
from datasets import ClassLabel, Dataset, List
from datasets import config as datasets_config
from hub_server import HubServer
from huggingface_hub import ModelCard
from PIL import Image
from small_data import save_folder
from small_models import ALL_KINDS, BACKBONES, random_labels, save_small_model, small_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModel, pipeline

from transformers_degmix import DeGMixConfig
from transformers_degmix.data.collator import DeGMixDataCollator
from transformers_degmix.data.rooms import ROOMS_TASKS, load_rooms
from transformers_degmix.evaluation import METRICS
from transformers_degmix.evaluation.evaluator import evaluate_model
from transformers_degmix.files import locked
from transformers_degmix.training.arguments import TrainingArguments, parse_arguments
from transformers_degmix.training.balancing import FixedWeights, UncertaintyWeights
from transformers_degmix.training.build import build_model, build_optimizer, build_scheduler
from transformers_degmix.training.data import TrainBatches, load_split
from transformers_degmix.training.loop import accumulate_gradients, train


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
        "num_logged_images": 0,
    }
    return TrainingArguments(**{**defaults, **fields})


def test_a_run_ends_in_models_that_the_pipeline_loads(tmp_path):
    args = arguments(tmp_path, optimizer="adamw", learning_rate=3e-3, lr_scheduler="cosine", max_grad_norm=1.0)
    scores = train(args)
    assert set(scores) == set(ROOMS_TASKS)
    assert {"rmse", "abs_rel", "delta1"} <= set(scores["depth"])
    for name in ("best", "last"):
        predict = pipeline("multi-task-dense-prediction", model=str(tmp_path / "run" / name))
        prediction = predict(Image.new("RGB", (50, 40)))
        assert prediction["normals"].shape == (3, 40, 50)
        assert predict.model.config.tasks["semseg"]["id2label"] == ROOMS_TASKS["semseg"]["id2label"]


def test_models_have_a_card_of_their_run(tmp_path):
    args = arguments(tmp_path, num_logged_images=1, max_steps=3)
    scores = train(args)
    for name, step in (("best", None), ("last", 3)):
        directory = tmp_path / "run" / name
        card = ModelCard.load(directory / "README.md")
        assert step is None or f"after step {step} of 3" in card.text
        assert yaml.safe_load(card.text.split("```yaml")[1].split("```")[0]) == args.decisive()
        for part, number in (("train", 4), ("validation", 3)):
            assert re.search(rf"split `{part}`, the first {number} images, `datasets` fingerprint `\w+`", card.text)
        assert "### Reported by the authors\n\nNothing" in card.text and "0.0" in card.text
        assert re.search(r"[\d.e-]+ hours on 1 x CPU .*The energy was not measured", card.text)
        assert card.data.license == "apache-2.0" and card.data.datasets == ["rooms"]
        assert Image.open(directory / re.search(r"!\[.*\]\((.*)\)", card.text)[1]).width > 1000
    results = {result.task_name: result for result in card.data.eval_results}
    assert results["depth"].metric_value == round(scores["depth"]["rmse"], 4)
    assert list(results) == list(scores)
    assert all(result.metric_name.endswith("(measured by us)") for result in results.values())


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
    args = arguments(tmp_path, num_train_images=1, batch_size=1)
    batches = iter(TrainBatches(args, args.sources, build_model(args)[1], ROOMS_TASKS, Accelerator()))
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
    optimizer = build_optimizer(args, build_model(args)[0], FixedWeights(6))
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


def test_new_tasks_are_learnt_from_their_labels_alone(tmp_path):
    train(arguments(tmp_path, model={**MODEL, "tasks": {"semseg": {}, "depth": {}}}))
    rooms = load_rooms("train", 4, (32, 48)).select_columns(["image", "normals", "edge"])
    for split in ("train", "validation"):
        rooms.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    fields = {
        "output_dir": str(tmp_path / "grown"), "pretrained": str(tmp_path / "run" / "last"), "model": {},
        "dataset": str(tmp_path / "data"), "num_train_images": None, "num_eval_images": 2, "num_logged_images": 1,
        "new_tasks": {name: ROOMS_TASKS[name] for name in ("normals", "edge")},
        "optimizer": "adamw", "learning_rate": 0.01, "weight_decay": 0.1, "ema_decay": 0.5,
    }  # fmt: skip
    scores = train(arguments(tmp_path, **fields))
    assert list(scores) == ["normals", "edge"]

    before, after = (AutoModel.from_pretrained(tmp_path / run / "last") for run in ("run", "grown"))
    assert list(after.config.tasks) == ["semseg", "depth", "normals", "edge"]
    kept = before.state_dict()
    new = {name: value for name, value in after.state_dict().items() if name not in kept}
    assert all(torch.equal(after.state_dict()[name], value) for name, value in kept.items())
    assert all(".normals." in name or ".edge." in name for name in new)
    assert new["model.mixers.edge.0.channel_norm.running_mean"].any()
    maps = pipeline("multi-task-dense-prediction", model=str(tmp_path / "grown" / "last"))(Image.new("RGB", (50, 40)))
    assert list(maps) == list(after.config.tasks) and maps["edge"].shape == (40, 50)
    results = ModelCard.load(tmp_path / "grown" / "last" / "README.md").data.eval_results
    assert len(results) == 2 and (tmp_path / "grown" / "last" / "predictions.jpg").exists()

    fields |= {"output_dir": str(tmp_path / "all"), "dataset": "rooms", "num_train_images": 4}
    train(arguments(tmp_path, **fields, train_only_new=False))
    changed = AutoModel.from_pretrained(tmp_path / "all" / "last").state_dict()
    name = "model.mixers.depth.0.channel_mixing.weight"
    assert not torch.equal(changed[name], kept[name])


def test_a_pretrained_model_whose_configuration_is_damaged_is_named(tmp_path):
    folder = save_small_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": "many"}))
    with pytest.raises(ValueError, match=r"`pretrained`: .*model: Field 'hidden_size' expected int, got str"):
        build_model(arguments(tmp_path, model={}, pretrained=str(folder)))


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
    with pytest.raises(ValueError, match=r"data', split 'train'.*lacks column 'parts'; it has.*'depth'"):
        train(arguments(tmp_path / "other", model={**MODEL, "tasks": tasks}, **fields))


@pytest.mark.parametrize("fields", [{}, {"single_task_scores": {"depth": 0.5, "semseg": 0.5}, "streaming": True}])
def test_a_task_without_labels_in_the_evaluation_split(tmp_path, fields):
    rooms = load_rooms("train", 4, (32, 48)).select_columns(["image", "depth", "semseg"])
    rows = [{**row, "depth": None} for row in rooms]
    save_splits(tmp_path / "data", rooms, ["train"])
    fields |= save_splits(tmp_path / "data", Dataset.from_list(rows, features=rooms.features), ["validation"])
    tasks = {"depth": {"kind": "depth"}, "semseg": ROOMS_TASKS["semseg"]}
    scores = train(arguments(tmp_path, model={**MODEL, "tasks": tasks}, num_logged_images=1, **fields))
    assert list(scores) == ["semseg"]
    for name in ("best", "last"):
        assert "depth" in AutoModel.from_pretrained(tmp_path / "run" / name).config.tasks


@pytest.mark.parametrize("fields", [{}, {"single_task_scores": {"depth": 0.5}, "early_stopping_patience": 1}])
def test_the_newest_model_is_the_best_one_without_labels_to_evaluate_with(tmp_path, fields):
    rooms = load_rooms("train", 2, (32, 48)).select_columns(["image", "depth"])
    rows = [{**row, "depth": None} for row in rooms]
    save_splits(tmp_path / "data", rooms, ["train"])
    fields |= save_splits(tmp_path / "data", Dataset.from_list(rows, features=rooms.features), ["validation"])
    tasks = {"depth": {"kind": "depth"}}
    assert train(arguments(tmp_path, model={**MODEL, "tasks": tasks}, max_steps=3, eval_steps=1, **fields)) == {}
    cards = [ModelCard.load(tmp_path / "run" / name / "README.md").text for name in ("best", "last")]
    assert cards[0] == cards[1] and "after step 3 of 3" in cards[0]


def save_splits(folder: Path, data: Dataset, splits=("train", "validation")) -> dict:
    """Writes a data set; fields of a run that reads it."""
    for split in splits:
        data.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return {"dataset": str(folder), "num_train_images": None, "num_eval_images": None}


PAGE = Path(__file__).parents[2] / "docs" / "own_data.md"


def test_own_data_as_in_the_docs(tmp_path, monkeypatch):
    text = re.search(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    assert len(text.splitlines()) <= 15
    (tmp_path / "mine.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    save_folder(tmp_path / "my_data")
    fast = ["--max_steps", "3", "--batch_size", "2", "--num_workers", "0", "--pretrained_backbone", "null"]
    fast += ["--model.hidden_size", "16", "--model.backbone_config", json.dumps(BACKBONES["resnet"].to_dict())]
    args = parse_arguments(["mine.yaml", *fast])
    data = load_split(args, args.sources[0], "train", build_model(args)[0].config.tasks)
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
    assert tasks["semseg"] == DeGMixConfig(tasks=ROOMS_TASKS).tasks["semseg"]

    stream = load_split(args, args.sources[0], "train", tasks)
    orders = []
    for epoch in range(2):
        stream.set_epoch(epoch)
        orders.append([row["image_id"] for row in stream])
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1]) == rooms["image_id"][:]
    assert [row["image_id"] for row in load_split(args, args.sources[0], "eval", tasks)] == rooms["image_id"][:]
    args.num_eval_images = 2
    assert len(list(load_split(args, args.sources[0], "eval", tasks))) == 2


def test_streams_are_scored_as_data_sets_are(tmp_path, no_pause):
    fields = save_splits(tmp_path / "data", load_rooms("train", 3, (32, 48)).select_columns(["image", "depth"]))
    fields["model"] = {**MODEL, "tasks": {"depth": {"kind": "depth"}}}
    frozen = {"learning_rate": 1e-30, "weight_decay": 0.0, "batch_size": 3, "max_steps": 1}
    scores = [
        train(
            arguments(
                tmp_path, output_dir=str(tmp_path / f"streaming_{streaming}"), streaming=streaming, **fields, **frozen
            )
        )
        for streaming in (False, True)
    ]
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

    def load(args, part):
        load_split(args, args.sources[0], part, tasks)

    with pytest.raises(ValueError, match="data', split 'validation'.* no data"):
        load(arguments(tmp_path, **fields), "eval")
    with pytest.raises(ValueError, match="data', split 'train': .*`num_train_images`.* is 2, but there are 1"):
        load(arguments(tmp_path, **{**fields, "num_train_images": 2}), "train")
    with pytest.raises(ValueError, match=r"^`columns` names \['dept'\]; the run knows \['image', 'depth', "):
        build_model(arguments(tmp_path, columns={"dept": "d"}, **fields))


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


def test_a_directory_is_for_one_run(tmp_path):
    args = arguments(tmp_path, max_steps=2, eval_steps=1)
    strange = tmp_path / "run" / "notes.unfinished.txt"
    with locked(tmp_path / "run"):
        strange.touch()
        with pytest.raises(ValueError, match="another process is writing .*run"):
            train(args)
    train(args)
    assert strange.exists() and {path.name for path in strange.parent.iterdir()} == {
        "best", "last", "checkpoint.pt", strange.name,
    }  # fmt: skip
    (tmp_path / "run" / "checkpoint.pt").unlink()
    with pytest.raises(FileExistsError, match="best exists: replace it with `resume`, or choose another"):
        train(args)


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


def test_command(monkeypatch, capsys, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(vars(arguments(tmp_path, max_steps=2))))
    assert run_command(monkeypatch, "train", config) is None
    output = capsys.readouterr().out
    assert "rmse" in output and str(tmp_path / "run") in output
    message = run_command(monkeypatch, "train", config, "--optimizer", "adam")
    assert message.startswith("error: ") and "adamw" in message and "\n" not in message


def run_train(
    args: TrainingArguments, *overrides: str, num_processes: int = 1, env: dict[str, str] = os.environ
) -> subprocess.Popen:
    """`degmix train` in a process of its own, or in several."""
    config = Path(args.output_dir).with_suffix(".yaml")
    config.write_text(yaml.safe_dump(vars(args)))
    # `accelerate launch --cpu` starts one process, whatever it is told, unless there is MPI.
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    env = {**env, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *(launch if num_processes > 1 else []), *DEGMIX[1:], "train", str(config), *overrides]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes, env=env, start_new_session=True)


def read_curves(output_dir: str) -> dict[str, list[float]]:
    """What TensorBoard shows, by name."""
    events = EventAccumulator(str(Path(output_dir) / "degmix"), size_guidance={"images": 0}).Reload()
    return {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


WITHOUT_DROP_PATH = {**MODEL, "backbone_config": {**MODEL["backbone_config"], "drop_path_rate": 0.0}}


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    # 7 images are not a multiple of the batch, 5 evaluation images not one of the processes, 4 steps not one epoch.
    # Images of one data set have no labels of the other's tasks: processes, and steps, lack labels of some.
    # Differences of rounding grow with every step, and among smaller images in batch norms.
    fields = {"model": WITHOUT_DROP_PATH, "num_eval_images": 5, "image_size": [64, 96], "datasets": [
        {"name": "a", "dataset": "rooms", "num_train_images": 4, "tasks": ["semseg", "depth", "human_parts"]},
        {"name": "b", "dataset": "rooms", "num_train_images": 3, "tasks": ["sal", "normals", "edge"]},
    ]}  # fmt: skip
    fields |= {"max_steps": 4, "eval_steps": 2, "log_with": ["tensorboard"], "logging_steps": 1}
    curves, models = [], []
    for num_processes, batch_size in ((1, 2), (2, 1)):
        name = f"processes_{num_processes}"
        args = arguments(tmp_path, output_dir=str(tmp_path / name), batch_size=batch_size, **fields)
        process = run_train(args, num_processes=num_processes)
        _, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors
        saved = torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
        assert saved["arguments"]["num_processes"] == len(saved["generators"]) == num_processes
        curves.append(read_curves(args.output_dir))
        models.append(AutoModel.from_pretrained(tmp_path / name / "last").state_dict())
    for name, values in curves[0].items():
        if name.startswith("eval/"):  # pixels close to a threshold change sides, a sample more would be a sixth
            assert curves[1][name][0] == pytest.approx(values[0], rel=1e-3), name
        elif "per_second" not in name:
            assert curves[1][name] == pytest.approx(values, rel=1e-4), name
    assert len(curves[0]["train/loss"]) == 4 and len(curves[0]["eval/depth_rmse"]) == 2
    assert min(len(curves[0][f"train/{task}"]) for task in ("depth", "edge")) < 4
    for name in models[0]:  # batch norms' statistics among them
        torch.testing.assert_close(models[1][name], models[0][name], rtol=1e-3, atol=2e-3, msg=name)


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    # Batch norms see one pass at a time: those that are frozen do not care.
    frozen = ["model.mixers", "heads"]
    fields = {"model": WITHOUT_DROP_PATH, "freeze": frozen, "max_steps": 3, "log_with": ["tensorboard"]}
    fields |= {"logging_steps": 1, "learning_rate": 0.1, "task_balancing": "uncertainty"}
    for passes in (1, 4):
        batches = {"batch_size": 4 // passes, "gradient_accumulation_steps": passes}
        train(arguments(tmp_path, output_dir=str(tmp_path / f"{passes}"), **batches, **fields))
    one, four = (AutoModel.from_pretrained(tmp_path / passes / "last").state_dict() for passes in ("1", "4"))
    for name in one:
        torch.testing.assert_close(four[name], one[name], rtol=1e-4, atol=1e-5, msg=name)
    assert read_curves(tmp_path / "4")["train/loss"] == pytest.approx(
        read_curves(tmp_path / "1")["train/loss"], rel=1e-4
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_step_without_labels_of_a_task_leaves_its_parts_alone(tmp_path, optimizer):
    """Momentum, weight decay and the task's weight do not move; statistics of batch norms do, with every image."""
    args = arguments(tmp_path, optimizer=optimizer, learning_rate=0.1, weight_decay=0.1)
    model, balancer, accelerator = small_model().train(), UncertaintyWeights(len(ALL_KINDS)), Accelerator()
    optimizer, tasks = build_optimizer(args, model, balancer), list(model.config.tasks)
    images = torch.randn(2, 3, 32, 64, generator=torch.Generator().manual_seed(0))

    def step(*unlabelled: str):
        labels = random_labels(ALL_KINDS, 2, 32, 64)
        for task in unlabelled:
            labels[task].fill_(255)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        variances = [value.item() for value in balancer.log_variances]
        batches = iter([{"pixel_values": images, "labels": labels}])
        _, labelled = accumulate_gradients(model, balancer, batches, args, accelerator)
        assert [task for task, known in zip(tasks, labelled) if not known] == list(unlabelled)
        optimizer.step()
        optimizer.zero_grad()
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        return moved, {task for task, a, b in zip(tasks, variances, balancer.log_variances) if a != b.item()}

    moved, weights = step()
    heads = {name for name in moved if name.startswith("heads.depth.")}
    assert heads and weights == set(tasks)  # there is momentum now
    moved, weights = step("depth")
    assert not heads & {name for name in moved if "running" not in name and "num_batches" not in name}
    assert weights == set(tasks) - {"depth"}
    assert any(name.startswith("model.mixers.depth.") and "running_mean" in name for name in moved)
    assert {name for name in moved if name.startswith("heads.semseg.")}
    moved, weights = step(*tasks)
    assert all("running" in name or "num_batches" in name for name in moved) and not weights


def test_frozen_modules_stay_as_they_are(tmp_path):
    args = arguments(tmp_path, freeze=["model.backbone", "model.mixers.depth"], learning_rate=0.1, max_steps=2)
    set_seed(args.seed)
    before = build_model(args)[0].state_dict()
    train(args)
    after = AutoModel.from_pretrained(tmp_path / "run" / "last").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not [name for name in changed if name.startswith(("model.backbone.", "model.mixers.depth."))]
    assert {"model.mixers.semseg.0.channel_norm.running_mean", "model.fusion.projections.0.weight"} <= changed
    with pytest.raises(ValueError, match=r"`freeze` names \['backbone'\]; the model has modules such as \['model'"):
        build_model(arguments(tmp_path, freeze=["backbone"]))


def test_backbone_has_its_own_learning_rate(tmp_path):
    args = arguments(tmp_path, backbone_learning_rate=0.0, learning_rate=0.1, weight_decay=0.0, max_steps=1)
    set_seed(args.seed)
    before = build_model(args)[0]
    train(args)
    after = AutoModel.from_pretrained(tmp_path / "run" / "last")
    for (name, old), new in zip(before.named_parameters(), after.parameters()):
        if name.startswith("model.backbone."):
            assert torch.equal(old, new), name
    assert not torch.equal(before.model.fusion.projections[0].weight, after.model.fusion.projections[0].weight)


def test_moving_average(tmp_path):
    weights = {}
    for decay, steps in ((0.0, 1), (0.0, 2), (0.1, 2), (0.75, 2)):
        name = f"{decay}_{steps}"
        rate = {"lr_scheduler": "constant", "learning_rate": 0.01, "max_steps": steps}
        train(arguments(tmp_path, output_dir=str(tmp_path / name), ema_decay=decay, **rate))
        weights[decay, steps] = AutoModel.from_pretrained(tmp_path / name / "last").state_dict()
    # It starts with the first step's weights, of which it keeps 2 / 11 at most in the second.
    for given, decay in ((0.1, 0.1), (0.75, 2 / 11)):
        for name, value in weights[given, 2].items():
            if value.is_floating_point():
                expected = decay * weights[0.0, 1][name] + (1 - decay) * weights[0.0, 2][name]
                torch.testing.assert_close(value, expected, msg=name)


@pytest.mark.parametrize("balancing", ["uncertainty", "dynamic_weight_average"])
def test_task_balancing(tmp_path, balancing):
    fields = {"task_balancing": balancing, "learning_rate": 1e-2, "max_steps": 8}
    train(arguments(tmp_path, **fields))
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["parts"]["balancer"]
    learned = torch.stack([*state.values()]) if balancing == "uncertainty" else state["weights"]
    assert learned.isfinite().all() and len(learned.unique()) == len(ROOMS_TASKS)


def test_a_resumed_run_ends_as_if_nothing_had_happened(tmp_path):
    # In the middle of an epoch, with stochastic depth, a moving average and weights that depend on earlier epochs
    fields = {"num_train_images": 6, "max_steps": 8, "checkpoint_steps": 4, "eval_steps": 8, "ema_decay": 0.5}
    fields |= {"task_balancing": "dynamic_weight_average", "max_grad_norm": 1.0, "warmup_steps": 2}
    scores = train(arguments(tmp_path, **fields))

    class Crash(Exception):
        pass

    def crash(*_):
        raise Crash

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers_degmix.training.loop.evaluate_model", crash)
        with pytest.raises(Crash):
            train(arguments(tmp_path, output_dir=str(tmp_path / "resumed"), **{**fields, "eval_steps": 5}))
    resumed = str(tmp_path / "resumed")
    with pytest.raises(ValueError, match="other arguments: `eval_steps` was 5 and is 8"):
        train(arguments(tmp_path, output_dir=resumed, resume=True, **fields))
    with pytest.raises(FileExistsError, match="checkpoint.pt exists: go on from it with `resume`"):
        train(arguments(tmp_path, output_dir=resumed, **fields))
    path = tmp_path / "resumed" / "checkpoint.pt"
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["parts"]["progress"]["step"] == 5 and checkpoint["parts"]["batches"]["position"] == 2
    torch.save({**checkpoint, "arguments": {**checkpoint["arguments"], "eval_steps": 8}}, path)

    assert train(arguments(tmp_path, output_dir=resumed, resume=True, **fields)) == scores
    one, other = (AutoModel.from_pretrained(tmp_path / name / "last").state_dict() for name in ("run", "resumed"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    # And once more: there is nothing left to do.
    assert train(arguments(tmp_path, output_dir=resumed, resume=True, **fields)) == scores


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_evaluation_that_failed_is_made_when_the_run_goes_on(tmp_path, num_workers):
    """Without the steps before it, and once."""
    rooms = load_rooms("train", 4, (32, 48)).select_columns(["image", "depth"])
    fields = save_splits(tmp_path / "data", rooms) | {"log_with": ["tensorboard"], "num_workers": num_workers}
    fields |= {"model": {**MODEL, "tasks": {"depth": {"kind": "depth"}}}, "checkpoint_steps": 100}
    scores = train(arguments(tmp_path, output_dir=str(tmp_path / "alone"), **fields))
    rows = [{**row, "image": {"bytes": b"no image", "path": None}} for row in rooms]
    save_splits(tmp_path / "data", Dataset.from_list(rows, features=rooms.features), ["validation"])
    message = (
        r"sample 0: column 'image': .*; this is the evaluation split, and `skip_unreadable: true` leaves out such"
    )
    with pytest.raises(ValueError, match=message):
        train(arguments(tmp_path, **fields))
    progress = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["parts"]["progress"]
    assert (progress["step"], progress["evaluated_step"]) == (2, 0)
    save_splits(tmp_path / "data", rooms, ["validation"])
    assert train(arguments(tmp_path, resume=True, **fields)) == scores
    curves = [read_curves(str(tmp_path / name))["eval/depth_rmse"] for name in ("alone", "run")]
    assert curves[0] == curves[1] and len(curves[0]) == 2
    one, other = (AutoModel.from_pretrained(tmp_path / name / "last").state_dict() for name in ("run", "alone"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_full_disk_leaves_the_last_checkpoint_to_go_on_from(tmp_path):
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    steps = []

    def evaluate(*args):
        steps.append(args)
        if len(steps) == 2:
            # Enough for what pytest captures
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
        return evaluate_model(*args)

    fields = {"eval_steps": 1, "checkpoint_steps": 1, "max_steps": 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers_degmix.training.loop.evaluate_model", evaluate)
        try:
            with pytest.raises(OSError, match="cannot write .*run/last"):
                train(arguments(tmp_path, **fields))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
    scores = train(arguments(tmp_path, resume=True, **fields))
    assert scores == train(arguments(tmp_path, output_dir=str(tmp_path / "alone"), **fields))
    assert not list((tmp_path / "run").rglob("*.unfinished*"))
    one, other = (AutoModel.from_pretrained(tmp_path / name / "last").state_dict() for name in ("run", "alone"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("kill", "num_workers"), [(os.kill, 0), (os.killpg, 2)])
def test_sigterm_saves_and_exits(kill, num_workers, tmp_path):
    """To the process, or to its loaders as well, as Slurm and `timeout` send it."""
    fields = {"num_workers": num_workers, "num_train_images": 8}
    args = arguments(tmp_path, max_steps=100_000, eval_steps=100_000, checkpoint_steps=100_000, **fields)
    process = run_train(args)
    while "train:" not in process.stderr.readline():
        assert process.poll() is None
    while not re.search(r" [1-9]\d*/200000 ", process.stderr.read(80)):
        pass
    kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 128 + signal.SIGTERM
    step = int(re.search(r"stopped by SIGTERM after step (\d+); go on with `resume`", errors)[1])
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["parts"]
    assert state["progress"]["step"] == step > 0
    assert "Traceback" not in errors


@pytest.mark.slow
def test_killed_runs_end_like_those_left_alone(tmp_path):
    script = Path(__file__).parents[2] / "scripts" / "check_resume.py"
    command = [sys.executable, str(script), "--kills", "2", "--output_dir", str(tmp_path / "runs")]
    short = ["--max_steps", "16", "--eval_steps", "6", "--checkpoint_steps", "3"]
    done = subprocess.run([*command, *short], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kills" in done.stdout and "all weights are equal" in done.stdout


def test_best_models_are_kept(tmp_path):
    qualities = iter([-3.0, -1.0, -2.0, -4.0])
    seen = []

    def scored(model, *_):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        scores = {name: {METRICS[task["kind"]].main: 0.5} for name, task in ROOMS_TASKS.items()}
        return {"depth": -next(qualities)}, scores

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers_degmix.training.loop.evaluate_model", scored)
        train(arguments(tmp_path, eval_steps=1, num_best_models=2, learning_rate=0.1))
    ranked = tmp_path / "run" / "best_models"
    assert {path.name for path in ranked.iterdir()} == {"step_2", "step_3"}
    saved = {"best": 1, "last": 3, "best_models/step_2": 1, "best_models/step_3": 2}
    for name, index in saved.items():
        weights = AutoModel.from_pretrained(tmp_path / "run" / name).state_dict()
        assert all(torch.equal(weights[key], seen[index][key]) for key in weights), name


def test_early_stop_on_the_multi_task_gain(tmp_path):
    # Nothing changes: batch norms are frozen, and steps too small.
    fields = {"freeze": ["model.mixers", "heads"], "learning_rate": 1e-30, "eval_steps": 1, "max_steps": 9}
    single = dict.fromkeys(ROOMS_TASKS, 1.0)
    train(arguments(tmp_path, single_task_scores=single, early_stopping_patience=2, **fields))
    progress = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["parts"]["progress"]
    assert progress["step"] == 3 and list(progress["qualities"]) == [1]
    with pytest.raises(ValueError, match="`early_stopping_patience`.*`single_task_scores`"):
        arguments(tmp_path, early_stopping_patience=2)


@pytest.mark.parametrize("scores", [{"depth": 1}, {"depth": 1, "semseg": 0}, {"depth": 1, "semseg": math.nan}])
def test_single_task_scores_that_give_no_gain_are_refused(tmp_path, scores):
    message = r"`single_task_scores`.*above 0 for each of \['semseg', 'depth'\]; \['semseg'\] have none"
    with pytest.raises(ValueError, match=message):
        train(arguments(tmp_path, tasks=["semseg", "depth"], single_task_scores=scores))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 2.5}, "hidden_size.*int.*2.5"),
        ({"backbone_config": {**MODEL["backbone_config"], "depths": "many"}}, "depths.*'many'.*list"),
    ],
)
def test_fields_of_the_model_of_another_type(tmp_path, fields, message):
    with pytest.raises(ValueError, match=f"^`model`: .*{message}"):
        train(arguments(tmp_path, model={**MODEL, **fields}))


def test_trackers_see_losses_scores_and_pictures(tmp_path):
    train(arguments(tmp_path, log_with=["tensorboard"], logging_steps=2, num_logged_images=2))
    curves = read_curves(tmp_path / "run")
    assert len(curves["train/depth"]) == 2 and len(curves["eval/semseg_mean_iou"]) == 2
    assert curves["train/loss"][0] == pytest.approx(sum(curves[f"train/{task}"][0] for task in ROOMS_TASKS))
    assert curves["train/learning_rate_0"][-1] == 0 and curves["train/images_per_second"][0] > 0
    events = EventAccumulator(str(tmp_path / "run" / "degmix"), size_guidance={"images": 0}).Reload()
    pictures = [Image.open(BytesIO(event.encoded_image_string)) for event in events.Images("predictions")]
    assert len(pictures) == 2 and pictures[0].width > 1500 and len(pictures[0].getcolors(10**6)) > 100


def test_trackers_that_are_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    with pytest.raises(ImportError, match="`log_with` needs .*pip install trackio wandb$"):
        train(arguments(tmp_path, log_with=["wandb", "tensorboard", "trackio"]))
    assert not (tmp_path / "run" / "last").exists()


@pytest.mark.slow
def test_compiled_model_trains_to_the_same_weights(tmp_path, monkeypatch):
    # Without the compiler for C++, which takes minutes: what is captured runs in PyTorch.
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    for name, fields in (("plain", {}), ("compiled", {"compile": True})):
        model = {**MODEL, "backbone_config": BACKBONES["resnet"].to_dict(), "tasks": {"depth": {}}}
        train(arguments(tmp_path, output_dir=str(tmp_path / name), model=model, max_steps=2, **fields))
    plain, compiled = (
        AutoModel.from_pretrained(tmp_path / name / "last").state_dict() for name in ("plain", "compiled")
    )
    assert list(plain) == list(compiled)
    for name in plain:
        torch.testing.assert_close(compiled[name], plain[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.fixture
def other_precision():
    """Accelerate keeps the precision of a process's first accelerator."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_bf16(tmp_path, other_precision):
    train(arguments(tmp_path, mixed_precision="bf16", max_steps=2))
    weights = AutoModel.from_pretrained(tmp_path / "run" / "last").state_dict()
    assert all(value.isfinite().all() and value.dtype != torch.bfloat16 for value in weights.values())


def test_the_best_model_is_pushed_to_the_hub(tmp_path):
    with HubServer(token="hf_right") as hub:
        args = arguments(tmp_path, push_to_hub="user/model", hub_private=True, max_steps=1)
        env = {**os.environ, **hub.env, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        env["HF_DATASETS_CACHE"] = str(datasets_config.HF_DATASETS_CACHE)
        hub.fail_next(403, times=1, path="commit")
        _, errors = run_train(args, env=env).communicate(timeout=900)
        assert "Traceback" not in errors and "403" in errors.splitlines()[-1], errors
        process = run_train(args, "--resume", env=env)  # only the upload is left to do
        _, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors
        pushed, best = hub.files("user/model", "models"), tmp_path / "run" / "best"
        assert {path.name for path in best.iterdir()} == set(pushed) and hub.repos["models", "user/model"].private
        assert pushed["model.safetensors"] == (best / "model.safetensors").read_bytes()
