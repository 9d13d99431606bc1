"""Image processor of DeGMix on torchvision."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import ChannelDimension

from .image_processing_pil_degmix import DeGMixImageProcessingMixin, to_pixels


class DeGMixImageProcessor(DeGMixImageProcessingMixin, TorchvisionBackend):
    """
    Image processor of DeGMix that resizes and normalises with torchvision, on `device` if given, else where a tensor
    is already. Needs torchvision; arguments and results are those of [`DeGMixImageProcessorPil`].
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


__all__ = ["DeGMixImageProcessor"]
