"""DeGMix: multi-task dense prediction as a Transformers model.

Importing this package registers the Auto classes and the pipeline.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForDepthEstimation,
    AutoModelForNormalEstimation,
    AutoModelForSemanticSegmentation,
)

# From its module: in Transformers 5.17 without torchvision, `transformers.AutoImageProcessor` is a placeholder.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils import is_torchvision_available

from .configuration_degmix import DeGMixConfig
from .hub.shipped import DEGMIX_LITE0_NYUD
from .image_processing_pil_degmix import DeGMixImageProcessorPil
from .modeling_degmix import DeGMixForMultiTaskDensePrediction, DeGMixModel, DeGMixPreTrainedModel
from .modeling_degmix_single_task import (
    DeGMixForDepthEstimation,
    DeGMixForNormalEstimation,
    DeGMixForSemanticSegmentation,
)
from .modeling_efficientnet_lite import EfficientNetLiteBackbone, EfficientNetLiteConfig
from .pipeline_degmix import MultiTaskDensePredictionPipeline
from .version import __version__


# If a backend is missing, Transformers says so and takes the other.
image_processor_classes = {"pil": DeGMixImageProcessorPil}
if is_torchvision_available():
    from .image_processing_degmix import DeGMixImageProcessor

    image_processor_classes["torchvision"] = DeGMixImageProcessor
else:
    # As Transformers does with its own image processors.
    DeGMixImageProcessor = DeGMixImageProcessorPil  # type: ignore[misc]

AutoConfig.register(DeGMixConfig.model_type, DeGMixConfig)
AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig)
AutoModel.register(DeGMixConfig, DeGMixForMultiTaskDensePrediction)
AutoModelForDepthEstimation.register(DeGMixConfig, DeGMixForDepthEstimation)
AutoModelForNormalEstimation.register(DeGMixConfig, DeGMixForNormalEstimation)
AutoModelForSemanticSegmentation.register(DeGMixConfig, DeGMixForSemanticSegmentation)
AutoImageProcessor.register(DeGMixConfig, image_processor_classes=image_processor_classes)
PIPELINE_REGISTRY.register_pipeline(
    "multi-task-dense-prediction",
    MultiTaskDensePredictionPipeline,
    pt_model=AutoModel,
    default={"model": (DEGMIX_LITE0_NYUD, __version__)},
    type="image",
)

# `save_pretrained` then copies the code, for `trust_remote_code=True` where this package is not installed.
DeGMixConfig.register_for_auto_class()
DeGMixForMultiTaskDensePrediction.register_for_auto_class("AutoModel")
DeGMixForDepthEstimation.register_for_auto_class("AutoModelForDepthEstimation")
DeGMixForNormalEstimation.register_for_auto_class("AutoModelForNormalEstimation")
DeGMixForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")
DeGMixImageProcessorPil.register_for_auto_class("AutoImageProcessor")
DeGMixImageProcessor.register_for_auto_class("AutoImageProcessor")


__all__ = [
    "DEGMIX_LITE0_NYUD",
    "DeGMixConfig",
    "DeGMixForDepthEstimation",
    "DeGMixForMultiTaskDensePrediction",
    "DeGMixForNormalEstimation",
    "DeGMixForSemanticSegmentation",
    "DeGMixImageProcessor",
    "DeGMixImageProcessorPil",
    "DeGMixModel",
    "DeGMixPreTrainedModel",
    "EfficientNetLiteBackbone",
    "EfficientNetLiteConfig",
    "MultiTaskDensePredictionPipeline",
    "__version__",
]
