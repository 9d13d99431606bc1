"""Exports a model as an ONNX file with dynamic batch and image sizes, and compares it with PyTorch in onnxruntime.

    degmix export --model outputs/demo/best --output outputs/demo.onnx

The file appears only if the logits agree within 1e-4 at every size that is tried. `--int8 IMAGES` also writes
`outputs/demo.int8.onnx`, with ranges of values from the images. `degmix evaluate --model outputs/demo.int8.onnx` shows
what that costs in scores.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from logging import ERROR, getLogger
from pathlib import Path
from statistics import median

from torch import Tensor
from transformers.utils import logging

from ..hub.model_directory import load_model_directory
from ..hub.onnx import OnnxModel, export_onnx, quantize_onnx
from ..images_degmix import load_image
from .arguments import add_model_argument


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_argument(parser)
    parser.add_argument("--output", required=True, type=Path, help="file to create")
    parser.add_argument("--opset", type=int, help="version of the ONNX operators, 18 or newer (default: PyTorch's)")
    parser.add_argument("--int8", type=Path, nargs="+", default=[], metavar="IMAGE", help="also write an 8-bit file")
    return parser.parse_args()


def compare_int8(exact: OnnxModel, rounded: OnnxModel, batches: list[Tensor]):
    """Prints the mean relative difference of the logits, and the median time of an image in both models."""
    differences, seconds = dict.fromkeys(exact.config.tasks, 0.0), {exact: [], rounded: []}
    for batch in batches:
        outputs = {}
        for model in seconds:
            start = time.perf_counter()
            outputs[model] = model(batch).logits
            seconds[model].append(time.perf_counter() - start)
        for task, logits in outputs[exact].items():
            error = (outputs[rounded][task] - logits).abs().mean() / logits.abs().mean()
            differences[task] += float(error) / len(batches)
    print("mean difference of the logits: " + ", ".join(f"{task} {x:.1%}" for task, x in differences.items()))
    print("ms an image, float32 and 8 bits: " + ", ".join(f"{1000 * median(x):.1f}" for x in seconds.values()))


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Silences warnings, and what these loggers say below errors, inside the block."""
    levels = {getLogger(name): getLogger(name).level for name in names}
    for logger in levels:
        logger.setLevel(ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def main():
    args = parse_args()
    logging.disable_progress_bar()
    with quiet("torch.onnx", "onnxscript", "root"):  # PyTorch's exporter talks about itself
        export(args)


def export(args: argparse.Namespace):
    """Exports, compares and writes the files.

    Raises:
        ImportError, OSError, ValueError: the model or an image cannot be used, a file exists, or the logits differ.
    """
    int8 = args.output.with_suffix(".int8.onnx")
    for path in (args.output, int8) if args.int8 else (args.output,):
        if path.exists():
            raise FileExistsError(f"{path} exists")
    model, processor = load_model_directory(args.model)
    if isinstance(model, OnnxModel):
        raise ValueError(f"{args.model} is an ONNX file already")
    batches = [processor(load_image(path), return_tensors="pt")["pixel_values"] for path in args.int8]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    print("exporting and comparing, which takes minutes for large backbones", file=sys.stderr, flush=True)
    differences = export_onnx(model, args.output, processor, args.opset)
    if batches:
        quantize_onnx(args.output, int8, batches)
    tasks = list(model.config.tasks)
    print("| batch, height, width | " + " | ".join(tasks) + " |\n| --- |" + " --- |" * len(tasks))
    for size, found in differences:
        print(f"| {size[0]}, {size[1]} x {size[2]} | " + " | ".join(f"{found[task]:.1e}" for task in tasks) + " |")
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")
    if batches:
        print(f"{int8}: {int8.stat().st_size / 1e6:.1f} MB")
        compare_int8(OnnxModel(args.output), OnnxModel(int8), batches)
