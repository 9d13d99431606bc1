"""Serves a page for trying out a model in the browser, on this machine.

    degmix demo

The page shows all tasks side by side, their values at a point, the depth as a surface and the attention. The arrays
can be downloaded. Nothing leaves the machine.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from skimage.data import coffee
from transformers.utils import logging

from ..data.rooms import render_room
from ..demo import LAUNCH_OPTIONS, MAX_PIXELS, build_demo, read_photo
from ..hub.model_directory import load_model_directory
from .arguments import add_device_argument, add_model_argument


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_argument(parser)
    parser.add_argument(
        "--examples", type=Path, help="folder of photos to choose from (default: one photo and three rendered rooms)"
    )
    parser.add_argument(
        "--max-pixels", type=int, default=MAX_PIXELS, help=f"refuse larger photos (default {MAX_PIXELS})"
    )
    parser.add_argument("--server-port", type=int, help="default: the first free port from 7860 on")
    add_device_argument(parser)
    return parser.parse_args()


def read_examples(folder: Path, max_pixels: int) -> Iterator[Image.Image]:
    """The photos in a folder. Its other files are named on stderr."""
    for path in sorted(folder.iterdir()):
        try:
            yield read_photo(path, max_pixels)
        except ValueError as error:
            print(f"left out of the examples: {path}: {error}", file=sys.stderr)


def main():
    args = parse_args()
    logging.disable_progress_bar()
    Image.MAX_IMAGE_PIXELS = args.max_pixels  # PIL then warns only of photos that we refuse
    if args.examples:
        examples = list(read_examples(args.examples, args.max_pixels))
    else:
        rooms = [render_room("test", index)["image"] for index in range(3)]
        examples = [Image.fromarray(image) for image in (coffee(), *rooms)]
    demo = build_demo(*load_model_directory(args.model, args.device), examples, args.max_pixels)
    demo.launch(server_port=args.server_port, **LAUNCH_OPTIONS)
    raise KeyboardInterrupt  # on Ctrl-C, Gradio just returns
