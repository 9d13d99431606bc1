"""Reports of evaluations: numbers, tables and pictures, and whether reports are comparable."""

import json
import platform
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
import transformers
from accelerate import Accelerator
from matplotlib.figure import Figure
from PIL import Image

from ..data.mapping import MappedDataset
from ..hub.onnx import OnnxModel
from ..images_degmix import to_photo
from ..modeling_degmix import DeGMixForMultiTaskDensePrediction
from ..tasks import TASK_KINDS
from ..version import __version__
from ..visualization import draw_overview, stack
from . import BENCHMARK_METRICS, BoundaryMetric, SegmentationMetric
from .calibration import REMOVED, Calibration, median_angle
from .evaluator import markdown_table
from .metric import StreamingMetric, ThresholdedMetric
from .whole_images import ERROR_BINS, Evaluation, Protocol, WholeImageCollator, predict_whole_image


NUM_EXTREMES = 2
REPORT_VERSION = 2
DEPTH_RULES = ("crop", "max_depth", "median_scaling")


def build_report(
    evaluation: Evaluation,
    model: DeGMixForMultiTaskDensePrediction | OnnxModel,
    model_name: str,
    data: dict[str, Any],
    protocol: Protocol,
    precision: str,
    command: str,
    warnings: list[str],
) -> dict[str, Any]:
    """The content of `report.json`.

    Args:
        data: `dataset` (its name) and `split`; other entries are copied to the report.
        command: that started the evaluation.
        warnings: what looks wrong about the data.

    Raises:
        ValueError: no task has a valid pixel.
    """
    tasks, scores = model.config.tasks, evaluation.scores
    sizes = [(sample["height"], sample["width"]) for sample in evaluation.samples]
    confidence: dict[str, Any] = {}
    if evaluation.calibrations:
        confidence["calibration"] = {
            name: _describe_calibration(calibration)
            for name, calibration in evaluation.calibrations["confidence"].items()
        }
        if consistency := evaluation.calibrations["consistency"]:
            confidence["consistency"] = {
                "field_of_view": protocol.field_of_view,
                "median_angle": median_angle(consistency),
                "orders_errors_of": {name: calibration.compute() for name, calibration in consistency.items()},
            }
    windows = None
    if protocol.window_size:
        windows = {"size": list(protocol.window_size), "overlap": protocol.window_overlap}
    return {
        "version": REPORT_VERSION,
        "model": {"name": model_name, "parameters": model.num_parameters(), "tasks": tasks},
        "scores": scores,
        "per_class": {
            name: per_class_iou(metric)
            for name, metric in evaluation.metrics.items()
            if isinstance(metric, SegmentationMetric) and name in scores
        },
        **confidence,
        "protocol": {
            "split": data["split"],
            "num_images": len(sizes),
            "precision": precision,
            "scales": list(protocol.scales),
            "flip": protocol.flip,
            "windows": windows,
            "tasks": {name: _task_protocol(tasks[name], protocol) for name in scores},
        },
        "failed": evaluation.failed,
        "warnings": warnings,
        "fingerprint": evaluation.fingerprint,
        "data": {**data, "smallest_image": list(min(sizes)), "largest_image": list(max(sizes))},
        "versions": {
            "transformers_degmix": __version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "command": command,
    }


def _describe_calibration(calibration: Calibration) -> dict[str, Any]:
    scores = calibration.compute()
    curves = {name: errors.tolist() for name, errors in calibration.sparsification().items()}
    description = {**scores, "sparsification": {"removed": REMOVED.tolist(), **curves}}
    if "ece" in scores:
        description["reliability"] = calibration.reliability()
    return description


def _task_protocol(task: dict[str, Any], protocol: Protocol) -> dict[str, Any]:
    """What the scores of a task depend on besides the data, predictions and precision."""
    rules = {"kind": task["kind"], "num_labels": task["num_labels"], "ignored": "pixels labelled 255 or unknown"}
    if task.get("ignore_empty"):
        rules["ignored"] += ", images of class 0 only"
    if task["kind"] == "boundary":
        rules["edge_tolerance"] = protocol.edge_tolerance
    if task["kind"] == "depth":
        rules |= protocol.depth
    return rules


def per_class_iou(metric: SegmentationMetric) -> list[float | None]:
    """Intersection over union of each class, `None` for classes in neither labels nor predictions."""
    iou = metric.per_class_iou()
    return [iou.get(index) for index in range(metric.num_labels)]


def read_report(path: Path) -> dict[str, Any]:
    """A `report.json`, or the one in a directory.

    Raises:
        OSError: there is no such file.
        ValueError: it is not a report.
    """
    path = path / "report.json" if path.is_dir() else path
    try:
        report = json.loads(path.read_text())
        if report["version"] != REPORT_VERSION:
            raise ValueError(f"it is of version {report['version']}, not {REPORT_VERSION}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a report of `degmix evaluate`: {error!r}") from error
    return report


def check_comparable(reports: dict[str, dict[str, Any]]):
    """Raises ValueError unless all pairs of reports measured their common tasks by the same protocol on the same data.

    Args:
        reports: by their names in the message.
    """
    for (first, a), (second, b) in combinations(reports.items(), 2):
        common = [name for name in a["scores"] if name in b["scores"]]
        if not common:
            raise ValueError(f"{first} and {second} have no task in common: {list(a['scores'])}, {list(b['scores'])}")
        a, b = _conditions(a, common), _conditions(b, common)
        differing = [name for name in a if a[name] != b[name]]
        if differing:
            name = differing[0]
            raise ValueError(f"{first} and {second} are not comparable: `{name}` is {a[name]!r} and {b[name]!r}")


def _conditions(report: dict[str, Any], tasks: list[str]) -> dict[str, Any]:
    """What must be equal in reports for scores of these tasks to be comparable."""
    protocol = {**report["protocol"], **report["protocol"]["tasks"]}
    names = [name for name in report["protocol"] if name != "tasks"]
    return {
        **{f"protocol.{name}": protocol[name] for name in (*names, *tasks)},
        **{f"fingerprint.{name}": report["fingerprint"][name] for name in ("image", *tasks)},
    }


def single_task_scores(reports: dict[str, dict[str, Any]], tasks: dict[str, dict]) -> dict[str, float]:
    """Task -> main score of the model for it alone, for [`multi_task_gain`].

    Args:
        reports: by their names in messages.
        tasks: `DeGMixConfig.tasks` of the model that is compared with them.

    Raises:
        ValueError: the reports are not one for each of these tasks.
    """
    scores = {}
    for path, report in reports.items():
        names = list(report["scores"])
        if len(names) != 1 or names[0] not in tasks or names[0] in scores:
            raise ValueError(f"single-task reports must be one for each of {list(tasks)}; {path} is for {names}")
        scores[names[0]] = report["scores"][names[0]][BENCHMARK_METRICS[tasks[names[0]]["kind"]].main]
    missing = [name for name in tasks if not scores.get(name)]
    if missing:
        raise ValueError(
            f"the gain needs a single-task report with a score above 0 for each task; there is none for {missing}"
        )
    return scores


def format_table(reports: list[dict[str, Any]]) -> str:
    """A Markdown table of main scores, a row per report; the best of several is bold.

    It has the tasks that are scored in some report.
    """
    tasks = {name: report["model"]["tasks"][name] for report in reports for name in report["scores"]}
    header, columns = ["model"], [[report["model"]["name"] for report in reports]]
    for name, task in tasks.items():
        metric = BENCHMARK_METRICS[task["kind"]]
        title, factor, decimals = metric.column
        header.append(f"{name} {title} {'up' if metric.higher_is_better else 'down'}")
        values = [report["scores"].get(name, {}).get(metric.main) for report in reports]
        columns.append(_format_column(values, factor, f".{decimals}f", metric.higher_is_better))
    gains = [report.get("gain_percent") for report in reports]
    if any(gain is not None for gain in gains):
        header.append("gain % up")
        columns.append(_format_column(gains, 1, "+.2f", True))
    header.append("parameters")
    columns.append([f"{report['model']['parameters'] / 1e6:.2f} M" for report in reports])
    return markdown_table([header, *map(list, zip(*columns))])


def _format_column(values: list[float | None], factor: float, number_format: str, higher_is_better: bool) -> list[str]:
    known = [value for value in values if value is not None]
    best = (max if higher_is_better else min)(known) if len(values) > 1 else None
    texts = ["-" if value is None else format(factor * value, number_format) for value in values]
    return [f"**{text}**" if value is not None and value == best else text for value, text in zip(values, texts)]


def write_report(
    directory: Path,
    report: dict[str, Any],
    evaluation: Evaluation,
    model: DeGMixForMultiTaskDensePrediction | OnnxModel,
    processor,
    data: MappedDataset,
    protocol: Protocol,
    accelerator: Accelerator,
):
    """Writes `report.json`, `report.md` with its pictures, and `samples.parquet`.

    Args:
        directory: exists and is empty.
        report: what [`build_report`] made.
        evaluation: the report's. The other arguments are as for [`evaluate_whole_images`].
    """
    (directory / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    columns = dict.fromkeys(name for sample in evaluation.samples for name in sample)
    table = {name: [sample.get(name) for sample in evaluation.samples] for name in columns}
    pyarrow.parquet.write_table(pyarrow.table(table), directory / "samples.parquet")

    lines = [f"# {report['model']['name']} on {report['data']['dataset']}, {report['data']['split']}\n"]
    lines += [format_table([report]), _describe(report)]
    for title, listed in (
        ("What looks wrong about the labels", report["warnings"]),
        ("Samples that could not be evaluated", [f"{s['image_id']}: {s['reason']}" for s in report["failed"]]),
    ):
        if listed:
            lines.append(f"## {title} ({len(listed)})\n\n" + "".join(f"- {line}\n" for line in listed))
    if evaluation.calibrations:
        lines.append(_describe_confidence(report))
    for name, task in model.config.tasks.items():
        lines.append(f"## {name}\n")
        if name not in report["scores"]:
            lines.append("-, no label in this split\n" if name in evaluation.metrics else "-, not evaluated\n")
            continue
        scores = [[score, f"{value:.4f}"] for score, value in report["scores"][name].items()]
        lines.append(markdown_table([["score", "value"], *scores]))
        for title, figure in draw_figures(evaluation, name, task).items():
            file_name = f"{name}_{title.replace(' ', '_')}.png"
            figure.savefig(directory / file_name, dpi=100, bbox_inches="tight")
            lines.append(f"![{title} of {name}]({file_name})\n")
        for title, samples in find_extremes(evaluation, name).items():
            rows = [data[sample["index"]] for sample in samples]
            picture = draw_rows(rows, name, model, processor, protocol, accelerator)
            picture.save(directory / f"{name}_{title}.png")
            main = evaluation.metrics[name].main
            listed = ", ".join(f"{sample['image_id']} ({sample[f'{name}_{main}']:.4f})" for sample in samples)
            lines.append(f"The {title} samples by {main}, from top to bottom: {listed}\n")
            lines.append(f"![{title} samples of {name}]({name}_{title}.png)\n")
    (directory / "report.md").write_text("\n".join(lines), encoding="utf-8")


def _describe(report: dict[str, Any]) -> str:
    protocol, data = report["protocol"], report["data"]
    smallest, largest = (" x ".join(map(str, data[key])) for key in ("smallest_image", "largest_image"))
    sizes = f"of {smallest}" if smallest == largest else f"from {smallest} to {largest}"
    tolerances = [task["edge_tolerance"] for task in protocol["tasks"].values() if "edge_tolerance" in task]
    mirroring, windows = "with" if protocol["flip"] else "without", "images predicted whole"
    if protocol["windows"]:
        height, width = protocol["windows"]["size"]
        windows = f"windows of {height} x {width} that overlap by {protocol['windows']['overlap']}"
    parts = [
        f"{protocol['num_images']} images {sizes}, scored in their own size; precision {protocol['precision']}",
        f"scales {', '.join(map(str, protocol['scales']))}, {mirroring} mirrored images; {windows}",
        *(f"boundaries matched within {tolerance} of the diagonal" for tolerance in tolerances),
        *(
            f"{name}: " + ", ".join(f"{rule} {task[rule]}" for rule in DEPTH_RULES if rule in task)
            for name, task in protocol["tasks"].items()
            if any(rule in task for rule in DEPTH_RULES)
        ),
        ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        "data " + ", ".join(f"{name} {value}" for name, value in report["fingerprint"].items()),
    ]
    return "".join(f"- {part}\n" for part in parts) + f"\n```bash\n{report['command']}\n```\n"


def _describe_confidence(report: dict[str, Any]) -> str:
    rows = [["task", "AUSE down", "at random", "ratio", "ECE down"]]
    for name, scores in report["calibration"].items():
        rows.append([name, *_ause_cells(scores), f"{scores['ece']:.4f}" if "ece" in scores else "-"])
    parts = ["## Confidence\n", markdown_table(rows)]
    if "consistency" in report:
        consistency = report["consistency"]
        parts.append(
            "The median angle between the predicted normals and the normals of the predicted depth is "
            f"{consistency['median_angle']:.1f} degrees, for a field of view of {consistency['field_of_view']:g} "
            "degrees across the longer side. Their agreement as a confidence:\n"
        )
        rows = [[name, *_ause_cells(scores)] for name, scores in consistency["orders_errors_of"].items()]
        parts.append(markdown_table([["task", "AUSE down", "at random", "ratio"], *rows]))
    return "\n".join(parts)


def _ause_cells(scores: dict[str, float]) -> list[str]:
    ratio = scores["ause"] / max(scores["ause_random"], 1e-12)
    return [*(f"{scores[name]:.4f}" for name in ("ause", "ause_random")), f"{ratio:.2f}"]


def draw_figures(evaluation: Evaluation, name: str, task: dict[str, Any]) -> dict[str, Figure]:
    """The figures about a task: title -> figure."""
    metric = evaluation.metrics[name]
    figures = {}
    if isinstance(metric, SegmentationMetric):
        classes = [(task.get("id2label") or {}).get(index, str(index)) for index in range(task["num_labels"])]
        figures["class IoU"] = draw_class_bars(per_class_iou(metric), classes)
        figures["confusion matrix"] = draw_confusion(metric.sums["confusion"].numpy(), classes)
    if isinstance(metric, BoundaryMetric | ThresholdedMetric):
        figures["precision and recall"] = draw_precision_recall(metric)
    if name in evaluation.error_counts:
        figures["errors"] = draw_errors(evaluation.error_counts[name].numpy(), metric)
    if evaluation.calibrations:
        calibration = evaluation.calibrations["confidence"][name]
        if TASK_KINDS[task["kind"]].confidence_is_probability:
            figures["reliability"] = draw_reliability(calibration)
        signals = {signal: sums[name] for signal, sums in evaluation.calibrations.items() if name in sums}
        figures["sparsification"] = draw_sparsification(signals, metric)
    return figures


def draw_class_bars(iou: list[float | None], classes: list[str]) -> Figure:
    """Horizontal bars, the best class at the top; classes that do not occur are left out."""
    values, names = zip(*sorted((value, name) for value, name in zip(iou, classes) if value is not None))
    figure = Figure(figsize=(7, 1 + 0.22 * len(names)))
    axes = figure.subplots()
    bars = axes.barh(names, values)
    axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    axes.axvline(np.mean(values), color="gray", linestyle=":", zorder=0, label=f"mean {np.mean(values):.3f}")
    axes.set(xlim=(0, 1.08), xticks=np.linspace(0, 1, 6), xlabel="intersection over union")
    axes.margins(y=0.01)
    axes.legend(loc="lower right")
    return figure


def draw_confusion(confusion: np.ndarray, classes: list[str]) -> Figure:
    """The share of each true class (row) that is predicted as each class (column)."""
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=[2.5 + 0.22 * len(classes)] * 2)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="viridis", vmin=0, vmax=1)
    axes.set_xticks(range(len(classes)), classes, rotation=90)
    axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="predicted", ylabel="true")
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class")
    return figure


def draw_precision_recall(metric: BoundaryMetric | ThresholdedMetric) -> Figure:
    """Precision over recall at all thresholds, and the point of the best F-measure."""
    precision, recall = metric.precision_recall()
    scores = metric.compute()
    best = np.abs(np.asarray(metric.thresholds) - scores["threshold"]).argmin()
    figure = Figure(figsize=(5, 5))
    axes = figure.subplots()
    axes.plot(recall, precision, marker=".")
    label = f"{metric.main} {scores[metric.main]:.3f} at threshold {scores['threshold']:.2f}"
    axes.plot(recall[best], precision[best], "o", color="tab:red", label=label)
    axes.set(xlim=(0, 1), ylim=(0, 1.01), xlabel="recall", ylabel="precision", aspect="equal")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def draw_reliability(calibration: Calibration) -> Figure:
    """How often pixels of each confidence are right, and how many pixels have it."""
    rows, scores = calibration.reliability(), calibration.compute()
    confidence, accuracy, counts = (
        np.array([row[key] for row in rows]) for key in ("confidence", "accuracy", "count")
    )
    figure = Figure(figsize=(5, 5))
    axes = figure.subplots()
    axes.bar(confidence, counts / counts.sum(), width=0.05, color="tab:gray", alpha=0.4, label="share of pixels")
    axes.plot([0, 1], [0, 1], color="gray", linestyle=":", label="calibrated")
    axes.plot(confidence, accuracy, marker="o", label=f"ECE {scores['ece']:.3f}")
    axes.set(xlim=(0, 1), ylim=(0, 1.01), xlabel="confidence", ylabel="share of right pixels", aspect="equal")
    axes.legend(loc="upper left")
    return figure


def draw_sparsification(signals: dict[str, Calibration], metric: StreamingMetric) -> Figure:
    """The error of the pixels left after removal by each signal of the task, by the oracle, and at random."""
    figure = Figure(figsize=(7, 3.5))
    axes = figure.subplots()
    for signal, calibration in signals.items():
        curves, ause = calibration.sparsification(), calibration.compute()["ause"]
        axes.plot(100 * REMOVED, curves["confidence"], label=f"by {signal}, AUSE {ause:.3f}")
    curves = signals["confidence"].sparsification()
    axes.axhline(curves["oracle"][0], color="gray", linestyle=":", label="at random")
    axes.plot(100 * REMOVED, curves["oracle"], color="gray", label="the worst first (oracle)")
    axes.set(xlim=(0, 100), xlabel="% of the pixels removed, the least sure first", ylabel=metric.error_name)
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def draw_errors(counts: np.ndarray, metric: StreamingMetric) -> Figure:
    """Histogram of the errors of pixels; the last bar holds all larger errors."""
    figure = Figure(figsize=(7, 3.5))
    axes = figure.subplots()
    bins = ERROR_BINS[metric.kind]
    axes.stairs(counts / max(counts.sum(), 1), bins, fill=True)
    axes.set(xlabel=f"{metric.error_name} of a pixel", ylabel="share of pixels", xlim=(0, bins[-1]))
    return figure


def find_extremes(evaluation: Evaluation, name: str) -> dict[str, list[dict[str, Any]]]:
    """`"best"` and `"worst"` samples of a task by its main score.

    Samples with nothing to find are left out. Their scores say little: background alone is easy, and there is no
    boundary to find. No sample is in both lists.
    """
    metric = evaluation.metrics[name]
    key = f"{name}_{metric.main}"
    ranked = [sample for sample in evaluation.samples if not sample[f"{name}_empty"]]
    ranked.sort(key=lambda sample: sample[key], reverse=metric.higher_is_better)
    best = ranked[:NUM_EXTREMES]
    worst = ranked[len(best) :][::-1][:NUM_EXTREMES]
    return {title: samples for title, samples in (("best", best), ("worst", worst)) if samples}


def draw_rows(
    rows: list[dict[str, Any]],
    name: str,
    model: DeGMixForMultiTaskDensePrediction | OnnxModel,
    processor,
    protocol: Protocol,
    accelerator: Accelerator,
) -> Image.Image:
    """One task's predictions above the labels, for each row of the data set."""
    tasks = {name: model.config.tasks[name]}
    collator, overviews = WholeImageCollator(processor, model.config.tasks), []
    for row in rows:
        sample = collator([row])
        with accelerator.autocast():
            predictions, confidences = predict_whole_image(model, processor, sample["pixels"], protocol)
        image = to_photo(row["image"])
        references = {name: sample["labels"][name][0]}
        overviews.append(draw_overview(image, predictions, tasks, references=references, confidences=confidences))
    return stack(overviews)
