"""Makes a data set of Parquet files from the original archives of a benchmark, for `datasets.load_dataset(OUTPUT)`.

    degmix prepare nyud NYUDv2.tar.gz data/nyud
    degmix prepare cityscapes FOLDER data/cityscapes --classes 7 --num-proc 8
    degmix prepare rooms 2000,200 data/rooms

All files are checked before the first is converted. OUTPUT appears when everything is done. Until then, the work is in
.OUTPUT.partial beside it, and the same command goes on after an interruption.
"""

import argparse
import sys
from pathlib import Path

import datasets
from huggingface_hub.utils import validate_repo_id

from ..data.prepare import ARCHIVES, Job, prepare, push, push_command


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=[*ARCHIVES, "rooms"])
    parser.add_argument(
        "source",
        help="the archive (.tar.gz or .zip) or the folder unpacked from it; cityscapes: or a folder with "
        "leftImg8bit_trainvaltest.zip and so on; rooms: TRAIN,VALIDATION, two numbers",
    )
    parser.add_argument("output", type=Path, help="folder to create")
    parser.add_argument(
        "--classes", type=int, choices=(19, 7), help="Cityscapes: 19 classes (default) or 7 categories"
    )
    parser.add_argument("--num-proc", type=int, default=1, metavar="N", help="number of processes")
    parser.add_argument("--skip-bad", action="store_true", help="list images with bad files and leave them out")
    parser.add_argument(
        "--push-to-hub", metavar="REPO", help="push the result to this data set repository, private if it is new"
    )
    args = parser.parse_args()
    if args.classes and args.dataset != "cityscapes":
        parser.error("--classes is for cityscapes")
    if args.num_proc < 1:
        parser.error("--num-proc must be 1 or more")
    if args.push_to_hub:
        try:
            validate_repo_id(args.push_to_hub)
        except ValueError as error:
            parser.error(f"--push-to-hub: {error}")
    return args


def main():
    args = parse_args()
    datasets.disable_progress_bars()  # the job has one
    job = Job(args.dataset, args.source, args.output, args.classes, args.num_proc, args.skip_bad)
    counts = prepare(job)
    print(f"{args.output}: " + ", ".join(f"{count} {split} images" for split, count in counts.items()))
    if args.push_to_hub:
        try:
            print(push(args.output, args.push_to_hub))
        except OSError as error:
            again = push_command(args.output, args.push_to_hub)
            sys.exit(f"error: {args.output} is complete but not pushed; `{again}` tries again: {error}")
