"""Model cards in the Hub's format, all from one template, and the cards of the published configurations."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..data.benchmarks import BENCHMARKS
from ..evaluation import BENCHMARK_METRICS
from ..evaluation.metric import StreamingMetric
from ..tasks import TASK_KINDS


TEMPLATE = Path(__file__).with_name("model_card_template.md")
AUTHORS, OURS = "reported by the authors", "measured by us"

# By benchmark, and `"rooms"`: id, content, where models trained on it fail, and what it does not represent.
DATA = {
    "nyud": {
        "id": "nyud-v2",
        "title": "NYUD-v2",
        "holds": "NYUD-v2: 795 training and 654 test images of 425 x 560 pixels of rooms, taken with a Kinect, with "
        "40 classes, depth in metres, surface normals and boundaries.",
        "limits": "It has seen rooms in daylight or lamplight from the height of a person who stands in them: no "
        "outdoor scenes, no views from above, and depths of up to 10 metres. The sensor fails on glass, mirrors and "
        "shiny surfaces, where labels are wrong or missing.",
        "bias": "The rooms are homes, offices and shops of a few American cities: furniture and styles of other "
        "places and of other incomes are rare or missing. People are one of 40 classes, rare and seldom in view.",
    },
    "pascal_context": {
        "id": "pascal-context",
        "title": "PASCAL-Context",
        "holds": "PASCAL-Context: 4998 training and 5105 test images from a photo-sharing site, with 21 classes, 6 "
        "body parts, saliency, normals and boundaries. Saliency and normals are no measurements: other models "
        "predicted them (distillation).",
        "limits": "It knows everything outside of its 20 classes only as background. Normals and saliency are as "
        "wrong as the models that made the labels.",
        "bias": "The photos are what people uploaded in the 2000s, no sample of the world. Body parts are labelled in "
        "a part of the images with people; skin, clothing, age and disability were not balanced, and nobody has "
        "measured how the scores differ between people.",
    },
    "cityscapes": {
        "id": "cityscapes",
        "title": "Cityscapes",
        "holds": "Cityscapes: 2975 training and 500 validation images from a car in 50 cities, with 19 classes and "
        "disparity.",
        "limits": "It has seen streets by day, in fair weather, from one camera behind a windscreen.",
        "bias": "The cities are in Germany and its neighbours: streets, signs and vehicles of other countries are "
        "missing.",
    },
    "rooms": {
        "id": "rooms",
        "title": "Rooms",
        "holds": "Rooms: rendered by `transformers_degmix.data.rooms`, deterministically from a split and an index, "
        "with exact labels.",
        "limits": "It knows these rendered rooms and nothing else. On photos most of its predictions are wrong.",
        "bias": "Rooms and figures are made of a few hand-written shapes, which represent no place and no people.",
    },
}

UNKNOWN_DATA = {
    "limits": "The model does not know what the training data does not show. Nobody has written down what that is.",
    "bias": "It has the bias of the training data, which nobody has examined for this card.",
}

CITATIONS = {
    "DeGMix": """@article{xu2023degmix,
  title   = {DeGMix: Efficient Multi-Task Dense Prediction with Deformable and Gating Mixer},
  author  = {Xu, Yangyang and Yang, Yibo and Ghanem, Bernard and Zhang, Lefei and Du, Bo and Zhu, Jun},
  journal = {arXiv preprint arXiv:2308.05721},
  year    = {2023}
}""",
    "DeMT": """@inproceedings{xu2023demt,
  title     = {DeMT: Deformable Mixer Transformer for Multi-Task Learning of Dense Prediction},
  author    = {Xu, Yangyang and Yang, Yibo and Zhang, Lefei},
  booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
  year      = {2023}
}""",
}
PAPERS = {"DeGMix": "2308.05721", "DeMT": "2301.03461"}

USES = (
    "Research on multi-task dense prediction: comparing methods, fine-tuning on other data and other sets of tasks, "
    "and looking at what the tasks share."
)

LOAD = """```python
import transformers_degmix  # registers the pipeline; without the package: trust_remote_code=True
from transformers import pipeline

predict = pipeline("multi-task-dense-prediction", model="{directory}")
maps = predict("photo.jpg")  # task -> tensor in the image's size
```"""


def published_card(entry: dict[str, Any], recipe: dict[str, Any] | None) -> ModelCard:
    """The card of a configuration of the papers.

    Args:
        entry: of `model_cards/published.yaml`.
        recipe: the fields of the entry's recipe and of its bases; `None` without one.
    """
    model, backbone, benchmark, data = entry["model"], entry["backbone"], entry["benchmark"], DATA[entry["benchmark"]]
    tasks, paper = BENCHMARKS[benchmark].task_fields(), f"https://arxiv.org/abs/{PAPERS[entry['model']]}"
    title = f"{model} {backbone} on {data['title']}"
    source = {"source_name": f"{AUTHORS}: arXiv {PAPERS[model]}", "source_url": paper}
    measured = entry.get("measured", {})
    metrics = {name: BENCHMARK_METRICS[task["kind"]] for name, task in tasks.items()}
    results = [
        score_result(
            name, metrics[name], metrics[name].column[0], (data["id"], data["title"], "test"), score, by, **sources
        )
        for by, scores, sources in ((AUTHORS, entry["scores"], source), (OURS, measured.get("scores", {}), {}))
        for name, score in scores.items()
    ]

    def rows(scores: dict[str, float]) -> list[dict[str, Any]]:
        return [score_row(name, metrics[name], metrics[name].column[0], score) for name, score in scores.items()]

    sizes = [
        f"{entry[key]} {unit}"
        for key, unit in (("parameters", "million parameters"), ("gflops", "GFLOP"))
        if key in entry
    ]
    reported_sizes = [f"The authors report {' and '.join(sizes)}; how they counted is not stated."] if sizes else []
    return build_card(
        {
            "model_name": title,
            "license": "other",
            "license_name": "none-stated-by-the-authors",
            "datasets": [data["id"]],
            "base_model": hub_id(recipe["pretrained_backbone"]) if recipe else None,
        },
        tasks,
        results,
        title=title,
        summary=f"[{model}]({paper}) with the backbone {backbone}: a configuration that its authors published. The "
        "card comes without weights and does not say that the Hub has any; see below how to get them.",
        description=" ".join([*reported_sizes, entry.get("architecture", "")]).strip(),
        licence="The authors' code has no licence, and their weights come with none. Only they can say what they "
        "allow: ask them before you use or share converted weights. The code of transformers-degmix is Apache-2.0 and "
        "holds none of theirs. Weights that you train with it are under your licence, as far as the terms of the data "
        "set and of the backbone's weights allow.",
        intended_use=USES,
        limits=data["limits"],
        bias=data["bias"],
        get_started=_get_started(entry, f"outputs/{card_name(entry)}", recipe["output_dir"] if recipe else None),
        training_data=data["holds"],
        training_procedure=(
            "As the authors describe it: SGD, learning rate 0.001, momentum 0.9, weight decay 0.0005, polynomial "
            "decay of power 0.9 over 40,000 iterations of 8 images; random scale, crop, mirroring and photometric "
            "distortion; a backbone pretrained on ImageNet or ADE20k. "
            + (
                f"`degmix train {entry['recipe']}` is our recipe for it, from the weights "
                f"`{recipe['pretrained_backbone']}`."
                if recipe
                else "We have no recipe for it."
            )
        ),
        evaluation=f"On the test images of {data['title']}. Higher is better where it says up.",
        reported=rows(entry["scores"]),
        reported_note=f"Source: {paper}. We have not checked these numbers.",
        measured=rows(measured.get("scores", {})),
        measured_note=measured.get("note", f"`degmix evaluate` measures a model on `data/{benchmark}`."),
        environment="Not known: the authors state neither hours nor energy, and we have not trained it.",
        citation=CITATIONS[model],
    )


def card_name(entry: dict[str, Any]) -> str:
    """The file name of a published configuration's card, without its ending."""
    return "_".join((entry["model"], entry["backbone"], entry["benchmark"])).lower().replace("-", "_")


def _get_started(entry: dict[str, Any], directory: str, output_dir: str | None) -> str:
    """How to get a published configuration: from the authors' weights, if there are any, or by training."""
    if output_dir is None:
        return f"{entry['checkpoint']} We have no recipe. The recipe `nyud_demt_hrnet18` has the same backbone."
    checkout = "In a checkout of transformers-degmix,"
    if "checkpoint" in entry:
        directory, weights = f"{output_dir}/best", f"{entry['checkpoint']} {checkout} train one"
    else:
        weights = f"""{checkout} convert the authors' checkpoint, if you have it and may use it:

```bash
degmix convert CHECKPOINT {directory} --dataset {entry["benchmark"]}
```

or train one"""
    return f"""{weights}, which ends in `{output_dir}/best`:

```bash
degmix prepare {entry["benchmark"]} ARCHIVE data/{entry["benchmark"]}
degmix train {entry["recipe"]}
```

Then

{LOAD.format(directory=directory)}"""


def hub_id(name: str | None) -> str | None:
    """The repository that a model or backbone comes from; `None` if it comes from a directory or a package."""
    place = (name or "").removeprefix("hf-hub:")
    return place if re.fullmatch(r"[\w.-]+/[\w.-]+", place) and not Path(place).exists() else None


def build_card(metadata: dict[str, Any], tasks: dict[str, dict], results: list[EvalResult], **texts: Any) -> ModelCard:
    kinds = [task["kind"] for task in tasks.values()]
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag=TASK_KINDS[kinds[0]].pipeline_tag,
        tags=["degmix", "multi-task", "dense-prediction", *dict.fromkeys(kinds)],
        metrics=list(dict.fromkeys(result.metric_type for result in results)),
        eval_results=results,
        **metadata,
    )
    rows = [
        {"name": name, "kind": kind, "prediction": TASK_KINDS[kind].prediction} for name, kind in zip(tasks, kinds)
    ]
    return ModelCard.from_template(card_data, template_path=str(TEMPLATE), tasks=rows, **texts)


def score_row(task: str, metric: type[StreamingMetric], score_name: str, score: float) -> dict[str, Any]:
    """A row of a card's table of scores."""
    better = "up" if metric.higher_is_better else "down"
    return {"task": task, "score": f"{score_name}, {better}", "value": score}


def score_result(
    task: str,
    metric: type[StreamingMetric],
    score_name: str,
    data: tuple[str, str, str],
    score: float,
    by: str,
    **source: str,
) -> EvalResult:
    """A score in a card's metadata; `data` is id, title and split."""
    data_id, data_title, split = data
    return EvalResult(
        task_type=TASK_KINDS[metric.kind].pipeline_tag,
        task_name=task,
        dataset_type=data_id,
        dataset_name=data_title,
        # Results of the same type, data set, configuration and split would be merged into one, with one source.
        dataset_config=f"{task}, {by}",
        dataset_split=split,
        metric_type=metric.main,
        metric_name=f"{score_name} ({by})",
        metric_value=score,
        **source,
    )
