"""Options of scripts that go through the images of a split."""

from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path

from ..training.arguments import TrainingArguments, parse_arguments


def add_data_arguments(parser: ArgumentParser, required: bool = True):
    """The options that say which images of which data set; check them with [`check_data_arguments`]."""
    parser.add_argument("--dataset", required=required, help="folder or name on the Hugging Face Hub, or `rooms`")
    parser.add_argument("--split", required=required, help="name of the data set's split")
    parser.add_argument("--config", type=Path, help="YAML file of a training run, for its `columns`")
    parser.add_argument("--num-images", type=int, help="the first so many (default: all); rooms need it")
    parser.add_argument("--image-size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="of the rooms to render")


def check_data_arguments(parser: ArgumentParser, args: Namespace):
    """Ends the script with the parser's error where options of [`add_data_arguments`] contradict each other."""
    if args.dataset == "rooms" and (args.num_images is None or args.image_size is None):
        parser.error("rooms are rendered: give --num-images and --image-size")
    if args.dataset != "rooms" and args.image_size is not None:
        parser.error("--image-size is for rooms")
    if args.num_images is not None and args.num_images < 1:
        parser.error(f"--num-images must be 1 or more, got {args.num_images}")


def read_run(args: Namespace) -> TrainingArguments:
    """The training run on whose evaluation data a script works, from these options and `output`.

    Raises:
        ValueError, OSError: `config` is not such a file.
    """
    if args.config:
        run = parse_arguments([str(args.config), "--dataset", args.dataset, "--streaming", "false"])
    else:
        run = TrainingArguments(output_dir=str(args.output), dataset=args.dataset)
    size = args.image_size or run.image_size
    return replace(run, eval_split=args.split, num_eval_images=args.num_images, image_size=size)
