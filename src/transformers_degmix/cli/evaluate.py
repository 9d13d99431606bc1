"""Evaluates a model on a data set and writes a report: numbers, tables, pictures and the scores of each sample.

    degmix evaluate --model outputs/demo/best --dataset rooms --num-images 96 --image-size 96 128 \
        --split test --output outputs/report
    degmix evaluate ... --calibration  # also whether confidences tell where predictions are wrong
    accelerate launch --num_processes 8 -m transformers_degmix evaluate --model MODEL --dataset data/nyud \
        --split validation --edge-tolerance 0.011 --flip --output outputs/report

Predictions are scored in the size of the labels. The model runs on the GPU if there is one.
"""

import argparse
import multiprocessing
import shlex
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from transformers.utils import logging

from ..data.splits import PROCESS_TIMEOUT
from ..evaluation import BENCHMARK_METRICS
from ..evaluation.depth import DEPTH_CROPS
from ..evaluation.evaluator import multi_task_gain
from ..evaluation.report import (
    build_report,
    check_comparable,
    format_table,
    read_report,
    single_task_scores,
    write_report,
)
from ..evaluation.whole_images import Protocol, evaluate_whole_images
from ..files import check_writable, whole_directory
from ..hub.model_directory import load_model_directory
from ..sliding_windows import DEFAULT_OVERLAP
from ..visualization.geometry import FIELD_OF_VIEW
from .arguments import add_data_arguments, add_model_argument, add_window_arguments, allow_pixels, check_data_arguments
from .splits import read_split


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_argument(parser)
    add_data_arguments(parser)
    parser.add_argument("--output", required=True, type=Path, help="directory to create for the report")
    parser.add_argument(
        "--tasks",
        nargs="+",
        help="tasks to evaluate (default: all tasks of the model that the data has labels for, and that the source of "
        "`--config` labels)",
    )
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--flip", action="store_true", help="average with the predictions of mirrored images")
    parser.add_argument(
        "--scales", type=float, nargs="+", default=[1.0], help="average over images resized by these factors"
    )
    add_window_arguments(parser)
    parser.add_argument(
        "--edge-tolerance",
        type=float,
        default=0.0075,
        help="largest distance of matching boundaries, as a fraction of the diagonal (default 0.0075; NYUD-v2: 0.011)",
    )
    parser.add_argument(
        "--depth-crop",
        choices=DEPTH_CROPS,
        help="score depth only in this region, defined for KITTI; in images of 480 x 640, eigen is NYU Depth V2's",
    )
    parser.add_argument("--max-depth", type=float, help="score depth only below this many metres, clamp predictions")
    parser.add_argument("--median-scaling", action="store_true", help="scale each predicted depth to the true median")
    parser.add_argument(
        "--calibration", action="store_true", help="compare confidences, and how depth fits normals, with the errors"
    )
    parser.add_argument(
        "--field-of-view",
        type=float,
        default=FIELD_OF_VIEW,
        help="of the cameras across the longer side, in degrees, to compare depth with normals (default: "
        f"{FIELD_OF_VIEW:g} is assumed; cameras of Rooms have 60 to 80)",
    )
    parser.add_argument("--num-workers", type=int, default=0, help="processes that read samples, and that score them")
    parser.add_argument(
        "--single-task-reports", type=Path, nargs="+", default=[], help="reports of models for one task, for the gain"
    )
    args = parser.parse_args()
    check_data_arguments(parser, args)
    if args.window is None and args.window_overlap != DEFAULT_OVERLAP:
        parser.error("--window-overlap is for --window")
    if not args.calibration and args.field_of_view != FIELD_OF_VIEW:
        parser.error("--field-of-view is for --calibration")
    if args.num_workers < 0:
        parser.error(f"--num-workers must be 0 or more, got {args.num_workers}")
    return args


@contextmanager
def start_executor(num_workers: int) -> Iterator[Executor]:
    """Processes that score samples, or one thread without workers. Forked processes would lack the model's threads.

    After an error, samples that wait are dropped. Ctrl-C does not wait for those that are being scored either.
    """
    executor: Executor
    if num_workers:
        spawn = multiprocessing.get_context("spawn")
        executor = ProcessPoolExecutor(num_workers, spawn, initializer=torch.set_num_threads, initargs=(1,))
    else:
        executor = ThreadPoolExecutor(1)
    try:
        yield executor
    finally:
        executor.shutdown(wait=sys.exc_info()[0] is not KeyboardInterrupt, cancel_futures=True)


def evaluate(args: argparse.Namespace, accelerator: Accelerator):
    """Evaluates and writes the report.

    Raises:
        ValueError, OSError: the model, the data or an option cannot be used, or the report cannot be written.
    """
    check_writable(args.output)
    allow_pixels(args.max_pixels)
    protocol = Protocol(
        edge_tolerance=args.edge_tolerance,
        scales=tuple(args.scales),
        flip=args.flip,
        window_size=args.window and tuple(args.window),
        window_overlap=args.window_overlap,
        calibration=args.calibration,
        field_of_view=args.field_of_view,
        depth_crop=args.depth_crop,
        max_depth=args.max_depth,
        median_scaling=args.median_scaling,
    )
    split, source = read_split(args)
    with accelerator.main_process_first():  # it downloads and renders
        model, processor = load_model_directory(args.model, accelerator.device)
        unknown = sorted(set(args.tasks or ()) - set(model.config.tasks))
        if unknown:
            raise ValueError(f"`--tasks` must be some of {list(model.config.tasks)}, got {unknown}")
        labelled = source.choose(model.config.tasks) if source else model.config.tasks
        if not (args.tasks or labelled):
            raise ValueError(f"the source {args.dataset!r} labels none of {list(model.config.tasks)}; give `--tasks`")
        tasks = {name: model.config.tasks[name] for name in args.tasks or labelled}
        if protocol.depth and "depth" not in (task["kind"] for task in tasks.values()):
            raise ValueError(
                f"{', '.join(protocol.depth)}: no task of {args.model} is of the kind depth: {list(tasks)}"
            )
        data = split.load(tasks, may_lack_columns=not args.tasks)
    single_task_reports = {str(path): read_report(path) for path in args.single_task_reports}
    singles = single_task_scores(single_task_reports, tasks) if single_task_reports else None

    with start_executor(args.num_workers) as executor:
        evaluation = evaluate_whole_images(
            model, processor, data, protocol, accelerator, executor, args.num_workers, list(tasks)
        )
    described = {"dataset": split.dataset, "split": args.split}
    command = f"degmix evaluate {shlex.join(sys.argv[1:])}"
    report = build_report(evaluation, model, args.model, described, protocol, args.precision, command, data.warnings)
    # Raised only after the report is written, because it may have taken hours.
    problems = [f"{sample['image_id']!r} could not be evaluated: {sample['reason']}" for sample in evaluation.failed]
    if singles:
        try:
            for path, single_task_report in single_task_reports.items():
                check_comparable({"this evaluation": report, path: single_task_report})
            report["single_task_scores"] = singles
            report["gain_percent"] = multi_task_gain(report["scores"], singles, tasks, BENCHMARK_METRICS)
        except ValueError as error:
            problems.append(f"no gain: {error}")
    if accelerator.is_main_process:
        with whole_directory(args.output) as directory:
            write_report(directory, report, evaluation, model, processor, data, protocol, accelerator)
        print(format_table([report]) + f"\nreport: {args.output / 'report.md'}")
    accelerator.wait_for_everyone()
    if problems:
        raise ValueError(f"{args.output} is complete except for {len(problems)}: " + "; ".join(problems))


def main():
    args = parse_args()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # by itself, Accelerate would let torchrun's processes run apart
        mixed_precision={"fp32": "no", "bf16": "bf16"}[args.precision],
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT)],
    )
    evaluate(args, accelerator)
    accelerator.end_training()
