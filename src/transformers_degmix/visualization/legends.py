"""What the colours of maps mean."""

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..tasks import IGNORE_INDEX, TASK_KINDS, label_palette
from .geometry import first_of_kind
from .layout import (
    FAINT,
    GAP,
    LINE_GAP,
    PANEL_WIDTH,
    PAPER,
    SWATCH_SIZE,
    Color,
    entry,
    paragraph,
    shorten,
    side_by_side,
    stack,
    swatch,
    text_line,
    to_ascii,
    to_image,
)
from .maps import CONSISTENCY_RANGE, ValueRange, hatching, shown_range


BALL_SIZE = 56  # pixels
MAX_LEGEND_LINES = 4


@dataclass(frozen=True)
class Legend:
    """What the colours of one task's maps mean.

    Attributes:
        value_range: values shown as first and last colour.
        picture: explains the colours.
    """

    value_range: ValueRange
    picture: Image.Image


def draw_legend(task: dict[str, Any], maps: list[Tensor], width: int = PANEL_WIDTH) -> Legend:
    """The range of values that maps of a task share, and a picture of their colours, at most `width` wide."""
    kind, value_range = TASK_KINDS[task["kind"]], shown_range(task, *maps)
    lines = LEGENDS[kind.legend](task, maps, value_range, width)
    if any(kind.unknown(values).any() for values in maps):
        lines.append(entry(to_image(hatching((SWATCH_SIZE, SWATCH_SIZE))), "unknown"))
    return Legend(value_range, stack(lines, LINE_GAP))


def class_legend(task: dict[str, Any], maps: list[Tensor]) -> list[tuple[Color, str]]:
    """Colour and name of the classes that occur in the maps `(height, width)`, largest area first.

    The id stands for a name that is missing or that the font cannot show.
    """
    ids = torch.cat([values.flatten().long().cpu() for values in maps])
    areas = torch.bincount(ids, minlength=IGNORE_INDEX + 1)
    areas[IGNORE_INDEX] = 0
    present = [index for index in areas.argsort(descending=True, stable=True).tolist() if areas[index]]
    palette = label_palette(IGNORE_INDEX).tolist()
    names = task.get("id2label") or {}
    return [(tuple(palette[index]), to_ascii(names.get(index, "")) or str(index)) for index in present]


def fit_legend(widths: list[int], line_width: int, max_lines: int, more_width: int) -> list[int]:
    """How many of the legend's entries go into each line.

    Args:
        widths: of the entries, gaps included.
        line_width: of the lines; a wider entry gets its own line.
        max_lines: number of lines.
        more_width: width of the entry "+n more" that follows the last if not all fit.
    """
    for kept in range(len(widths), -1, -1):
        tail = [] if kept == len(widths) else [more_width]
        lines, free = [], 0
        for width in widths[:kept] + tail:
            if not lines or width > free:
                lines.append(0)
                free = line_width
            lines[-1] += 1
            free -= width
        if len(lines) <= max_lines:
            if tail:
                lines[-1] -= 1
            return lines
    return []


def _draw_class_legend(task: dict[str, Any], maps: list[Tensor], _, width: int) -> list[Image.Image]:
    classes = class_legend(task, maps)
    entries = [entry(swatch(color), shorten(name, width - SWATCH_SIZE - LINE_GAP)) for color, name in classes]
    more = text_line(f"+{len(entries)} more")
    lines = []
    for count in fit_legend([e.width + GAP for e in entries], width + GAP, MAX_LEGEND_LINES, more.width + GAP):
        lines.append(entries[:count])
        entries = entries[count:]
    if entries:
        lines[-1].append(text_line(f"+{len(entries)} more"))
    return [side_by_side(line) for line in lines]


def _draw_scale_legend(task: dict[str, Any], _, value_range: ValueRange, width: int) -> list[Image.Image]:
    kind = TASK_KINDS[task["kind"]]
    ends = [f"{value:.2f}".removesuffix(".00") + f" {kind.unit}".rstrip() for value in value_range]
    return [scale_bar(task["kind"], value_range, ends, width)]


def scale_bar(kind: str, value_range: ValueRange, ends: list[str], width: int) -> Image.Image:
    """The colours of the range, between the texts for both ends."""
    low, high = map(text_line, ends)
    length = max(SWATCH_SIZE, width - low.width - high.width - 2 * LINE_GAP)
    colors = TASK_KINDS[kind].colorize(torch.linspace(*value_range, length).expand(SWATCH_SIZE, -1), value_range)
    return side_by_side([low, to_image(colors), high], LINE_GAP)


def consistency_legend(tasks: dict[str, dict[str, Any]], field_of_view: float, width: int) -> Image.Image:
    low, high = CONSISTENCY_RANGE
    explanation = (
        f"Angle between {first_of_kind(tasks, 'normals')} and the normals that follow from "
        f"{first_of_kind(tasks, 'depth')}, for a field of view of {field_of_view:g} degrees across the longer side."
    )
    scale = scale_bar("depth", CONSISTENCY_RANGE, [f"{low:g}", f"{high:g} degrees"], width)
    return stack([scale, paragraph(explanation, width)], LINE_GAP)


def _draw_directions_legend(task: dict[str, Any], _, value_range: ValueRange, width: int) -> list[Image.Image]:
    """A ball in front of the camera, which shows all normals that a camera can see."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, BALL_SIZE)] * 2, indexing="ij")
    squared = x**2 + y**2
    normals = torch.stack([x, y, (1 - squared).clamp(min=0).sqrt()])
    colors = TASK_KINDS[task["kind"]].colorize(normals, value_range)
    ball = to_image(torch.where(squared <= 1, colors, torch.tensor(PAPER, dtype=torch.uint8)[:, None, None]))
    across = stack([text_line("up"), ball, text_line("down")], LINE_GAP, centred=True)
    centre = stack([text_line("centre: facing", color=FAINT), text_line("the camera", color=FAINT)], 2)
    return [side_by_side([side_by_side([text_line("left"), across, text_line("right")], LINE_GAP), centre])]


# Kind of legend -> its lines, pictures at most `width` wide
LEGENDS = {"classes": _draw_class_legend, "scale": _draw_scale_legend, "directions": _draw_directions_legend}
