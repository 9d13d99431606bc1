"""Rooms: a data set of indoor scenes, rendered locally, with exact labels for every kind of task."""

from .dataset import ROOMS_TASKS, load_rooms, render_room
from .scene import sample_room


__all__ = ["ROOMS_TASKS", "load_rooms", "render_room", "sample_room"]
