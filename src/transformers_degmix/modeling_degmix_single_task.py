"""DeGMix for one task, under the names and with the outputs of Transformers' models of that task."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from transformers.modeling_outputs import DepthEstimatorOutput, SemanticSegmenterOutput
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES,
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
)
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_degmix import DeGMixConfig, complete_fields
from .modeling_degmix import DeGMixForMultiTaskDensePrediction
from .tasks import task_of_kind


@dataclass
class DeGMixNormalEstimatorOutput(ModelOutput):
    """Output of [`DeGMixForNormalEstimation`].

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*, with `labels`):
            The task's loss, times its weight.
        normals (`torch.Tensor` of shape `(batch_size, 3, height, width)`):
            Normals at the size of the input, of any length.
        hidden_states (`tuple[torch.Tensor]`, *optional*): see [`DeGMixModelOutput`].
        attentions (`tuple[torch.Tensor]`, *optional*): see [`DeGMixModelOutput`].
    """

    loss: Tensor | None = None
    normals: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class DeGMixForSingleTask(DeGMixForMultiTaskDensePrediction):
    """Base class of the models of one task.

    They load checkpoints of [`DeGMixForMultiTaskDensePrediction`] and predict the same to the last bit. They leave out
    the heads and task queries of other tasks, and the mixers of tasks that their task does not attend to.
    `attentions` has only the query of their task.

    Args:
        config: of the checkpoint; `single_task` names the task if several are of the class' kind. The model's own
            configuration is a copy without the tasks that it does not need.

    Raises:
        ValueError: no task is of that kind; or several are, and `single_task` names none of them.
    """

    kind: ClassVar[str]
    output: ClassVar[Callable[..., ModelOutput]]
    _keys_to_ignore_on_load_unexpected = [r"^heads\.", r"^model\.mixers\.", r"^model\.query\.attentions\."]

    def __init__(self, config: DeGMixConfig):
        config = copy.deepcopy(config)
        kinds = {name: fields["kind"] for name, fields in config.tasks.items()}
        config.single_task = task = task_of_kind(self.kind, kinds, config.single_task, "single_task")
        needed = config.attended(task) if config.use_decoder else [task]
        attended = {name: [other for other in config.attended(name) if other in needed] for name in needed}
        config.tasks = complete_fields({name: {**config.tasks[name], "attends_to": attended[name]} for name in needed})
        super().__init__(config)
        for modules, _ in self.task_parts():
            if modules is not self.model.mixers:
                for other in set(needed) - {task}:
                    del modules[other]

    def add_task(self, *args, **kwargs):
        """Refused with a `ValueError`."""
        raise ValueError("a model of one task cannot grow: change the tasks of the multi-task model and load it again")

    remove_task = add_task

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> ModelOutput:
        """The prediction of the task.

        Args:
            pixel_values, output_hidden_states, output_attentions:
                See [`DeGMixForMultiTaskDensePrediction`].
            labels (`torch.Tensor`, *optional*): ground truth of the task.

        Raises:
            ValueError: see [`DeGMixForMultiTaskDensePrediction`].
        """
        task = self.config.single_task
        outputs = super().forward(
            pixel_values,
            labels=None if labels is None else {task: labels},
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            **kwargs,
        )
        return self.output(
            outputs.logits[task],
            loss=outputs.loss,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class DeGMixForDepthEstimation(DeGMixForSingleTask):
    """DeGMix for one depth task: `predicted_depth`, metres `(batch_size, height, width)`, at the size of the input.

    Values can be negative. The image processor's `post_process_depth_estimation` turns these into 0.
    """

    kind = "depth"

    @staticmethod
    def output(logits: Tensor, **others) -> DepthEstimatorOutput:
        return DepthEstimatorOutput(predicted_depth=logits.squeeze(1), **others)


class DeGMixForNormalEstimation(DeGMixForSingleTask):
    """DeGMix for one task of surface normals: [`DeGMixNormalEstimatorOutput`]."""

    kind = "normals"

    @staticmethod
    def output(logits: Tensor, **others) -> DeGMixNormalEstimatorOutput:
        return DeGMixNormalEstimatorOutput(normals=logits, **others)


class DeGMixForSemanticSegmentation(DeGMixForSingleTask):
    """DeGMix for one segmentation task: `logits` `(batch_size, num_labels, height, width)`, at the size of the input.

    `config.id2label` has the class names of the task.
    """

    kind = "segmentation"

    def __init__(self, config: DeGMixConfig):
        super().__init__(config)
        task = self.config.tasks[self.config.single_task or ""]
        self.config.num_labels = task["num_labels"]
        if task["id2label"]:
            self.config.id2label = task["id2label"]
            self.config.label2id = {label: index for index, label in task["id2label"].items()}

    @staticmethod
    def output(logits: Tensor, **others) -> SemanticSegmenterOutput:
        return SemanticSegmenterOutput(logits=logits, **others)


# Transformers' pipelines report that classes without an entry here are not supported.
MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES[DeGMixConfig.model_type] = DeGMixForDepthEstimation.__name__
MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES[DeGMixConfig.model_type] = DeGMixForSemanticSegmentation.__name__


__all__ = ["DeGMixForDepthEstimation", "DeGMixForNormalEstimation", "DeGMixForSemanticSegmentation"]
