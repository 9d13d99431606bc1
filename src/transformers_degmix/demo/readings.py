"""What the colours of maps mean, what the tasks say about a pixel, and the shares of attention, as HTML."""

import html
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..tasks import TASK_KINDS
from ..visualization.attention import mean_shares
from ..visualization.legends import class_legend
from ..visualization.maps import ValueRange, shown_range


MAX_LEGEND_CLASSES = 8
# As `TaskKind.legend` of normals draws them: x to the right, y down, z towards the camera
DIRECTIONS = {"left": (-1, 0, 0), "right": (1, 0, 0), "up": (0, -1, 0), "down": (0, 1, 0), "facing us": (0, 0, 1)}

# For the classes of the HTML below
CSS = """
.legend {display: flex; flex-wrap: wrap; gap: 2px 10px; font-size: 13px}
.legend span {white-space: nowrap}
.swatch {display: inline-block; width: 12px; height: 12px; margin-right: 5px; border-radius: 2px}
.scale {flex: 1; height: 12px; margin-top: 4px; border-radius: 2px}
.readings div {display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 14px}
.shares table {border: none}
.shares tr {border: none !important}
.shares td, .shares th {padding: 3px 8px; border: none !important; text-align: right; font-size: 14px}
@media (max-width: 640px) {
    .shares table {table-layout: fixed; width: 100%}
    .shares td, .shares th {padding: 3px; font-size: 11px; white-space: normal; overflow-wrap: anywhere}
}
"""


def _css(color: Sequence[int]) -> str:
    return f"rgb({', '.join(map(str, color))})"


def _entry(color: Sequence[int], text: str) -> str:
    return f'<span><i class="swatch" style="background: {_css(color)}"></i>{html.escape(text)}</span>'


def _color(value: Tensor, task: dict[str, Any], value_range: ValueRange) -> list[int]:
    """Of one pixel: `()` or `(3,)`."""
    return TASK_KINDS[task["kind"]].colorize(value[..., None, None], value_range).flatten().tolist()


def _class_legend(task: dict[str, Any], prediction: Tensor) -> str:
    classes = class_legend(task, [prediction])
    more = len(classes) - MAX_LEGEND_CLASSES
    entries = [_entry(*entry) for entry in classes[:MAX_LEGEND_CLASSES]]
    return "".join([*entries, f"<span>+{more} more</span>"] if more > 0 else entries)


def _scale_legend(task: dict[str, Any], prediction: Tensor) -> str:
    low, high = shown_range(task, prediction)
    colors = ", ".join(_css(_color(value, task, (low, high))) for value in torch.linspace(low, high, 9))
    unit = TASK_KINDS[task["kind"]].unit
    return (
        f"<span>{low:.3g} {unit}</span>"
        f'<i class="scale" style="background: linear-gradient(to right, {colors})"></i>'
        f"<span>{high:.3g} {unit}</span>"
    )


def _direction_legend(task: dict[str, Any], prediction: Tensor) -> str:
    value_range = shown_range(task, prediction)
    return "".join(
        _entry(_color(torch.tensor(vector), task, value_range), name) for name, vector in DIRECTIONS.items()
    )


LEGENDS = {"classes": _class_legend, "scale": _scale_legend, "directions": _direction_legend}


def draw_legend(task: dict[str, Any], prediction: Tensor) -> str:
    """What the colours of a map mean."""
    return f'<div class="legend">{LEGENDS[TASK_KINDS[task["kind"]].legend](task, prediction)}</div>'


def _read_class(task: dict[str, Any], value: Tensor) -> str:
    return (task.get("id2label") or {}).get(int(value), f"class {int(value)}")


def _read_scale(task: dict[str, Any], value: Tensor) -> str:
    return f"{float(value):.2f} {TASK_KINDS[task['kind']].unit}".rstrip()


def _read_direction(_, value: Tensor) -> str:
    """The nearest of the named directions, and the vector."""
    names, vectors = list(DIRECTIONS), torch.tensor(list(DIRECTIONS.values())).float()
    x, y, z = value.tolist()
    return f"{names[(vectors @ value.float()).argmax()]} ({x:.2f}, {y:.2f}, {z:.2f})"


READINGS = {"classes": _read_class, "scale": _read_scale, "directions": _read_direction}


def read_point(predictions: dict[str, Tensor], tasks: dict[str, dict], row: int, column: int) -> dict[str, str]:
    """What every task says about one pixel: task -> class, value with its unit, or direction."""
    readings = {}
    for name, task in tasks.items():
        kind, value = TASK_KINDS[task["kind"]], predictions[name][..., row, column]
        is_unknown = bool(kind.unknown(value[..., None, None]).any())
        readings[name] = "unknown" if is_unknown else READINGS[kind.legend](task, value)
    return readings


def draw_readings(predictions: dict[str, Tensor], tasks: dict[str, dict], row: int, column: int) -> str:
    """[`read_point`], each in the colour that it has on its map."""
    entries = []
    for name, text in read_point(predictions, tasks, row, column).items():
        color = _color(predictions[name][..., row, column], tasks[name], shown_range(tasks[name], predictions[name]))
        entries.append(_entry(color, f"{name}: {text}"))
    return f"<div><b>row {row}, column {column}</b>{''.join(entries)}</div>"


def draw_shares(attentions: Tensor, tasks: Sequence[str]) -> str:
    """A table: how much of its attention each task (row) pays to each (column)."""
    head = "".join(f"<th>{html.escape(task)}</th>" for task in tasks)
    rows = []
    for task, shares in zip(tasks, mean_shares(attentions).tolist()):
        cells = "".join(
            f'<td style="background: rgba(59, 130, 246, {share:.2f})">{share:.0%}</td>' for share in shares
        )
        rows.append(f"<tr><th>{html.escape(task)}</th>{cells}</tr>")
    return f'<div class="shares"><table><tr><th>takes from</th>{head}</tr>{"".join(rows)}</table></div>'
