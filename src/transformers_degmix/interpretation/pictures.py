"""Pictures of what happens inside of a model."""

from typing import Any

import numpy as np
import torch
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torch import Tensor

from ..visualization.layout import (
    FAINT,
    GAP,
    LINE_GAP,
    PAPER,
    entry,
    grid,
    heading,
    panel_size,
    paragraph,
    stack,
    swatch,
    text_line,
)


NUM_COLUMNS = 3

# Bright and far apart, on a photo that is made paler and darker.
POINT_COLORS = ((255, 225, 25), (0, 200, 255), (255, 90, 60), (60, 230, 110), (255, 120, 230), (170, 150, 255))
POINT_OPACITY = 170  # of 255
PADDING = (70, 70, 76)
SUPERSAMPLING = 3
SAMPLING_EXPLANATION = (
    "For each pixel, every channel of a task is sampled at its own point. Rings: pixels; dots of the same colour: "
    "where the channels are sampled for them. One half of the channels has offsets made from rows, the other from "
    "columns. Points outside are not shown; they read zeros."
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
        points, outside: of one layer, `(tasks, pixels, channels, 2)` and `(tasks, pixels, channels)`.
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
            count = text_line(f"{int(task_outside.sum())} of {task_outside.numel()} points outside", color=FAINT)
            row.append(stack([heading(name, f"from {source}"), panel(task_points), count], LINE_GAP))
        rows.append([None, *row])
    legend = [entry(swatch(color), f"{x:.0f}, {y:.0f}") for color, (x, y) in zip(colors, pixels.tolist())]
    texts = [heading("sampling points", note), paragraph(SAMPLING_EXPLANATION, panel_width)]
    rows[0][0] = stack([*texts, *legend], LINE_GAP)
    return ImageOps.expand(grid(rows, panel_width), GAP, PAPER)


def _square(centre: list[float], radius: int) -> list[float]:
    """Left, top, right and bottom around a circle; the centre is in pixels before, the radius after the reduction."""
    return [length + sign * radius * SUPERSAMPLING for sign in (-1, 1) for length in centre]


def draw_affinity(affinity: dict[str, Any]) -> Figure:
    """The matrices of [`describe_affinity`] as numbers and colours: blue below uniform attention, red above."""
    tasks, uniform = affinity["tasks"], affinity["uniform"]
    panels = {"mean over the heads": affinity}
    if len(affinity["heads"]) > 1:
        panels |= {f"head {number}": head for number, head in enumerate(affinity["heads"], 1)}
    num_columns = min(NUM_COLUMNS, len(panels))
    num_rows = -(-len(panels) // num_columns)
    length = 1.2 + 0.62 * len(tasks)
    figure = Figure(figsize=(num_columns * length + 1.2, num_rows * length + 0.3), layout="constrained")
    all_axes = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False).flatten()
    # One scale for all. It reaches at least twice the uniform share, so that small differences stay pale.
    highest = max(2 * uniform, *(np.max(panel["mean"]) for panel in panels.values()))
    norm = TwoSlopeNorm(uniform, 0, highest)
    for axes, (title, panel) in zip(all_axes, panels.items()):
        image = axes.imshow(panel["mean"], cmap="RdBu_r", norm=norm)
        for row, column in np.ndindex(len(tasks), len(tasks)):
            mean = panel["mean"][row][column]
            style = {"ha": "center", "color": "white" if abs(norm(mean) - 0.5) > 0.33 else "black"}
            if panel["std"]:
                axes.text(column, row + 0.05, f"{mean:.2f}", fontsize=10, va="bottom", **style)
                axes.text(column, row + 0.1, f"± {panel['std'][row][column]:.2f}", fontsize=7, va="top", **style)
            else:
                axes.text(column, row, f"{mean:.2f}", fontsize=10, va="center", **style)
        axes.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(tasks)), tasks)
        axes.set_title(title, fontsize=11)
    for axes in all_axes[len(panels) :]:
        axes.remove()
    figure.supylabel("query of", fontsize=10)
    figure.supxlabel("attended to", fontsize=10)
    figure.colorbar(image, ax=all_axes[: len(panels)], shrink=0.8, label="share of a query's attention").set_ticks(
        [0, uniform, highest], labels=["0", f"{uniform:.2f}, uniform", f"{highest:.2f}"]
    )
    note = ", ± standard deviation between images" if affinity["std"] else ""
    figure.suptitle(f"images: {affinity['num_images']}; mean over pixels and images{note}\n", fontsize=10)
    return figure
