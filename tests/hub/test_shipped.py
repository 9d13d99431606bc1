"""The model that comes with the package, as a new user meets it: without a network and without naming it."""

import subprocess

import pytest
import torch
from commands import DEGMIX
from PIL import Image
from skimage import data
from transformers import AutoModel, AutoModelForDepthEstimation, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from transformers_degmix import DEGMIX_LITE0_NYUD, DeGMixForMultiTaskDensePrediction
from transformers_degmix.data.benchmarks import NYUD_CLASSES
from transformers_degmix.hub.model_directory import load_model_directory
from transformers_degmix.hub.shipped import DEFAULT_MODEL


TASK = "multi-task-dense-prediction"


@pytest.fixture(scope="module")
def photo():
    return Image.fromarray(data.coffee())


@pytest.fixture(scope="module")
def maps(photo):
    return pipeline(TASK)(photo)


def test_photo_without_a_model(maps, photo):
    size = photo.size[::-1]
    assert {task: tuple(x.shape) for task, x in maps.items()} == {
        "semseg": size, "depth": size, "normals": (3, *size), "edge": size
    }  # fmt: skip
    # A cup on a table, from near. A model of random weights predicts one class and depths around 0.
    assert 0.3 < maps["depth"].median() < 4 and maps["semseg"].unique().numel() > 1
    assert maps["edge"].std() > 0.01


@pytest.mark.parametrize("model_class", [AutoModel, DeGMixForMultiTaskDensePrediction])
def test_from_pretrained(model_class, maps, photo):
    model = model_class.from_pretrained(DEGMIX_LITE0_NYUD)
    assert {x.dtype for x in model.parameters()} == {torch.float32}
    assert list(model.config.tasks["semseg"]["id2label"].values()) == list(NYUD_CLASSES)
    processor = AutoImageProcessor.from_pretrained(DEGMIX_LITE0_NYUD)
    with torch.no_grad():
        outputs = model(**processor(photo, return_tensors="pt"))
    own = processor.post_process_dense_prediction(outputs, [photo.size[::-1]])[0]
    assert all(torch.equal(own[task], maps[task]) for task in maps)


def test_depth_alone(maps, photo):
    predict = pipeline("depth-estimation", model=DEGMIX_LITE0_NYUD)
    assert isinstance(predict.model, AutoModelForDepthEstimation._model_mapping[type(predict.model.config)])
    assert torch.equal(predict(photo)["predicted_depth"], maps["depth"])


def test_by_name(maps, photo):
    model, processor = load_model_directory(DEFAULT_MODEL)
    assert torch.equal(pipeline(TASK, model=model, image_processor=processor)(photo)["edge"], maps["edge"])


def test_predict_without_a_model(tmp_path, maps, photo):
    photo.save(tmp_path / "photo.png")
    command = [*DEGMIX, "predict", "--input", tmp_path / "photo.png", "--output", tmp_path / "out"]
    subprocess.run(command, check=True, timeout=900)
    pictures = {path.name for path in (tmp_path / "out").iterdir()}
    assert {f"photo.{ending}" for ending in ("npz", "overview.png", "depth.png")} <= pictures
