"""Several data sets in one run, each labelled for some of the tasks."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, List
from datasets import config as datasets_config
from huggingface_hub import ModelCard
from PIL import Image
from small_models import BACKBONES
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModel

from transformers_degmix.data.benchmarks import NYUD_CLASSES
from transformers_degmix.data.rooms import ROOMS_TASKS, load_rooms
from transformers_degmix.training.arguments import TrainingArguments, parse_arguments
from transformers_degmix.training.build import build_model
from transformers_degmix.training.data import find_sources, load_split
from transformers_degmix.training.loop import mean_scores, train


MODEL = {"backbone_config": BACKBONES["swin"].to_dict(), "hidden_size": 16, "gating_intermediate_size": 8}
TASKS = {"semseg": {"kind": "segmentation"}, "depth": {"kind": "depth"}}


def arguments(tmp_path: Path, *sources: dict, **fields) -> TrainingArguments:
    defaults = {
        "output_dir": str(tmp_path / "run"), "datasets": list(sources), "image_size": [32, 48],
        "model": {**MODEL, "tasks": TASKS}, "max_steps": 4, "batch_size": 2, "eval_steps": 2, "num_workers": 0,
        "num_logged_images": 0,
    }  # fmt: skip
    return TrainingArguments(**{**defaults, **fields})


def save(folder: Path, data: Dataset) -> str:
    for split in ("train", "validation"):
        data.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


@pytest.fixture
def sources(tmp_path) -> list[dict]:
    """Five rooms with classes, three with depth."""
    rooms = load_rooms("train", 5, (32, 48))
    classes = rooms.select_columns(["image", "image_id", "semseg", "semseg_classes"])
    depth = rooms.select(range(3)).select_columns(["image", "depth"])
    return [
        {"name": "streets", "dataset": save(tmp_path / "a", classes)},
        {"name": "kitchens", "dataset": save(tmp_path / "b", depth)},
    ]


A = {"name": "a", "dataset": "x"}


@pytest.mark.parametrize(
    ("datasets", "fields", "message"),
    [
        ([{**A, "wieght": 1}], {}, r"source 'a' .*\['wieght'\].*'weight'"),
        ([{"dataset": "x"}], {}, r"source 0 .* must have the fields \['name'\]"),
        ([{"name": "a"}], {}, r"source 'a' .* must have the fields \['dataset'\]"),
        ([{**A, "tasks": "depth"}], {}, "source 'a'.*tasks.*'depth'.*list"),
        ([{**A, "num_train_images": "all"}], {}, "source 'a'.*num_train_images.*'all'.*int"),
        ([{**A, "num_train_images": 0}], {}, "source 'a'.*`num_train_images` must be at least 1, got 0"),
        ([A], {"num_eval_images": -1}, "source 'a'.*`num_eval_images` must be at least 1, got -1"),
        ([{**A, "tasks": []}], {}, "source 'a'.*`tasks`.*none"),
        ([{**A, "weight": 0}], {}, "source 'a'.*positive number as `weight`, got 0"),
        ([{**A, "weight": -1.5}], {}, "source 'a'.*positive number as `weight`, got -1.5"),
        ([{**A, "weight": float("nan")}], {}, "source 'a'.*positive number as `weight`, got nan"),
        ([{**A, "weight": float("inf")}], {}, "source 'a'.*positive number as `weight`, got inf"),
        ([{**A, "weight": True}], {}, "source 'a'.*weight.*True"),
        ([{**A, "weight": "much"}], {}, "source 'a'.*weight.*'much'"),
        ([{**A, "weight": 2}, {**A, "name": "b"}], {}, r"`weight`, but \['b'\] have none"),
        ([A, {**A, "dataset": "y"}], {}, r"different names, got \['a', 'a'\]"),
        ([], {}, r"different names, got \[\]"),
        ([A], {"dataset": "y"}, "`dataset` and `train_split`.*`datasets`"),
        ([A], {"train_split": "half"}, "`dataset` and `train_split`.*`datasets`"),
        ([{**A, "dataset": "rooms"}], {"streaming": True}, "source 'a': `streaming`.*rooms"),
    ],
)
def test_bad_sources_are_refused(datasets, fields, message):
    with pytest.raises(ValueError, match=message):
        TrainingArguments(output_dir="o", datasets=datasets, **fields)


def test_what_a_source_does_not_say_is_said_by_the_run(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "output_dir: o\neval_split: test\nnum_eval_images: 7\ncolumns: {depth: d}\ndatasets:\n"
        "- {name: a, dataset: x, train_split: 'train[:5]', weight: 1}\n"
        "- {name: b, dataset: y, eval_split: val, num_eval_images: 2, columns: {}, tasks: [depth], weight: 2e-1}\n"
    )
    args = parse_arguments([str(path)])
    first, second = args.sources
    assert (first.train_split, first.eval_split, first.num_eval_images, first.columns) == (
        "train[:5]", "test", 7, {"depth": "d"},
    )  # fmt: skip
    assert (second.train_split, second.eval_split, second.num_eval_images, second.columns) == ("train", "val", 2, {})
    assert second.tasks == ["depth"] and (first.weight, second.weight) == (1, 0.2)
    alone = TrainingArguments(output_dir="o", dataset="z", train_split="half").sources
    assert [(source.name, source.dataset, source.train_split) for source in alone] == [(None, "z", "half")]


def test_a_source_labels_what_it_has_or_says(tmp_path, sources):
    found = find_sources(arguments(tmp_path, *sources), TASKS)
    assert [source.tasks for source in found] == [["semseg"], ["depth"]]
    rooms = {"name": "all", "dataset": "rooms", "num_train_images": 4, "num_eval_images": 2, "tasks": ["semseg"]}
    found = find_sources(arguments(tmp_path, rooms, sources[1]), TASKS)
    assert [source.tasks for source in found] == [["semseg"], ["depth"]]
    row = load_split(arguments(tmp_path, *sources), found[1], "train", TASKS)[0]
    assert set(row) == {"image", "image_id", "depth"}

    def find(*given):
        return find_sources(arguments(tmp_path, *given), TASKS | {"edge": {"kind": "boundary"}})

    with pytest.raises(ValueError, match=r"none of the sources \['streets', 'kitchens'\] labels the tasks \['edge'\]"):
        find(*sources)
    first = {**sources[0], "columns": {"semseg": {"ignore": 3}, "depth": "nowhere"}}
    with pytest.raises(ValueError, match="source 'streets': .*lacks column 'nowhere' .for 'depth'."):
        train(arguments(tmp_path, first, sources[1]))
    with pytest.raises(ValueError, match=r"source 'streets': it labels none .*\['depth'\].*columns are \['image', "):
        find_sources(arguments(tmp_path, *sources), {"depth": TASKS["depth"]})
    with pytest.raises(ValueError, match=r"source 'kitchens': it labels none .*\['semseg'\].*`tasks` are \['depth'\]"):
        find_sources(arguments(tmp_path, sources[0], {**sources[1], "tasks": ["depth"]}), {"semseg": TASKS["semseg"]})
    with pytest.raises(ValueError, match=r"source 'streets': `tasks` names \['flow'\].*\['semseg', 'depth'\]"):
        build_model(arguments(tmp_path, {**sources[0], "tasks": ["semseg", "flow"]}, sources[1]))


def test_columns_may_be_of_more_tasks_than_are_trained(tmp_path):
    rooms = load_rooms("train", 2, (32, 48)).select_columns(["image", "depth", "semseg"])
    data = {"dataset": save(tmp_path / "data", rooms.rename_columns({"depth": "metres", "semseg": "ids"}))}
    tasks = {"classes": {"kind": "segmentation", "num_labels": 18}, "depth": TASKS["depth"]}
    columns = {"classes": "ids", "depth": "metres"}
    for fields in ({"datasets": None, **data}, {"datasets": [{"name": "a", **data}, {"name": "b", **data}]}):
        model = {**MODEL, "tasks": tasks}
        args = arguments(tmp_path, columns=columns, tasks=["depth"], **{"model": model, **fields})
        trained = build_model(args)[0].config.tasks
        for source in find_sources(args, trained):
            assert set(load_split(args, source, "train", trained)[0]) == {"image", "image_id", "depth"}
    with pytest.raises(ValueError, match=r"source 'a': `columns` names \['clases'\]; .*'image', 'classes', 'depth'"):
        build_model(replace(args, columns={"clases": "ids"}))


def test_a_source_that_is_empty_or_not_there(tmp_path, sources):
    rooms = load_rooms("train", 5, (32, 48)).select_columns(["image", "depth"])
    rooms.select([]).to_parquet(tmp_path / "b" / "train-00000-of-00001.parquet")
    for streaming in (False, True):
        with pytest.raises(ValueError, match="source 'kitchens': .*/b', split 'train': "):
            train(arguments(tmp_path, *sources, streaming=streaming))
    with pytest.raises(ValueError, match="source 'kitchens': .*/nowhere', split 'train': "):
        train(arguments(tmp_path, sources[0], {**sources[1], "dataset": str(tmp_path / "nowhere")}))
    with pytest.raises(ValueError, match="source 'kitchens': .*`num_train_images`.* is 9, but there are 5"):
        train(arguments(tmp_path, sources[0], {**sources[1], "dataset": sources[0]["dataset"], "num_train_images": 9}))
    assert not (tmp_path / "run").exists()


def test_what_looks_wrong_is_said_of_a_source(tmp_path, sources, monkeypatch):
    said = []
    for module in ("data.mapping", "training.data"):
        monkeypatch.setattr(f"transformers_degmix.{module}.logger.warning", said.append)
    images = {"image": [Image.new("RGB", (48, 32))] * 4, "depth": [Image.new("F", (48, 32), 1500.0)] * 3}
    images["depth"].append(Image.new("F", (48, 32), -1.0))
    save(tmp_path / "b", Dataset.from_dict(images))
    args = arguments(tmp_path, *sources, skip_unreadable=True)
    assert len(load_split(args, find_sources(args, TASKS)[1], "train", TASKS)) == 3
    assert len(said) == 2 and "not in metres?" in said[0] and "1 of 4 samples are left out" in said[1]
    assert all(line.startswith("source 'kitchens': ") for line in said)


def test_a_weight_for_less_than_an_image_is_refused(tmp_path, sources):
    first, second = {**sources[0], "weight": 1000}, {**sources[1], "weight": 1}
    with pytest.raises(ValueError, match="source 'kitchens': `weight` 1 gives it none of the 8 images"):
        train(arguments(tmp_path, first, second))


def test_labels_that_are_wrong_are_named_by_source(tmp_path, sources):
    images = {"image": [Image.new("RGB", (48, 32))] * 2, "depth": [Image.new("F", (48, 32), -1.0)] * 2}
    save(tmp_path / "b", Dataset.from_dict(images))
    with pytest.raises(ValueError, match="`depth` of row . of the batch, 'kitchens: [01]': expected metres"):
        train(arguments(tmp_path, *sources, batch_size=4))
    files = [{"bytes": b"no image", "path": None}] * 2
    save(tmp_path / "b", Dataset.from_dict({"image": files, "depth": images["depth"]}))
    with pytest.raises(ValueError, match="source 'kitchens': sample [01]: .*cannot read the image.*skip_unreadable"):
        train(arguments(tmp_path, *sources, batch_size=4))


# Class lists


def named(folder: Path, *names: str, ids: int = 0) -> str:
    rows = {"image": [Image.new("RGB", (48, 32))], "semseg": [Image.new("L", (48, 32), ids)], "semseg_classes": [[0]]}
    return save(folder, Dataset.from_dict(rows).cast_column("semseg_classes", List(ClassLabel(names=list(names)))))


def test_class_lists_that_differ(tmp_path):
    first = {"name": "a", "dataset": named(tmp_path / "a", "floor", "wall", "sky"), "tasks": ["semseg"]}
    second = {"name": "b", "dataset": named(tmp_path / "b", "floor", "door", ids=1)}
    rooms = {"name": "c", "dataset": "rooms", "num_train_images": 2, "num_eval_images": 2}

    def build(*sources, semseg=TASKS["semseg"]):
        args = arguments(tmp_path, *sources, model={**MODEL, "tasks": {"semseg": semseg}})
        return args, build_model(args)[0].config.tasks

    message = "'semseg' has 3 classes in the source 'a' and 2 in 'b'; class 1 is 'wall' and 'door': .*`columns: {sem"
    with pytest.raises(ValueError, match=message):
        build(first, second)
    with pytest.raises(ValueError, match="3 classes in the source 'a' and 18 in 'c'; class 0 is 'floor' and 'wall'"):
        build(first, rooms)
    mapped = {**second, "columns": {"semseg": {"classes": {0: 0}}}}
    with pytest.raises(ValueError, match=r"source 'a': `tasks\['semseg'\]\['num_labels'\]` is 2, .* names 3 classes"):
        build(first, mapped, semseg={**TASKS["semseg"], "num_labels": 2})
    # The task's own names settle it, and so does a mapping: to the floor of `a`; doors are unlabelled there.
    own = {"kind": "segmentation", "num_labels": 3, "id2label": {0: "x", 1: "y", 2: "z"}}
    assert build(first, second, semseg=own)[1]["semseg"]["id2label"] == own["id2label"]
    args, tasks = build(first, mapped)
    assert tasks["semseg"]["id2label"] == {0: "floor", 1: "wall", 2: "sky"}
    label = load_split(args, find_sources(args, tasks)[1], "train", tasks)[0]["semseg"]
    assert label.unique().tolist() == [255]


def test_a_benchmark_with_rooms(tmp_path):
    """The classes are those of the benchmark; what it does not have is learnt from Rooms."""
    modes = {"image": "RGB", "semseg": "L", "depth": "F", "normals": "RGB", "edge": "L"}
    nyud = Dataset.from_dict(
        {name: [Image.new(mode, (48, 32))] for name, mode in modes.items()} | {"semseg_classes": [[0]]}
    ).cast_column("semseg_classes", List(ClassLabel(names=list(NYUD_CLASSES))))
    mapped = {"semseg": {"classes": {0: 0, 1: 1, 2: 21}}}
    rooms = {"name": "rooms", "dataset": "rooms", "num_train_images": 3, "num_eval_images": 2, "columns": mapped}
    args = arguments(
        tmp_path, {"name": "nyud", "dataset": save(tmp_path / "nyud", nyud)}, rooms, benchmark="nyud", model=MODEL
    )
    tasks = build_model(args)[0].config.tasks
    assert set(tasks) == set(ROOMS_TASKS) and tasks["edge"]["pos_weight"] == 0.8
    assert list(tasks["semseg"]["id2label"].values()) == list(NYUD_CLASSES)
    assert tasks["human_parts"]["id2label"] == ROOMS_TASKS["human_parts"]["id2label"]
    found = find_sources(args, tasks)
    assert set(found[0].tasks) == {"semseg", "depth", "normals", "edge"} and set(found[1].tasks) == set(ROOMS_TASKS)
    ids = load_split(args, found[1], "train", tasks)[0]["semseg"]
    assert set(ids.unique().tolist()) <= {0, 1, 21, 255}
    with pytest.raises(ValueError, match=r"Rooms and nyud: there are no tasks \['flow'\].*others need a `kind`"):
        build_model(arguments(tmp_path, *args.datasets, benchmark="nyud", model={**MODEL, "tasks": {"flow": {}}}))


# Training


def test_one_model_of_several_data_sets(tmp_path, sources):
    fields = {"num_logged_images": 1, "log_with": ["tensorboard"], "logging_steps": 1}
    scores = train(arguments(tmp_path, {**sources[0], "weight": 3}, {**sources[1], "weight": 1}, **fields))
    assert list(scores) == ["semseg", "depth"]  # each of the source that labels it
    assert AutoModel.from_pretrained(tmp_path / "run" / "last").config.tasks["semseg"]["num_labels"] == 18
    events = EventAccumulator(str(tmp_path / "run" / "degmix")).Reload()
    curves = {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert curves["eval/kitchens/depth_rmse"] == curves["eval/depth_rmse"]
    assert "eval/kitchens/semseg_mean_iou" not in curves
    # 3 of 4 images have classes: the second batch of an epoch may be without depth, whose loss is not 0 then.
    assert 0 not in curves["train/depth"] and len(curves["train/loss"]) == 4

    card = ModelCard.load(tmp_path / "run" / "last" / "README.md")
    assert card.data.datasets == ["a", "b"] and card.data.license == "unknown"
    assert f"| kitchens | - | {scores['depth']['rmse']:.4f} |" in card.text
    assert "- source `streets`: a, labels of `semseg`, weight 3\n  - training: split `train`, `data" in card.text
    results = {result.task_name: result for result in card.data.eval_results}
    assert (results["depth"].dataset_name, results["depth"].metric_name) == ("b", "rmse (kitchens, measured by us)")
    recipe = yaml.safe_load(card.text.split("```yaml")[1].split("```")[0])
    assert [source["name"] for source in recipe["datasets"]] == ["streets", "kitchens"]


def test_scores_are_means_over_the_sources_that_label_the_task(tmp_path):
    both = {"depth": {"rmse": 1.5, "abs_rel": 2}, "sal": {"max_f": 1}}
    by_source = {"a": {"depth": {"rmse": 0.5, "abs_rel": 1}}, "b": both}
    assert mean_scores(["sal", "edge", "depth"], by_source) == {
        "sal": {"max_f": 1}, "depth": {"rmse": 1, "abs_rel": 1.5},
    }  # fmt: skip
    # The same images once more change neither the scores nor the loss of the best model.
    rooms = load_rooms("train", 3, (32, 48)).select_columns(["image", "depth"])
    source = {"name": "a", "dataset": save(tmp_path / "data", rooms)}
    frozen = {"learning_rate": 1e-30, "weight_decay": 0.0, "max_steps": 1, "freeze": ["model.mixers", "heads"]}
    frozen["model"] = {**MODEL, "tasks": {"depth": TASKS["depth"]}}
    outcomes = []
    for number, given in enumerate(([source], [source, {**source, "name": "b"}])):
        output_dir = str(tmp_path / f"run{number}")
        scores = train(arguments(tmp_path, *given, output_dir=output_dir, **frozen))
        progress = torch.load(Path(output_dir) / "checkpoint.pt", weights_only=True)["parts"]["progress"]
        outcomes.append((scores["depth"], progress["qualities"][1]))
    assert outcomes[0][0] == pytest.approx(outcomes[1][0]) and outcomes[0][1] == pytest.approx(outcomes[1][1])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_resumed_run_ends_as_if_nothing_had_happened(tmp_path, sources, streaming, monkeypatch):
    """Through several epochs, with weights and batches without labels of a task."""
    monkeypatch.setattr(datasets_config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.01)  # at the end of shuffled streams
    given = [{**sources[0], "weight": 1}, {**sources[1], "weight": 3}]
    fields = {"max_steps": 10, "eval_steps": 7, "streaming": streaming, "batch_size": 2}
    fields |= {"task_balancing": "uncertainty", "optimizer": "adamw", "learning_rate": 0.01}

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    train(arguments(tmp_path, *given, **fields))
    resumed = str(tmp_path / "resumed")
    with monkeypatch.context() as patch:
        patch.setattr("transformers_degmix.training.loop.update_best", stop)
        with pytest.raises(Stop):
            train(arguments(tmp_path, *given, output_dir=resumed, **fields))
    state = torch.load(Path(resumed) / "checkpoint.pt", weights_only=True)["parts"]
    assert state["progress"]["step"] == 7 and state["batches"]["position"] > 0
    train(arguments(tmp_path, *given, output_dir=resumed, resume=True, **fields))
    one, other = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("run", "resumed"))
    for part in ("model", "balancer"):
        assert all(torch.equal(value, other["parts"][part][name]) for name, value in one["parts"][part].items()), part
