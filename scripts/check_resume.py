"""Kills a training run again and again, resumes it each time, and compares it with an uninterrupted run.

    python scripts/check_resume.py [--kills 10] [--seed 0] [--output_dir DIR] [--field value ...]

Every other kill comes while a checkpoint is being written, the others after a random step. The weights of both runs
must be equal to the last bit. `--field` changes a field of the recipe `rooms_tiny`.
"""

import argparse
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from transformers_degmix.cli import run_script
from transformers_degmix.files import UNFINISHED
from transformers_degmix.training.arguments import parse_arguments


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/check_resume"), help="must be new")
    options, overrides = parser.parse_known_args()
    args = parse_arguments(["rooms_tiny", *overrides])
    alone, killed = options.output_dir / "alone", options.output_dir / "killed"
    options.output_dir.mkdir(parents=True)

    finish(start(alone, overrides))
    rng = random.Random(options.seed)
    num_during_writing = 0
    # After each, there is another checkpoint.
    steps = sorted(rng.sample(range(1, args.max_steps - args.checkpoint_steps), options.kills))
    for number, step in enumerate(steps):
        process = start(killed, [*overrides, "--resume"])
        log = killed.with_suffix(".log")
        while steps_made(log, args.max_steps) < step or (
            number % 2 and not list(killed.glob(f".checkpoint.pt{UNFINISHED}*"))
        ):
            if process.poll() is not None:
                sys.exit(f"the run ended before it was killed at step {step}: see {log}")
            time.sleep(0.001 if number % 2 else rng.uniform(0.001, 0.05))
        process.kill()
        process.wait()
        during_writing = bool(list(killed.rglob(f"*{UNFINISHED}*")))
        num_during_writing += during_writing
        print(
            f"killed after step {steps_made(log, args.max_steps)}"
            + during_writing * ", while a file was being written",
            flush=True,
        )
    finish(start(killed, [*overrides, "--resume"]))

    for name in ("last", "best"):
        weights = [load_file(run / name / "model.safetensors") for run in (alone, killed)]
        different = [key for key in weights[0] if not torch.equal(weights[0][key], weights[1][key])]
        if different:
            sys.exit(f"{name}: {len(different)} of {len(weights[0])} tensors differ, such as {different[0]}")
    print(f"{options.kills} kills, {num_during_writing} while a file was being written: all weights are equal")


def start(output_dir: Path, overrides: list[str]) -> subprocess.Popen:
    """A training run whose output goes to `output_dir` + `.log`."""
    command = [sys.executable, *"-m transformers_degmix train rooms_tiny --output_dir".split(), str(output_dir)]
    with open(output_dir.with_suffix(".log"), "w") as log:
        return subprocess.Popen([*command, *overrides], stdout=log, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen):
    if process.wait():
        sys.exit(f"a run failed: {' '.join(process.args)}")


def steps_made(log: Path, max_steps: int) -> int:
    """The number of steps according to the run's progress bar."""
    bars = re.findall(r"train: +\d+%.*? (\d+)/(\d+) ", log.read_text())
    return int(bars[-1][0]) * max_steps // int(bars[-1][1]) if bars else 0


if __name__ == "__main__":
    run_script(main)
