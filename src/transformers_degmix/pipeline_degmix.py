"""`pipeline("multi-task-dense-prediction")`: images in, maps of all tasks in the images' own sizes out."""

import os
from collections import defaultdict
from copy import copy
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import Pipeline
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import ModelOutput

from .images_degmix import load_image, upright
from .sliding_windows import DEFAULT_OVERLAP, check_window, predict_maps_in_windows


class MultiTaskDensePredictionPipeline(Pipeline):
    """Predicts the maps of all tasks of an image.

    ```python
    >>> import transformers_degmix
    >>> from transformers import pipeline

    >>> predict = pipeline("multi-task-dense-prediction", model=path)
    >>> predict("kitchen.jpg")["depth"].shape
    torch.Size([480, 640])
    ```
    """

    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = False

    def __call__(
        self, inputs: str | os.PathLike | Image.Image | list[str | os.PathLike | Image.Image], **kwargs: Any
    ) -> Any:
        """The predictions of all tasks.

        Args:
            inputs: path, `http(s):` or `data:` URL, or PIL image, or a list of them.
            batch_size (`int`, *optional*, defaults to 1):
                Images handed to the model at once. Within a batch, only images of one size run together, so that
                predictions do not depend on the batch.
            do_resize (`bool`, *optional*):
                Replaces the processor's own. `False` predicts images at their own size, as a whole.
            window_size (`tuple[int, int]`, *optional*):
                Height and width of overlapping windows. Images are predicted in them at their own size: the processor
                neither resizes nor pads them. For images that are larger than in training, or than memory allows; see
                [`predict_maps_in_windows`]. As many windows run together as a batch has images.
            window_overlap (`float`, *optional*, defaults to 0.25): share of a window in common with the next.
            timeout (`float`, *optional*): seconds to wait for a server.
            return_confidence (`bool`, *optional*, defaults to `False`):
                Whether to return a pair for each image: the predictions, and how sure they are, task -> map in [0, 1].

        Returns:
            For each image the dictionary of `DeGMixImageProcessor.post_process_dense_prediction`, task -> tensor on
            the CPU, in the image's size after EXIF rotation; with `return_confidence`, its pair of dictionaries.

        Raises:
            ValueError: an image cannot be read (the message names the file), or a window is out of range.
        """
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(
        self,
        timeout: float | None = None,
        do_resize: bool | None = None,
        window_size: tuple[int, int] | None = None,
        window_overlap: float | None = None,
        return_confidence: bool | None = None,
    ) -> tuple[dict, dict, dict]:
        preprocess, forward, postprocess = (
            {name: value for name, value in step.items() if value is not None}
            for step in (
                {"timeout": timeout, "do_resize": do_resize, "window_size": window_size},
                {
                    "window_size": window_size,
                    "window_overlap": window_overlap,
                    "return_confidence": return_confidence,
                },
                {"do_resize": do_resize, "return_confidence": return_confidence},
            )
        )
        if window_size:
            check_window(window_size, window_overlap or 0)
        return preprocess, forward, postprocess

    def _processor(self, do_resize: bool | None) -> ImageProcessingMixin:
        """The image processor, or a copy with this `do_resize`, which post-processing undoes."""
        if do_resize is None:
            return self.image_processor
        processor = copy(self.image_processor)
        processor.do_resize = do_resize
        return processor

    def preprocess(
        self,
        image: str | os.PathLike | Image.Image,
        timeout: float | None = None,
        do_resize: bool | None = None,
        window_size: tuple[int, int] | None = None,
    ) -> dict[str, Any]:
        image = upright(image) if isinstance(image, Image.Image) else load_image(image, timeout)
        options = {"do_resize": False, "do_pad": False} if window_size else {}
        inputs = self._processor(do_resize)(image, return_tensors="pt", **options).to(self.dtype)
        # Nested, because the pipeline concatenates plain tensors of a batch, which need one size, and lists the rest.
        return {"inputs": inputs, "target_size": (image.height, image.width)}

    def _forward(
        self,
        model_inputs: dict[str, Any],
        window_size: tuple[int, int] | None = None,
        window_overlap: float = DEFAULT_OVERLAP,
        return_confidence: bool = False,
    ) -> dict[str, Any]:
        """Logits. In windows, the result: memory then holds all logits of an image only if confidences need them."""
        inputs, target_size = model_inputs["inputs"], model_inputs["target_size"]
        batch_size = len(inputs) if isinstance(inputs, list) else 1

        def predict(pixel_values: Tensor) -> list[Any]:
            if window_size:
                post_process = self.image_processor.post_process_dense_prediction
                windows = (window_size, window_overlap, batch_size)
                return predict_maps_in_windows(self.model, pixel_values, post_process, *windows, return_confidence)
            logits = self.model(pixel_values).logits
            return [
                {task: maps[image : image + 1] for task, maps in logits.items()} for image in range(len(pixel_values))
            ]

        name = "result" if window_size else "logits"
        if not isinstance(inputs, list):
            return {name: predict(inputs["pixel_values"])[0], "target_size": target_size}
        by_size = defaultdict(list)
        for index, image in enumerate(inputs):
            by_size[image["pixel_values"].shape].append(index)
        predictions: list[Any] = [None] * len(inputs)
        for indices in by_size.values():
            batch = predict(torch.cat([inputs[index]["pixel_values"] for index in indices]))
            for index, prediction in zip(indices, batch):
                predictions[index] = prediction
        return {name: predictions, "target_size": target_size}

    def postprocess(
        self, model_outputs: dict[str, Any], do_resize: bool | None = None, return_confidence: bool = False
    ) -> dict[str, Tensor] | tuple[dict[str, Tensor], dict[str, Tensor]]:
        if "result" in model_outputs:
            return model_outputs["result"]
        outputs, target_size = ModelOutput(logits=model_outputs["logits"]), model_outputs["target_size"]
        return self._processor(do_resize).post_process_dense_prediction(outputs, [target_size], return_confidence)[0]


__all__ = ["MultiTaskDensePredictionPipeline"]
