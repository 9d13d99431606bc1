"""DeGMix model configuration."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from .modeling_efficientnet_lite import EfficientNetLiteConfig
from .tasks import IGNORE_INDEX, TASK_KINDS


if TYPE_CHECKING:
    # `save_pretrained` copies modules that are imported relatively. It must copy all modules of `AUTO_MAP`.
    from .modeling_degmix_single_task import DeGMixForSingleTask  # noqa: F401

    # as they are after `__post_init__`
    Tasks = dict[str, dict[str, Any]]
    SizeDivisor = int
else:
    Tasks = dict[str, dict[str, Any]] | list[dict[str, Any]] | None
    SizeDivisor = int | None

INTERACTION_SCOPES = ("token", "task", "image")
OFFSET_POSITIONS = ("absolute", "normalized", "none")

# NYUD-v2 with the authors' names, order and loss weights (released code, NYUD configuration).
NYUD_TASKS: dict[str, dict[str, Any]] = {
    "semseg": {"kind": "segmentation", "num_labels": 40},
    "depth": {"kind": "depth"},
    "normals": {"kind": "normals"},
    "edge": {"kind": "boundary", "pos_weight": 0.8},
}

# Where auto classes find the code beside the weights, with `trust_remote_code=True`.
AUTO_MAP = {
    "AutoConfig": "configuration_degmix.DeGMixConfig",
    "AutoModel": "modeling_degmix.DeGMixForMultiTaskDensePrediction",
    "AutoModelForDepthEstimation": "modeling_degmix_single_task.DeGMixForDepthEstimation",
    "AutoModelForNormalEstimation": "modeling_degmix_single_task.DeGMixForNormalEstimation",
    "AutoModelForSemanticSegmentation": "modeling_degmix_single_task.DeGMixForSemanticSegmentation",
}

# Where `pipeline(..., trust_remote_code=True)` finds the class, beside the weights.
CUSTOM_PIPELINES = {
    "multi-task-dense-prediction": {
        "impl": "pipeline_degmix.MultiTaskDensePredictionPipeline",
        "pt": ["AutoModel"],
        "type": "image",
    }
}


@strict
class DeGMixConfig(PreTrainedConfig):
    r"""Configuration of DeGMix ([paper](https://huggingface.co/papers/2308.05721)) and of its predecessor DeMT.

    DeMT ([paper](https://huggingface.co/papers/2301.03461)) has `use_gating=False`, `num_mixer_layers=1` and
    `num_attention_heads=4`.

    Args:
        backbone_config (`PreTrainedConfig` or `dict`, *optional*):
            Any backbone that `AutoBackbone` builds and that takes images of any size. Its `out_features` are the maps
            that are fused; the first has the highest resolution. Defaults to Swin-T with its four stages. The
            configuration of a timm model can have `model_args`: further arguments of `timm.create_model`.
        tasks (`dict[str, dict]`, *optional*):
            The tasks in order, name -> fields (in `config.json` a list, each task with its `name`). Defaults to
            NYUD-v2's (`semseg`, `depth`, `normals`, `edge`). Fields:

            - `kind`: `"segmentation"`, `"saliency"`, `"depth"`, `"normals"` or `"boundary"`;
            - `num_labels`: number of classes of a segmentation task (required there; fixed for other kinds);
            - `loss_weight`: weight in the total loss, default by kind (segmentation 1, saliency 5, depth 1,
              normals 10, boundary 50);
            - `pos_weight`: boundary only, weight of boundary pixels against `1 - pos_weight` of the others,
              in (0, 1), default 0.95;
            - `log_loss`: depth only, whether the loss compares logarithms of metres, not metres, default `False`;
            - `gradient_weight`: depth only, weight of a loss on the differences between pixels, 0 or more, default 0;
              the loss on the pixels has the weight 1, see [`~loss_degmix.depth_loss`];
            - `id2label`: segmentation only, names of the classes;
            - `ignore_empty`: segmentation only, whether training and evaluation ignore images whose only label is
              class 0, default `False`; for body parts, which are not annotated in every image of a person;
            - `attends_to`: names of the tasks that its interaction and query attend to, default all. The list must
              contain the task itself and, for each task in it, all tasks that this one attends to. The output does not
              depend on tasks outside the list.
        hidden_size (`int`, *optional*, defaults to 256):
            Channels of the fused features and of every block after them.
        num_mixer_layers (`int`, *optional*, defaults to 2):
            Deformable mixer blocks per task; 0 for none. DeMT has 1.
        num_attention_heads (`int`, *optional*, defaults to 2):
            Heads of the task interaction and task query attention. DeMT has 4.
        use_decoder (`bool`, *optional*, defaults to `True`):
            Whether there is a task-aware gating transformer decoder between mixers and heads. Without it and without
            mixers the model is the plain multi-task baseline: backbone, fusion and heads.
        use_gating (`bool`, *optional*, defaults to `True`):
            Whether the task-aware gating follows the task queries. DeMT has none.
        gating_intermediate_size (`int`, *optional*, defaults to 512):
            Channels inside the gating; one half gates the other.
        interaction_scope (`str`, *optional*, defaults to `"token"`):
            What a token attends to in the task interaction: `"token"` only itself, which is what the released code
            computes for one image and what its checkpoints are trained with; `"task"` the tokens of all tasks at its
            pixel; `"image"` all tokens of all tasks, as in the paper's text (quadratic in the number of pixels).
        interaction_reduction (`int`, *optional*, defaults to 1):
            Scope `"image"` only: keys and values are averaged over squares of this side, which divides the cost by
            its square.
        head_hidden_size (`int`, *optional*):
            Channels of the task heads. Defaults to an eighth of the channels of all backbone maps together.
        offset_position (`str`, *optional*, defaults to `"absolute"`):
            How a pixel's position enters the offsets at which the deformable mixers sample: `"absolute"` as row and
            column, counted from 1, as in the released code and its checkpoints; `"normalized"` in the range from -1
            to 1, which does not depend on the size of the image; `"none"` not at all.
        attention_norm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of the LayerNorms after task interaction and task query. With a small value, as in the released
            code, their output jumps where an attention's output passes through zero; with 1 it is smooth.
        size_divisor (`int`, *optional*):
            The model pads images on all sides, with 0, to heights and widths that are multiples of it, and crops the
            logits. Defaults to what the backbone needs to run and to see the whole image, found when a model is built:
            for example 1 for Swin, 14 or 16 for vision transformers, 32 for ConvNeXt.
        single_task (`str`, *optional*):
            The task that a single-task model, such as [`DeGMixForSemanticSegmentation`], predicts; needed if several
            tasks are of its kind. The multi-task model does not read it.

    Raises:
        ValueError: a field has a value that is not allowed; the message names field, value and what is allowed.

    Example:
    ```python
    >>> from transformers_degmix import DeGMixConfig, DeGMixForMultiTaskDensePrediction

    >>> config = DeGMixConfig(tasks={"parts": {"kind": "segmentation", "num_labels": 7}, "depth": {"kind": "depth"}})
    >>> model = DeGMixForMultiTaskDensePrediction(config)
    ```
    """

    model_type = "degmix"
    # `Trainer` then takes only the logits as predictions.
    keys_to_ignore_at_inference = ["losses", "hidden_states", "attentions"]
    sub_configs = {"backbone_config": AutoConfig}

    backbone_config: dict | PreTrainedConfig | None = None
    tasks: Tasks = None  # type: ignore[assignment]
    hidden_size: int = 256
    num_mixer_layers: int = 2
    num_attention_heads: int = 2
    use_decoder: bool = True
    use_gating: bool = True
    gating_intermediate_size: int = 512
    interaction_scope: str = "token"
    interaction_reduction: int = 1
    head_hidden_size: int | None = None
    offset_position: str = "absolute"
    attention_norm_eps: float = 1e-5
    size_divisor: SizeDivisor = None  # type: ignore[assignment]
    single_task: str | None = None

    def __post_init__(self, **kwargs):
        if self.backbone_config is None:
            self.backbone_config = CONFIG_MAPPING["swin"](out_features=["stage1", "stage2", "stage3", "stage4"])
        elif isinstance(self.backbone_config, dict):
            self.backbone_config = _backbone_config_from_dict(self.backbone_config)
        self.tasks = complete_fields(NYUD_TASKS if self.tasks is None else self.tasks)
        if not type(self).__module__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME):
            # The pipeline is registered already. With this field, Transformers would ask to trust remote code.
            kwargs.pop("custom_pipelines", None)
        super().__post_init__(**kwargs)
        # The setter chooses the eager attention. With another, a configuration with this option cannot be saved.
        self.output_attentions = self.output_attentions
        self._check_sizes()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> "DeGMixConfig":
        """As in the base class, but fields among `kwargs` are completed and checked, like the dictionary's."""
        names = kwargs.keys() & DeGMixConfig.__annotations__.keys() - {"backbone_config"}  # the base class merges that
        return super().from_dict({**config_dict, **{name: kwargs.pop(name) for name in names}}, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As in the base class, with where the code is, and tasks as a list to keep their order: JSON sorts keys."""
        output = {**super().to_dict(), "auto_map": AUTO_MAP, "custom_pipelines": CUSTOM_PIPELINES}
        output["tasks"] = [{"name": name, **task} for name, task in output["tasks"].items()]
        return output

    def padded_size(self, size: Sequence[int]) -> tuple[int, int]:
        """(height, width) of images -> (height, width) to which a model pads them."""
        divisor = self.size_divisor
        # Without negative numbers, whose quotients ONNX rounds the other way.
        height, width = ((length + divisor - 1) // divisor * divisor for length in size)
        return height, width

    def attended(self, task: str) -> list[str]:
        """The tasks that a task attends to."""
        return self.tasks[task]["attends_to"] or list(self.tasks)

    def attended_columns(self) -> list[slice | list[int]]:
        """For each task the indices of the tasks that it attends to; for all tasks a slice, which needs no copy."""
        names = list(self.tasks)
        attended = [[names.index(other) for other in self.attended(task)] for task in names]
        return [slice(None) if len(columns) == len(names) else columns for columns in attended]

    def _check_sizes(self):
        for field, lowest in (
            ("hidden_size", 1),
            ("num_mixer_layers", 0),
            ("num_attention_heads", 1),
            ("interaction_reduction", 1),
        ):
            if getattr(self, field) < lowest:
                raise ValueError(f"`{field}` must be at least {lowest}, got {getattr(self, field)}")
        if self.hidden_size % 2:
            # The first half of the channels samples by the rows' offsets, the second half by the columns'.
            raise ValueError(f"`hidden_size` must be even, got {self.hidden_size}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`num_attention_heads` must divide `hidden_size` ({self.hidden_size}), got {self.num_attention_heads}"
            )
        if self.gating_intermediate_size < 2 or self.gating_intermediate_size % 2:
            raise ValueError(
                f"`gating_intermediate_size` must be even and positive, got {self.gating_intermediate_size}"
            )
        for field, allowed in (("interaction_scope", INTERACTION_SCOPES), ("offset_position", OFFSET_POSITIONS)):
            if getattr(self, field) not in allowed:
                raise ValueError(f"`{field}` must be one of {allowed}, got {getattr(self, field)!r}")
        if self.interaction_reduction > 1 and self.interaction_scope != "image":
            raise ValueError(
                "`interaction_reduction` applies to `interaction_scope='image'` only, got "
                f"{self.interaction_reduction} with {self.interaction_scope!r}"
            )
        if not 0 < self.attention_norm_eps < float("inf"):
            raise ValueError(f"`attention_norm_eps` must be above 0, got {self.attention_norm_eps}")
        for field in ("head_hidden_size", "size_divisor"):
            if getattr(self, field) is not None and getattr(self, field) < 1:
                raise ValueError(f"`{field}` must be at least 1 or None, got {getattr(self, field)}")


def _backbone_config_from_dict(backbone_config: dict) -> PreTrainedConfig:
    model_type = backbone_config.get("model_type")
    if model_type == EfficientNetLiteConfig.model_type:
        # In the code beside the weights, without the package, nobody registers this class.
        return EfficientNetLiteConfig.from_dict(backbone_config)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"`backbone_config` needs the `model_type` of a Transformers model, got {model_type!r}")
    return CONFIG_MAPPING[model_type].from_dict(backbone_config)


def complete_fields(tasks: dict[str, dict[str, Any]] | list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Tasks, by name or as a list with their names, with every field that their kinds have.

    Raises:
        ValueError: there are none, or a field has a value that is not allowed. The message names task, field, value.
    """
    if isinstance(tasks, list):
        names = [task.get("name") for task in tasks]
        if None in names or len(set(names)) < len(names):
            raise ValueError(f"`tasks` as a list needs a different `name` in each, got {names}")
        tasks = {task["name"]: {field: task[field] for field in task if field != "name"} for task in tasks}
    if not tasks:
        raise ValueError("`tasks` is empty: name at least one task")
    completed = {name: _complete_task(name, task) for name, task in tasks.items()}
    for name, task in completed.items():
        taken = [other for other in completed if other in (f"{name}_confidence", f"{name}_classes")]
        if taken:
            raise ValueError(f"`tasks` has the name {taken[0]!r}, which data sets have for a column about {name!r}")
        if task["attends_to"] is None:
            continue
        attended = [other for other in completed if other in task["attends_to"]]
        needed = {name}.union(*(completed[other]["attends_to"] or completed for other in attended))
        if len(attended) < len(task["attends_to"]) or not needed.issubset(attended):
            raise ValueError(
                f"`tasks[{name!r}]['attends_to']` must be some of the tasks {list(completed)}, each once, with "
                f"{name!r} and all tasks that these attend to, got {task['attends_to']!r}"
            )
        task["attends_to"] = attended if len(attended) < len(completed) else None
    return completed


def _complete_task(name: str, task: dict[str, Any]) -> dict[str, Any]:
    """A task with every field that its kind has, or an error that names the task, the field and the value."""
    # Task names become parameter names.
    if not isinstance(name, str) or not name.isidentifier() or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"`tasks` has the name {name!r}: names must be identifiers that `nn.ModuleDict` can hold")
    if name in ("image", "image_id"):
        raise ValueError(f"`tasks` has the name {name!r}, which data sets have for another column")
    if task.get("kind") not in list(TASK_KINDS):  # the list, because a value can be unhashable
        raise ValueError(f"`tasks[{name!r}]['kind']` must be one of {sorted(TASK_KINDS)}, got {task.get('kind')!r}")
    kind = TASK_KINDS[task["kind"]]
    completed = {"kind": None, "num_labels": kind.num_logits, "attends_to": None, **kind.defaults}
    unknown = sorted(set(task) - set(completed))
    if unknown:
        raise ValueError(
            f"`tasks[{name!r}]` has the fields {unknown}; a {task['kind']} task can have {sorted(completed)}"
        )
    completed.update(task)

    def invalid(field: str, allowed: str) -> ValueError:
        return ValueError(f"`tasks[{name!r}][{field!r}]` must be {allowed}, got {completed[field]!r}")

    num_labels = completed["num_labels"]
    if kind.num_logits is not None and num_labels != kind.num_logits:
        raise invalid("num_labels", f"{kind.num_logits} for a {task['kind']} task")
    # Class ids share 8 bits with the ignore label.
    if not isinstance(num_labels, int) or isinstance(num_labels, bool) or not 1 <= num_labels <= IGNORE_INDEX:
        raise invalid("num_labels", f"an integer from 1 to {IGNORE_INDEX}")
    for field in ("loss_weight", "gradient_weight"):
        weight = completed.get(field, 0)
        if not _is_number(weight) or not 0 <= weight < float("inf"):
            raise invalid(field, "a number of at least 0")
    pos_weight = completed.get("pos_weight", 0.5)
    if not _is_number(pos_weight) or not 0 < pos_weight < 1:
        raise invalid("pos_weight", "a number between 0 and 1")
    for field in ("ignore_empty", "log_loss"):
        if not isinstance(completed.get(field, False), bool):
            raise invalid(field, "true or false")
    if not isinstance(completed["attends_to"], list | None):
        raise invalid("attends_to", "a list of tasks, or none for all of them")
    id2label = completed.get("id2label")
    if id2label is not None:
        # JSON turns integer keys into strings.
        if not isinstance(id2label, dict) or set(map(str, id2label)) != set(map(str, range(num_labels))):
            raise invalid("id2label", f"a dictionary with a name for each class from 0 to {num_labels - 1}")
        if not all(isinstance(label, str) for label in id2label.values()):
            raise invalid("id2label", "names that are texts")
        completed["id2label"] = {int(index): label for index, label in id2label.items()}
    return completed


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


__all__ = ["DeGMixConfig"]
