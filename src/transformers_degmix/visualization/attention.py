"""The tasks' attention to each other: without padding, in shares, and as pictures."""

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..layers_degmix import crop_centred
from ..tasks import label_palette
from .layout import LINE_GAP, PAPER, SWATCH_SIZE, Color, heading, paragraph, shorten, stack, text_line, to_image


TRACK = (234, 234, 238)

# Attention is often spread so evenly that a plain mixture of colours is grey. Weights to the power of four show which
# task leads; the bars below show by how much.
SHARPENING = 4
EXPLANATION = (
    "Each task looks at the features of all tasks. A pixel has the colour of the task it takes most from, or a "
    "mixture where several are close. Bars: mean share of the attention."
)


def crop_attentions(attentions: Tensor, padded_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Attention without the padding around the image, to whole pixels of the attention's map.

    Args:
        attentions: of one image, `(..., h, w)`.
        padded_size: (height, width) to which the model pads its input, which the maps cover.
        size: (height, width) of the image in the middle of it.
    """
    kept = [
        max(1, round(cells * inner / outer)) for cells, inner, outer in zip(attentions.shape[-2:], size, padded_size)
    ]
    return crop_centred(attentions, kept)


def mean_shares(attentions: Tensor) -> Tensor:
    """`(tasks, heads, tasks, h, w)` -> `(tasks, tasks)`: what share of its attention a task (row) pays to each."""
    return attentions.detach().float().mean(dim=(1, 3, 4)).cpu()


def attention_cells(attentions: Tensor, names: list[str], size: tuple[int, int], width: int) -> list[Image.Image]:
    """The row of the attention: an explanation, and per task a map and the mean shares."""
    if attentions.ndim != 5 or attentions.shape[0] != len(names) or attentions.shape[2] != len(names):
        raise ValueError(
            f"`attentions` of {len(names)} tasks must have the shape ({len(names)}, heads, {len(names)}, h, w), "
            f"got {tuple(attentions.shape)}"
        )
    colors = label_palette(len(names) + 1)[1:]
    sharpened = attentions.detach().float().cpu().mean(dim=1) ** SHARPENING
    sharpened = sharpened / sharpened.sum(dim=1, keepdim=True)
    maps = torch.einsum("qshw,sc->qchw", sharpened, colors.float())
    maps = (
        F.interpolate(maps, size, mode="bilinear", align_corners=False, antialias=True)
        .clamp(0, 255)
        .round()
        .to(torch.uint8)
    )

    cells = [stack([heading("attention"), paragraph(EXPLANATION, width)], LINE_GAP)]
    for name, mixed, shares in zip(names, maps, mean_shares(attentions).tolist()):
        bars = _draw_shares(names, shares, [tuple(color) for color in colors.tolist()], width)
        cells.append(stack([heading(name, "takes from"), to_image(mixed), bars], LINE_GAP))
    return cells


def _draw_shares(names: list[str], shares: list[float], colors: list[Color], width: int) -> Image.Image:
    """A line per task: its name, a bar in its colour, whose full length is 100%, and the share in percent."""
    labels = [text_line(shorten(name, width // 2)) for name in names]
    numbers = [text_line(f"{share:.0%}") for share in shares]
    start = max(label.width for label in labels) + LINE_GAP
    length = max(1, width - start - LINE_GAP - text_line("100%").width)
    lines = []
    for label, number, share, color in zip(labels, numbers, shares, colors):
        line = Image.new("RGB", (width, label.height), PAPER)
        line.paste(label, (0, 0))
        top = (label.height - SWATCH_SIZE) // 2
        line.paste(TRACK, (start, top, start + length, top + SWATCH_SIZE))
        line.paste(color, (start, top, start + round(share * length), top + SWATCH_SIZE))
        line.paste(number, (width - number.width, 0))
        lines.append(line)
    return stack(lines, 0)
