"""Trains a model: `degmix train RECIPE [--field value ...]`."""

import signal
import sys

from accelerate import PartialState
from transformers.utils import logging

from ..training.arguments import parse_arguments
from ..training.loop import TrainingTerminated, train


def main():
    logging.disable_progress_bar()  # the bar of saving; training has its own
    args = parse_arguments()
    try:
        scores = train(args)
    except TrainingTerminated as stop:
        print(stop, file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    if PartialState().is_main_process:
        if len(args.sources) > 1:
            print("means over the sources that label the task:")
        for task, values in scores.items():
            print(f"{task:12} " + "  ".join(f"{name} {value:.4f}" for name, value in values.items()))
        print(f"models: {args.output_dir}/best and {args.output_dir}/last")
