"""Image processor of DeGMix on torchvision; where that is not installed, the one on PIL, with a warning."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import ChannelDimension, PILImageResampling, SizeDict
from transformers.utils import is_torchvision_available, logging

from .image_processing_pil_degmix import DeGMixImageProcessingMixin, DeGMixImageProcessorPil, resize_with_pil
from .images_degmix import to_pixels


class DeGMixImageProcessor(DeGMixImageProcessingMixin, TorchvisionBackend):
    """Image processor of DeGMix that resizes and normalises with torchvision.

    It runs on `device` if given, else on the device of a tensor. Arguments and results are as for
    [`DeGMixImageProcessorPil`].
    """

    def process_image(
        self,
        image: Image.Image | np.ndarray | Tensor,
        do_convert_rgb: bool,
        input_data_format: str | ChannelDimension | None = None,
        device: str | torch.device | None = None,
        **kwargs,
    ) -> Tensor:
        if device is None and isinstance(image, Tensor):
            device = image.device
        return torch.from_numpy(to_pixels(image, do_convert_rgb, input_data_format)).to(device)

    def resize(self, image: Tensor, size: SizeDict, resample: PILImageResampling, **kwargs) -> Tensor:
        """Uses PIL for filters that torchvision does not have for tensors on all devices and in all versions."""
        if resample in (PILImageResampling.BILINEAR, PILImageResampling.BICUBIC):
            return super().resize(image, size, resample, **kwargs)
        return torch.from_numpy(resize_with_pil(image.cpu().numpy(), size, resample)).to(image.device)


if not is_torchvision_available():
    logging.get_logger(__name__).warning_once(
        "`DeGMixImageProcessor` needs torchvision, which is not installed: `DeGMixImageProcessorPil` takes its place."
    )
    DeGMixImageProcessor = DeGMixImageProcessorPil  # type: ignore[misc]


__all__ = ["DeGMixImageProcessor"]
