"""One image and all that was predicted from it, in one picture."""

from typing import Any

from PIL import Image, ImageOps
from torch import Tensor

from ..tasks import TASK_KINDS
from .attention import attention_cells
from .geometry import FIELD_OF_VIEW, depth_normals_angles
from .layout import GAP, LINE_GAP, PANEL_WIDTH, PAPER, grid, heading, panel_size, stack
from .legends import Legend, consistency_legend, draw_legend, scale_bar
from .maps import confidence_range, draw_confidence, draw_consistency, draw_prediction


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
    to each other. If there are a depth and a normals task, one more panel at the right shows where they
    contradict each other.

    Args:
        image: the input, upright.
        predictions: a map for each of the tasks, as [`draw_prediction`] takes them.
        tasks: `config.tasks`, or some of them if the others are not to be shown.
        attentions: `outputs.attentions[0]` of this image, `(tasks, heads, tasks, h, w)`, without padding: how much
            each task (first axis) takes from each task (third axis) at each pixel. Needs all tasks.
        references: maps to compare with, of any of the tasks, in the predictions' form. They share the predictions'
            colours and, where there is one, the range of values.
        panel_width: width of each map in pixels; high maps are narrower.
        legends: of each task, by default [`draw_legend`] of the maps shown. Legends of more maps make several
            overviews comparable, such as the frames of a video.
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
        return stack([heading(name, note), picture], LINE_GAP)

    note = "prediction" if references else ""
    rows: list[list[Image.Image | None]]
    rows = [[stack([heading("input"), photo], LINE_GAP), *(panel(name, predictions, note) for name in tasks)]]
    if references:
        rows.append([None, *(panel(name, references, "reference") if name in references else None for name in tasks)])
    rows.append([None, *(legends[name].picture for name in tasks)])
    angles = depth_normals_angles(predictions, tasks, field_of_view)
    if angles is not None:
        rows[0].append(stack([heading("consistency"), draw_consistency(angles, size)], LINE_GAP))
        rows[-1].append(consistency_legend(tasks, field_of_view, panel_width))
    if confidences:
        rows.append([None, *(_confidence_cell(name, tasks[name], confidences, size, panel_width) for name in tasks)])
    if attentions is not None:
        rows.append([*attention_cells(attentions, list(tasks), size, panel_width)])
    return ImageOps.expand(grid(rows, panel_width), GAP, PAPER)


def _confidence_cell(
    name: str, task: dict[str, Any], confidences: dict[str, Tensor], size: tuple[int, int], width: int
) -> Image.Image | None:
    """Map and legend."""
    if name not in confidences:
        return None
    is_probability = TASK_KINDS[task["kind"]].confidence_is_probability
    ends = ["0", "1"] if is_probability else ["least sure", "surest here"]
    legend = scale_bar("depth", confidence_range(confidences[name], task), ends, width)
    return stack([heading(name, "confidence"), draw_confidence(confidences[name], task, size), legend], LINE_GAP)
