"""The model card of a training run."""

import platform
from pathlib import Path

import torch
import transformers
import yaml
from huggingface_hub import ModelCard
from transformers import PreTrainedModel

from ..evaluation import METRICS
from ..hub.model_card import (
    CITATIONS,
    DATA,
    LOAD,
    OURS,
    UNKNOWN_DATA,
    USES,
    build_card,
    hub_id,
    score_result,
    score_row,
)
from ..version import __version__
from .arguments import TrainingArguments


PICTURE = "predictions.jpg"


def run_card(
    args: TrainingArguments,
    model: PreTrainedModel,
    scores: dict[str, dict[str, float]],
    step: int,
    fingerprints: dict[str, str],
    environment: str,
    has_picture: bool,
) -> ModelCard:
    """The card of the model of a training run.

    Args:
        args: of the run.
        model: its `DeGMixForMultiTaskDensePrediction`.
        scores: on the evaluation split, by task and name of the score; of the new tasks if only these were trained.
        step: after which the model was saved and evaluated.
        fingerprints: `"train"` and `"eval"` -> the one that `datasets` has of that split; none of streams.
        environment: hours and hardware.
        has_picture: whether [`PICTURE`] is beside the card.
    """
    tasks, known = model.config.tasks, args.benchmark or args.dataset
    data = DATA.get(known, UNKNOWN_DATA)
    data_id = data.get("id", Path(args.dataset).name if Path(args.dataset).exists() else args.dataset)
    from_scratch = args.dataset == "rooms" and not (args.pretrained or args.pretrained_backbone)
    data_title = data.get("title", data_id)
    rows, results = [], []
    for name in scores:
        metric = METRICS[tasks[name]["kind"]]
        score = round(scores[name][metric.main], 4)
        rows.append(score_row(name, metric, metric.main, score))
        results.append(score_result(name, metric, metric.main, (data_id, data_title, args.eval_split), score, OURS))
    splits = "\n".join(
        f"- {role}: split `{getattr(args, f'{part}_split')}`"
        + (f", the first {number} images" if (number := getattr(args, f"num_{part}_images")) else "")
        + (f", `datasets` fingerprint `{fingerprints[part]}`" if part in fingerprints else ", streamed")
        for part, role in (("train", "training"), ("eval", "evaluation"))
    )
    backbone = getattr(model.config.backbone_config, "backbone", model.config.backbone_config.model_type)
    title = f"DeGMix with {backbone} on {data_title}"
    picture = f"\n\n![Predictions above the labels, evaluation split]({PICTURE})" if has_picture else ""
    recipe = yaml.safe_dump(args.decisive(), sort_keys=False, allow_unicode=True).strip()
    return build_card(
        {
            "model_name": title,
            "license": "apache-2.0" if from_scratch else "unknown",
            "datasets": [data_id],
            "base_model": hub_id(args.pretrained or args.pretrained_backbone),
        },
        tasks,
        results,
        title=title,
        summary="A [DeGMix](https://arxiv.org/abs/2308.05721) that was trained with transformers-degmix "
        f"{__version__}; this is the model after step {step} of {args.max_steps}.{picture}",
        description=f"It has {model.num_parameters():,} parameters.",
        licence="Apache-2.0, as the code and the data, which the code renders."
        if from_scratch
        else "Not stated yet. It is for whoever trained the model to choose, as far as the terms of the training data "
        "and of the weights that it started from allow. The code is Apache-2.0.",
        intended_use=USES,
        limits=data["limits"],
        bias=data["bias"],
        get_started=LOAD.format(directory="PATH_OR_REPOSITORY"),
        training_data=f"{data.get('holds', f'`{data_id}`.')}\n\n{splits}",
        training_procedure=f"transformers-degmix {__version__}, transformers {transformers.__version__}, torch "
        f"{torch.__version__}, Python {platform.python_version()}; `degmix train` with\n\n"
        f"```yaml\n{recipe}\n```",
        evaluation="On the evaluation split that training compared its models on, in batches as in training, with "
        "labels of the batch's size. `exact_f` of boundaries counts pixels that coincide with true ones and is not "
        "comparable with the odsF of papers; `degmix evaluate` makes a report with that.",
        reported=[],
        measured=rows,
        measured_note="One run, no error bars. All scores of the evaluation:\n\n"
        + "\n".join(
            f"- `{task}`: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items())
            for task, values in scores.items()
        ),
        environment=f"{environment} The energy was not measured.",
        citation=CITATIONS["DeGMix"],
    )
