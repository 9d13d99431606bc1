"""Trains one model on several data sets, each labelled for some of its tasks, and compares it with others.

    python scripts/studies/sources.py [--recipe nyud_lite] [--seeds 0 1] [--only thirds rooms] [--num_images 795]
        [--num_rooms 795] [--jobs 1] [--output_dir DIR] [--field value ...]

- thirds: the training photographs are cut into three, each with the labels of one task: classes, depth or normals. One
  model learns from all three. It is compared with a model for each task on its third, and with a model of the three
  tasks on all labels of all photographs.
- rooms: one model learns from the photographs, labelled for the four tasks of NYUD-v2, and from rendered Rooms,
  labelled for these, human parts and saliency. On the four tasks, it is compared with a model of the photographs
  alone, scored on photographs. Its predictions on photographs, for all six tasks, are drawn (photographs.png).

All trainings have the same number of steps and the same batch size. Parts that models have in common start from the
same weights. Finished trainings are not repeated. `--field` changes a field of the recipe, whose data set is NYUD-v2.
To choose, hold out training images: `--num_images 635 --eval_split "train[635:]"`.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from transformers_degmix.cli import run_script
from transformers_degmix.data.benchmarks import NYUD_CLASSES
from transformers_degmix.data.inspection import evenly_spaced
from transformers_degmix.data.rooms import ROOMS_TASKS
from transformers_degmix.evaluation import METRICS
from transformers_degmix.evaluation.evaluator import markdown_table
from transformers_degmix.hub.model_directory import load_model_directory
from transformers_degmix.training.arguments import TrainingArguments
from transformers_degmix.training.build import choose_tasks
from transformers_degmix.training.data import load_split
from transformers_degmix.training.study import DEGMIX, Outcome, parse_study, run, run_all, score_columns, study_parser
from transformers_degmix.training.tracking import draw_samples


THIRDS = ("semseg", "depth", "normals")
NUM_DRAWN = 20

# Classes of Rooms that have another name in NYUD-v2. Plants and balls have none there: they are unlabelled.
OTHER_NAMES = {"bookcase": "bookshelf", "tv": "television", "rug": "floor mat"}


def main():
    parser = study_parser(__doc__, "outputs/sources")
    parser.set_defaults(recipe="nyud_lite")
    parser.add_argument("--only", nargs="+", choices=("thirds", "rooms"), default=("thirds", "rooms"))
    parser.add_argument("--num_images", type=int, default=795, help="of the training split (default: %(default)s)")
    parser.add_argument("--num_rooms", type=int, default=795, help="rooms to train with (default: %(default)s)")
    options, args, tasks = parse_study(parser)

    trainings = {}
    for seed in options.seeds:
        folder = options.output_dir / f"seed_{seed}"
        if "thirds" in options.only:
            trainings |= plan_thirds(folder / "thirds", args, options.num_images, seed)
        if "rooms" in options.only:
            trainings |= plan_rooms(folder / "rooms", args, options.num_images, options.num_rooms, list(tasks), seed)
    outcomes = dict(zip(trainings, run_all(list(trainings.values()), options.jobs)))
    table = draw_table(outcomes, options.seeds, tasks)
    (options.output_dir / "study.md").write_text(table, encoding="utf-8")
    print(f"\n{table}\nalso in {options.output_dir / 'study.md'}")
    if "rooms" in options.only:
        for seed in options.seeds:
            picture = options.output_dir / f"seed_{seed}" / "rooms" / "photographs.png"
            draw_photographs(picture.parent / "with_rooms" / "last", args, picture)
            print(f"predictions on photographs: {picture}")


def plan_thirds(folder: Path, args: TrainingArguments, num_images: int, seed: int) -> dict[tuple[str, int], partial]:
    """The trainings of the first comparison, by model and seed."""
    limits = [num_images * index // len(THIRDS) for index in range(len(THIRDS) + 1)]
    splits = {task: f"{args.train_split}[{limits[i]}:{limits[i + 1]}]" for i, task in enumerate(THIRDS)}
    sources = [
        {"name": f"{task} third", "dataset": args.dataset, "train_split": split, "tasks": [task]}
        for task, split in splits.items()
    ]
    args = replace(args, tasks=list(THIRDS), train_split=f"{args.train_split}[:{num_images}]")
    trainings = {
        ("three tasks, all labels", seed): partial(run, folder / "all_labels", args, THIRDS, DEGMIX, seed),
        ("three tasks, a third of the labels each", seed): partial(
            run, folder / "a_third_each", args, THIRDS, DEGMIX, seed, **several(sources)
        ),
    }
    for task, split in splits.items():
        trainings[f"{task} alone, its third", seed] = partial(
            run, folder / f"{task}_alone", args, [task], DEGMIX, seed, train_split=split
        )
    return trainings


def plan_rooms(
    folder: Path, args: TrainingArguments, num_images: int, num_rooms: int, tasks: list[str], seed: int
) -> dict[tuple[str, int], partial]:
    """The trainings of the second comparison, by model and seed; `tasks` are those of the photographs."""
    ids = {name: index for index, name in enumerate(NYUD_CLASSES)}
    rooms_classes = ROOMS_TASKS["semseg"]["id2label"].items()
    names = {index: OTHER_NAMES.get(name, name) for index, name in rooms_classes}
    classes = {index: ids[name] for index, name in names.items() if name in ids}
    split = f"{args.train_split}[:{num_images}]"
    photographs = {"name": "photographs", "dataset": args.dataset, "train_split": split}
    rooms = {
        "name": "rooms", "dataset": "rooms", "num_train_images": num_rooms, "eval_split": "validation",
        "num_eval_images": 160, "columns": {"semseg": {"classes": classes}},
    }  # fmt: skip
    both = replace(args, **several([photographs, rooms]))
    every = list(choose_tasks(both, None))
    return {
        ("photographs alone", seed): partial(
            run, folder / "alone", both, tasks, DEGMIX, seed, **several([photographs])
        ),
        ("photographs with rooms", seed): partial(run, folder / "with_rooms", both, every, DEGMIX, seed),
    }


def several(sources: list[dict[str, Any]]) -> dict[str, Any]:
    """Fields of a run with these sources."""
    return {"datasets": sources, "dataset": None, "train_split": "train"}


def draw_table(outcomes: dict[tuple[str, int], Outcome], seeds: list[int], tasks: dict[str, dict]) -> str:
    """Markdown: the scores on photographs, means over the seeds, with the deviation if there are several."""
    metrics = {name: METRICS[task["kind"]] for name, task in tasks.items()}
    lines = [["model", *score_columns(tasks)]]
    for model in dict.fromkeys(model for model, _ in outcomes):
        line = [model]
        for name, metric in metrics.items():
            found = [
                scores[name][metric.main]
                for seed in seeds
                for source, scores in outcomes[model, seed]["source_scores"].items()
                if source != "rooms" and name in scores
            ]
            spread = f" ± {stdev(found):.4f}" if len(found) > 1 else ""
            line.append(f"{mean(found):.4f}{spread}" if found else "-")
        lines.append(line)
    return markdown_table(lines)


def draw_photographs(directory: Path, args: TrainingArguments, picture: Path):
    """Draws a model's predictions on evaluation photographs, above their labels."""
    model, processor = load_model_directory(directory)
    labelled = {name: model.config.tasks[name] for name in choose_tasks(args, None)}
    data = load_split(args, args.sources[0], "eval", labelled)
    draw_samples(model, processor, [data[index] for index in evenly_spaced(len(data), NUM_DRAWN)]).save(picture)


if __name__ == "__main__":
    run_script(main)
