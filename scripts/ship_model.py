"""Makes a trained model the one that comes with the package.

    python scripts/ship_model.py outputs/nyud_lite/best

Matrices are stored in 16 bits, tensors of one dimension (biases, statistics of batch norms) in 32. `from_pretrained`
loads all in 32. Score the shipped model to measure what is lost.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save
from transformers.utils import logging

from transformers_degmix.cli import run_script
from transformers_degmix.files import whole_directory
from transformers_degmix.hub.model_directory import load_model_directory, save_model_directory
from transformers_degmix.hub.shipped import DEFAULT_MODEL, SHIPPED_MODELS


# Wheels and clones contain the weights.
MAX_BYTES = 12_000_000


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model directory")
    parser.add_argument("--name", default=DEFAULT_MODEL, choices=SHIPPED_MODELS, help="default: %(default)s")
    args = parser.parse_args()
    logging.disable_progress_bar()
    try:
        ship(args.model, SHIPPED_MODELS[args.name])
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def ship(source: str, target: str):
    """Writes the model directory `target`, without code, which the package has."""
    model, processor = load_model_directory(source)
    with tempfile.TemporaryDirectory() as scratch, whole_directory(target, overwrite=True) as directory:
        saved = Path(scratch, "saved")
        save_model_directory(saved, model, processor)
        for name in ("config.json", "preprocessor_config.json"):
            shutil.copy(saved / name, directory)
        weights = {
            name: x.half() if x.ndim > 1 else x.clone() for name, x in load_file(saved / "model.safetensors").items()
        }
        overflown = [name for name, x in weights.items() if not x.isfinite().all()]
        if overflown:
            raise ValueError(f"{source} has weights that do not fit into 16 bits: {', '.join(overflown)}")
        path = directory / "model.safetensors"
        path.write_bytes(save(weights, metadata={"format": "pt"}))
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ValueError(f"the weights would take {size / 1e6:.1f} MB, more than {MAX_BYTES / 1e6:g}")
    print(f"{target}: {size / 1e6:.2f} MB, {sum(x.numel() for x in weights.values()):,} numbers")


if __name__ == "__main__":
    run_script(main)
