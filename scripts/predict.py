"""Predicts all tasks of images.

For each image: the arrays (NAME.npz), a picture per task (NAME.TASK.png) and all of them side by side, with legends
and the tasks' attention to each other (NAME.overview.png). With --window, images may be much larger than those the
model was trained with; the attention, which belongs to a window, is left out then.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import logging

from transformers_degmix import DeGMixForMultiTaskDensePrediction
from transformers_degmix.image_processing_pil_degmix import load_image, resized_size, to_pixels
from transformers_degmix.saving import load_model_directory, write_whole
from transformers_degmix.sliding_windows import DEFAULT_OVERLAP, add_window_arguments, check_window, predict_in_windows
from transformers_degmix.visualization import crop_attentions, draw_overview, draw_prediction


IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model directory, or name on the Hugging Face Hub")
    parser.add_argument(
        "--image",
        required=True,
        nargs="+",
        type=Path,
        help=f"image files, and directories of them ({', '.join(sorted(IMAGE_SUFFIXES))})",
    )
    parser.add_argument("--output", required=True, type=Path, help="directory for the results, made if need be")
    add_window_arguments(parser)
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    args = parser.parse_args()
    if args.window is None and args.window_overlap != DEFAULT_OVERLAP:
        parser.error("--window-overlap is for --window")
    return args


def find_images(paths: list[Path]) -> list[Path]:
    """The files among the paths, and the images in the directories among them, sorted by name.

    Raises:
        ValueError: a directory has no images, or two images have the same stem, after which results are named.
    """
    images = []
    for path in paths:
        found = sorted(file for file in path.iterdir() if _is_image_name(file)) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"there are no images in {path}")
        images += found
    by_stem = {}
    for image in images:
        if image.stem in by_stem:
            raise ValueError(f"{by_stem[image.stem]} and {image} would have results of the same name, {image.stem}.*")
        by_stem[image.stem] = image
    return images


def _is_image_name(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def check_output(images: list[Path], tasks: dict[str, dict], output: Path):
    """Raises ValueError if a result would overwrite an input, as a second run over its own results does."""
    inputs = {image.resolve() for image in images}
    for image in images:
        for ending in ("npz", "overview.png", *(f"{task}.png" for task in tasks)):
            result = output / f"{image.stem}.{ending}"
            if result.resolve() in inputs:
                raise ValueError(f"{result} is an input and would be overwritten, choose another --output")


@torch.inference_mode()
def predict(
    model: DeGMixForMultiTaskDensePrediction,
    processor: ImageProcessingMixin,
    path: Path,
    window_size: tuple[int, int] | None,
    overlap: float,
) -> tuple[Image.Image, dict[str, Tensor], Tensor | None]:
    """The image as the model sees it, upright RGB, a map per task in its size, and its attention without padding.

    In windows there is no attention of the image, and without decoder there is none at all.

    Raises:
        ValueError: the file holds no image that can be used.
    """
    image = load_image(path)
    pixels = np.moveaxis(to_pixels(image, do_convert_rgb=True), 0, -1).round().clip(0, 255).astype(np.uint8)
    picture, size = Image.fromarray(pixels), pixels.shape[:2]
    if window_size:
        inputs = processor(image, return_tensors="pt", do_resize=False, do_pad=False).to(model.device, model.dtype)
        outputs = predict_in_windows(model, inputs["pixel_values"], window_size, overlap)
        return picture, processor.post_process_dense_prediction(outputs)[0], None
    inputs = processor(image, return_tensors="pt").to(model.device, model.dtype)
    outputs = model(**inputs, output_attentions=True)
    predictions = processor.post_process_dense_prediction(outputs, [size])[0]
    resized = resized_size(size, processor.size) if processor.do_resize else size
    attentions = None
    if outputs.attentions:
        attentions = crop_attentions(outputs.attentions[0][0], inputs["pixel_values"].shape[-2:], resized)
    return picture, {task: values.cpu() for task, values in predictions.items()}, attentions


def save(
    image: Image.Image,
    predictions: dict[str, Tensor],
    attentions: Tensor | None,
    tasks: dict[str, dict],
    base: Path,
):
    """Writes everything about one image, under names that begin with `base`."""

    def save_picture(picture: Image.Image, ending: str):
        write_whole(base.with_name(f"{base.name}.{ending}"), lambda file: picture.save(file, format="PNG"))

    arrays = {task: values.numpy() for task, values in predictions.items()}
    write_whole(base.with_name(f"{base.name}.npz"), lambda file: np.savez_compressed(file, **arrays))
    for task, values in predictions.items():
        save_picture(draw_prediction(values, tasks[task]), f"{task}.png")
    save_picture(draw_overview(image, predictions, tasks, attentions), "overview.png")


def main():
    args = parse_args()
    logging.disable_progress_bar()
    try:
        if args.window:
            check_window(args.window, args.window_overlap)
        images = find_images(args.image)
        model, processor = load_model_directory(args.model, args.device, getattr(torch, args.dtype))
        tasks = model.config.tasks
        check_output(images, tasks, args.output)
        args.output.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")

    failed = 0
    for path in tqdm(images, unit="image", disable=len(images) == 1):
        try:
            results = predict(model, processor, path, args.window, args.window_overlap)
        except (ValueError, RuntimeError, MemoryError) as error:  # not an image, or more than memory holds
            tqdm.write(f"error: {path}: {error}", file=sys.stderr)
            failed += 1
            continue
        try:
            save(*results, tasks, args.output / path.stem)
        except OSError as error:  # a full disk will not get better with the next image
            sys.exit(f"error: cannot write the results of {path}: {error}")
    print(f"{len(images) - failed} of {len(images)} images: {args.output}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
