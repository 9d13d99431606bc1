"""A prediction -> pictures people can read: coloured maps, what their colours mean, and which task looks at which.

A picture is made of smaller ones, all of them `PIL.Image`s, pasted side by side or one below the other.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps
from torch import Tensor
from torch.nn import functional as F

from ..image_processing_pil_degmix import crop_centred, resize_nearest
from ..tasks import IGNORE_INDEX, TASK_KINDS, label_palette
from .geometry import FIELD_OF_VIEW, depth_normals_angles, first_of_kind


Color = tuple[int, int, int]
ValueRange = tuple[float, float]

PAPER, INK, FAINT, TRACK = (255, 255, 255), (28, 28, 32), (110, 110, 118), (234, 234, 238)
HATCHING = ((44, 44, 48), (104, 104, 110))

# Lengths in pixels
GAP = 12
LINE_GAP = 5
TITLE_SIZE = 18
TEXT_SIZE = 15
SWATCH_SIZE = 14
BALL_SIZE = 56
MAX_LEGEND_LINES = 4
PANEL_WIDTH = 300

# Attention is often spread so evenly that a plain mixture of colours is grey. Weights to the power of four show which
# task leads; the bars below show by how much.
SHARPENING = 4
ATTENTION_EXPLANATION = (
    "Each task looks at the features of all tasks. A pixel has the colour of the task it takes most from, or a "
    "mixture where several are close. Bars: mean share of the attention."
)

# Degrees between the normals of depth and the predicted ones; larger angles have the last colour.
CONSISTENCY_RANGE = (0.0, 60.0)


@dataclass(frozen=True)
class Legend:
    """What the colours of one task's maps mean.

    Attributes:
        value_range: values shown as first and last colour.
        picture: that explains it.
    """

    value_range: ValueRange
    picture: Image.Image


def shown_range(task: dict[str, Any], *maps: Tensor) -> ValueRange:
    """Values shown as first and last colour: those of the task's kind; where it leaves them to the maps (depth), the
    2nd and the 98th percentile of all known pixels, so that a few outliers do not use up the colours.

    Args:
        task: the task's fields, as in `config.tasks`.
        maps: predictions and references `(height, width)` that are to be compared by their colours.
    """
    kind = TASK_KINDS[task["kind"]]
    if kind.value_range is not None:
        return kind.value_range
    known = torch.cat([values[~kind.unknown(values)].float().cpu() for values in maps]).numpy()
    if not known.size:
        return 0.0, 1.0
    # NumPy's, since torch.quantile refuses more than 2 ** 24 values.
    low, high = np.quantile(known, [0.02, 0.98])
    return float(low), float(high)


def draw_prediction(
    prediction: Tensor,
    task: dict[str, Any],
    value_range: ValueRange | None = None,
    size: tuple[int, int] | None = None,
) -> Image.Image:
    """Colours one map by the kind of its task; unknown pixels (ignored, without depth or normal) are hatched.

    Args:
        prediction: class ids, metres, strengths or probabilities `(height, width)`, or unit vectors
            `(3, height, width)`. References are drawn just the same.
        task: the task's fields, as in `config.tasks`.
        value_range: values shown as first and last colour, by default [`shown_range`] of this map.
        size: (height, width) of the picture, by default the map's. Pixels are picked, not mixed, so that every colour
            stands for a value of the map; of thin lines, the strongest pixel is picked.

    Raises:
        ValueError: the map has not the shape that the task's kind asks for.
    """
    kind = TASK_KINDS[task["kind"]]
    channels = () if kind.label_channels == 1 else (kind.label_channels,)
    if prediction.ndim != len(channels) + 2 or prediction.shape[:-2] != channels:
        expected = ", ".join([*map(str, channels), "height", "width"])
        raise ValueError(f"a {task['kind']} map must have the shape ({expected}), got {tuple(prediction.shape)}")
    prediction = prediction.detach().cpu()
    if value_range is None:
        value_range = shown_range(task, prediction)
    unknown = kind.unknown(prediction)
    prediction = prediction.masked_fill(unknown, 0)
    if size is not None:
        prediction = _resize_lines(prediction, size) if kind.thin else resize_nearest(prediction, size)
        unknown = resize_nearest(unknown, size)
    colors = kind.colorize(prediction, value_range)
    return _to_image(torch.where(unknown, _hatching(tuple(colors.shape[-2:])), colors))


def draw_overview(
    image: Image.Image,
    predictions: dict[str, Tensor],
    tasks: dict[str, dict[str, Any]],
    attentions: Tensor | None = None,
    references: dict[str, Tensor] | None = None,
    panel_width: int = PANEL_WIDTH,
    legends: dict[str, Legend] | None = None,
    confidences: dict[str, Tensor] | None = None,
    field_of_view: float = FIELD_OF_VIEW,
) -> Image.Image:
    """One image and all that was predicted from it, side by side.

    From top to bottom: the image and the predictions; the references; legends; the confidences; the tasks' attention
    to each other. Of a depth and a normals task, one more panel at the right shows where they contradict each other.

    Args:
        image: the input, upright.
        predictions: a map for each of the tasks, as [`draw_prediction`] takes them.
        tasks: `config.tasks`, or those of them that are to be shown.
        attentions: `outputs.attentions[0]` of this image, `(tasks, heads, tasks, h, w)`, without padding: how much
            each task (first axis) takes from each task (third axis) at each pixel. Needs all tasks.
        references: maps to compare with, of any of the tasks, in the predictions' form. They share the predictions'
            colours and, where there is one, the range of values.
        panel_width: width of each map in pixels; high maps are narrower.
        legends: of each task, by default [`draw_legend`] of the maps shown. Those of more maps make overviews that
            can be compared, such as the frames of a video.
        confidences: of any of the tasks, `(height, width)` in [0, 1], as `post_process_dense_prediction` gives them.
        field_of_view: of the camera, see [`depth_normals_angles`].

    Raises:
        ValueError: a map has the wrong shape, or `attentions` is not of these tasks.
    """
    references = references or {}
    size = panel_size((image.height, image.width), panel_width)
    photo = image.convert("RGB").resize(size[::-1], Image.Resampling.BICUBIC, reducing_gap=3)

    if legends is None:
        shown = {name: [maps[name] for maps in (predictions, references) if name in maps] for name in tasks}
        legends = {name: draw_legend(task, shown[name], panel_width) for name, task in tasks.items()}

    def panel(name: str, maps: dict[str, Tensor], note: str) -> Image.Image:
        picture = draw_prediction(maps[name], tasks[name], legends[name].value_range, size)
        return _column([_title(name, note), picture], LINE_GAP)

    note = "prediction" if references else ""
    rows = [[_column([_title("input"), photo], LINE_GAP)] + [panel(name, predictions, note) for name in tasks]]
    if references:
        rows.append([None] + [panel(name, references, "reference") if name in references else None for name in tasks])
    rows.append([None] + [legends[name].picture for name in tasks])
    angles = depth_normals_angles(predictions, tasks, field_of_view)
    if angles is not None:
        rows[0].append(_column([_title("consistency"), draw_consistency(angles, size)], LINE_GAP))
        rows[-1].append(_consistency_legend(tasks, field_of_view, panel_width))
    if confidences:
        rows.append([None] + [_confidence_cell(name, tasks[name], confidences, size, panel_width) for name in tasks])
    if attentions is not None:
        rows.append(_attention_cells(attentions, list(tasks), size, panel_width))
    return ImageOps.expand(_grid(rows, panel_width), GAP, PAPER)


def draw_consistency(angles: Tensor, size: tuple[int, int] | None = None) -> Image.Image:
    """Colours what [`depth_normals_angles`] gives, `(height, width)`, from 0 to 60 degrees; NaN is hatched.

    Args:
        size: (height, width) of the picture, by default the map's.
    """
    return _draw_scale(angles, CONSISTENCY_RANGE, size)


def draw_confidence(confidence: Tensor, task: dict[str, Any], size: tuple[int, int] | None = None) -> Image.Image:
    """Colours a confidence `(height, width)` by [`confidence_range`].

    Args:
        task: the task's fields, as in `config.tasks`.
        size: (height, width) of the picture, by default the map's.
    """
    return _draw_scale(confidence, confidence_range(confidence, task), size)


def confidence_range(confidence: Tensor, task: dict[str, Any]) -> ValueRange:
    """Confidences shown as first and last colour: 0 and 1 where they are probabilities; where they only order pixels,
    the 2nd and the 98th percentile."""
    if TASK_KINDS[task["kind"]].confidence_is_probability:
        return 0.0, 1.0
    low, high = np.quantile(confidence.float().cpu().numpy(), [0.02, 0.98])
    return float(low), float(high)


def stack_overviews(overviews: list[Image.Image]) -> Image.Image:
    """Several overviews, one below the other."""
    return _column(overviews)


def panel_size(size: tuple[int, int], width: int = PANEL_WIDTH) -> tuple[int, int]:
    """(height, width) of the largest panel of this aspect ratio, at most `width` wide and a third more high."""
    scale = min(width / size[1], width * 4 / 3 / size[0])
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def draw_legend(task: dict[str, Any], maps: list[Tensor], width: int = PANEL_WIDTH) -> Legend:
    """The values that maps of a task have in common, and what their colours mean, at most `width` wide."""
    kind, value_range = TASK_KINDS[task["kind"]], shown_range(task, *maps)
    lines = LEGENDS[kind.legend](task, maps, value_range, width)
    if any(kind.unknown(values).any() for values in maps):
        lines.append(_entry(_to_image(_hatching((SWATCH_SIZE, SWATCH_SIZE))), "unknown"))
    return Legend(value_range, _column(lines, LINE_GAP))


def class_legend(task: dict[str, Any], maps: list[Tensor]) -> list[tuple[Color, str]]:
    """Colour and name (or id) of the classes that occur in the maps `(height, width)`, largest area first."""
    areas = sum(torch.bincount(ids.flatten().long().cpu(), minlength=IGNORE_INDEX + 1) for ids in maps)
    areas[IGNORE_INDEX] = 0
    present = [index for index in areas.argsort(descending=True, stable=True).tolist() if areas[index]]
    palette = label_palette(IGNORE_INDEX).tolist()
    names = task.get("id2label") or {}
    return [(tuple(palette[index]), names.get(index, str(index))) for index in present]


def fit_legend(widths: list[int], line_width: int, max_lines: int, more_width: int) -> list[int]:
    """How many of the legend's entries go into each line.

    Args:
        widths: of the entries, gaps included.
        line_width: of the lines; a wider entry has a line of its own.
        max_lines: number of lines.
        more_width: width of the entry "+n more" that follows the last where not all fit.
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
    return crop_centred(attentions, tuple(kept))


def mean_shares(attentions: Tensor) -> Tensor:
    """`(tasks, heads, tasks, h, w)` -> `(tasks, tasks)`: what share of its attention a task (row) pays to each."""
    return attentions.detach().float().mean(dim=(1, 3, 4)).cpu()


def _resize_lines(values: Tensor, size: tuple[int, int]) -> Tensor:
    """As `resize_nearest`, but where it shrinks, the largest value of all those that become one pixel."""
    smaller = [min(old, new) for old, new in zip(values.shape, size)]
    return resize_nearest(F.adaptive_max_pool2d(values[None].float(), smaller)[0], size)


def _hatching(size: tuple[int, int]) -> Tensor:
    """uint8 `(3, *size)`, diagonal stripes."""
    rows, columns = torch.meshgrid(*map(torch.arange, size), indexing="ij")
    stripes = ((rows + columns) % 8 < 4).long()
    return torch.tensor(HATCHING, dtype=torch.uint8)[stripes].permute(2, 0, 1)


def _to_image(colors: Tensor) -> Image.Image:
    """uint8 `(3, height, width)` -> image."""
    return Image.fromarray(colors.permute(1, 2, 0).contiguous().numpy())


def _draw_scale(values: Tensor, value_range: ValueRange, size: tuple[int, int] | None) -> Image.Image:
    """In the colours of depth; NaN is hatched."""
    values = values.detach().cpu()
    if size is not None:
        values = resize_nearest(values, size)
    colors = TASK_KINDS["depth"].colorize(values.nan_to_num(0), value_range)
    return _to_image(torch.where(values.isnan(), _hatching(tuple(colors.shape[-2:])), colors))


# Legends


def _draw_class_legend(task: dict[str, Any], maps: list[Tensor], _, width: int) -> list[Image.Image]:
    classes = class_legend(task, maps)
    entries = [_entry(_swatch(color), _shorten(name, width - SWATCH_SIZE - LINE_GAP)) for color, name in classes]
    more = _text(f"+{len(entries)} more")
    lines = []
    for count in fit_legend([e.width + GAP for e in entries], width + GAP, MAX_LEGEND_LINES, more.width + GAP):
        lines.append(entries[:count])
        entries = entries[count:]
    if entries:
        lines[-1].append(_text(f"+{len(entries)} more"))
    return [_row(line) for line in lines]


def _draw_scale_legend(task: dict[str, Any], _, value_range: ValueRange, width: int) -> list[Image.Image]:
    kind = TASK_KINDS[task["kind"]]
    ends = [f"{value:.2f}".removesuffix(".00") + f" {kind.unit}".rstrip() for value in value_range]
    return [_scale(task["kind"], value_range, ends, width)]


def _scale(kind: str, value_range: ValueRange, ends: list[str], width: int) -> Image.Image:
    """The colours between the two values of the range, and what to say at both ends."""
    low, high = map(_text, ends)
    length = width - low.width - high.width - 2 * LINE_GAP
    colors = TASK_KINDS[kind].colorize(torch.linspace(*value_range, length).expand(SWATCH_SIZE, -1), value_range)
    return _row([low, _to_image(colors), high], LINE_GAP)


def _consistency_legend(tasks: dict[str, dict[str, Any]], field_of_view: float, width: int) -> Image.Image:
    low, high = CONSISTENCY_RANGE
    explanation = (
        f"Angle between {first_of_kind(tasks, 'normals')} and the normals that follow from "
        f"{first_of_kind(tasks, 'depth')}, for a field of view of {field_of_view:g} degrees across the longer side."
    )
    scale = _scale("depth", CONSISTENCY_RANGE, [f"{low:g}", f"{high:g} degrees"], width)
    return _column([scale, _paragraph(explanation, width)], LINE_GAP)


def _confidence_cell(
    name: str, task: dict[str, Any], confidences: dict[str, Tensor], size: tuple[int, int], width: int
) -> Image.Image | None:
    """Map and legend."""
    if name not in confidences:
        return None
    is_probability = TASK_KINDS[task["kind"]].confidence_is_probability
    ends = ["0", "1"] if is_probability else ["least sure", "surest here"]
    legend = _scale("depth", confidence_range(confidences[name], task), ends, width)
    return _column([_title(name, "confidence"), draw_confidence(confidences[name], task, size), legend], LINE_GAP)


def _draw_directions_legend(task: dict[str, Any], _, value_range: ValueRange, width: int) -> list[Image.Image]:
    """A ball in front of the camera, which shows all normals that a camera can see."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, BALL_SIZE)] * 2, indexing="ij")
    squared = x**2 + y**2
    normals = torch.stack([x, y, (1 - squared).clamp(min=0).sqrt()])
    colors = TASK_KINDS[task["kind"]].colorize(normals, value_range)
    ball = _to_image(torch.where(squared <= 1, colors, torch.tensor(PAPER, dtype=torch.uint8)[:, None, None]))
    across = _column([_text("up"), ball, _text("down")], LINE_GAP, centred=True)
    centre = _column([_text("centre: facing", color=FAINT), _text("the camera", color=FAINT)], 2)
    return [_row([_row([_text("left"), across, _text("right")], LINE_GAP), centre])]


# Kind of legend -> its lines, pictures at most `width` wide
LEGENDS = {"classes": _draw_class_legend, "scale": _draw_scale_legend, "directions": _draw_directions_legend}


# Attention


def _attention_cells(attentions: Tensor, names: list[str], size: tuple[int, int], width: int) -> list[Image.Image]:
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

    cells = [_column([_title("attention"), _paragraph(ATTENTION_EXPLANATION, width)], LINE_GAP)]
    for name, mixed, shares in zip(names, maps, mean_shares(attentions).tolist()):
        bars = _draw_shares(names, shares, [tuple(color) for color in colors.tolist()], width)
        cells.append(_column([_title(name, "takes from"), _to_image(mixed), bars], LINE_GAP))
    return cells


def _draw_shares(names: list[str], shares: list[float], colors: list[Color], width: int) -> Image.Image:
    """A line per task: its name, a bar in its colour, whose full length is 100%, and the share in percent."""
    labels = [_text(_shorten(name, width // 2)) for name in names]
    numbers = [_text(f"{share:.0%}") for share in shares]
    start = max(label.width for label in labels) + LINE_GAP
    length = width - start - LINE_GAP - _text("100%").width
    lines = []
    for label, number, share, color in zip(labels, numbers, shares, colors):
        line = Image.new("RGB", (width, label.height), PAPER)
        line.paste(label, (0, 0))
        top = (label.height - SWATCH_SIZE) // 2
        line.paste(TRACK, (start, top, start + length, top + SWATCH_SIZE))
        line.paste(color, (start, top, start + round(share * length), top + SWATCH_SIZE))
        line.paste(number, (width - number.width, 0))
        lines.append(line)
    return _column(lines, 0)


# Text and layout


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """The font inside of Pillow, which every machine has. It covers ASCII."""
    return ImageFont.load_default(size)


def _text(text: str, size: int = TEXT_SIZE, color: Color = INK) -> Image.Image:
    """One line, as high as the font whatever the letters."""
    font = _font(size)
    canvas = Image.new("RGB", (max(1, round(font.getlength(text))), sum(font.getmetrics())), PAPER)
    ImageDraw.Draw(canvas).text((0, 0), text, color, font)
    return canvas


def _title(text: str, note: str = "") -> Image.Image:
    return (
        _row([_text(text, TITLE_SIZE), _text(note, TITLE_SIZE, FAINT)], LINE_GAP) if note else _text(text, TITLE_SIZE)
    )


def _paragraph(text: str, width: int) -> Image.Image:
    """Lines of at most `width`, broken at blanks."""
    font = _font(TEXT_SIZE)
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return _column([_text(line, color=FAINT) for line in lines], 2)


def _shorten(text: str, width: int) -> str:
    """The text, or as much of its beginning as fits, and an ellipsis."""
    font = _font(TEXT_SIZE)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _swatch(color: Color) -> Image.Image:
    return Image.new("RGB", (SWATCH_SIZE, SWATCH_SIZE), color)


def _entry(swatch: Image.Image, text: str) -> Image.Image:
    return _row([swatch, _text(text)], LINE_GAP)


def _row(images: list[Image.Image], gap: int = GAP) -> Image.Image:
    """Side by side, centred vertically."""
    height = max(image.height for image in images)
    canvas = Image.new("RGB", (sum(image.width + gap for image in images) - gap, height), PAPER)
    left = 0
    for image in images:
        canvas.paste(image, (left, (height - image.height) // 2))
        left += image.width + gap
    return canvas


def _column(images: list[Image.Image], gap: int = GAP, centred: bool = False) -> Image.Image:
    """One below the other, aligned at the left or centred."""
    width = max(image.width for image in images)
    canvas = Image.new("RGB", (width, sum(image.height + gap for image in images) - gap), PAPER)
    top = 0
    for image in images:
        canvas.paste(image, ((width - image.width) // 2 if centred else 0, top))
        top += image.height + gap
    return canvas


def _grid(rows: list[list[Image.Image | None]], width: int) -> Image.Image:
    """Cells in columns of one width, aligned at the top left; `None` stays empty."""
    heights = [max(cell.height for cell in row if cell) for row in rows]
    columns = max(len(row) for row in rows)
    canvas = Image.new("RGB", (columns * (width + GAP) - GAP, sum(heights) + GAP * (len(rows) - 1)), PAPER)
    top = 0
    for row, height in zip(rows, heights):
        for column, cell in enumerate(row):
            if cell:
                canvas.paste(cell, (column * (width + GAP), top))
        top += height + GAP
    return canvas


# Sampling points

# Bright and far apart, on a photo that is paler and darker than it was.
POINT_COLORS = ((255, 225, 25), (0, 200, 255), (255, 90, 60), (60, 230, 110), (255, 120, 230), (170, 150, 255))
POINT_OPACITY = 170  # of 255
PADDING = (70, 70, 76)
SUPERSAMPLING = 3
SAMPLING_EXPLANATION = (
    "For each pixel, every channel of a task is sampled at a point of its own. Rings: pixels; dots of their colour: "
    "where the channels are sampled for them. One half of the channels has offsets made from rows, the other from "
    "columns. Points outside, which are not seen here, read zeros."
)


def draw_sampling(
    image: Image.Image,
    area: tuple[float, float, float, float],
    pixels: Tensor,
    points: Tensor,
    outside: Tensor,
    names: list[str],
    note: str,
    panel_width: int = 400,
) -> Image.Image:
    """The sampling points of a mixer layer on the photo: a column per task, a row per half of the channels.

    Args:
        image: the photo, upright.
        area, pixels: of [`~interpretation.attention.SamplingPoints`].
        points, outside: those of one layer, `(tasks, pixels, channels, 2)` and `(tasks, pixels, channels)`.
        names: of the tasks.
        note: which layer it is.
        panel_width: width of each panel, which shows `area`, in pixels; high panels are narrower.
    """
    left, top, right, bottom = area
    size = panel_size((round(bottom - top), round(right - left)), panel_width)
    scale = SUPERSAMPLING * size[1] / (right - left)
    photo = image.convert("RGB").resize([max(1, round(scale * length)) for length in image.size])
    photo = ImageEnhance.Brightness(ImageEnhance.Color(photo).enhance(0.3)).enhance(0.6)
    canvas = Image.new("RGB", (SUPERSAMPLING * size[1], SUPERSAMPLING * size[0]), PADDING)
    canvas.paste(photo, (round(-left * scale), round(-top * scale)))
    colors = [POINT_COLORS[index % len(POINT_COLORS)] for index in range(len(pixels))]
    corner = torch.tensor([left, top])

    def panel(task_points: Tensor) -> Image.Image:
        picture = canvas.copy()
        draw = ImageDraw.Draw(picture, "RGBA")
        for color, dots in zip(colors, ((task_points - corner) * scale).tolist()):
            for dot in dots:
                draw.ellipse(_square(dot, 4), (0, 0, 0, POINT_OPACITY // 2))
                draw.ellipse(_square(dot, 3), (*color, POINT_OPACITY))
        for color, centre in zip(colors, ((pixels - corner) * scale).tolist()):
            draw.ellipse(_square(centre, 10), None, (0, 0, 0), 5 * SUPERSAMPLING)
            draw.ellipse(_square(centre, 9), None, color, 3 * SUPERSAMPLING)
        return picture.reduce(SUPERSAMPLING)

    rows = []
    for source, half_points, half_outside in zip(("rows", "columns"), points.chunk(2, dim=2), outside.chunk(2, dim=2)):
        row = []
        for name, task_points, task_outside in zip(names, half_points, half_outside):
            count = _text(f"{int(task_outside.sum())} of {task_outside.numel()} points outside", color=FAINT)
            row.append(_column([_title(name, f"from {source}"), panel(task_points), count], LINE_GAP))
        rows.append([None, *row])
    legend = [_entry(_swatch(color), f"{x:.0f}, {y:.0f}") for color, (x, y) in zip(colors, pixels.tolist())]
    texts = [_title("sampling points", note), _paragraph(SAMPLING_EXPLANATION, panel_width)]
    rows[0][0] = _column([*texts, *legend], LINE_GAP)
    return ImageOps.expand(_grid(rows, panel_width), GAP, PAPER)


def _square(centre: list[float], radius: int) -> list[float]:
    """Left, top, right and bottom around a circle; the centre is in pixels before, the radius after the reduction."""
    return [length + sign * radius * SUPERSAMPLING for sign in (-1, 1) for length in centre]


__all__ = [
    "Legend",
    "class_legend",
    "confidence_range",
    "crop_attentions",
    "draw_confidence",
    "draw_consistency",
    "draw_legend",
    "draw_overview",
    "draw_prediction",
    "draw_sampling",
    "fit_legend",
    "mean_shares",
    "panel_size",
    "shown_range",
    "stack_overviews",
]
