"""DeGMix: multi-task dense prediction as a Transformers model. Importing this package registers the Auto classes."""

from transformers import AutoConfig, AutoModel

from .configuration_degmix import DeGMixConfig
from .modeling_degmix import DeGMixForMultiTaskDensePrediction, DeGMixModel, DeGMixPreTrainedModel
from .version import __version__


AutoConfig.register(DeGMixConfig.model_type, DeGMixConfig)
AutoModel.register(DeGMixConfig, DeGMixForMultiTaskDensePrediction)


__all__ = [
    "DeGMixConfig",
    "DeGMixForMultiTaskDensePrediction",
    "DeGMixModel",
    "DeGMixPreTrainedModel",
    "__version__",
]
