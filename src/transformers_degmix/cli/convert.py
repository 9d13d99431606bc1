"""Converts a released DeGMix or DeMT checkpoint into a model directory for `from_pretrained`."""

import argparse
from typing import Any

from transformers.utils import logging

from .. import DeGMixForMultiTaskDensePrediction
from ..data.benchmarks import BENCHMARKS
from ..files import check_writable
from ..hub.conversion import convert_checkpoint
from ..hub.model_directory import save_model_directory
from ..image_processing_pil_degmix import DeGMixImageProcessorPil


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="Lightning checkpoint, state dict or safetensors file of the released code")
    parser.add_argument("output_dir", help="model directory to create")
    parser.add_argument(
        "--dataset",
        choices=list(BENCHMARKS),
        help="what it was trained on (default: the only one that fits the tasks and class counts, if there is one)",
    )
    return parser.parse_args()


def describe(model: DeGMixForMultiTaskDensePrediction) -> str:
    config = model.config
    swin: Any = config.backbone_config
    tasks = ", ".join(f"{name} ({task['kind']}, {task['num_labels']})" for name, task in config.tasks.items())
    gating = f"gating {config.gating_intermediate_size}" if config.use_gating else "no gating"
    return (
        f"  backbone: Swin, width {swin.embed_dim}, depths {swin.depths}, heads {swin.num_heads}, "
        f"window {swin.window_size}\n"
        f"  decoder: width {config.hidden_size}, {config.num_mixer_layers} mixer layers, "
        f"{config.num_attention_heads} heads, {gating}\n"
        f"  tasks: {tasks}\n"
        f"  parameters: {model.num_parameters():,}"
    )


def main():
    args = parse_args()
    logging.disable_progress_bar()
    check_writable(args.output_dir)
    model = convert_checkpoint(args.checkpoint, args.dataset)
    processor = DeGMixImageProcessorPil(tasks=model.config.tasks)
    save_model_directory(args.output_dir, model, processor)
    print(f"Model directory: {args.output_dir}\n{describe(model)}")
