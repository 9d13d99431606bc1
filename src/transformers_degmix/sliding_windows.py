"""Large images in overlapping windows, each no larger than the model and the memory can take."""

import math
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from .modeling_degmix import DeGMixDensePredictionOutput


DEFAULT_OVERLAP = 0.25


def predict_in_windows(
    model: Callable[[Tensor], DeGMixDensePredictionOutput],
    pixel_values: Tensor,
    window_size: tuple[int, int],
    overlap: float = DEFAULT_OVERLAP,
    batch_size: int = 1,
) -> DeGMixDensePredictionOutput:
    """Logits of images, blended from the logits of windows that overlap.

    The weight of a window falls linearly from its middle to its border, so that predictions that disagree leave no
    seam where windows overlap. In windows of the size of its training images, a model sees the positions and distances
    that it was trained with. It sees nothing of the scene outside the window.

    The logits of large images take much memory, for 40 classes 160 bytes a pixel. [`predict_maps_in_windows`] never
    holds all of them.

    Args:
        model: a `DeGMixForMultiTaskDensePrediction` in eval mode.
        pixel_values: normalised images `(batch, 3, height, width)` on the model's device, in its dtype. The processor
            gives them for an image at its own size with `do_resize=False` and `do_pad=False`.
        window_size: height and width, 32 or more. Smaller images have smaller windows. Backbones that cut off
            incomplete patches need multiples of the patch size.
        overlap: least share of the height or width that neighbouring windows have in common, in [0, 1). Windows are
            spread evenly from border to border. 0 leaves seams.
        batch_size: windows handed to the model at once, of any of the images.

    Returns:
        `logits` as the model gives them for whole images, but float32 on the CPU.

    Raises:
        ValueError: the window or the overlap is outside of its range.
    """
    bands = list(_predict_bands(model, pixel_values, window_size, overlap, batch_size))
    return DeGMixDensePredictionOutput(
        logits={task: torch.cat([band[task] for band in bands], 2) for task in bands[0]}
    )


def predict_maps_in_windows(
    model: Callable[[Tensor], DeGMixDensePredictionOutput],
    pixel_values: Tensor,
    post_process: Callable[..., list[Any]],
    window_size: tuple[int, int],
    overlap: float = DEFAULT_OVERLAP,
    batch_size: int = 1,
    return_confidence: bool = False,
) -> list[Any]:
    """[`predict_in_windows`], and what the processor makes of the logits, band by band.

    The rows that no further window reaches are post-processed before the next windows are predicted. Memory
    holds the images, their maps, the model with one batch of windows, and the logits of one row of windows and of its
    overlap with the next, however high the images are.

    Args:
        post_process: a processor's `post_process_dense_prediction`, which predicts each pixel from its own logits.
        model, pixel_values, window_size, overlap, batch_size: see [`predict_in_windows`].
        return_confidence: whether to return the confidences too. They also depend on the pixels around each one, so
            that memory then holds the logits of whole images.

    Returns:
        Per image, task -> map `(..., height, width)`, on the CPU; or a pair of this and the confidences.

    Raises:
        ValueError: the window or the overlap is outside of its range.
    """
    if return_confidence:
        outputs = predict_in_windows(model, pixel_values, window_size, overlap, batch_size)
        return post_process(outputs, return_confidence=True)
    size = pixel_values.shape[-2:]
    maps: list[dict[str, Tensor]] = [{} for _ in pixel_values]
    top = 0
    for band in _predict_bands(model, pixel_values, window_size, overlap, batch_size):
        for image_maps, predictions in zip(maps, post_process(DeGMixDensePredictionOutput(logits=band))):
            for task, values in predictions.items():
                if task not in image_maps:
                    image_maps[task] = values.new_empty(*values.shape[:-2], *size)
                image_maps[task][..., top : top + values.shape[-2], :] = values
        top += values.shape[-2]
    return maps


def _predict_bands(
    model: Callable[[Tensor], DeGMixDensePredictionOutput],
    pixel_values: Tensor,
    window_size: tuple[int, int],
    overlap: float,
    batch_size: int,
) -> Iterator[dict[str, Tensor]]:
    """The blended logits from top to bottom, in bands of rows that no further window reaches."""
    check_window(window_size, overlap)
    size = pixel_values.shape[-2:]
    (tops, row_weights), (lefts, column_weights) = (
        place_windows(length, min(length, window), overlap) for length, window in zip(size, window_size)
    )
    height, width = row_weights.shape[1], column_weights.shape[1]
    unfinished = {}  # the rows that the last row of windows has in common with the next
    for top, next_top, rows in zip(tops, [*tops[1:], size[0]], row_weights):
        blended = {}
        windows = list(product(range(len(pixel_values)), zip(lefts, column_weights)))
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size]
            views = [pixel_values[image, :, top : top + height, left : left + width] for image, (left, _) in batch]
            with torch.no_grad():
                outputs = model(torch.stack(views))
            for task, logits in outputs.logits.items():
                if task not in blended:
                    blended[task] = torch.zeros(len(pixel_values), logits.shape[1], height, size[1])
                    if task in unfinished:
                        carried = unfinished.pop(task)
                        blended[task][:, :, : carried.shape[2]] = carried
                for (image, (left, columns)), maps in zip(batch, logits.float().cpu()):
                    blended[task][image, :, :, left : left + width] += rows[:, None] * columns * maps
        finished = next_top - top
        yield {task: maps[:, :, :finished] for task, maps in blended.items()}
        unfinished = {task: maps[:, :, finished:].clone() for task, maps in blended.items()}


def check_window(window_size: tuple[int, int], overlap: float):
    """Raises ValueError unless windows can have this size and overlap."""
    if not isinstance(window_size, tuple | list) or len(window_size) != 2 or min(window_size) < 32:
        raise ValueError(f"`window_size` must be (height, width), 32 or more each, got {window_size}")
    if not 0 <= overlap < 1:
        raise ValueError(f"the overlap of windows must be a share in [0, 1), got {overlap}")


def place_windows(length: int, window: int, overlap: float) -> tuple[list[int], Tensor]:
    """Where windows start along an axis, and how much each counts.

    As few windows as overlap by at least the given share, spread evenly from the first pixel to the last.

    Args:
        length: of the axis.
        window: length of each window, at most the axis'.
        overlap: share of the window in [0, 1).

    Returns:
        Starts, and weights `(windows, window)` that sum to one at every pixel of the axis.
    """
    stride = max(1, math.floor(window * (1 - overlap)))
    count = math.ceil((length - window) / stride) + 1
    starts = torch.linspace(0, length - window, count, dtype=torch.float64).round().long()
    pixels = starts[:, None] + torch.arange(window)
    to_border = torch.minimum(torch.arange(1.0, window + 1), torch.arange(float(window), 0, -1)).expand(count, -1)
    total = torch.zeros(length).index_put_((pixels,), to_border, accumulate=True)
    return starts.tolist(), to_border / total[pixels]


__all__ = ["check_window", "place_windows", "predict_in_windows", "predict_maps_in_windows"]
