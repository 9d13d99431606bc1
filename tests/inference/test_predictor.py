"""Batches of photos and the threads around them: the results of photos alone, in order, and bounded memory."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import BACKBONES, small_model

from transformers_degmix import DeGMixImageProcessorPil
from transformers_degmix.inference.predictor import Predictor, map_ahead, predict_batch, prepare, take_ahead


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def processor(model):
    size = {"shortest_edge": 48}
    return DeGMixImageProcessorPil(tasks=model.config.tasks, do_resize=True, size=size, size_divisor=32)


def photos(*sizes):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes]


# The fourth goes into the model as those before.
SIZES = [(60, 48), (60, 48), (60, 48), (120, 96), (100, 48), (60, 48)]


@pytest.mark.parametrize("num_workers", [0, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_results_are_those_of_photos_alone_and_in_order(model, processor, batch_size, num_workers):
    inputs, calls = photos(*SIZES), []

    def counted(pixel_values, **kwargs):
        calls.append(len(pixel_values))
        return model(pixel_values, **kwargs)

    counted.device, counted.dtype, counted.config = model.device, model.dtype, model.config
    predictor = Predictor(counted, processor, batch_size, num_workers, output_attentions=True)
    found = list(predictor(range(len(inputs)), inputs.__getitem__, lambda index, result: (index, result)))
    assert [item for item, _ in found] == [index for _, (index, _) in found] == list(range(len(inputs)))
    assert calls == {1: [1] * 6, 2: [2, 2, 1, 1], 8: [4, 1, 1]}[batch_size]
    for photo, (_, (_, result)) in zip(inputs, found):
        (expected,) = predict_batch(model, processor, [prepare(processor, photo)], output_attentions=True)
        assert np.array_equal(result.photo, photo)
        torch.testing.assert_close(result.attentions, expected.attentions)
        for task, values in expected.predictions.items():
            assert result.predictions[task].shape[-2:] == (photo.height, photo.width)
            if values.dtype == torch.int64:
                assert (result.predictions[task] == values).float().mean() > 0.99
            else:
                torch.testing.assert_close(result.predictions[task], values, atol=1e-4, rtol=1e-4)
    assert 0 < predictor.seconds["model"] <= predictor.seconds["all"]


def test_attention_leaves_out_what_the_model_pads():
    model = small_model(backbone_config=BACKBONES["convnextv2"])
    prepared = prepare(DeGMixImageProcessorPil(tasks=model.config.tasks), photos((60, 48))[0])
    processor = DeGMixImageProcessorPil(tasks=model.config.tasks)
    (result,) = predict_batch(model, processor, [prepared], output_attentions=True)
    outputs = model(prepared.pixel_values, output_attentions=True)
    # 48 x 60 in the middle of 64 x 64, of which a cell of the map is 4 x 4
    assert torch.equal(result.attentions, outputs.attentions[0][0][..., 2:14, :15])


def test_errors_are_of_their_photo_only(model, processor):
    inputs = photos((60, 48), (60, 48), (60, 48), (60, 48))

    def load(index):
        if index == 1:
            raise ValueError("no image")
        return inputs[index]

    def too_small_for_two(pixel_values, **kwargs):
        if len(pixel_values) > 1:
            raise RuntimeError("out of memory")
        return model(pixel_values, **kwargs)

    too_small_for_two.device, too_small_for_two.dtype = model.device, model.dtype
    predictor = Predictor(too_small_for_two, processor, batch_size=4)
    found = dict(predictor(range(4), load, lambda index, result: result.photo.size))
    assert isinstance(found[1], ValueError) and [found[index] for index in (0, 2, 3)] == [(60, 48)] * 3

    def too_small(pixel_values, **kwargs):
        raise RuntimeError("out of memory")

    too_small.device, too_small.dtype = model.device, model.dtype
    found = dict(Predictor(too_small, processor)(range(4), load, lambda index, result: None))
    assert [str(error) for error in found.values()] == ["out of memory", "no image", "out of memory", "out of memory"]


def test_errors_of_what_is_done_with_results_end_everything(model, processor):
    def save(index, result):
        raise OSError("disk full")

    before = threading.active_count()
    with pytest.raises(OSError, match="disk full"):
        list(Predictor(model, processor)(photos((60, 48)) * 20, lambda photo: photo, save))
    assert threading.active_count() < before + 20


def test_what_waits_for_a_thread_is_left_undone_by_an_interruption(processor, monkeypatch):
    loaded, stopped, end = [], threading.Event(), ThreadPoolExecutor.shutdown
    (photo,) = photos((60, 48))

    def load(index):
        loaded.append(index)
        if index:
            stopped.wait()
        return photo

    def interrupted(pixel_values, **kwargs):
        while len(loaded) < 3:
            time.sleep(0.001)
        raise KeyboardInterrupt

    def shutdown(executor, wait=True, **options):
        end(executor, wait=False, **options)
        stopped.set()
        end(executor, wait=wait)

    interrupted.device, interrupted.dtype = torch.device("cpu"), torch.float32
    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", shutdown)
    with pytest.raises(KeyboardInterrupt):
        list(Predictor(interrupted, processor)(range(100), load, lambda index, result: None))
    assert loaded == [0, 1, 2]


def test_windows_are_neither_resized_nor_padded(model, processor):
    (photo,) = photos((70, 50))
    sizes = []

    def counted(pixel_values, **kwargs):
        sizes.append(pixel_values.shape)
        return model(pixel_values)

    counted.device, counted.dtype, counted.config = model.device, model.dtype, model.config
    predictor = Predictor(counted, processor, 3, window_size=(40, 40), output_attentions=True)
    ((_, result),) = predictor([photo], lambda photo: photo, lambda _, result: result)
    assert sizes == [(2, 3, 40, 40)] * 2 and result.attentions is None
    assert result.predictions["depth"].shape == (50, 70)


@pytest.mark.parametrize("ahead", [1, 3])
def test_no_more_than_allowed_is_ahead(ahead):
    started = []

    def work(item):
        started.append(item)
        time.sleep(0.001 * (item % 3))
        return 2 * item

    with ThreadPoolExecutor(4) as executor:
        results = map_ahead(executor, work, count(), ahead)
        for expected in range(0, 20, 2):
            assert next(results) == expected
            assert max(started) <= expected // 2 + ahead
        results.close()
    with ThreadPoolExecutor(1) as executor:
        taken = []
        items = take_ahead(executor, map(taken.append, count()), ahead)
        list(islice(items, 5))
        assert 5 <= len(taken) <= 5 + ahead
        del items


def test_everything_is_taken_in_order():
    for items in ([], [None, None], list(range(10))):
        with ThreadPoolExecutor(1) as executor:
            assert list(take_ahead(executor, items, 2)) == list(take_ahead(None, items, 2)) == items
            assert list(map_ahead(executor, lambda item: item, items, 2)) == items
