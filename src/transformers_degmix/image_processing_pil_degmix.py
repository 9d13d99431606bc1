"""Image processor of DeGMix: images and label maps in, tensors out; logits in, maps of the images' own size out.

What both backends share is in [`DeGMixImageProcessingMixin`]. Geometry, with sizes as (height, width):

    own size --resize--> resized size --centred padding--> padded size = size of the logits

and back again in `post_process_dense_prediction`.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput
from transformers.image_processing_utils import BatchFeature
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
    get_image_size_for_max_height_width,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import ModelOutput, TensorType, logging

from .configuration_degmix import NYUD_TASKS
from .images_degmix import LabelMap, Size, load_image, resize_nearest, to_label, to_pixels
from .layers_degmix import crop_centred, pad_centred
from .tasks import IGNORE_INDEX, TASK_KINDS, task_of_kind


if TYPE_CHECKING:
    # `save_pretrained` copies modules that are imported relatively. `trust_remote_code=True` needs these too.
    from .image_processing_degmix import DeGMixImageProcessor  # noqa: F401
    from .pipeline_degmix import MultiTaskDensePredictionPipeline  # noqa: F401

logger = logging.get_logger(__name__)

# The class of each backend, for `AutoImageProcessor.from_pretrained(..., trust_remote_code=True)`.
AUTO_MAP = {
    "AutoImageProcessor": {
        "pil": "image_processing_pil_degmix.DeGMixImageProcessorPil",
        "torchvision": "image_processing_degmix.DeGMixImageProcessor",
    }
}


def resized_size(size: Size, target: SizeDict) -> Size:
    """Size of an image of `size` after resizing to `target`.

    `height` and `width` are taken as they are; `shortest_edge` (with `longest_edge` as a limit) and `max_height` and
    `max_width` keep the aspect ratio, but leave at least one pixel.

    Raises:
        ValueError: `target` has none of these.
    """
    if target.height and target.width:
        return target.height, target.width
    if target.shortest_edge:
        height, width = get_size_with_aspect_ratio(size, target.shortest_edge, target.longest_edge)
    elif target.max_height and target.max_width:
        height, width = get_image_size_for_max_height_width(size, target.max_height, target.max_width)
    else:
        raise ValueError(
            "`size` must have `height` and `width`, or `shortest_edge`, or `max_height` and `max_width`, "
            f"got {dict(target)}"
        )
    return max(1, height), max(1, width)


def padded_size(sizes: list[Size], pad_size: SizeDict | None, size_divisor: int | None) -> Size:
    """Size to which a batch of images of `sizes` is padded.

    That is `pad_size`, else the largest height and width, each rounded up to a multiple of `size_divisor`.

    Raises:
        ValueError: an image is larger than `pad_size`.
    """
    if pad_size is None:
        divisor = size_divisor or 1
        height, width = (-(-max(lengths) // divisor) * divisor for lengths in zip(*sizes))
        return height, width
    for index, (height, width) in enumerate(sizes):
        if height > pad_size.height or width > pad_size.width:
            raise ValueError(
                f"image {index} of {height} x {width} is larger than `pad_size`, {pad_size.height} x {pad_size.width}"
            )
    return pad_size.height, pad_size.width


def resize_with_pil(image: np.ndarray, size: SizeDict, resample: PILImageResampling) -> np.ndarray:
    """`(channels, height, width)` in float32, channel by channel, because PIL rounds several channels to 8 bits."""
    channels = (Image.fromarray(channel).resize((size.width, size.height), resample) for channel in image)
    return np.stack([np.array(channel) for channel in channels])


def to_resampling(resample: Any) -> PILImageResampling:
    """PIL's filter for one of PIL's filters, its number, or torchvision's `InterpolationMode` of the same name.

    Raises:
        ValueError: it is none of these.
    """
    try:
        if isinstance(resample, int):
            return PILImageResampling(resample)
        return PILImageResampling[resample.name.removesuffix("_EXACT")]
    except (AttributeError, KeyError, ValueError):
        filters = ", ".join(f"{number.name} ({number:d})" for number in PILImageResampling)
        raise ValueError(
            f"`resample` must be one of PIL's filters {filters}, or torchvision's `InterpolationMode` of the same "
            f"name, got {resample!r}"
        ) from None


class DeGMixBatchFeature(BatchFeature):
    """A [`BatchFeature`] whose `labels`, a dictionary, follow the images to their device and keep their dtypes."""

    def to(self, *args, **kwargs) -> "DeGMixBatchFeature":
        super().to(*args, **kwargs)
        if "labels" in self:
            self["labels"] = BatchFeature(self["labels"]).to(self["pixel_values"][0].device).data
        return self


class DeGMixImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    resample (`PILImageResampling`, `int` or torchvision's `InterpolationMode`, *optional*):
        Filter for images. Labels take the nearest pixel.
    size_divisor (`int`, *optional*):
        Without `pad_size`, images are padded to multiples of it.
    tasks (`dict` or `list`, *optional*):
        Tasks in order: name -> kind, or `DeGMixConfig.tasks` as it is, or the list in `config.json`.
    """  # noqa: D205, D212 (the form that Transformers reads)

    resample: Any  # checked by `to_resampling`; the base class refuses an `InterpolationMode`
    size_divisor: int | None
    tasks: dict[str, Any] | list[dict[str, Any]] | None


class DeGMixImageProcessingMixin:
    """Everything about DeGMix' image processors that does not depend on the backend.

    A backend class adds `process_image` and `resize`, both for one image; filters come from [`to_resampling`].
    """

    valid_kwargs = DeGMixImageProcessorKwargs
    model_input_names = ["pixel_values"]

    do_convert_rgb = True
    do_resize = False
    resample = PILImageResampling.BILINEAR
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    do_pad = True
    pad_size = None
    size_divisor = None
    tasks: dict[str, Any] = NYUD_TASKS

    def __init__(self, **kwargs: Unpack[DeGMixImageProcessorKwargs]):
        if kwargs.get("tasks") is None:
            kwargs["tasks"] = self.tasks
        super().__init__(**kwargs)

    def preprocess(
        self,
        images: ImageInput,
        labels: dict[str, LabelMap | list[LabelMap]] | None = None,
        **kwargs: Unpack[DeGMixImageProcessorKwargs],
    ) -> DeGMixBatchFeature:
        """Images and labels as the model takes them.

        Args:
            images:
                One image or a list of images: PIL image, path, `http(s):` or `data:` URL, array or tensor
                `(height, width)`, `(channels, height, width)` or `(height, width, channels)`, or a batch of these
                with four axes. [`to_pixels`] says how modes and dtypes are converted. As everywhere in Transformers,
                arrays are expected in 0..255; for values in [0, 1] set `do_rescale=False`.
            labels:
                For any of the tasks, one label map per image (for a single image, a single map), of the image's size:
                PIL image, array or tensor, `(height, width)`; three channels first or last for normals. 8-bit maps
                are decoded as the task's kind says, other dtypes hold class ids, metres, unit vectors or strengths;
                255 is ignored. See [`to_label`].
            kwargs:
                Settings for this call. `post_process_dense_prediction` uses the processor's own settings: to have the
                resizing undone, set `do_resize` and `size` on the processor.

        Returns:
            `pixel_values` `(batch, 3, height, width)`, float32, and with labels `labels`, a dictionary: per task
            `(batch, height, width)`, for normals `(batch, 3, height, width)`, of dtype `TaskKind.label_dtype`; 255 on
            pixels that are padding or unknown.

        Raises:
            ValueError: an image cannot be read or used, a label map does not fit its image, a task is unknown, there
                are not as many maps as images, or an image is larger than `pad_size`. The message names
                the image by its index, and the task.
        """
        return super().preprocess(images, labels, **kwargs)

    def _standardize_kwargs(
        self, tasks=None, size_divisor: int | None = None, resample=None, **kwargs
    ) -> dict[str, Any]:
        if size_divisor is not None and size_divisor < 1:
            raise ValueError(f"`size_divisor` must be at least 1, got {size_divisor}")
        return {
            **super()._standardize_kwargs(**kwargs),
            "tasks": _task_kinds(self.tasks if tasks is None else tasks),
            "size_divisor": size_divisor,
            "resample": None if resample is None else to_resampling(resample),
        }

    def _validate_preprocess_kwargs(self, do_center_crop: bool | None = None, **kwargs):
        if do_center_crop:
            raise ValueError("`do_center_crop` is not supported: predictions cover the whole image")
        super()._validate_preprocess_kwargs(**kwargs)

    def _prepare_image_like_inputs(self, images: list, **kwargs) -> list:
        prepared = []
        for index, image in enumerate(images):
            if isinstance(image, str | os.PathLike):
                image = load_image(image)
            try:
                prepared.append(self.process_image(image, **kwargs))
            except ValueError as error:
                raise ValueError(f"image {index}: {error}") from error
        return prepared

    def _preprocess_image_like_inputs(
        self,
        images: ImageInput,
        labels: dict[str, LabelMap | list[LabelMap]] | None,
        do_convert_rgb: bool,
        input_data_format: str | ChannelDimension | None,
        do_resize: bool,
        size: SizeDict | None,
        do_pad: bool,
        pad_size: SizeDict | None,
        size_divisor: int | None,
        tasks: dict[str, str],
        return_tensors: str | TensorType | None,
        device: str | torch.device | None = None,
        **kwargs,
    ) -> DeGMixBatchFeature:
        is_batch = isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4
        images = list(images) if is_batch else [images]
        if not images:
            raise ValueError("expected at least one image, got none")
        are_floats = ["float" in str(getattr(image, "dtype", "")) for image in images]
        images = self._prepare_image_like_inputs(
            images, do_convert_rgb=do_convert_rgb, input_data_format=input_data_format, device=device
        )
        if kwargs["do_rescale"] and any(is_float and 0 < x.max() <= 1 for x, is_float in zip(images, are_floats)):
            logger.warning_once(
                "no value of an image is above 1, but values from 0 to 255 are expected: set `do_rescale=False`"
            )
        own_sizes = [tuple(image.shape[-2:]) for image in images]
        resized_sizes = [resized_size(own_size, size) for own_size in own_sizes] if do_resize else own_sizes
        padded_sizes = [padded_size(resized_sizes, pad_size, size_divisor)] * len(images) if do_pad else resized_sizes

        inputs = {
            "pixel_values": [
                pad_centred(self._preprocess(image, resized, do_resize=do_resize, **kwargs), padded)
                for image, resized, padded in zip(images, resized_sizes, padded_sizes)
            ]
        }
        if labels is not None:
            geometry = list(zip(own_sizes, resized_sizes, padded_sizes))
            maps = self._preprocess_labels(labels, tasks, geometry, is_batch, inputs["pixel_values"][0].device)
            inputs["labels"] = BatchFeature(maps, tensor_type=return_tensors).data
        return DeGMixBatchFeature(inputs, tensor_type=return_tensors)

    def _preprocess(
        self,
        image: np.ndarray | Tensor,
        size: Size,
        do_resize: bool,
        resample: PILImageResampling,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | tuple[float, ...],
        image_std: float | tuple[float, ...],
        **kwargs,
    ) -> Tensor:
        """One image `(channels, height, width)` of the backend's type -> float32 `(channels, *size)`."""
        if do_resize and resample == PILImageResampling.NEAREST:
            image = resize_nearest(torch.as_tensor(image), size)
        elif do_resize:
            image = self.resize(image, SizeDict(height=size[0], width=size[1]), resample)
        image = torch.as_tensor(image)
        mean, std = (
            torch.as_tensor(value, dtype=image.dtype, device=image.device).view(-1, 1, 1)
            for value in ((image_mean, image_std) if do_normalize else (0.0, 1.0))
        )
        # In place: the image is the copy that `to_pixels` made.
        return image.mul_((rescale_factor if do_rescale else 1) / std).sub_(mean / std)

    def _preprocess_labels(
        self,
        labels: dict[str, LabelMap | list[LabelMap]],
        tasks: dict[str, str],
        geometry: list[tuple[Size, Size, Size]],
        is_batch: bool,
        device: torch.device,
    ) -> dict[str, list[Tensor]]:
        """The labels of each task, one tensor per image; `geometry` has each image's own, resized and padded size."""
        if not isinstance(labels, Mapping):
            raise ValueError(f"`labels` must be a dictionary of task -> maps, got a {type(labels).__name__}")
        prepared = {}
        for task, maps in labels.items():
            if task not in tasks:
                raise ValueError(f"`labels` must be of some of the tasks {list(tasks)}, got {task!r}")
            if not isinstance(maps, list | tuple) and (not is_batch or isinstance(maps, Image.Image)):
                maps = [maps]
            if len(maps) != len(geometry):
                raise ValueError(f"`labels[{task!r}]` has {len(maps)} maps for {len(geometry)} images")
            kind = TASK_KINDS[tasks[task]]
            prepared[task] = []
            for index, (label, (own_size, resized, padded)) in enumerate(zip(maps, geometry)):
                try:
                    label = to_label(label, kind, own_size)
                except (TypeError, ValueError) as error:
                    raise ValueError(f"`labels[{task!r}]` of image {index}: {error}") from error
                label = pad_centred(resize_nearest(label, resized), padded, kind.label_padding)
                label = torch.where(kind.unknown(label), IGNORE_INDEX, label).to(device)
                prepared[task].append(label if kind.label_channels == 3 else label.squeeze(0))
        return prepared

    def post_process_dense_prediction(
        self,
        outputs: ModelOutput,
        target_sizes: list[Size] | Tensor | None = None,
        return_confidence: bool = False,
    ) -> list[dict[str, Tensor]] | list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """Logits -> predictions, one dictionary per image, in the images' own sizes.

        An image of `(height, width)` fills the middle `(h, w)` of its logits `(H, W)`, from row `(H - h) // 2` and
        column `(W - w) // 2`. `(h, w)` is its size after resizing by the processor's `do_resize` and `size`. This part
        is cut out, interpolated bilinearly to `(height, width)` if it has another size, and then activated.

        Args:
            outputs: the model's, with `logits`, task -> `(batch, num_labels, H, W)`, of any floating dtype.
            target_sizes: (height, width) of each image as it went into the processor (after EXIF rotation), as a list
                or a tensor `(batch, 2)`. Without them, the whole padded maps are returned.
            return_confidence: whether to return, for each image, a pair: the predictions and their confidences.

        Returns:
            Per image, task -> tensor on the logits' device: segmentation int64 `(height, width)`, class ids; depth
            float32 `(height, width)`, metres, at least 0; normals float32 `(3, height, width)`, unit length; saliency
            and boundary float32 `(height, width)` in [0, 1].

            Confidences of the same tasks are float32 `(height, width)` in [0, 1]. For segmentation, they are the
            probability of the predicted class; for saliency and boundary, of the likelier side. Depth and normals have
            no probabilities: their confidences, from the predictions around a pixel, only order pixels, the surest
            with the largest values. `degmix evaluate --calibration` measures how good they are on your data.

        Raises:
            ValueError: the processor does not know a task, `target_sizes` is not as long as the batch, an image of
                such a size does not fit into the logits, or logits are NaN or infinite.
        """
        kinds = self._kinds(outputs)
        sizes = _target_sizes(target_sizes, len(next(iter(outputs.logits.values()))))
        results: list[Any] = []
        for index, size in enumerate(sizes):
            predictions, confidences = {}, {}
            for task, logits in outputs.logits.items():
                kind = TASK_KINDS[kinds[task]]
                image_logits = self._to_target_size(logits[index : index + 1].float(), size)
                predictions[task] = kind.activation(image_logits)[0]
                if return_confidence:
                    confidences[task] = kind.confidence(image_logits)[0]
            results.append((predictions, confidences) if return_confidence else predictions)
        return results

    def post_process_depth_estimation(
        self, outputs: ModelOutput, target_sizes: list[Size] | Tensor | None = None, task: str | None = None
    ) -> list[dict[str, Tensor]]:
        """Metres of one depth task, as Transformers' depth estimators return them.

        Args:
            outputs: with the logits of all tasks, or with one map `predicted_depth` `(batch, H, W)`.
            target_sizes: (height, width) of each image, as in `post_process_dense_prediction`.
            task: the depth task, if `outputs` has the logits of several.

        Returns:
            Per image `{"predicted_depth": depth}`, float32 `(height, width)`, metres, at least 0: the map of
            `post_process_dense_prediction`.

        Raises:
            ValueError: as in `post_process_dense_prediction`; no task is a depth task; or several are and `task` is
                none of them.
        """
        depth = getattr(outputs, "predicted_depth", None)
        logits = self._logits_of_kind("depth", outputs, task) if depth is None else depth.unsqueeze(1)
        activation = TASK_KINDS["depth"].activation
        return [{"predicted_depth": activation(x)[0]} for x in self._in_target_sizes(logits, target_sizes)]

    def post_process_normal_estimation(
        self, outputs: ModelOutput, target_sizes: list[Size] | Tensor | None = None, task: str | None = None
    ) -> list[dict[str, Tensor]]:
        """Unit vectors of one task of surface normals, as Transformers' normal estimators return them.

        x points to the right, y down and z towards the camera. Normals of TIPSv2 have x to the left and y up, as the
        pictures in its authors' notebook show (github.com/google-deepmind/tips, `TIPS_decoder_inference.ipynb`).

        Arguments and errors are as in `post_process_depth_estimation`, with `normals` `(batch, 3, H, W)` in place of
        `predicted_depth`.

        Returns:
            Per image `{"normals": normals}`, float32 `(3, height, width)`, unit length: the map of
            `post_process_dense_prediction`.
        """
        logits = getattr(outputs, "normals", None)
        if logits is None:
            logits = self._logits_of_kind("normals", outputs, task)
        activation = TASK_KINDS["normals"].activation
        return [{"normals": activation(x)[0]} for x in self._in_target_sizes(logits, target_sizes)]

    def post_process_semantic_segmentation(
        self,
        outputs: ModelOutput,
        target_sizes: list[Size] | Tensor | None = None,
        return_segmentation_scores: bool = False,
        task: str | None = None,
    ) -> list[Tensor] | list[SemanticSegmentationPostProcessorOutput]:
        """Class ids of one segmentation task, as Transformers' semantic segmenters return them.

        Other arguments and errors are as in `post_process_depth_estimation`, with a tensor `logits`
        `(batch, num_labels, H, W)` in place of `predicted_depth`.

        Args:
            return_segmentation_scores: whether to return the logits too.

        Returns:
            Per image int64 `(height, width)`, class ids: the map of `post_process_dense_prediction`; with scores, an
            output with this map as `segmentation`, and `segmentation_scores` float32 `(num_labels, height, width)`.
        """
        logits = outputs.logits
        if isinstance(logits, dict):
            logits = self._logits_of_kind("segmentation", outputs, task)
        results: list[Any] = []
        for scores in self._in_target_sizes(logits, target_sizes):
            segmentation = TASK_KINDS["segmentation"].activation(scores)[0]
            if return_segmentation_scores:
                data = {"segmentation": segmentation, "segmentation_scores": scores[0]}
                segmentation = SemanticSegmentationPostProcessorOutput(data=data)
            results.append(segmentation)
        return results

    def _kinds(self, outputs: ModelOutput) -> dict[str, str]:
        """The kind of each task in the outputs of the multi-task model."""
        unknown = [task for task in outputs.logits if task not in self.tasks]
        if unknown:
            raise ValueError(f"`outputs` has logits of {unknown}; the tasks of the processor are {list(self.tasks)}")
        return {task: self.tasks[task] for task in outputs.logits}

    def _logits_of_kind(self, kind: str, outputs: ModelOutput, task: str | None) -> Tensor:
        """The logits of the one or the chosen task of a kind, from the outputs of the multi-task model."""
        return outputs.logits[task_of_kind(kind, self._kinds(outputs), task, "task")]

    def _in_target_sizes(self, logits: Tensor, target_sizes: list[Size] | Tensor | None) -> Iterator[Tensor]:
        """Logits `(batch, num_labels, H, W)` -> float32 `(1, num_labels, height, width)` of each image."""
        for index, size in enumerate(_target_sizes(target_sizes, len(logits))):
            yield self._to_target_size(logits[index : index + 1].float(), size)

    def _to_target_size(self, logits: Tensor, target_size: Size | Tensor | None) -> Tensor:
        """Logits `(1, num_labels, H, W)` of one image -> logits of its own size."""
        if not logits.isfinite().all():
            raise ValueError("the logits are NaN or infinite: was the training stable? float16 has too small a range")
        if target_size is None:
            return logits
        height, width = (int(length) for length in target_size)
        size = resized_size((height, width), self.size) if self.do_resize else (height, width)
        if size[0] > logits.shape[-2] or size[1] > logits.shape[-1]:
            raise ValueError(
                f"an image of {height} x {width} (`target_sizes`) goes into the model as {size[0]} x {size[1]}, "
                f"which does not fit into logits of {logits.shape[-2]} x {logits.shape[-1]}"
            )
        logits = crop_centred(logits, size)
        if size == (height, width):
            return logits
        return F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)

    def to_dict(self) -> dict[str, Any]:
        """As in the base class, with both backends, and tasks as a list to keep their order: JSON sorts keys."""
        tasks = [{"name": name, "kind": kind} for name, kind in self.tasks.items()]
        return {**super().to_dict(), "tasks": tasks, "auto_map": AUTO_MAP}


def _target_sizes(target_sizes: Sequence[Size] | Tensor | None, batch_size: int) -> Sequence[Size | None] | Tensor:
    """A size for each image, or `None`."""
    if target_sizes is None:
        return [None] * batch_size
    if len(target_sizes) != batch_size:
        raise ValueError(f"`target_sizes` has {len(target_sizes)} sizes for {batch_size} images")
    return target_sizes


def _task_kinds(tasks: dict[str, str | dict[str, Any]] | list[dict[str, Any]]) -> dict[str, str]:
    """Task name -> kind, from any of the forms that [`DeGMixImageProcessorKwargs`] allows."""
    if isinstance(tasks, list):
        tasks = {task.get("name"): task for task in tasks}
    kinds: dict[str, Any] = {n: task.get("kind") if isinstance(task, dict) else task for n, task in tasks.items()}
    for name, kind in kinds.items():
        if not isinstance(name, str):
            raise ValueError(f"`tasks` as a list needs a `name` in each, got {name!r}")
        if kind not in list(TASK_KINDS):  # the list, because a value can be unhashable
            raise ValueError(f"`tasks[{name!r}]` must be of one of the kinds {sorted(TASK_KINDS)}, got {kind!r}")
    return kinds


class DeGMixImageProcessorPil(DeGMixImageProcessingMixin, PilBackend):
    """Image processor of DeGMix that works with PIL and NumPy on the CPU.

    Its tensors equal [`DeGMixImageProcessor`]'s except for float rounding.

    Args:
        do_resize (`bool`, *optional*, defaults to `False`): whether to resize images to `size`.
        size (`dict[str, int]`, *optional*):
            `{"height", "width"}`; or, keeping the aspect ratio, `{"shortest_edge"}`, with an optional
            `"longest_edge"` as a limit, or `{"max_height", "max_width"}`.
        resample (`PILImageResampling`, `int` or torchvision's `InterpolationMode`, *optional*, defaults to bilinear):
            Filter for images; labels take the nearest pixel, as images do with NEAREST.
        do_convert_rgb (`bool`, *optional*, defaults to `True`): whether to make three channels of any image.
        do_rescale (`bool`, *optional*, defaults to `True`): whether to multiply by `rescale_factor`.
        rescale_factor (`float`, *optional*, defaults to 1/255): what to multiply by.
        do_normalize (`bool`, *optional*, defaults to `True`): whether to subtract mean and divide by deviation.
        image_mean (`tuple[float, float, float]`, *optional*, defaults to ImageNet's): mean of each channel.
        image_std (`tuple[float, float, float]`, *optional*, defaults to ImageNet's): deviation of each channel.
        do_pad (`bool`, *optional*, defaults to `True`):
            Whether to pad images on all sides with 0 after normalisation; labels with the kind's `label_padding`.
        pad_size (`dict[str, int]`, *optional*):
            `{"height", "width"}` to pad to. Defaults to the largest height and the largest width in the batch.
        size_divisor (`int`, *optional*): without `pad_size`, heights and widths are rounded up to multiples of it.
        tasks (`dict` or `list`, *optional*):
            Tasks in order: name -> kind, or `DeGMixConfig.tasks` as it is. Defaults to NYUD-v2's.

    Raises:
        ValueError: a task is of an unknown kind, or `resample` is no filter.

    Example:
    ```python
    >>> processor = DeGMixImageProcessorPil(tasks=model.config.tasks)
    >>> inputs = processor(image, labels={"depth": depth}, return_tensors="pt")
    >>> outputs = model(**inputs)
    >>> maps = processor.post_process_dense_prediction(outputs, target_sizes=[(image.height, image.width)])[0]
    ```
    """

    def process_image(
        self,
        image: Image.Image | np.ndarray | Tensor,
        do_convert_rgb: bool,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs,
    ) -> np.ndarray:
        return to_pixels(image, do_convert_rgb, input_data_format)

    def resize(self, image: np.ndarray, size: SizeDict, resample: PILImageResampling, **kwargs) -> np.ndarray:
        return resize_with_pil(image, size, resample)


__all__ = ["DeGMixImageProcessorPil"]
