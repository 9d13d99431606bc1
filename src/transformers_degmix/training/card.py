"""The model card of a training run."""

import platform
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from huggingface_hub import ModelCard
from transformers import PreTrainedModel

from ..data.prepare import ARCHIVES, Rooms
from ..evaluation import METRICS
from ..evaluation.evaluator import Scores, format_source_table
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
from .sources import Source


PICTURE = "predictions.jpg"


def run_card(
    args: TrainingArguments,
    sources: list[Source],
    model: PreTrainedModel,
    scores: dict[str, Scores],
    source_scores: dict[str, dict[str, Scores]],
    step: int,
    fingerprints: list[dict[str, str]],
    environment: str,
    has_picture: bool,
) -> ModelCard:
    """The card of the model of a training run.

    Args:
        args: of the run.
        sources: its data sets, each with the tasks that it labels.
        model: its `DeGMixForMultiTaskDensePrediction`.
        scores: on the evaluation split, by task and name of the score; only of the new tasks if only these were
            trained. With several sources, they are means.
        source_scores: source name -> its scores, by task and name.
        step: after which the model was saved and evaluated.
        fingerprints: for each source, `"train"` and `"eval"` -> fingerprint of that split by `datasets`; empty for
            streams.
        environment: hours and hardware.
        has_picture: whether [`PICTURE`] is beside the card.
    """
    tasks, described = model.config.tasks, [describe_data(source) for source in sources]
    from_scratch = all(source.dataset == "rooms" for source in sources) and not (
        args.pretrained or args.pretrained_backbone
    )
    metrics = {name: METRICS[tasks[name]["kind"]] for name in scores}
    results = []
    for source, data, own in zip(sources, described, source_scores.values()):
        place = (data["id"], data["title"], source.eval_split)
        by = OURS if source.name is None else f"{source.name}, {OURS}"
        for name in own:
            main = metrics[name].main
            results.append(score_result(name, metrics[name], main, place, round(own[name][main], 4), by))
    splits = "\n".join(
        line
        for source, data, prints in zip(sources, described, fingerprints or [{}] * len(sources))
        for line in describe_source(source, data, prints)
    )
    # Several sources can be parts of one data set.
    data_sets = {data["id"]: data for data in described}.values()
    data_title = " and ".join(data["title"] for data in data_sets)
    texts = {key: "\n\n".join(dict.fromkeys(data[key] for data in data_sets)) for key in ("limits", "bias", "holds")}
    backbone = getattr(model.config.backbone_config, "backbone", model.config.backbone_config.model_type)
    title = f"DeGMix with {backbone} on {data_title}"
    picture = f"\n\n![Predictions above the labels, evaluation split]({PICTURE})" if has_picture else ""
    recipe = yaml.safe_dump(args.decisive(), sort_keys=False, allow_unicode=True).strip()
    return build_card(
        {
            "model_name": title,
            "license": "apache-2.0" if from_scratch else "unknown",
            "datasets": [data["id"] for data in data_sets],
            "base_model": hub_id(args.pretrained or args.pretrained_backbone),
        },
        tasks,
        results,
        title=title,
        summary="A [DeGMix](https://arxiv.org/abs/2308.05721) that was trained with transformers-degmix "
        f"{__version__}; this is the model after step {step} of {args.max_steps}.{picture}",
        description=f"It has {model.num_parameters():,} parameters.",
        licence="Apache-2.0, like the code and the data, which the code renders."
        if from_scratch
        else "Not stated yet. Whoever trained the model can choose it, as far as the terms of the training data and "
        "of the initial weights allow. The code is Apache-2.0.",
        intended_use=USES,
        limits=texts["limits"],
        bias=texts["bias"],
        get_started=LOAD.format(directory="PATH_OR_REPOSITORY"),
        training_data=f"{texts['holds']}\n\n{splits}",
        training_procedure=f"transformers-degmix {__version__}, transformers {transformers.__version__}, torch "
        f"{torch.__version__}, Python {platform.python_version()}; `degmix train` with\n\n"
        f"```yaml\n{recipe}\n```",
        evaluation="On the evaluation split, on which the training also compared its models, in batches as in "
        "training, with labels of the batch's size. `exact_f` of boundaries counts pixels that coincide with true "
        "ones. It is not comparable with the odsF of papers, which `degmix evaluate` measures.",
        reported=[],
        measured=[
            score_row(name, metric, metric.main, round(scores[name][metric.main], 4))
            for name, metric in metrics.items()
        ],
        measured_note=describe_scores(scores, source_scores, tasks),
        environment=f"{environment} The energy was not measured.",
        citation=CITATIONS["DeGMix"],
    )


def describe_scores(
    scores: dict[str, Scores], source_scores: dict[str, dict[str, Scores]], tasks: dict[str, dict]
) -> str:
    """All scores of the evaluation and, if there are several sources, a table of them."""
    table = ""
    if len(source_scores) > 1:
        table = "The scores above are means over the sources that label the task. By source:\n\n"
        table += format_source_table(source_scores, {name: tasks[name] for name in scores}) + "\n"
    return f"{table}One run, no error bars. All scores of the evaluation:\n\n" + "\n".join(
        f"- `{task}`: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items())
        for task, values in scores.items()
    )


def describe_data(source: Source) -> dict[str, str]:
    """`id`, `title`, `holds`, `limits` and `bias` of a source's data set, as far as they are known.

    A folder is known to hold a benchmark, or Rooms, if `degmix prepare` has written its card.
    """
    data_id, card = source.dataset, Path(source.dataset, "README.md")
    if data_id == "rooms":
        return DATA["rooms"]
    if card.parent.exists():
        data_id = card.parent.name
    titles = card.read_bytes().splitlines() if card.exists() else []
    makers: dict[str, type[Any]] = {"rooms": Rooms, **ARCHIVES}
    for name, made in makers.items():
        if f"pretty_name: {made.title}".encode() in titles:
            return DATA[name]
    return {"id": data_id, "title": data_id, "holds": f"`{data_id}`.", **UNKNOWN_DATA}


def describe_source(source: Source, data: dict[str, str], fingerprints: dict[str, str]) -> list[str]:
    """Lines that say which part of a data set was read."""
    lines = []
    if source.name is not None:
        tasks = ", ".join(f"`{name}`" for name in source.tasks or ())
        weight = "" if source.weight is None else f", weight {source.weight:g}"
        lines.append(f"- source `{source.name}`: {data['title']}, labels of {tasks}{weight}")
    for part, role in (("train", "training"), ("eval", "evaluation")):
        line = f"- {role}: split `{getattr(source, f'{part}_split')}`"
        if number := getattr(source, f"num_{part}_images"):
            line += f", the first {number} images"
        line += f", `datasets` fingerprint `{fingerprints[part]}`" if part in fingerprints else ", streamed"
        lines.append(f"  {line}" if source.name is not None else line)
    return lines
