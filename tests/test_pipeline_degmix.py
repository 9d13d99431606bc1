"""The pipeline, from a saved model: its maps are those of the processor and the model called by hand, per image."""

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import small_model
from transformers import pipeline

from transformers_degmix import (
    DeGMixForMultiTaskDensePrediction,
    DeGMixImageProcessorPil,
    MultiTaskDensePredictionPipeline,
)
from transformers_degmix.sliding_windows import predict_in_windows


TASK = "multi-task-dense-prediction"
TASKS = {
    "walls": {"kind": "segmentation", "num_labels": 4},
    "depth": {"kind": "depth"},
    "normals": {"kind": "normals"},
    "edge": {"kind": "boundary"},
    "a_saliency": {"kind": "saliency"},
}
ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A saved model whose maps vary over the image, and its processor."""
    model = small_model(tasks=TASKS)
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    DeGMixImageProcessorPil(tasks=model.config.tasks, size_divisor=32).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def images():
    """Sizes that repeat; padded to multiples of 32, the first, third and last are equal, the others not."""
    rng = np.random.default_rng(0)
    sizes = [(40, 60), (70, 40), (50, 33), (33, 70), (40, 60)]
    patches = [Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)) for _ in sizes]
    return [patch.resize(size[::-1], Image.Resampling.BICUBIC) for patch, size in zip(patches, sizes)]


@pytest.fixture(scope="module")
def predict(path):
    return pipeline(TASK, model=str(path))


@pytest.fixture(scope="module")
def expected(path, images):
    """The maps of each image, from the padding to the activation by hand."""
    model = DeGMixForMultiTaskDensePrediction.from_pretrained(path).eval()
    return [maps_by_hand(model, image) for image in images]


def maps_by_hand(model, image):
    pixels = np.array(image).transpose(2, 0, 1) / 255
    mean, std = (np.array(values).reshape(3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    height, width = image.height, image.width
    vertical, horizontal = -height % 32, -width % 32
    top, left = vertical // 2, horizontal // 2
    padded = np.pad((pixels - mean) / std, ((0, 0), (top, vertical - top), (left, horizontal - left)))
    with torch.no_grad():
        logits = model(torch.from_numpy(padded[None]).float()).logits
    logits = {task: maps[0, :, top : top + height, left : left + width] for task, maps in logits.items()}
    return {
        "walls": logits["walls"].argmax(0),
        "depth": logits["depth"][0].clamp(min=0),
        "normals": logits["normals"] / logits["normals"].norm(dim=0),
        "edge": logits["edge"][0].sigmoid(),
        "a_saliency": logits["a_saliency"].softmax(0)[1],
    }


def assert_equal_maps(found, expected):
    assert list(found) == list(TASKS) == list(expected)
    for task, maps in expected.items():
        assert found[task].shape == maps.shape and found[task].dtype == maps.dtype
        if task == "walls":
            # Classes may swap where two logits tie but for rounding.
            assert (found[task] == maps).float().mean() > 0.999
        else:
            torch.testing.assert_close(found[task], maps, atol=1e-4, rtol=1e-4)


def test_one_image_gives_its_maps_in_its_own_size(predict, images, expected):
    assert isinstance(predict, MultiTaskDensePredictionPipeline)
    assert isinstance(predict.model, DeGMixForMultiTaskDensePrediction)
    maps = predict(images[0])
    assert maps["walls"].unique().numel() > 1 and maps["depth"].std() > 0
    assert_equal_maps(maps, expected[0])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_maps_do_not_depend_on_the_batch(predict, images, expected, batch_size):
    found = predict(images, batch_size=batch_size)
    assert len(found) == len(images)
    for maps, expected_maps in zip(found, expected):
        assert_equal_maps(maps, expected_maps)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_confidence_comes_as_a_second_dictionary(predict, images, expected, batch_size):
    for (maps, confidences), by_hand in zip(
        predict(images, batch_size=batch_size, return_confidence=True), expected, strict=True
    ):
        assert_equal_maps(maps, by_hand)
        assert list(confidences) == list(TASKS)
        assert all(values.shape == by_hand["depth"].shape for values in confidences.values())
        torch.testing.assert_close(confidences["edge"], by_hand["edge"].sub(0.5).abs() + 0.5, atol=1e-4, rtol=1e-4)
    maps, confidences = predict(images[0], return_confidence=True)
    assert list(maps) == list(confidences)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_windows_are_of_the_images_own_size(path, images, batch_size):
    model = DeGMixForMultiTaskDensePrediction.from_pretrained(path).eval()
    processor = DeGMixImageProcessorPil(tasks=TASKS)
    resizing = DeGMixImageProcessorPil(tasks=TASKS, do_resize=True, size={"height": 50, "width": 50}, size_divisor=64)
    predict = pipeline(TASK, model=str(path), image_processor=resizing)
    found = predict(images, batch_size=batch_size, window_size=(36, 33), window_overlap=0.5)
    for maps, image in zip(found, images, strict=True):
        inputs = processor(image, return_tensors="pt")["pixel_values"]
        outputs = predict_in_windows(model, inputs, (36, 33), 0.5)
        assert_equal_maps(maps, processor.post_process_dense_prediction(outputs)[0])
    for size in ((16, 33), 64):
        with pytest.raises(ValueError, match="`window_size`"):
            predict(images[0], window_size=size)
    # Windows stay at the images' own size, wherever options were given.
    in_windows = pipeline(TASK, model=str(path), image_processor=resizing, window_size=(36, 33), window_overlap=0.5)
    found_too = in_windows(images, batch_size=batch_size, do_resize=True, return_confidence=True)
    for (maps, confidences), expected in zip(found_too, found, strict=True):
        assert_equal_maps(maps, expected)
        assert {task: values.shape for task, values in confidences.items()} == {
            task: values.shape[-2:] for task, values in maps.items()
        }


@pytest.mark.parametrize("batch_size", [1, 3])
def test_images_at_their_own_size_on_request(path, images, expected, batch_size):
    resizing = DeGMixImageProcessorPil(tasks=TASKS, do_resize=True, size={"height": 50, "width": 50}, size_divisor=32)
    predict = pipeline(TASK, model=str(path), image_processor=resizing)
    for maps, expected_maps in zip(predict(images, batch_size=batch_size, do_resize=False), expected, strict=True):
        assert_equal_maps(maps, expected_maps)
    assert resizing.do_resize and (predict(images[0])["depth"] - expected[0]["depth"]).abs().max() > 0.01


def test_files_are_read_and_turned_upright(predict, images, expected, tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    stored = images[0].transpose(Image.Transpose.ROTATE_90)
    stored.save(tmp_path / "turned.png", exif=exif)
    images[0].save(tmp_path / "upright.png")
    assert_equal_maps(predict(Image.open(tmp_path / "turned.png")), expected[0])
    for maps in predict([str(tmp_path / "turned.png"), tmp_path / "upright.png"], batch_size=2):
        assert_equal_maps(maps, expected[0])


def test_unreadable_file_is_named(predict, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    for name in ("missing.png", "text.png"):
        with pytest.raises(ValueError, match=name):
            predict(str(tmp_path / name))
    with pytest.raises(ValueError, match="missing.png"):
        predict([str(tmp_path / "missing.png")], batch_size=2)


def test_device_and_dtype(path, images, expected):
    predict = pipeline(TASK, model=str(path), device="cpu", dtype=torch.bfloat16)
    assert predict.device.type == "cpu" and predict.model.dtype == torch.bfloat16
    maps = predict(images[1])
    for task, expected_map in expected[1].items():
        assert maps[task].dtype == expected_map.dtype and maps[task].shape == expected_map.shape
    assert (maps["edge"] - expected[1]["edge"]).abs().mean() < 0.05
    torch.testing.assert_close(maps["normals"].norm(dim=0), torch.ones(70, 40))


def test_unknown_parameters_are_refused(predict, images):
    with pytest.raises(TypeError, match="threshold"):
        predict(images[0], threshold=0.5)
