"""Trains DeGMix: python scripts/train.py CONFIG.yaml [--field value ...]"""

import signal
import sys

from accelerate import PartialState
from transformers.utils import logging

from transformers_degmix.training.arguments import parse_arguments
from transformers_degmix.training.loop import TrainingTerminated, train


def main():
    logging.disable_progress_bar()  # of saving; there is one of training
    try:
        args = parse_arguments()
        scores = train(args)
    except (ValueError, OSError, ImportError) as error:
        # What a loader process raises comes with its traceback.
        message = str(error)
        sys.exit(f"error: {message.strip().splitlines()[-1] if 'Original Traceback' in message else message}")
    except TrainingTerminated as stop:
        print(stop, file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    if PartialState().is_main_process:
        for task, values in scores.items():
            print(f"{task:12} " + "  ".join(f"{name} {value:.4f}" for name, value in values.items()))
        print(f"models: {args.output_dir}/best and {args.output_dir}/last")


if __name__ == "__main__":
    main()
