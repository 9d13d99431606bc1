"""Options that several commands have."""

import warnings
from argparse import ArgumentParser, Namespace, _ArgumentGroup
from pathlib import Path

import torch
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


def add_device_argument(parser: ArgumentParser):
    """The option `--device` of a command that predicts in one process."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    parser.add_argument(
        "--device",
        default=str(device),
        help="cpu, cuda, cuda:1, ... (default: a GPU or the like if there is one; here %(default)s)",
    )


def add_window_arguments(parser: ArgumentParser):
    """The options `--window`, `--window-overlap` and `--max-pixels` of a command that predicts images.

    `--max-pixels` is for [`allow_pixels`].
    """
    parser.add_argument(
        "--window",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="predict in overlapping windows, best of the size of the training images; images are then neither "
        "resized nor padded (default: whole images, as the processor says)",
    )
    parser.add_argument(
        "--window-overlap",
        type=float,
        default=DEFAULT_OVERLAP,
        metavar="SHARE",
        help=f"share of a window that the next one covers too (default {DEFAULT_OVERLAP})",
    )
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=2 * Image.MAX_IMAGE_PIXELS,  # type: ignore[operator]
        help="refuse larger images, which could fill the memory (default %(default)s)",
    )


def allow_pixels(max_pixels: int):
    """Lets this process and its forks open images of up to `max_pixels` pixels."""
    Image.MAX_IMAGE_PIXELS = -(-max_pixels // 2)  # PIL refuses images of more than twice this number
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # and warns of more than this number


def add_data_arguments(parser: ArgumentParser | _ArgumentGroup, required: bool = True):
    """The options that choose images of a data set; check them with [`check_data_arguments`]."""
    parser.add_argument(
        "--dataset",
        required=required,
        help="folder, name on the Hugging Face Hub, `rooms`, or a source of `--config`",
    )
    parser.add_argument("--split", required=required, help="name of the data set's split")
    parser.add_argument("--config", type=Path, help="YAML file of a training run, for its `columns`")
    parser.add_argument("--num-images", type=int, help="how many, from the first (default: all; needed for rooms)")
    parser.add_argument("--image-size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="size of rendered rooms")


def check_data_arguments(parser: ArgumentParser, args: Namespace):
    """Ends the command with the parser's error if options of [`add_data_arguments`] contradict each other."""
    if args.dataset == "rooms" and (args.num_images is None or args.image_size is None):
        parser.error("rooms are rendered: give --num-images and --image-size")
    if args.dataset != "rooms" and args.image_size is not None:
        parser.error("--image-size is for rooms")
    if args.num_images is not None and args.num_images < 1:
        parser.error(f"--num-images must be 1 or more, got {args.num_images}")
