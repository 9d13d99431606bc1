"""Predictions for many images, in batches, while threads prepare the next ones and save the results."""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice, repeat, takewhile
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_base import ImageProcessingMixin

from ..image_processing_pil_degmix import resized_size
from ..images_degmix import to_photo
from ..modeling_degmix import DeGMixForMultiTaskDensePrediction
from ..sliding_windows import DEFAULT_OVERLAP, predict_maps_in_windows
from ..visualization.attention import crop_attentions


Item = TypeVar("Item")
Outcome = TypeVar("Outcome")

# What a photo can fail with. [`is_photos_fault`] tells it from failures of the machine.
PREDICTION_ERRORS = (ValueError, RuntimeError, MemoryError)


def is_photos_fault(error: Exception) -> bool:
    """Whether the photo is not a usable image, or too large for the memory, so that it would fail again."""
    is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
    return isinstance(error, ValueError) or is_memory


@dataclass(frozen=True)
class Prepared:
    """A photo as the model sees it.

    Attributes:
        photo: upright, RGB.
        pixel_values: `(1, 3, h, w)`.
    """

    photo: Image.Image
    pixel_values: Tensor


@dataclass(frozen=True)
class Result:
    """A photo as the model sees it, and what was predicted from it.

    Attributes:
        photo: upright, RGB.
        predictions: task -> map in the photo's size.
        attentions: `(tasks, heads, tasks, h, w)` without padding; `None` if there are none or none were asked for.
        confidences: task -> `(height, width)` in [0, 1]; `None` if they were not asked for.
    """

    photo: Image.Image
    predictions: dict[str, Tensor]
    attentions: Tensor | None
    confidences: dict[str, Tensor] | None = None

    def cpu(self) -> "Result":
        """The same on the CPU. Waits for what the device still computes."""
        predictions = {task: values.cpu() for task, values in self.predictions.items()}
        attentions = None if self.attentions is None else self.attentions.cpu()
        confidences = self.confidences and {task: values.cpu() for task, values in self.confidences.items()}
        return Result(self.photo, predictions, attentions, confidences)


def prepare(processor: ImageProcessingMixin, image: Image.Image, in_windows: bool = False) -> Prepared:
    """Prepares a photo of any mode and orientation for [`predict_batch`].

    Args:
        in_windows: whether it will be predicted in windows. It is then neither resized nor padded.

    Raises:
        ValueError: its values are out of range.
    """
    photo = to_photo(image)
    options = {"do_resize": False, "do_pad": False} if in_windows else {}
    return Prepared(photo, processor(image, return_tensors="pt", **options)["pixel_values"])


@torch.inference_mode()
def predict_batch(
    model: DeGMixForMultiTaskDensePrediction,
    processor: ImageProcessingMixin,
    batch: Sequence[Prepared],
    output_attentions: bool = False,
    window_size: tuple[int, int] | None = None,
    window_overlap: float = DEFAULT_OVERLAP,
    window_batch_size: int = 1,
    return_confidence: bool = False,
) -> list[Result]:
    """All maps of photos whose `pixel_values` have the same size, and the attention, except in windows.

    Returns:
        A result per photo, on the model's device, which may still be computing it.
    """
    pixel_values = torch.cat([prepared.pixel_values for prepared in batch]).to(model.device, model.dtype)
    post_process = processor.post_process_dense_prediction
    if window_size:
        windows = (window_size, window_overlap, window_batch_size)
        maps = predict_maps_in_windows(model, pixel_values, post_process, *windows, return_confidence)
        pairs = maps if return_confidence else [(predictions, None) for predictions in maps]
        return [Result(prepared.photo, predictions, None, sure) for prepared, (predictions, sure) in zip(batch, pairs)]
    outputs = model(pixel_values, output_attentions=output_attentions)
    sizes = [(prepared.photo.height, prepared.photo.width) for prepared in batch]
    results = []
    maps = post_process(outputs, sizes, return_confidence)
    for index, (prepared, size, predictions) in enumerate(zip(batch, sizes, maps)):
        attentions, confidences = None, None
        if return_confidence:
            predictions, confidences = predictions
        if outputs.attentions:
            resized = resized_size(size, processor.size) if processor.do_resize else size
            padded = model.config.padded_size(pixel_values.shape[-2:])
            attentions = crop_attentions(outputs.attentions[0][index], padded, resized)
        results.append(Result(prepared.photo, predictions, attentions, confidences))
    return results


class Predictor:
    """Predicts many photos, in batches of one size, in order.

    While the model works, one thread takes the next items, and others load and prepare photos and finish results. What
    waits in memory between two of these steps is bounded: by a batch plus one photo per thread; in windows, which are
    for large images, by one photo.

    Args:
        model, processor: of one model, as `hub.model_directory.load_model_directory` gives them.
        batch_size: photos per pass, if they follow each other and enter the model at the same size; or windows of one
            photo.
        num_workers: threads that prepare and finish. With 0, everything is done one after the other.
        output_attentions: whether results have the attention.
        window_size, window_overlap: see [`predict_maps_in_windows`].
        return_confidence: whether results have the confidences.

    Attributes:
        seconds: spent so far: in `all`, in the `model`, and waiting for `input`. The rest was spent waiting for
            results to be finished; a GPU may have worked during a part of it.
    """

    def __init__(
        self,
        model: DeGMixForMultiTaskDensePrediction,
        processor: ImageProcessingMixin,
        batch_size: int = 1,
        num_workers: int = 2,
        output_attentions: bool = False,
        window_size: tuple[int, int] | None = None,
        window_overlap: float = DEFAULT_OVERLAP,
        return_confidence: bool = False,
    ):
        self.processor = processor
        self.num_workers = num_workers
        self.in_windows = bool(window_size)
        self.batch_size = 1 if window_size else batch_size
        self.ahead = 1 if window_size else batch_size + num_workers
        self.predict = partial(
            predict_batch,
            model,
            processor,
            output_attentions=output_attentions,
            window_size=window_size,
            window_overlap=window_overlap,
            window_batch_size=batch_size,
            return_confidence=return_confidence,
        )
        self.seconds = {"all": 0.0, "model": 0.0, "input": 0.0}

    def __call__(
        self, items: Iterable[Item], load: Callable[[Item], Image.Image], finish: Callable[[Item, Result], Outcome]
    ) -> Generator[tuple[Item, Outcome | Exception], None, None]:
        """Predicts items, one after the other.

        Args:
            items: anything from which `load` makes a photo.
            load: item -> photo. [`PREDICTION_ERRORS`] are yielded; other errors end everything.
            finish: item and its result on the CPU -> outcome.

        Yields:
            Each item, in order, with what `finish` returned, or with the error.
        """

        def prepare_item(item: Item) -> tuple[Item, Prepared | Exception]:
            try:
                return item, prepare(self.processor, load(item), self.in_windows)
            except PREDICTION_ERRORS as error:
                return item, error

        def finish_item(predicted: tuple[Item, Result | Exception]) -> tuple[Item, Outcome | Exception]:
            item, result = predicted
            return item, result if isinstance(result, Exception) else finish(item, result.cpu())

        start = time.perf_counter()
        with ExitStack() as stack:
            reader = workers = None
            if self.num_workers:
                reader, workers = ThreadPoolExecutor(1), ThreadPoolExecutor(self.num_workers)
                # The workers are shut down first. If the consumer stops, work that waits is dropped.
                for executor in (reader, workers):
                    stack.callback(executor.shutdown, cancel_futures=True)
            prepared = map_ahead(workers, prepare_item, take_ahead(reader, items, self.ahead), self.ahead)
            yield from map_ahead(workers, finish_item, self._run(prepared), self.ahead)
        self.seconds["all"] += time.perf_counter() - start

    def _run(self, prepared: Iterator[tuple[Item, Prepared | Exception]]) -> Iterator[tuple[Item, Result | Exception]]:
        batches = self._batches(prepared)
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            started = time.perf_counter()
            self.seconds["input"] += started - asked
            if batch is None:
                return
            items, photos = zip(*batch)
            results = photos if isinstance(photos[0], Exception) else self._predict(photos)
            self.seconds["model"] += time.perf_counter() - started
            del batch, photos
            yield from zip(items, results)

    def _batches(
        self, prepared: Iterator[tuple[Item, Prepared | Exception]]
    ) -> Iterator[list[tuple[Item, Prepared | Exception]]]:
        """Up to `batch_size` photos that follow each other and have the same size; each error alone."""
        for _, group in groupby(prepared, key=_size):
            while batch := list(islice(group, self.batch_size)):
                yield batch

    def _predict(self, photos: Sequence[Prepared]) -> list[Result | Exception]:
        try:
            return [*self.predict(photos)]
        except PREDICTION_ERRORS as error:
            failure = error.with_traceback(None)  # a traceback would keep the model's tensors
        if len(photos) == 1:
            return [failure]
        # Perhaps the batch was too large for the memory.
        return [result for photo in photos for result in self._predict([photo])]


def _size(prepared: tuple[Item, Prepared | Exception]) -> torch.Size | Exception:
    photo = prepared[1]
    return photo if isinstance(photo, Exception) else photo.pixel_values.shape


def map_ahead(
    executor: Executor | None, function: Callable[[Item], Outcome], items: Iterable[Item], ahead: int
) -> Generator[Outcome, None, None]:
    """`map(function, items)` in an executor, up to `ahead` items ahead of the consumer.

    Results come in order; an error is raised in place of its result. Items are taken in the consumer's thread, so that
    they can come from another such iterator: at most `ahead` results of each wait in memory.

    Args:
        executor: `None` calls the function in the consumer's thread, when its result is asked for.
    """
    if executor is None:
        yield from map(function, items)
        return
    futures: deque[Future[Outcome]] = deque()
    try:
        for item in items:
            futures.append(executor.submit(function, item))
            if len(futures) > ahead:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:
        for future in futures:
            future.cancel()


def take_ahead(executor: Executor | None, items: Iterable[Item], ahead: int) -> Iterator[Item]:
    """The items, of which an executor of one thread takes up to `ahead` in advance; `None` takes none."""
    iterator = iter(items)
    end: Any = object()
    taken = map_ahead(executor, lambda _: next(iterator, end), repeat(None), ahead)
    return takewhile(lambda item: item is not end, taken)
