"""A saved model directory where `transformers_degmix` is not installed, loaded with `trust_remote_code=True`."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import BACKBONES, small_model
from transformers import AutoModel, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from transformers_degmix import DeGMixImageProcessor, DeGMixImageProcessorPil, MultiTaskDensePredictionPipeline


# Arguments: model directory, backend, picture, where to put outputs, where to save everything once more.
PREDICT = """
import sys

class HidePackage:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "transformers_degmix":
            raise ModuleNotFoundError(f"{name} is hidden")

sys.meta_path.insert(0, HidePackage())
import numpy as np
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForNormalEstimation, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor

name, backend, picture, output, copy = sys.argv[1:]
model = AutoModel.from_pretrained(name, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(name, backend=backend, trust_remote_code=True)
predict = pipeline(model=name, image_processor=processor, trust_remote_code=True)
assert predict.task == "multi-task-dense-prediction"
assert all(type(part).__module__.startswith("transformers_modules.") for part in (model, processor, predict))
inputs = processor(Image.open(picture), return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits
torch.save({"inputs": inputs["pixel_values"], **logits}, f"{output}/logits")
torch.save(predict(picture), f"{output}/predictions")
torch.save(predict(picture, return_confidence=True)[1], f"{output}/confidences")
torch.save(pipeline("multi-task-dense-prediction", model=name, trust_remote_code=True)(picture), f"{output}/default")
# Models of one task
options = {"image_processor": processor, "trust_remote_code": True}
predict_depth = pipeline("depth-estimation", model=name, **options)
segment = pipeline("image-segmentation", model=name, model_kwargs={"single_task": "semseg"}, **options)
with torch.no_grad():
    outputs = AutoModelForNormalEstimation.from_pretrained(name, trust_remote_code=True)(**inputs)
single = {"depth": predict_depth(picture)["predicted_depth"]}
single["normals"] = processor.post_process_normal_estimation(outputs, [Image.open(picture).size[::-1]])[0]["normals"]
for segment in segment(picture):
    single[segment["label"]] = torch.from_numpy(np.array(segment["mask"])) == 255
torch.save(single, f"{output}/single")
for part in (model, processor):
    part.save_pretrained(copy)
"""

# Where torchvision is not installed, the PIL processor takes its place.
BACKENDS = ["pil", "torchvision"]
# One backbone of Transformers and the one whose code is here.
CASES = list(zip(BACKENDS, ("swin", "efficientnet_lite")))
VISION = [pytest.param(name, "swin", marks=pytest.mark.vision, id=f"{name} where torchvision is") for name in BACKENDS]


@pytest.mark.parametrize("backend, backbone", [*CASES, *VISION])
def test_same_outputs_without_the_package(tmp_path, backend, backbone):
    model = small_model(backbone_config=BACKBONES[backbone])
    picture, saved, copy = tmp_path / "picture.png", tmp_path / "saved", tmp_path / "copy"
    processor_class = DeGMixImageProcessorPil if backend == "pil" else DeGMixImageProcessor
    processor = processor_class(tasks=model.config.tasks, do_resize=True, size={"shortest_edge": 40})
    for part in (model, processor):
        part.save_pretrained(saved)
    # Rounding depends on where in memory weights are, on some CPUs: both sides have them from the file.
    model = AutoModel.from_pretrained(saved)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (53, 67, 3), np.uint8)).save(picture)
    inputs = processor(Image.open(picture), return_tensors="pt")
    with torch.no_grad():
        logits = {"inputs": inputs["pixel_values"], **model(**inputs).logits}
    predict = pipeline("multi-task-dense-prediction", model=model, image_processor=processor)
    predictions, confidences = predict(str(picture), return_confidence=True)
    # Where torchvision is, its processor loads by default, whichever was saved. The backends differ in resizing.
    default = pipeline("multi-task-dense-prediction", model=str(saved))(str(picture))

    command = [sys.executable, "-c", PREDICT, *map(str, (saved, backend, picture, tmp_path, copy))]
    env = {**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ""}
    process = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "is not supported for" not in process.stderr
    single = {task: predictions[task] for task in ("depth", "normals")}
    single |= {f"class {index}": predictions["semseg"] == index for index in predictions["semseg"].unique()}
    expectations = {
        "logits": logits,
        "predictions": predictions,
        "confidences": confidences,
        "default": default,
        "single": single,
    }
    for name, expected in expectations.items():
        result = torch.load(tmp_path / name)
        assert list(result) == list(expected)
        assert all(torch.equal(result[key], expected[key]) for key in expected), name
    # What is saved there can be used elsewhere again.
    assert {path.name for path in copy.iterdir()} == {path.name for path in saved.iterdir()}
    for path in saved.iterdir():
        if path.name != "config.json":
            assert (copy / path.name).read_bytes() == path.read_bytes(), path.name
    one, other = (json.loads((directory / "config.json").read_text()) for directory in (saved, copy))
    assert all(one[field] == other[field] for field in ("auto_map", "custom_pipelines", "tasks"))


def test_installed_package_needs_no_trust(tmp_path):
    model = small_model()
    for part in (model, DeGMixImageProcessor(tasks=model.config.tasks)):
        part.save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is type(model)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is DeGMixImageProcessor
    assert type(pipeline("multi-task-dense-prediction", model=str(tmp_path))) is MultiTaskDensePredictionPipeline
