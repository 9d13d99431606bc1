"""Predictions -> pictures that people can read: coloured maps, what their colours mean, which task looks at which."""

from .layout import panel_size, stack
from .legends import Legend, draw_legend
from .maps import draw_confidence, draw_consistency, draw_prediction
from .overview import draw_overview


__all__ = [
    "Legend",
    "draw_confidence",
    "draw_consistency",
    "draw_legend",
    "draw_overview",
    "draw_prediction",
    "panel_size",
    "stack",
]
