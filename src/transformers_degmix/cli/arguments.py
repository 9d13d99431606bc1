"""Options that several commands have."""

import warnings
from argparse import ArgumentParser, Namespace, _ArgumentGroup
from pathlib import Path

from PIL import Image

from ..hub.shipped import DEFAULT_MODEL, SHIPPED_MODELS
from ..sliding_windows import DEFAULT_OVERLAP


def add_model_argument(parser: ArgumentParser):
    """The option `--model` of a command that loads a model."""
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help="model directory, name on the Hugging Face Hub, or one of the models that come with the package: "
        f"{', '.join(SHIPPED_MODELS)} (default: {DEFAULT_MODEL})",
    )


def add_window_arguments(parser: ArgumentParser):
    """The options `--window`, `--window-overlap` and `--max-pixels` of a command that predicts images.

    The last is for [`allow_pixels`].
    """
    parser.add_argument(
        "--window",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="predict in overlapping windows of this size, best that of the training images: images are neither "
        "resized nor padded then (default: whole images, as the processor says)",
    )
    parser.add_argument(
        "--window-overlap",
        type=float,
        default=DEFAULT_OVERLAP,
        metavar="SHARE",
        help=f"of a window in common with the next (default {DEFAULT_OVERLAP})",
    )
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=2 * Image.MAX_IMAGE_PIXELS,  # type: ignore[operator]
        help="images of more are refused, as they may be made to fill the memory (default %(default)s)",
    )


def allow_pixels(max_pixels: int):
    """Lets this process and its forks open images of up to so many pixels."""
    Image.MAX_IMAGE_PIXELS = -(-max_pixels // 2)  # PIL refuses images of more than twice as many
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # and warns from this number on


def add_data_arguments(parser: ArgumentParser | _ArgumentGroup, required: bool = True):
    """The options that say which images of which data set; check them with [`check_data_arguments`]."""
    parser.add_argument(
        "--dataset",
        required=required,
        help="folder or name on the Hugging Face Hub, or `rooms`; or the name of a source of `--config`",
    )
    parser.add_argument("--split", required=required, help="name of the data set's split")
    parser.add_argument("--config", type=Path, help="YAML file of a training run, for its `columns`")
    parser.add_argument("--num-images", type=int, help="the first so many (default: all); rooms need it")
    parser.add_argument("--image-size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="of the rooms to render")


def check_data_arguments(parser: ArgumentParser, args: Namespace):
    """Ends the command with the parser's error where options of [`add_data_arguments`] contradict each other."""
    if args.dataset == "rooms" and (args.num_images is None or args.image_size is None):
        parser.error("rooms are rendered: give --num-images and --image-size")
    if args.dataset != "rooms" and args.image_size is not None:
        parser.error("--image-size is for rooms")
    if args.num_images is not None and args.num_images < 1:
        parser.error(f"--num-images must be 1 or more, got {args.num_images}")
