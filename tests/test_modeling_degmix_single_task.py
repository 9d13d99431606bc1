"""Models of one task predict what the model of all tasks does, to the last bit, from the same files."""

import copy
from types import MappingProxyType

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import ALL_KINDS, BACKBONES, random_labels, small_config, small_model
from transformers import (
    AutoModel,
    AutoModelForDepthEstimation,
    AutoModelForNormalEstimation,
    AutoModelForSemanticSegmentation,
    pipeline,
)
from transformers.modeling_outputs import DepthEstimatorOutput, SemanticSegmenterOutput
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from transformers_degmix import (
    DeGMixConfig,
    DeGMixForDepthEstimation,
    DeGMixForMultiTaskDensePrediction,
    DeGMixForNormalEstimation,
    DeGMixForSemanticSegmentation,
    DeGMixImageProcessorPil,
    DeGMixModel,
)


AUTO_CLASSES = {
    "depth": AutoModelForDepthEstimation,
    "normals": AutoModelForNormalEstimation,
    "human_parts": AutoModelForSemanticSegmentation,
    "semseg": AutoModelForSemanticSegmentation,
}
PIXELS = torch.randn(2, 3, 64, 72, generator=torch.Generator().manual_seed(0))
# of depth, normals and edge
ATTENDED = {"depth": ["depth"], "normals": ["depth", "normals", "edge"], "edge": ["depth", "normals", "edge"]}


@pytest.fixture(autouse=True)
def several_portions(monkeypatch):
    monkeypatch.setattr(DeGMixModel, "CPU_PORTION", 100)


def saved(path, attends_to=MappingProxyType({}), **fields):
    """The model of all tasks, as it is loaded from a directory with its processor."""
    tasks = {name: {**task, "attends_to": attends_to.get(name)} for name, task in ALL_KINDS.items()}
    model = small_model(backbone_config=BACKBONES["resnet"], tasks=tasks, num_mixer_layers=1, **fields)
    model.save_pretrained(path)
    DeGMixImageProcessorPil(tasks=tasks, do_resize=True, size={"height": 40, "width": 56}).save_pretrained(path)
    return AutoModel.from_pretrained(path)


def map_of(outputs):
    """The logits of one task `(B, num_labels, H, W)`."""
    if isinstance(outputs, DepthEstimatorOutput):
        return outputs.predicted_depth.unsqueeze(1)
    return outputs.logits if isinstance(outputs, SemanticSegmenterOutput) else outputs.normals


@pytest.mark.parametrize(
    "fields",
    [
        {"interaction_scope": "token"},
        {"interaction_scope": "task"},
        {"interaction_scope": "image", "interaction_reduction": 2},
        {"use_decoder": False},
    ],
)
@pytest.mark.parametrize("attends_to", [{}, ATTENDED])
@torch.no_grad()
def test_maps_are_those_of_the_model_of_all_tasks(tmp_path, fields, attends_to):
    full = saved(tmp_path, attends_to, **fields)
    logits = full(PIXELS).logits
    for task in ("depth", "normals", "semseg"):
        auto_class = AUTO_CLASSES[task]
        model, loading = auto_class.from_pretrained(tmp_path, single_task=task, output_loading_info=True)
        assert not any(loading.values())
        assert torch.equal(map_of(model(PIXELS)), logits[task])
        needed = full.config.attended(task) if full.config.use_decoder else [task]
        assert list(model.config.tasks) == list(model.model.mixers) == needed
        assert list(model.heads) == [task]
        if full.config.use_decoder:
            assert list(model.model.query.attentions) == [task]


def test_classes_and_outputs(tmp_path):
    full = saved(tmp_path)
    found = {task: auto.from_pretrained(tmp_path, single_task=task) for task, auto in AUTO_CLASSES.items()}
    assert [type(model) for model in found.values()] == [
        DeGMixForDepthEstimation,
        DeGMixForNormalEstimation,
        DeGMixForSemanticSegmentation,
        DeGMixForSemanticSegmentation,
    ]
    assert type(AutoModel.from_pretrained(tmp_path)) is DeGMixForMultiTaskDensePrediction
    labels = random_labels(ALL_KINDS, 2, *PIXELS.shape[-2:])
    expected = full(PIXELS, labels=labels, output_hidden_states=True, output_attentions=True)
    for task, model in found.items():
        outputs = model(PIXELS, labels=labels[task], output_hidden_states=True, output_attentions=True)
        assert torch.equal(outputs.loss, expected.losses[task])
        index = list(ALL_KINDS).index(task)
        assert torch.equal(outputs.attentions[0][:, 0], expected.attentions[0][:, index])
        assert torch.equal(outputs.hidden_states[-1][:, 0], expected.hidden_states[-1][:, index])
        values = model(PIXELS, return_dict=False)
        assert isinstance(values, tuple) and len(values) == 1
        channels = {"depth": (), "normals": (3,)}.get(task, (ALL_KINDS[task].get("num_labels"),))
        assert values[0].shape == (2, *channels, *PIXELS.shape[-2:])
        outputs.loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_model_of_one_task_is_saved_as_such(tmp_path):
    saved(tmp_path / "all", ATTENDED)
    for task, auto_class in AUTO_CLASSES.items():
        model = auto_class.from_pretrained(tmp_path / "all", single_task=task)
        model.save_pretrained(tmp_path / task)
        loaded, loading = auto_class.from_pretrained(tmp_path / task, output_loading_info=True)
        assert not any(loading.values()) and loaded.config.single_task == task
        assert list(loaded.config.tasks.items()) == list(model.config.tasks.items())
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(x, model.state_dict()[name]) for name, x in loaded.state_dict().items())
    assert list(loaded.config.tasks) == list(ALL_KINDS)  # which semseg attends to
    assert loaded.config.id2label == ALL_KINDS["semseg"]["id2label"]
    assert loaded.config.label2id["class 4"] == 4


def test_models_of_one_task_cannot_grow():
    model = DeGMixForDepthEstimation(small_config())
    before = copy.deepcopy((model.config.tasks, [x.requires_grad for x in model.parameters()]))
    for change in (lambda: model.add_task("more", {"kind": "depth"}), lambda: model.remove_task("edge", False)):
        with pytest.raises(ValueError, match="change the tasks of the multi-task model"):
            change()
    assert (model.config.tasks, [x.requires_grad for x in model.parameters()]) == before


def test_the_configuration_stays_as_it_was():
    config = DeGMixConfig(tasks={name: {**task, "attends_to": [name]} for name, task in ALL_KINDS.items()})
    before = config.to_dict()
    with torch.device("meta"):
        model = DeGMixForDepthEstimation(config)
    assert config.to_dict() == before
    assert list(model.config.tasks) == ["depth"] and model.config.tasks["depth"]["attends_to"] is None


@pytest.mark.parametrize("task", [None, "depth", "rain"])
def test_one_of_several_tasks_must_be_named(tmp_path, task):
    saved(tmp_path)
    message = rf"`single_task` must be .*'segmentation', \['semseg', 'human_parts'\], got {task!r}"
    with pytest.raises(ValueError, match=message):
        AutoModelForSemanticSegmentation.from_pretrained(tmp_path, single_task=task)


def test_a_task_of_the_kind_must_be_there():
    config = DeGMixConfig(tasks={"depth": ALL_KINDS["depth"], "edge": ALL_KINDS["edge"]})
    with pytest.raises(ValueError, match="no task is of the kind 'normals'; .*'depth': 'depth', 'edge': 'boundary'"):
        DeGMixForNormalEstimation(config)


@pytest.fixture
def photo(tmp_path):
    patch = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(patch).resize((90, 70), Image.Resampling.BICUBIC).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def test_pipelines_of_transformers(tmp_path, photo):
    saved(tmp_path)
    maps = pipeline("multi-task-dense-prediction", model=str(tmp_path))(photo)
    with CaptureLogger(logging.get_logger("transformers.pipelines.base")) as log:
        depth = pipeline("depth-estimation", model=str(tmp_path))
        segment = pipeline("image-segmentation", model=str(tmp_path), model_kwargs={"single_task": "semseg"})
    assert "not supported" not in log.out
    assert isinstance(depth.model, DeGMixForDepthEstimation)
    assert maps["depth"].min() == 0 < maps["depth"].max()
    assert torch.equal(depth(photo)["predicted_depth"], maps["depth"])
    assert depth(photo)["depth"].size == (90, 70)
    segments = segment(photo)
    assert [segment["label"] for segment in segments] == [f"class {i}" for i in maps["semseg"].unique()]
    for segment in segments:
        mask = maps["semseg"] == int(segment["label"].removeprefix("class "))
        np.testing.assert_array_equal(np.array(segment["mask"]) == 255, mask)
    with pytest.raises(ValueError, match=r"`single_task` must be one of .*\['semseg', 'human_parts'\]"):
        pipeline("image-segmentation", model=str(tmp_path))
