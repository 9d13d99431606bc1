"""A page for trying out a model in the browser."""

from .page import LAUNCH_OPTIONS, MAX_PIXELS, build_demo, read_photo


__all__ = ["LAUNCH_OPTIONS", "MAX_PIXELS", "build_demo", "read_photo"]
