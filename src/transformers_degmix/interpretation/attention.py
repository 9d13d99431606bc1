"""What happens inside of a model: which task attends to which, and where the deformable mixers sample.

Attention is no measure of importance. It says how a task's query mixes the tokens of all tasks, not what a prediction
would lose without one of them: a token can get attention and change little, and each task's own token also bypasses
the attention, on a residual path. The deviation between images does not say how another training would turn out.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..data.mapping import MappedDataset
from ..image_processing_pil_degmix import resized_size
from ..images_degmix import Size, to_pixels
from ..modeling_degmix import DeGMixForMultiTaskDensePrediction
from ..visualization.attention import crop_attentions


@dataclass
class Inspection:
    """What was seen in each image of a data set. Padding is left out.

    Attributes:
        shares: `(images, heads, tasks, tasks)`, mean over the pixels of an image: how much of its attention a task
            (third axis) pays to each task (fourth axis, sums to 1).
        distances: `(images, layers, tasks, 2)`: median and 90th percentile, over pixels and channels, of how far a
            sampling point lies from its pixel, in pixels of the mixers' map.
        outside: `(images, layers, tasks)`: the share of sampling points that lie outside of the map. Points more
            than half a pixel outside read only zeros.
    """

    shares: Tensor
    distances: Tensor
    outside: Tensor


@dataclass
class SamplingPoints:
    """Where the mixers sample for some pixels of a photo.

    Positions are (x, y) in pixels of the photo from its top left corner: the centre of the first pixel is (0.5, 0.5).

    Attributes:
        pixels: `(pixels, 2)`: centres of the map's pixels that the chosen pixels of the photo lie in.
        points: `(layers, tasks, pixels, channels, 2)`. Offsets of the first half of the channels are made from rows,
            offsets of the second half from columns.
        outside: `(layers, tasks, pixels, channels)`: whether a point lies outside of the map, as in [`Inspection`].
        area: left, top, right and bottom of what the map covers: the photo, and the padding around it.
    """

    pixels: Tensor
    points: Tensor
    outside: Tensor
    area: tuple[float, float, float, float]


@torch.no_grad()
def inspect_images(model: DeGMixForMultiTaskDensePrediction, processor, data: MappedDataset) -> Inspection:
    """Attention between tasks and distances of sampling points in each image; maps are not kept.

    Args:
        model: in eval mode, with a decoder.
        processor: its image processor.
        data: with the column `image`.

    Raises:
        ValueError: the model has no decoder, or an image cannot be used; the message has its index.
    """
    if not model.config.use_decoder:
        raise ValueError("the model has no decoder (`use_decoder`), and so no attention between tasks")
    num_layers, num_tasks = model.config.num_mixer_layers, len(model.config.tasks)
    shares, distances, outside = [], [], []
    for index in tqdm(range(len(data)), desc="inspect", leave=False):
        image = data[index]["image"]
        try:
            pixel_values, _, size = prepare_image(model, processor, image)
        except ValueError as error:
            raise ValueError(f"sample {index}: {error}") from error
        padded = model.config.padded_size(pixel_values.shape[-2:])
        distances.append(torch.zeros(num_layers, num_tasks, 2))
        outside.append(torch.zeros(num_layers, num_tasks))

        def measure(layer: int, task: int, grid: Tensor, padded=padded, size=size):
            height, width = grid.shape[2:4]
            away = (grid[0] - pixel_centres(height, width).to(grid)) * grid.new_tensor([width, height]) / 2
            # `crop_attentions` takes (..., h, w)
            lengths, beyond = (
                crop_attentions(values, padded, size).cpu().numpy()
                for values in (away.norm(dim=-1), (grid[0].abs() > 1).any(dim=-1))
            )
            # NumPy's, because torch.quantile refuses more than 2 ** 24 values.
            distances[-1][layer, task] = torch.from_numpy(np.quantile(lengths, [0.5, 0.9]))
            outside[-1][layer, task] = float(beyond.mean())

        with observe_sampling(model, measure):
            attentions = model(pixel_values, output_attentions=True).attentions[0][0]
        shares.append(crop_attentions(attentions, padded, size).cpu().double().mean(dim=(-2, -1)).transpose(0, 1))
    return Inspection(torch.stack(shares), torch.stack(distances), torch.stack(outside))


@torch.no_grad()
def find_sampling_points(
    model: DeGMixForMultiTaskDensePrediction, processor, image: Image.Image, pixels: list[tuple[int, int]]
) -> SamplingPoints:
    """Where the mixers of all tasks sample for some pixels of a photo.

    Args:
        model: in eval mode, with mixer layers.
        processor: its image processor.
        image: the photo.
        pixels: (x, y) of each pixel in the upright photo.

    Raises:
        ValueError: the model has no mixer layers, the photo cannot be used, or a pixel is outside of it.
    """
    if not model.config.num_mixer_layers:
        raise ValueError("the model has no mixer layers (`num_mixer_layers`), and so no sampling points")
    pixel_values, (height, width), resized_height_width = prepare_image(model, processor, image)
    for x, y in pixels:
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(
                f"the pixel {x},{y} is outside of the image of {width} x {height}: "
                f"x must be from 0 to {width - 1}, y from 0 to {height - 1}"
            )
    # (x, y) from here on. The map covers the padded image. The processor pads first, then the model; both round down.
    given_height_width = pixel_values.shape[-2:]
    own, resized, given, padded = (
        torch.tensor(size[::-1], dtype=torch.float64)
        for size in (
            (height, width),
            resized_height_width,
            given_height_width,
            model.config.padded_size(given_height_width),
        )
    )
    start, scale = (given - resized) // 2 + (padded - given) // 2, resized / own
    chosen = ((torch.tensor(pixels) + 0.5) * scale + start) / padded
    found = {}

    def pick(layer: int, task: int, grid: Tensor):
        height, width = grid.shape[2:4]
        columns, rows = (chosen * torch.tensor([width, height])).long().unbind(1)
        centres = pixel_centres(height, width)[rows, columns]
        found[layer, task] = centres, grid[0].cpu()[:, rows, columns].transpose(0, 1)

    with observe_sampling(model, pick):
        model(pixel_values)

    def to_photo(grid: Tensor) -> Tensor:
        return ((grid.double() + 1) / 2 * padded - start) / scale

    layers, tasks = range(model.config.num_mixer_layers), range(len(model.config.tasks))
    grids = torch.stack([torch.stack([found[layer, task][1] for task in tasks]) for layer in layers])
    left_top, right_bottom = to_photo(torch.tensor([[-1, -1], [1, 1]])).tolist()
    return SamplingPoints(
        to_photo(found[0, 0][0]), to_photo(grids), (grids.abs() > 1).any(dim=-1), (*left_top, *right_bottom)
    )


def prepare_image(
    model: DeGMixForMultiTaskDensePrediction, processor, image: Image.Image | np.ndarray
) -> tuple[Tensor, Size, Size]:
    """The model's input `(1, 3, height, width)`, and (height, width) of the upright image and after resizing.

    Raises:
        ValueError: the image cannot be used.
    """
    pixels = to_pixels(image, processor.do_convert_rgb)
    size = pixels.shape[-2:]
    inputs = processor(pixels, return_tensors="pt").to(model.device, model.dtype)
    return inputs["pixel_values"], size, resized_size(size, processor.size) if processor.do_resize else size


@contextmanager
def observe_sampling(
    model: DeGMixForMultiTaskDensePrediction, visit: Callable[[int, int, Tensor], None]
) -> Iterator[None]:
    """Inside, a forward pass calls `visit(layer, task, grid)` for each mixer layer of each task, by their indices.

    The grid comes from `DeGMixDeformableConv.sampling_grid`: `(batch, channels, h, w, 2)`, (x, y) in [-1, 1].
    """

    def hook(layer: int, task: int):
        return lambda conv, inputs: visit(layer, task, conv.sampling_grid(*inputs))

    handles = [
        mixer.get_submodule("spatial_mixing").register_forward_pre_hook(hook(layer, task))
        for task, mixers in enumerate(model.model.mixers.values())
        for layer, mixer in enumerate(mixers.children())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def pixel_centres(height: int, width: int) -> Tensor:
    """`(height, width, 2)`: (x, y) of each pixel of a map as a sampling grid has them, in [-1, 1]."""
    y, x = ((2 * torch.arange(length, dtype=torch.float64) + 1) / length - 1 for length in (height, width))
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)


def describe_affinity(shares: Tensor, tasks: list[str]) -> dict[str, Any]:
    """The content of `affinity.json`: matrices whose rows attend and whose columns are attended to.

    Args:
        shares: of an [`Inspection`].
        tasks: their names.

    Returns:
        `mean` and `std` over the images: of the mean over the heads and, in `heads`, of each head. Every image counts
        the same. `std` is `None` for a single image. `uniform` is what each task gets from a query that treats all
        tasks alike.
    """

    def describe(matrices: Tensor) -> dict[str, Any]:
        std = matrices.std(dim=0).tolist() if len(matrices) > 1 else None
        return {"mean": matrices.mean(dim=0).tolist(), "std": std}

    return {
        "tasks": tasks,
        "num_images": len(shares),
        "uniform": 1 / len(tasks),
        **describe(shares.mean(dim=1)),
        "heads": [describe(head) for head in shares.unbind(1)],
    }


def describe_sampling(inspection: Inspection, tasks: list[str]) -> list[dict[str, dict[str, float]]]:
    """The content of `sampling.json`: per layer and task, means over the images of what an [`Inspection`] measures."""
    values = torch.cat((inspection.distances, inspection.outside.unsqueeze(-1)), dim=-1).mean(dim=0)
    names = ("median_distance", "distance_90th_percentile", "outside")
    return [{task: dict(zip(names, row)) for task, row in zip(tasks, layer)} for layer in values.tolist()]
