"""Exports a model as ONNX file with dynamic batch and image sizes, and compares it with PyTorch in onnxruntime.

    python scripts/export_onnx.py --model outputs/demo/best --output outputs/demo.onnx

The file appears only if the logits agree within 1e-4 at every size that is tried.
"""

import argparse
import sys
import warnings
from pathlib import Path

from transformers.utils import logging

from transformers_degmix.export import export_onnx
from transformers_degmix.saving import load_model_directory


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model directory, or name on the Hugging Face Hub")
    parser.add_argument("--output", required=True, type=Path, help="file to create")
    parser.add_argument("--opset", type=int, help="version of the ONNX operators, 18 or newer (default: PyTorch's)")
    return parser.parse_args()


def main():
    args = parse_args()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # of PyTorch's exporter about itself
    try:
        if args.output.exists():
            raise FileExistsError(f"{args.output} exists")
        model, processor = load_model_directory(args.model)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        print("exporting and comparing, which takes minutes for large backbones", file=sys.stderr, flush=True)
        differences = export_onnx(model, args.output, processor, args.opset)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    tasks = list(model.config.tasks)
    print("| batch, height, width | " + " | ".join(tasks) + " |\n| --- |" + " --- |" * len(tasks))
    for size, found in differences:
        print(f"| {size[0]}, {size[1]} x {size[2]} | " + " | ".join(f"{found[task]:.1e}" for task in tasks) + " |")
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
