r"""Shows what happens inside a model: which task attends to which, and where the deformable mixers sample.

    degmix explain --model outputs/demo/best --dataset rooms --num-images 96 --image-size 96 128 \
        --split test --output outputs/inside
    degmix explain --model outputs/demo/best --image photo.jpg --points 120,80 400,300 --output outputs/dots

--dataset writes the tasks' attention to each other (affinity.json, affinity.png) and how far sampling points lie from
their pixels (sampling.json). It needs no labels. Attention is no measure of importance. --image draws the sampling
points of some pixels of a photo, a picture per mixer layer (sampling.layer1.png). Both can be given at once.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import datasets
from transformers.utils import logging

from .. import DeGMixForMultiTaskDensePrediction
from ..files import check_writable, whole_directory
from ..hub.model_directory import load_model_directory
from ..images_degmix import load_image
from ..inference.predictor import prepare
from ..interpretation.attention import (
    describe_affinity,
    describe_sampling,
    find_sampling_points,
    inspect_images,
)
from ..interpretation.pictures import draw_affinity, draw_sampling
from .arguments import add_data_arguments, add_device_argument, add_model_argument, check_data_arguments
from .splits import read_split


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_argument(parser)
    parser.add_argument("--output", required=True, type=Path, help="directory to create for the results")
    add_data_arguments(parser, required=False)
    parser.add_argument("--image", type=Path, help="photo on which to show sampling points")
    parser.add_argument(
        "--points",
        type=parse_point,
        nargs="+",
        metavar="X,Y",
        help="pixels of the upright photo, counted from 0 at the top left (default: six, spread evenly)",
    )
    add_device_argument(parser)
    args = parser.parse_args()
    if args.dataset is None and args.image is None:
        parser.error("give --dataset, --image, or both")
    if (args.dataset is None) != (args.split is None):
        parser.error("--dataset and --split need each other")
    if args.dataset is None and (args.config or args.num_images):
        parser.error("--config and --num-images are for --dataset")
    if args.points and args.image is None:
        parser.error("--points are for --image")
    check_data_arguments(parser, args)
    return args


def parse_point(text: str) -> tuple[int, int]:
    try:
        x, y = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be two whole numbers as in 120,80, got {text!r}") from None
    return x, y


def explain_data(args: argparse.Namespace, model: DeGMixForMultiTaskDensePrediction, processor, directory: Path):
    """Writes the attention and the sampling over a data set; prints how far sampling points lie from their pixels."""
    data = read_split(args)[0].load({})
    inspection, tasks = inspect_images(model, processor, data), list(model.config.tasks)
    affinity = describe_affinity(inspection.shares, tasks)
    source = {
        "model": args.model,
        "dataset": args.dataset,
        "split": args.split,
        "command": f"degmix explain {shlex.join(sys.argv[1:])}",
    }
    (directory / "affinity.json").write_text(json.dumps({**source, **affinity}, indent=2) + "\n")
    draw_affinity(affinity).savefig(directory / "affinity.png", dpi=120)
    if not model.config.num_mixer_layers:
        return
    layers = describe_sampling(inspection, tasks)
    (directory / "sampling.json").write_text(json.dumps({**source, "layers": layers}, indent=2) + "\n")
    print("| layer | task | median distance | 90th percentile | outside |\n| --- | --- | --- | --- | --- |")
    for number, layer in enumerate(layers, 1):
        for task, row in layer.items():
            median, percentile, outside = row.values()
            print(f"| {number} | {task} | {median:.1f} | {percentile:.1f} | {outside:.1%} |")


def explain_photo(args: argparse.Namespace, model: DeGMixForMultiTaskDensePrediction, processor, directory: Path):
    """Writes a picture per mixer layer; prints the share of points that lie outside of the map."""
    image = load_image(args.image)
    try:
        photo = prepare(processor, image).photo
        chosen = args.points or [
            (int(photo.width * x), int(photo.height * y)) for y in (1 / 4, 3 / 4) for x in (1 / 6, 1 / 2, 5 / 6)
        ]
        found = find_sampling_points(model, processor, image, chosen)
    except ValueError as error:
        raise ValueError(f"{args.image}: {error}") from error
    tasks = list(model.config.tasks)
    for number, (points, outside) in enumerate(zip(found.points, found.outside), 1):
        picture = draw_sampling(photo, found.area, found.pixels, points, outside, tasks, f"mixer layer {number}")
        picture.save(directory / f"sampling.layer{number}.png")
        shares = zip(tasks, outside.float().mean(dim=(1, 2)).tolist())
        print(f"{args.image}, layer {number}, outside: " + ", ".join(f"{task} {share:.1%}" for task, share in shares))


def main():
    args = parse_args()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    check_writable(args.output)
    model, processor = load_model_directory(args.model, args.device)
    if not isinstance(model, DeGMixForMultiTaskDensePrediction):
        raise ValueError(f"{args.model} is an ONNX file, which gives only logits")
    with whole_directory(args.output) as directory:
        if args.image:
            explain_photo(args, model, processor, directory)
        if args.dataset:
            explain_data(args, model, processor, directory)
    print(f"results: {args.output}")
