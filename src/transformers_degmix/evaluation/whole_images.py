"""Evaluation of whole images, in the labels' own sizes, with everything that a report needs."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data.collator import DeGMixDataCollator
from ..data.mapping import MappedDataset
from ..hub.onnx import OnnxModel
from ..image_processing_pil_degmix import DeGMixImageProcessorPil, resized_size
from ..layers_degmix import crop_centred
from ..modeling_degmix import DeGMixDensePredictionOutput, DeGMixForMultiTaskDensePrediction
from ..sliding_windows import DEFAULT_OVERLAP, check_window, predict_in_windows
from ..tasks import IGNORE_INDEX, TASK_KINDS
from ..visualization.geometry import FIELD_OF_VIEW
from . import BENCHMARK_METRICS
from .calibration import Calibration, build_calibrations, calibrate_sample
from .depth import DEPTH_CROPS, adapt_depth, crop_depth
from .evaluator import Scores, sum_over_processes
from .metric import NoValidPixelError, StreamingMetric, compute_scores, finite_logits, valid_pixels


# By task kind, limits of the bins in which errors of pixels are counted: metres and degrees. Larger errors count in
# the last bin.
ERROR_BINS = {"depth": np.linspace(0, 4, 81), "normals": np.linspace(0, 180, 91)}


@dataclass(frozen=True)
class Protocol:
    """How whole images are evaluated.

    Attributes:
        edge_tolerance: of [`BoundaryMetric`].
        scales: factors by which images are resized; the logits are averaged.
        flip: whether to average with the logits of the mirrored image too.
        window_size: height and width of the windows in which images are predicted; the processor neither resizes nor
            pads them then. See [`predict_in_windows`]. By default, images are predicted whole.
        window_overlap: share of a window that overlaps with the next, in [0, 1).
        calibration: whether confidences, and the consistency of depth and normals, are compared with the errors.
        field_of_view: for this consistency, see [`depth_normals_angles`].
        depth_crop, max_depth: see [`crop_depth`].
        median_scaling: see [`adapt_depth`].
    """

    edge_tolerance: float = 0.0075
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    window_size: tuple[int, int] | None = None
    window_overlap: float = DEFAULT_OVERLAP
    calibration: bool = False
    field_of_view: float = FIELD_OF_VIEW
    depth_crop: str | None = None
    max_depth: float | None = None
    median_scaling: bool = False

    @property
    def depth(self) -> dict[str, Any]:
        """The rules for depth that are set."""
        rules = {"crop": self.depth_crop, "max_depth": self.max_depth, "median_scaling": self.median_scaling}
        return {name: value for name, value in rules.items() if value}

    def __post_init__(self):
        if self.window_size:
            check_window(self.window_size, self.window_overlap)
        if not self.scales or not all(0 < scale < float("inf") for scale in self.scales):
            raise ValueError(f"`scales` must be positive numbers, got {list(self.scales)}")
        if not 0 < self.field_of_view < 180:
            raise ValueError(f"`field_of_view` must be between 0 and 180 degrees, got {self.field_of_view}")
        if self.depth_crop not in (None, *DEPTH_CROPS):
            raise ValueError(f"`depth_crop` must be one of {list(DEPTH_CROPS)}, got {self.depth_crop!r}")
        if self.max_depth is not None and not 1e-3 < self.max_depth < float("inf"):
            raise ValueError(f"`max_depth` must be above 0.001 metres and finite, got {self.max_depth}")


@dataclass
class Evaluation:
    """The results of evaluating whole images: sums to which samples are added, and what is known of each sample.

    Attributes:
        metrics: task -> the metric that has seen all samples.
        error_counts: tasks with [`ERROR_BINS`] -> how many pixels have an error in each bin.
        calibrations: what [`calibrate_sample`] returns, over all samples; empty if the protocol has none.
        samples: one row per sample, in the order of the data set: `index`, `image_id`, `height`, `width`, and under
            `<task>_<score>` its own scores, `None` where it has no valid pixel for the task; `<task>_empty` says
            whether there is nothing to find in it: all known labels are 0 (background, no boundary).
        failed: samples that could not be evaluated: `index`, `image_id` and `reason`. Other results leave them out.
        fingerprint: `"image"` or task -> hash of the ids and pixels, or labels, as they were used. It depends neither
            on where the data lies nor on how files are compressed.
    """

    metrics: dict[str, StreamingMetric]
    error_counts: dict[str, Tensor]
    calibrations: dict[str, dict[str, Calibration]]
    samples: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)
    fingerprint: dict[str, str] = field(default_factory=dict)

    @classmethod
    def empty(cls, tasks: dict[str, dict[str, Any]], protocol: Protocol) -> "Evaluation":
        """No sample yet."""
        bins = {name: ERROR_BINS[task["kind"]] for name, task in tasks.items() if task["kind"] in ERROR_BINS}
        return cls(
            build_metrics(tasks, protocol),
            {name: torch.zeros(len(limits) - 1, dtype=torch.int64) for name, limits in bins.items()},
            build_calibrations(tasks) if protocol.calibration else {},
        )

    def add(
        self,
        row: dict[str, Any],
        metrics: dict[str, StreamingMetric],
        error_counts: dict[str, Tensor],
        calibrations: dict[str, dict[str, Calibration]],
    ):
        """Adds a sample: its row as [`_describe`] makes it, and what [`score_sample`] returns."""
        _add_sums(self.metrics, metrics)
        for signal, sums in calibrations.items():
            _add_sums(self.calibrations[signal], sums)
        for name, counts in error_counts.items():
            self.error_counts[name] += counts
        self.samples.append({**row, **_sample_scores(metrics)})

    def fail(self, sample: dict[str, Any], reason: Exception | str):
        """Leaves a sample out."""
        self.failed.append({"index": sample["index"], "image_id": sample["image_id"], "reason": str(reason)})

    def gather(self, accelerator: Accelerator):
        """Brings the results of all processes to each of them, and makes the fingerprint of the samples' hashes."""
        summed: list[StreamingMetric | Calibration] = [*self.metrics.values()]
        for by_task in self.calibrations.values():
            summed += by_task.values()
        for sums in summed:
            sums.sums = sum_over_processes(sums.sums, accelerator)
        self.error_counts = sum_over_processes(self.error_counts, accelerator)
        # A task can have no label, and without depths above 0, there are no angles.
        for signal, by_task in self.calibrations.items():
            self.calibrations[signal] = {name: sums for name, sums in by_task.items() if sums.sums["count"].any()}
        self.samples, self.failed = (
            sorted(gather_object(rows), key=lambda row: row["index"]) for rows in (self.samples, self.failed)
        )
        hashes = [row.pop("hashes") for row in self.samples]
        self.fingerprint = {
            name: _hash(*(of_sample[name] for of_sample in hashes)).hex()[:16] for name in ("image", *self.metrics)
        }

    @property
    def scores(self) -> dict[str, Scores]:
        """Scores of the tasks with a label.

        Raises:
            ValueError: no task has one.
        """
        scores = compute_scores(self.metrics)
        if not scores:
            raise ValueError(f"none of the tasks {list(self.metrics)} has a valid label in this split")
        return scores


class WholeImageCollator:
    """One row -> `image_id`, `pixels` as float32 array `(3, height, width)`, `labels` and `hashes`.

    Labels `(1, height, width)` or `(1, 3, height, width)` have the image's own size; see [`DeGMixDataCollator`].
    """

    def __init__(self, processor, tasks: dict[str, dict[str, Any]]):
        unchanged = DeGMixImageProcessorPil(
            tasks=tasks,
            do_convert_rgb=processor.do_convert_rgb,
            do_rescale=False,
            do_normalize=False,
            do_pad=False,
        )
        self.collator = DeGMixDataCollator(unchanged, tasks=tasks)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch, image_id = self.collator(rows), rows[0]["image_id"]
        maps = {"image": batch["pixel_values"], **batch["labels"]}
        return {
            "image_id": image_id,
            "pixels": batch["pixel_values"][0].numpy(),
            "labels": batch["labels"],
            "hashes": {
                name: _hash(f"{image_id} {tuple(x.shape)}".encode(), x.numpy().data) for name, x in maps.items()
            },
        }


class WholeImages(torch.utils.data.Dataset):
    """Samples with their `index`, as [`WholeImageCollator`] makes them, or the `reason` why one cannot be read."""

    def __init__(self, data: MappedDataset, indices: range, collator: WholeImageCollator):
        self.data = data
        self.indices = indices
        self.collator = collator

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> dict[str, Any]:
        index = self.indices[position]
        try:
            return {"index": index, **self.collator([self.data[index]])}
        except (ValueError, OSError) as error:
            image_id = self.data.data[index].get("image_id")
            return {"index": index, "image_id": str(index if image_id is None else image_id), "reason": str(error)}


def _first(samples: list) -> Any:
    (sample,) = samples
    return sample


def _hash(*parts: bytes | memoryview) -> bytes:
    digest = sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()


def evaluate_whole_images(
    model: DeGMixForMultiTaskDensePrediction | OnnxModel,
    processor,
    data: MappedDataset,
    protocol: Protocol,
    accelerator: Accelerator,
    executor: Executor,
    num_workers: int = 0,
    task_names: list[str] | None = None,
) -> Evaluation:
    """Scores of the tasks on the data set and on each sample, with predictions in the labels' own sizes.

    Images go through the model one at a time: only the processor pads them, and the padding is cropped away.

    Args:
        model: a `DeGMixForMultiTaskDensePrediction` in eval mode on the accelerator's device.
        processor: its image processor.
        data: with the columns of the tasks; every process evaluates a part of it.
        protocol: how to evaluate.
        accelerator: of the processes; it also sets the precision.
        executor: scores samples while the model predicts the next ones.
        num_workers: processes that read samples.
        task_names: of the tasks; by default all of the model's.

    Raises:
        ValueError: no sample can be evaluated. If only some cannot, the result names them.
    """
    tasks = {name: model.config.tasks[name] for name in task_names or model.config.tasks}
    indices = range(accelerator.process_index, len(data), accelerator.num_processes)
    whole_images = WholeImages(data, indices, WholeImageCollator(processor, tasks))
    loader = DataLoader(whole_images, collate_fn=_first, num_workers=num_workers)
    evaluation = Evaluation.empty(tasks, protocol)

    def predict() -> Iterator[tuple[dict[str, Any], Future]]:
        """The row of each sample, and its scores to come."""
        for sample in tqdm(loader, desc="evaluate", leave=False, disable=not accelerator.is_local_main_process):
            if "reason" in sample:
                evaluation.fail(sample, sample["reason"])
                continue
            try:
                with accelerator.autocast():
                    maps = predict_whole_image(model, processor, sample["pixels"], protocol)
            except (ValueError, RuntimeError) as error:  # RuntimeError: PyTorch's, if an image is too small
                evaluation.fail(sample, error)
                continue
            predictions, confidences = ({name: x[name] for name in tasks if name in x} for x in maps)
            labels = _cut_depths(sample["labels"], tasks, protocol)
            scores = executor.submit(score_sample, tasks, protocol, predictions, confidences, labels)
            yield _describe(sample, labels), scores

    for row, scores in _running_ahead(predict(), 2 * max(num_workers, 1)):
        try:
            result = scores.result()
        except ValueError as error:
            evaluation.fail(row, error)
        else:
            evaluation.add(row, *result)
    evaluation.gather(accelerator)
    if not evaluation.samples:
        failed = evaluation.failed[0]
        raise ValueError(f"no sample can be evaluated; {failed['image_id']!r}: {failed['reason']}")
    return evaluation


def _cut_depths(labels: dict[str, Tensor], tasks: dict[str, dict[str, Any]], protocol: Protocol) -> dict[str, Tensor]:
    """The labels, without the depths that the protocol leaves out."""
    depths = [name for name in labels if tasks[name]["kind"] == "depth"]
    return {**labels, **{name: crop_depth(labels[name], protocol.depth_crop, protocol.max_depth) for name in depths}}


def _describe(sample: dict[str, Any], labels: dict[str, Tensor]) -> dict[str, Any]:
    """The row of [`Evaluation.samples`] without scores, and the sample's `hashes`."""
    height, width = sample["pixels"].shape[-2:]
    empty = {f"{name}_empty": bool(((x == 0) | (x == IGNORE_INDEX)).all()) for name, x in labels.items()}
    row = {"index": sample["index"], "image_id": sample["image_id"], "height": height, "width": width, **empty}
    return {**row, "hashes": sample["hashes"]}


def _add_sums(totals: dict[str, Any], more: dict[str, Any]):
    for name, metric in more.items():
        for key, values in metric.sums.items():
            totals[name].sums[key] = totals[name].sums[key] + values


def _running_ahead(items: Iterable, count: int) -> Iterator:
    """The same items, each only after up to `count` more have been made."""
    waiting = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


def build_metrics(tasks: dict[str, dict[str, Any]], protocol: Protocol) -> dict[str, StreamingMetric]:
    options: dict[str, dict[str, Any]] = {"boundary": {"tolerance": protocol.edge_tolerance}}
    return {
        name: BENCHMARK_METRICS[task["kind"]](task, **options.get(task["kind"], {})) for name, task in tasks.items()
    }


@torch.no_grad()
def predict_whole_image(
    model: DeGMixForMultiTaskDensePrediction | OnnxModel, processor, pixels: np.ndarray, protocol: Protocol
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The prediction of each task in the image's own size, on the CPU.

    If the protocol has calibration, also its confidence; see `post_process_dense_prediction`.

    With several scales or mirrored images, the logits (class scores, metres, components of normals, log-odds) are
    first mapped back to the image and averaged. Windows are laid over each of these images.

    Args:
        pixels: `(3, height, width)` in the range that the processor takes.
    """
    size = tuple(pixels.shape[-2:])
    base = resized_size(size, processor.size) if processor.do_resize and not protocol.window_size else size
    views = [(scale, mirrored) for scale in protocol.scales for mirrored in (False, True)[: 1 + protocol.flip]]
    mean = {}
    for scale, mirrored in views:
        scaled = tuple(max(1, round(scale * length)) for length in base)
        options = {"do_resize": True, "size": dict(zip(("height", "width"), scaled))}
        if protocol.window_size:
            options["do_pad"] = False
        elif processor.pad_size:
            padded = max(1, scale) * np.array([processor.pad_size.height, processor.pad_size.width])
            options["pad_size"] = dict(zip(("height", "width"), np.ceil(padded).astype(int).tolist()))
        inputs = processor(pixels, return_tensors="pt", **options)["pixel_values"].to(model.device)
        if mirrored:
            inputs = inputs.flip(-1)
        if protocol.window_size:
            outputs = predict_in_windows(model, inputs, protocol.window_size, protocol.window_overlap)
        else:
            outputs = model(inputs)
        for name, logits in outputs.logits.items():
            kind = TASK_KINDS[model.config.tasks[name]["kind"]]
            logits = finite_logits(logits, name)
            if mirrored:
                logits = kind.flip(logits.flip(-1))
            # In an enlarged image, everything seems nearer.
            logits = kind.rescale(crop_centred(logits, scaled), 1 / scale)
            if scaled != size:
                logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
            mean[name] = mean.get(name, 0) + logits / len(views)
    outputs = DeGMixDensePredictionOutput(logits=mean)
    results = processor.post_process_dense_prediction(outputs, return_confidence=protocol.calibration)[0]
    predictions, confidences = results if protocol.calibration else (results, {})
    return send_to_device(predictions, "cpu"), send_to_device(confidences, "cpu")


def score_sample(
    tasks: dict[str, dict[str, Any]],
    protocol: Protocol,
    predictions: dict[str, Tensor],
    confidences: dict[str, Tensor],
    labels: dict[str, Tensor],
) -> tuple[dict[str, StreamingMetric], dict[str, Tensor], dict[str, dict[str, Calibration]]]:
    """The metric of each task for this sample alone, the counts of its errors in [`ERROR_BINS`], and its calibration.

    The latter is what [`calibrate_sample`] returns, or empty if the protocol has none.

    Args:
        predictions: one map per task, in the label's size.
        confidences: of the predictions; empty without calibration.
        labels: batches of one. Depth is unknown where the protocol does not score it.
    """
    metrics, error_counts = build_metrics(tasks, protocol), {}
    for name, task in tasks.items():
        if task["kind"] == "depth" and protocol.depth:
            adapted = adapt_depth(predictions[name][None], labels[name], protocol.median_scaling, protocol.max_depth)
            predictions = {**predictions, name: adapted[0]}
    for name, metric in metrics.items():
        prediction, label, kind = predictions[name][None], labels[name], tasks[name]["kind"]
        metric.update(prediction, label)
        if kind in ERROR_BINS:
            errors = metric.errors(prediction, label)[valid_pixels(kind, label)]
            counts = np.histogram(errors.clip(max=ERROR_BINS[kind][-1]), ERROR_BINS[kind])[0]
            error_counts[name] = torch.from_numpy(counts)
    calibrations = {}
    if protocol.calibration:
        calibrations = calibrate_sample(tasks, predictions, confidences, labels, protocol.field_of_view)
    return metrics, error_counts, calibrations


def _sample_scores(metrics: dict[str, StreamingMetric]) -> dict[str, float | None]:
    scores = {}
    for name, metric in metrics.items():
        try:
            scores |= {f"{name}_{key}": value for key, value in metric.compute().items()}
        except NoValidPixelError:
            scores[f"{name}_{metric.main}"] = None
    return scores
