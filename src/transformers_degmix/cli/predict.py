"""Predicts all tasks of images and videos, or of a data set.

An image gives the arrays (NAME.npz), a picture per task (NAME.TASK.png), and an overview of all tasks side by side,
with legends and the tasks' attention to each other (NAME.overview.png). --confidence also writes how sure the
predictions are (TASK_confidence in the arrays, NAME.TASK.confidence.png). A video gives a video of the overviews, at
the same times and without sound (NAME.overview.mp4; needs the extra `video`). With --window, images can be much larger
than those the model was trained with. The overview then has no attention, because attention belongs to a window.

With --dataset, the rows of a data set become a data set with a column per task, in Parquet files that training reads:

    degmix predict --dataset user/photos --split train --output-dataset outputs/labelled --confidence-threshold 0.8
    accelerate launch --num_processes 8 -m transformers_degmix predict --dataset ... --device cuda
    degmix predict --dataset ... --engine ray --workers 64 --device cuda

If it is killed, the same command goes on. Rows that cannot be predicted are listed in errors.csv.

While the model works, threads read the next images and write the results.
"""

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers.utils import logging

from ..files import write_whole
from ..hub.model_directory import load_model_directory
from ..images_degmix import load_image, resize_nearest
from ..inference.predictor import PREDICTION_ERRORS, Predictor, Result, map_ahead
from ..sliding_windows import DEFAULT_OVERLAP, check_window
from ..visualization import (
    draw_confidence,
    draw_legend,
    draw_overview,
    draw_prediction,
    panel_size,
)
from .arguments import (
    add_data_arguments,
    add_device_argument,
    add_model_argument,
    add_window_arguments,
    allow_pixels,
    check_data_arguments,
)


IMAGE_SUFFIXES = {
    *(".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".mpo", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"),
}
VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"}
# Options that go with --dataset alone.
DATASET_OPTIONS = {
    *("split", "config", "num_images", "image_size", "image_column", "streaming", "output_dataset"),
    *("confidence_threshold", "normals_format", "num_shards", "engine", "workers"),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_argument(parser)
    parser.add_argument(
        "--input",
        nargs="+",
        type=Path,
        help=f"images ({', '.join(sorted(IMAGE_SUFFIXES))}), videos ({', '.join(sorted(VIDEO_SUFFIXES))}), and "
        "directories of them",
    )
    parser.add_argument("--output", type=Path, help="directory for the results, created if it is missing")
    parser.add_argument("--confidence", action="store_true", help="also write how sure predictions are, not of videos")
    parser.add_argument("--no-resize", action="store_true", help="predict images at their own size, as a whole")
    add_window_arguments(parser)
    parser.add_argument(
        "--batch-size",
        type=int,
        default=1,
        help="images or frames per pass, if they enter the model at the same size, or windows (default 1)",
    )
    parser.add_argument(
        "--num-workers",
        type=int,
        default=2,
        help="threads that read and write images (default 2); with 0, everything is done one after the other",
    )
    add_device_argument(parser)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    rows = parser.add_argument_group("data sets")
    add_data_arguments(rows, required=False)
    rows.add_argument("--image-column", metavar="NAME", help="column of the images (default: image)")
    rows.add_argument("--streaming", action="store_true", help="read rows while they arrive, without a copy on disk")
    rows.add_argument("--output-dataset", type=Path, metavar="DIR", help="folder to create or to continue")
    rows.add_argument(
        "--confidence-threshold",
        nargs="+",
        metavar="[TASK=]NUMBER",
        help="make pixels of less confidence unknown, in TASK or in all other tasks (for labels to train with)",
    )
    rows.add_argument("--normals-format", choices=["png", "float16"], help="8-bit images (default), or 16-bit arrays")
    rows.add_argument(
        "--num-shards",
        type=int,
        help="number of Parquet files; a killed run makes unfinished files again (default: one per 256 rows; of a "
        "stream, one per file)",
    )
    rows.add_argument(
        "--engine", choices=["local", "ray"], help="local (default): this process, or all that a launcher started"
    )
    rows.add_argument("--workers", type=int, help="with Ray: number of models, each with a CPU or GPU (default 1)")
    args = parser.parse_args()
    check_source(parser, args)
    if args.window is None and args.window_overlap != DEFAULT_OVERLAP:
        parser.error("--window-overlap is for --window")
    if args.batch_size < 1:
        parser.error(f"--batch-size must be 1 or more, got {args.batch_size}")
    if args.num_workers < 0:
        parser.error(f"--num-workers must be 0 or more, got {args.num_workers}")
    return args


def check_source(parser: argparse.ArgumentParser, args: argparse.Namespace):
    """Ends the command with the parser's error unless either files or a data set are given, with the right options."""
    given = {name for name, value in vars(args).items() if value is not None and value is not False}
    if not given & {"input", "dataset"}:
        parser.error("give images and videos as --input, or a data set as --dataset")
    source, output, others = "input", "output", DATASET_OPTIONS
    if args.dataset:
        source, output, others = "dataset", "output_dataset", {"input", "output"}
        check_data_arguments(parser, args)
    if others & given:
        parser.error(f"--{source} does not go with {', '.join(sorted(map(option_name, others & given)))}")
    if output not in given:
        parser.error(f"--{source} needs {option_name(output)}")
    if args.workers is not None and (args.engine != "ray" or args.workers < 1):
        parser.error("--workers is for --engine ray, and 1 or more")


def option_name(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def parse_thresholds(words: list[str]) -> dict[str | None, float]:
    """Words `NUMBER` or `TASK=NUMBER` -> number of each task; `None` is for all other tasks.

    Raises:
        ValueError: a word is neither.
    """
    thresholds: dict[str | None, float] = {}
    for word in words:
        task, _, number = word.rpartition("=")
        try:
            thresholds[task or None] = float(number)
        except ValueError:
            raise ValueError(f"`--confidence-threshold` takes NUMBER or TASK=NUMBER, got {word!r}") from None
    return thresholds


def find_inputs(paths: list[Path]) -> tuple[list[Path], list[Path], list[Path]]:
    """The images, the videos and the other files at these paths.

    A path is a file, or a directory whose files are taken by name; hidden ones are left out. Only directories have
    other files.

    Raises:
        ValueError: a directory has no images or videos, or two files have the same stem and thus the same results.
    """
    inputs, others, suffixes = [], [], IMAGE_SUFFIXES | VIDEO_SUFFIXES
    for path in paths:
        files = sorted(file for file in path.iterdir() if file.name[0] != ".") if path.is_dir() else [path]
        found = [file for file in files if file.suffix.lower() in suffixes] if path.is_dir() else files
        others += [file for file in files if file not in found]
        if not found:
            raise ValueError(f"there are no images or videos in {path}" + (f", only {_list(files)}" if files else ""))
        inputs += found
    by_stem = {}
    for path in inputs:
        if path.stem in by_stem:
            raise ValueError(f"{by_stem[path.stem]} and {path} would have results of the same name, {path.stem}.*")
        by_stem[path.stem] = path
    return [path for path in inputs if not _is_video(path)], [path for path in inputs if _is_video(path)], others


def _list(paths: list[Path]) -> str:
    names = [path.name for path in paths]
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


def check_output(inputs: list[Path], tasks: dict[str, dict], output: Path):
    """Raises ValueError if a result would overwrite an input, as in a second run over its own results."""
    resolved = {path.resolve() for path in inputs}
    for path in inputs:
        pictures = [f"{task}{of}.png" for task in tasks for of in ("", ".confidence")]
        for ending in ("npz", "overview.png", "overview.mp4", *pictures):
            result = output / f"{path.stem}.{ending}"
            if result.resolve() in resolved:
                raise ValueError(f"{result} is an input and would be overwritten, choose another --output")


def save(result: Result, tasks: dict[str, dict], base: Path):
    """Writes everything about one image, under names that begin with `base`."""

    def save_picture(picture: Image.Image, ending: str):
        write_whole(base.with_name(f"{base.name}.{ending}"), lambda file: picture.save(file, "PNG", compress_level=1))

    # Better compression saves a fifth (pictures) to a half (arrays) of the bytes, but makes the model wait.
    confidences = result.confidences or {}
    arrays: dict[str, Any] = {task: values.numpy() for task, values in result.predictions.items()}
    arrays |= {f"{task}_confidence": values.numpy() for task, values in confidences.items()}
    write_whole(base.with_name(f"{base.name}.npz"), lambda file: np.savez(file, **arrays))
    for task, values in result.predictions.items():
        save_picture(draw_prediction(values, tasks[task]), f"{task}.png")
    for task, values in confidences.items():
        save_picture(draw_confidence(values, tasks[task]), f"{task}.confidence.png")
    overview = draw_overview(
        result.photo, result.predictions, tasks, result.attentions, confidences=result.confidences
    )
    save_picture(overview, "overview.png")


def predict_video(predictor: Predictor, path: Path, tasks: dict[str, dict], output: Path):
    """Writes a video of the overviews of all frames.

    Colours and legends come from frames all over the video, so that they stay the same from frame to frame.

    Raises:
        ValueError, RuntimeError, MemoryError: the video cannot be read or predicted.
    """
    from ..inference.video import VideoWriter, read_frames, survey_video

    survey = survey_video(path)
    size = panel_size((survey.samples[0].height, survey.samples[0].width))

    def shrink(_, result: Result) -> dict[str, torch.Tensor]:
        return {task: resize_nearest(values, size) for task, values in result.predictions.items()}

    samples = [_or_raise(maps) for _, maps in predictor(survey.samples, lambda photo: photo, shrink)]
    legends = {name: draw_legend(task, [maps[name] for maps in samples]) for name, task in tasks.items()}

    def draw(_, result: Result) -> Image.Image:
        return draw_overview(result.photo, result.predictions, tasks, legends=legends)

    def write(file: BinaryIO):
        drawn = predictor(read_frames(path), attrgetter("image"), draw)
        with VideoWriter(file, survey.rate) as writer, ThreadPoolExecutor(1) as encoder, closing(drawn):
            written = map_ahead(encoder, lambda pair: writer.write(_or_raise(pair[1]), pair[0].time), drawn, ahead=4)
            with closing(written):
                for _ in tqdm(written, path.name, survey.num_frames, unit="frame"):
                    pass

    write_whole(output / f"{path.stem}.overview.mp4", write)


def _or_raise(outcome):
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def predict_rows(args: argparse.Namespace):
    """Predicts a data set.

    Raises:
        ValueError, OSError: the model, the data or an option cannot be used, or the output cannot be written.
        ModuleNotFoundError: an extra is not installed.
    """
    import datasets

    from ..inference.dataset import Job, predict_dataset, predict_dataset_with_ray
    from .splits import read_split

    split, _ = read_split(args)
    column = {"image": args.image_column} if args.image_column else {}
    split = replace(split, name=args.split or "train", columns={**split.columns, **column}, streaming=args.streaming)
    job = Job(
        args.model,
        split,
        args.output_dataset,
        return_confidence=args.confidence,
        confidence_thresholds=parse_thresholds(args.confidence_threshold or []),
        normals_format=args.normals_format or "png",
        num_shards=args.num_shards,
        dtype=args.dtype,
        do_resize=not args.no_resize,
        window_size=args.window and tuple(args.window),
        window_overlap=args.window_overlap,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
    )
    datasets.disable_progress_bars()
    summary = (
        predict_dataset_with_ray(job, args.workers or 1, args.device)
        if args.engine == "ray"
        else predict_dataset(job, args.device)
    )
    if summary is None:  # in a process that is not the main one
        return
    report_done(f"{summary.num_rows - summary.num_failed} of {summary.num_rows} rows: {job.output}", summary.seconds)
    if summary.num_failed:
        sys.exit(f"error: {summary.num_failed} rows could not be predicted: {job.output / 'errors.csv'}")


def report_done(what: str, seconds: dict[str, float]):
    """Prints what was done, and the seconds of a [`Predictor`]."""
    waited = seconds["all"] - seconds["input"] - seconds["model"]
    print(
        f"{what}; {seconds['all']:.1f} s, of which the model waited {seconds['input']:.1f} s for input and "
        f"{waited:.1f} s for output"
    )


def main():
    args = parse_args()
    logging.disable_progress_bar()
    if args.dataset:
        allow_pixels(args.max_pixels)
        try:
            return predict_rows(args)
        except ModuleNotFoundError as error:
            extra = "ray" if error.name == "ray" else "train"
            sys.exit(f"error: {error.name} is missing, for data sets: pip install transformers-degmix[{extra}]")
    try:
        if args.window:
            check_window(args.window, args.window_overlap)
        allow_pixels(args.max_pixels)
        images, videos, others = find_inputs(args.input)
        if videos:
            import transformers_degmix.inference.video  # noqa: F401
        model, processor = load_model_directory(args.model, args.device, getattr(torch, args.dtype))
        tasks = model.config.tasks
        check_output(images + videos, tasks, args.output)
        args.output.mkdir(parents=True, exist_ok=True)
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error.name} is missing, for videos: pip install transformers-degmix[video]")
    if args.no_resize:
        processor.do_resize = False

    windows = {"window_size": args.window, "window_overlap": args.window_overlap}
    options = {"batch_size": args.batch_size, "num_workers": args.num_workers, **windows}
    image_predictor = Predictor(model, processor, output_attentions=True, return_confidence=args.confidence, **options)
    frame_predictor = Predictor(model, processor, **options)
    failed = 0

    def report(path: Path, error: Exception):
        nonlocal failed
        failed += 1
        tqdm.write(f"error: {path}: {error}", file=sys.stderr)

    try:
        saved = image_predictor(images, load_image, lambda path, result: save(result, tasks, args.output / path.stem))
        with closing(saved):
            for path, failure in tqdm(saved, total=len(images), unit="image", disable=len(images) < 2):
                if failure:
                    report(path, failure)
        for path in videos:
            try:
                predict_video(frame_predictor, path, tasks, args.output)
            except PREDICTION_ERRORS as error:
                report(path, error)
    except OSError as error:  # such as a full disk, which stays full for the next image
        sys.exit(f"error: cannot write to {args.output}: {error}")

    seconds = {part: image_predictor.seconds[part] + frame_predictor.seconds[part] for part in image_predictor.seconds}
    report_done(f"{len(images + videos) - failed} of {len(images + videos)} inputs: {args.output}", seconds)
    if others:
        print(f"left out, because their names are not of images or videos: {_list(others)}")
    sys.exit(1 if failed else 0)
