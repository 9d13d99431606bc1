import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import numpy as np
import pyarrow.parquet
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from PIL import Image
from small_models import small_model
from torch.utils.data import DataLoader

from transformers_degmix import DeGMixImageProcessorPil
from transformers_degmix.data.collator import DeGMixDataCollator
from transformers_degmix.data.mapping import map_columns
from transformers_degmix.data.rooms import ROOMS_TASKS, load_rooms
from transformers_degmix.evaluation import BENCHMARK_METRICS, BoundaryMetric
from transformers_degmix.evaluation.calibration import Calibration
from transformers_degmix.evaluation.depth import crop_depth
from transformers_degmix.evaluation.evaluator import evaluate_model
from transformers_degmix.evaluation.report import (
    build_report,
    check_comparable,
    find_extremes,
    format_table,
    single_task_scores,
    write_report,
)
from transformers_degmix.evaluation.whole_images import (
    Protocol,
    WholeImageCollator,
    evaluate_whole_images,
    predict_whole_image,
    score_sample,
)
from transformers_degmix.sliding_windows import predict_in_windows
from transformers_degmix.tasks import TASK_KINDS
from transformers_degmix.visualization.geometry import depth_normals_angles


@pytest.fixture(scope="module")
def model():
    return small_model(tasks=ROOMS_TASKS)


@pytest.fixture(scope="module")
def data(model):
    return map_columns(load_rooms("test", 3, (32, 48)), model.config.tasks)


PLAIN = Protocol()


def evaluate(model, processor, data, protocol=PLAIN):
    with ThreadPoolExecutor(1) as executor:
        return evaluate_whole_images(model, processor, data, protocol, Accelerator(), executor)


@pytest.fixture(scope="module")
def evaluation(model, data):
    return evaluate(model, DeGMixImageProcessorPil(tasks=model.config.tasks), data)


def make_report(model, evaluation, protocol=PLAIN, name="model"):
    described = {"dataset": "rooms", "split": "test"}
    return build_report(evaluation, model, name, described, protocol, "fp32", "degmix evaluate", [])


def test_scores_are_those_of_evaluate_model(model, data, evaluation):
    tasks = model.config.tasks
    collator = DeGMixDataCollator(DeGMixImageProcessorPil(tasks=tasks), tasks=tasks)
    batches = DataLoader(data, 3, collate_fn=collator)
    expected = evaluate_model(model, batches, tasks, Accelerator())[1]
    (batch,) = batches
    boundaries = BoundaryMetric(tasks["edge"], 0.0075)
    with torch.no_grad():
        boundaries.update(model(batch["pixel_values"]).logits["edge"].sigmoid()[:, 0], batch["labels"]["edge"])
    expected["edge"] = boundaries.compute()
    for name, scores in evaluation.scores.items():
        assert scores == pytest.approx(expected[name], abs=1e-5), name


def test_scores_are_of_own_size_without_padding(model, data):
    tasks = model.config.tasks
    options = {"do_resize": True, "size": {"shortest_edge": 40}, "size_divisor": 64}
    processor = DeGMixImageProcessorPil(tasks=tasks, **options)
    evaluation = evaluate(model, processor, data)
    metrics = {name: BENCHMARK_METRICS[task["kind"]](task) for name, task in tasks.items()}
    for row, sample in zip(data, evaluation.samples):
        with torch.no_grad():
            outputs = model(**processor(row["image"], return_tensors="pt"))
        assert outputs.logits["depth"].shape[-2:] == (64, 64)
        predictions = processor.post_process_dense_prediction(outputs, [(32, 48)])[0]
        labels = DeGMixDataCollator(DeGMixImageProcessorPil(tasks=tasks), tasks=tasks)([row])["labels"]
        for name, metric in metrics.items():
            metric.update(predictions[name][None], labels[name])
        errors = (predictions["depth"] - labels["depth"][0])[labels["depth"][0] != 255]
        assert sample["depth_rmse"] == pytest.approx(errors.square().mean().sqrt().item(), rel=1e-5)
    for name, metric in metrics.items():
        for key, values in metric.sums.items():
            torch.testing.assert_close(evaluation.metrics[name].sums[key], values)
    assert evaluation.error_counts["depth"].sum() == metrics["depth"].sums["valid"]


@pytest.mark.parametrize("size_divisor", [None, 33])
def test_views_are_averaged_in_the_frame_of_the_image(model, data, size_divisor):
    tasks = model.config.tasks
    processor = DeGMixImageProcessorPil(tasks=tasks, size_divisor=size_divisor)
    pixels = np.asarray(data[0]["image"], np.float32).transpose(2, 0, 1)
    inputs = processor(pixels, return_tensors="pt")["pixel_values"]
    top, left = (inputs.shape[2] - 32) // 2, (inputs.shape[3] - 48) // 2
    large = processor(pixels, do_resize=True, size={"height": 64, "width": 96}, return_tensors="pt")["pixel_values"]
    large_top, large_left = (large.shape[2] - 64) // 2, (large.shape[3] - 96) // 2
    with torch.no_grad():
        plain, mirrored = model(inputs).logits, model(inputs.flip(-1)).logits
        enlarged = model(large).logits
    flipped = predict_whole_image(model, processor, pixels, Protocol(flip=True))[0]
    scaled = predict_whole_image(model, processor, pixels, Protocol(scales=(1, 2)))[0]
    for name, task in tasks.items():
        sign = torch.tensor([-1.0, 1, 1] if task["kind"] == "normals" else [1.0]).view(1, -1, 1, 1)
        factor = 2 if task["kind"] == "depth" else 1  # seems half as far
        one = plain[name][..., top : top + 32, left : left + 48]
        back = (sign * mirrored[name].flip(-1))[..., top : top + 32, left : left + 48]
        small = factor * enlarged[name][..., large_top : large_top + 64, large_left : large_left + 96]
        small = torch.nn.functional.interpolate(small, (32, 48), mode="bilinear")
        activation = TASK_KINDS[task["kind"]].activation
        torch.testing.assert_close(flipped[name], activation((one + back) / 2)[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(scaled[name], activation((one + small) / 2)[0], atol=1e-5, rtol=1e-5)


def test_padding_to_a_fixed_size_is_cropped_away(model, data):
    tasks = model.config.tasks
    processor = DeGMixImageProcessorPil(tasks=tasks, pad_size={"height": 50, "width": 64})
    pixels = np.asarray(data[0]["image"], np.float32).transpose(2, 0, 1)
    # By hand: 9 rows above and below, 8 columns to the left and right; of the enlarged image 18 and 16.
    padded = processor(pixels, return_tensors="pt")["pixel_values"]
    large = DeGMixImageProcessorPil(
        tasks=tasks, do_resize=True, size={"height": 64, "width": 96}, pad_size={"height": 100, "width": 128}
    )(pixels, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits, enlarged = model(padded).logits, model(large).logits
    plain = predict_whole_image(model, processor, pixels, Protocol())[0]
    scaled = predict_whole_image(model, processor, pixels, Protocol(scales=(2,)))[0]
    small = predict_whole_image(model, processor, pixels, Protocol(scales=(0.5, 1)))[0]
    for name, task in tasks.items():
        activation = TASK_KINDS[task["kind"]].activation
        one = logits[name][..., 9:41, 8:56]
        two = torch.nn.functional.interpolate(enlarged[name][..., 18:82, 16:112], (32, 48), mode="bilinear")
        two = (2 if task["kind"] == "depth" else 1) * two
        torch.testing.assert_close(plain[name], activation(one)[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(scaled[name], activation(two)[0], atol=1e-5, rtol=1e-5)
        assert small[name].shape == plain[name].shape


@pytest.mark.parametrize("options", [{"pad_size": {"height": 80, "width": 80}}, {"do_resize": True}])
def test_windows_are_of_the_image_as_it_is(model, options):
    tasks = model.config.tasks
    (row,) = map_columns(load_rooms("test", 1, (48, 64)), tasks)
    pixels = np.asarray(row["image"], np.float32).transpose(2, 0, 1)
    processor = DeGMixImageProcessorPil(tasks=tasks, size={"height": 33, "width": 35}, size_divisor=50, **options)
    protocol = Protocol(flip=True, scales=(1, 1.5), window_size=(40, 50), window_overlap=0.1)
    found = predict_whole_image(model, processor, pixels, protocol)[0]
    plain = DeGMixImageProcessorPil(tasks=tasks)
    inputs = plain(pixels, return_tensors="pt")["pixel_values"]
    large = plain(pixels, do_resize=True, size={"height": 72, "width": 96}, return_tensors="pt")["pixel_values"]
    views = [predict_in_windows(model, view, (40, 50), 0.1).logits for view in (inputs, inputs.flip(-1))]
    views += [predict_in_windows(model, view, (40, 50), 0.1).logits for view in (large, large.flip(-1))]
    for name, task in tasks.items():
        sign = torch.tensor([-1.0, 1, 1] if task["kind"] == "normals" else [1.0]).view(1, -1, 1, 1)
        factor = 1.5 if task["kind"] == "depth" else 1
        maps = [view[name] for view in views]
        maps[1::2] = (sign * mirrored.flip(-1) for mirrored in maps[1::2])
        maps[2:] = (factor * torch.nn.functional.interpolate(x, (48, 64), mode="bilinear") for x in maps[2:])
        expected = TASK_KINDS[task["kind"]].activation(sum(maps) / 4)[0]
        torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-5)


def test_samples_without_anything_to_find_are_not_the_best_or_worst():
    tasks = {name: {**ROOMS_TASKS[name]} for name in ("human_parts", "sal", "depth", "edge")}
    tasks["human_parts"]["ignore_empty"] = False
    model = small_model(tasks=tasks)
    rows = [dict(row) for row in load_rooms("test", 4, (32, 48))]
    for index, row in enumerate(rows):
        for name in ("human_parts", "sal", "edge"):
            row[name] = Image.fromarray(np.uint8(np.eye(32, 48) if index < 2 else np.zeros((32, 48))))
    rows[1]["human_parts"] = Image.fromarray(np.full((32, 48), 255, np.uint8))
    data = map_columns(Dataset.from_list(rows, features=load_rooms("test", 1, (32, 48)).features), model.config.tasks)
    evaluation = evaluate(model, DeGMixImageProcessorPil(tasks=model.config.tasks), data)
    ranked = {
        name: {sample["index"] for samples in find_extremes(evaluation, name).values() for sample in samples}
        for name in tasks
    }
    assert ranked == {"human_parts": {0}, "sal": {0, 1}, "depth": {0, 1, 2, 3}, "edge": {0, 1}}
    assert evaluation.samples[2]["human_parts_mean_iou"] is not None  # scored, but not ranked


def test_report_is_complete(model, data, evaluation, tmp_path):
    processor = DeGMixImageProcessorPil(tasks=model.config.tasks)
    report = make_report(model, evaluation)
    write_report(tmp_path, report, evaluation, model, processor, data, Protocol(), Accelerator())
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["scores"] == evaluation.scores and written["protocol"]["num_images"] == 3
    assert written["protocol"]["tasks"]["edge"]["edge_tolerance"] == 0.0075
    assert "class 0 only" in written["protocol"]["tasks"]["human_parts"]["ignored"]
    iou = [value for value in written["per_class"]["semseg"] if value is not None]
    assert np.mean(iou) == pytest.approx(written["scores"]["semseg"]["mean_iou"])

    text = (tmp_path / "report.md").read_text()
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert all(f"({name})" in text for name in pictures)
    expected = {f"{task}_{title}.png" for task in model.config.tasks for title in ("best", "worst")}
    expected |= {f"{task}_{x}.png" for task in ("semseg", "human_parts") for x in ("class_IoU", "confusion_matrix")}
    expected |= {f"{task}_precision_and_recall.png" for task in ("sal", "edge")}
    expected |= {f"{task}_errors.png" for task in ("depth", "normals")}
    assert expected - pictures <= {"human_parts_worst.png"} and pictures <= expected

    samples = pyarrow.parquet.read_table(tmp_path / "samples.parquet").to_pylist()
    assert [sample["image_id"] for sample in samples] == [row["image_id"] for row in data]
    assert samples[1]["depth_rmse"] == evaluation.samples[1]["depth_rmse"]


def test_report_with_calibration(model, data, evaluation, tmp_path):
    tasks, processor = model.config.tasks, DeGMixImageProcessorPil(tasks=model.config.tasks)
    protocol = Protocol(calibration=True, field_of_view=75)
    calibrated = evaluate(model, processor, data, protocol)
    report = make_report(model, calibrated, protocol)
    write_report(tmp_path, report, calibrated, model, processor, data, protocol, Accelerator())
    assert report["scores"] == evaluation.scores

    by_hand, angles = {name: Calibration(task["kind"]) for name, task in tasks.items()}, []
    for row in data:
        with torch.no_grad():
            outputs = model(**processor(row["image"], return_tensors="pt"))
        maps, confidences = processor.post_process_dense_prediction(outputs, return_confidence=True)[0]
        labels = DeGMixDataCollator(processor, tasks=tasks)([row])["labels"]
        for name, calibration in by_hand.items():
            calibration.update(confidences[name][None], maps[name][None], labels[name])
        angles.append(depth_normals_angles(maps, tasks, 75))
    for name, calibration in by_hand.items():
        scores = calibration.compute()
        assert {key: report["calibration"][name][key] for key in scores} == pytest.approx(scores, rel=1e-3)
        assert (
            ("ece" in scores) == ("reliability" in report["calibration"][name]) == (name not in ("depth", "normals"))
        )
        assert (tmp_path / f"{name}_sparsification.png").exists()
        assert (tmp_path / f"{name}_reliability.png").exists() == ("ece" in scores)
    consistency = report["consistency"]
    assert consistency["field_of_view"] == 75 and set(consistency["orders_errors_of"]) == {"depth", "normals"}
    assert consistency["median_angle"] == pytest.approx(torch.stack(angles).nanmedian().item(), abs=0.05)

    written = json.loads((tmp_path / "report.json").read_text())
    assert written["calibration"] == report["calibration"]
    check_comparable({"with": written, "without": make_report(model, evaluation)})
    text = (tmp_path / "report.md").read_text()
    assert "## Confidence" in text and all(f"({path.name})" in text for path in tmp_path.glob("*.png"))


def test_no_consistency_where_no_depth_is_above_0(data):
    model = small_model(tasks={name: ROOMS_TASKS[name] for name in ("depth", "normals")})
    with torch.no_grad():
        model.heads["depth"].classifier.bias.fill_(-1000)
    protocol = Protocol(calibration=True)
    processor = DeGMixImageProcessorPil(tasks=model.config.tasks)
    report = make_report(model, evaluate(model, processor, data, protocol), protocol)
    assert "consistency" not in report and list(report["calibration"]) == ["depth", "normals"]


def test_fingerprint_is_of_the_content(model, data, evaluation, tmp_path):
    rows = load_rooms("test", 3, (32, 48))
    rows.to_parquet(tmp_path / "test.parquet")
    copied = map_columns(Dataset.from_parquet(str(tmp_path / "test.parquet")), model.config.tasks)
    processor = DeGMixImageProcessorPil(tasks=model.config.tasks)
    assert evaluate(model, processor, copied).fingerprint == evaluation.fingerprint

    changed = [dict(row) for row in rows]
    changed[2]["sal"] = changed[0]["sal"]
    other = map_columns(Dataset.from_list(changed, features=rows.features), model.config.tasks)
    other = evaluate(model, processor, other).fingerprint
    assert {name for name in other if other[name] != evaluation.fingerprint[name]} == {"sal"}


def test_table_marks_the_best(model, evaluation):
    first = make_report(model, evaluation, name="first")
    second = deepcopy(first)
    second["model"]["name"] = "second"
    second["scores"]["depth"]["rmse"] /= 2
    second["scores"]["semseg"]["mean_iou"] /= 2
    del second["scores"]["sal"]
    second["gain_percent"] = -1.5
    header, _, *rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in format_table([first, second]).splitlines()
    ]
    table = {column: cells for column, *cells in zip(header, *rows)}
    iou, rmse = first["scores"]["semseg"]["mean_iou"], first["scores"]["depth"]["rmse"]
    assert table["model"] == ["first", "second"]
    assert table["semseg mIoU % up"] == [f"**{100 * iou:.2f}**", f"{50 * iou:.2f}"]
    assert table["depth RMSE m down"] == [f"{rmse:.4f}", f"**{rmse / 2:.4f}**"]
    assert table["sal maxF % up"][1] == "-" and table["gain % up"] == ["-", "**-1.50**"]


def test_only_like_is_compared(model, evaluation):
    report = make_report(model, evaluation)
    check_comparable({"a": report, "b": deepcopy(report)})
    windows = make_report(model, evaluation, Protocol(window_size=(512, 512)))
    wider = make_report(model, evaluation, Protocol(window_size=(512, 512), window_overlap=0.5))
    for a, b in ((report, windows), (windows, wider)):
        with pytest.raises(ValueError, match="a and b are not comparable: `protocol.windows`"):
            check_comparable({"a": a, "b": b})
    for path, value in (("protocol.flip", True), ("fingerprint.image", "0"), ("protocol.tasks.edge", {})):
        other = deepcopy(report)
        *parents, leaf = path.split(".")
        node = other
        for parent in parents:
            node = node[parent]
        node[leaf] = value
        with pytest.raises(ValueError, match=f"a and b are not comparable: `{path.replace('tasks.', '')}`"):
            check_comparable({"a": report, "b": other})
    # Another task may be scored on other data.
    other = deepcopy(report)
    other["fingerprint"]["edge"] = "0"
    del other["scores"]["edge"]
    check_comparable({"a": report, "b": other})


def test_single_task_scores():
    tasks = {"depth": {"kind": "depth"}, "edge": {"kind": "boundary"}}
    depth, edge = {"scores": {"depth": {"rmse": 0.5}}}, {"scores": {"edge": {"ods_f": 0.7}}}
    assert single_task_scores({"a": depth, "b": edge}, tasks) == {"depth": 0.5, "edge": 0.7}
    with pytest.raises(ValueError, match=r"there is none for \['edge'\]"):
        single_task_scores({"a": depth}, tasks)
    with pytest.raises(ValueError, match=r"there is none for \['edge'\]"):  # no gain is relative to 0
        single_task_scores({"a": depth, "b": {"scores": {"edge": {"ods_f": 0.0}}}}, tasks)
    for reports in (
        {"a": depth, "b": depth},
        {"b": {"scores": {"semseg": {}}}},
        {"b": {"scores": {**depth["scores"], "edge": {}}}},
    ):
        with pytest.raises(ValueError, match="one for each of.*b is for"):
            single_task_scores(reports, tasks)


def test_tasks_without_labels_are_left_out(model, data, evaluation, tmp_path):
    rows = [{**row, "depth": None, "human_parts": Image.new("L", (48, 32))} for row in load_rooms("test", 3, (32, 48))]
    features = load_rooms("test", 1, (32, 48)).features
    unlabelled = map_columns(Dataset.from_list(rows, features=features), model.config.tasks)
    processor, protocol = DeGMixImageProcessorPil(tasks=model.config.tasks), Protocol(calibration=True)
    partial = evaluate(model, processor, unlabelled, protocol)
    assert partial.samples[0]["depth_rmse"] is None
    report = make_report(model, partial, protocol)
    # Parts of persons are not asked for where there is none.
    left = [name for name in evaluation.scores if name not in ("depth", "human_parts")]
    assert report["scores"] == {name: evaluation.scores[name] for name in left}
    assert list(report["protocol"]["tasks"]) == list(report["calibration"]) == left
    header = format_table([report]).splitlines()[0]
    assert [name for name in evaluation.scores if f"| {name} " in header] == left
    write_report(tmp_path, report, partial, model, processor, unlabelled, protocol, Accelerator())
    assert "## depth\n\n-, no label in this split" in (tmp_path / "report.md").read_text()
    check_comparable({"a": make_report(model, evaluation), "b": make_report(model, evaluate(model, processor, data))})


def test_a_task_can_be_chosen(model, data, evaluation):
    processor = DeGMixImageProcessorPil(tasks=model.config.tasks)
    with ThreadPoolExecutor(1) as executor:
        chosen = evaluate_whole_images(
            model, processor, data, Protocol(calibration=True), Accelerator(), executor, 0, ["edge"]
        )
    assert chosen.scores == {"edge": evaluation.scores["edge"]} and list(chosen.fingerprint) == ["image", "edge"]


def test_samples_that_cannot_be_evaluated_are_named(model, evaluation, tmp_path):
    rows = load_rooms("test", 3, (32, 48))
    changed = [dict(row) for row in rows]
    tiny = {name: changed[0][name].crop((0, 0, 4, 4)) for name in ("image", *model.config.tasks)}
    changed.append({**changed[0], **tiny, "image_id": "tiny"})
    changed.append({**changed[0], "depth": Image.new("F", (9, 9)), "image_id": None})
    data = map_columns(Dataset.from_list(changed, features=rows.features), model.config.tasks)
    processor = DeGMixImageProcessorPil(tasks=model.config.tasks, do_pad=False)
    partial = evaluate(model, processor, data)
    assert [(sample["index"], sample["image_id"]) for sample in partial.failed] == [(3, "tiny"), (4, "4")]
    assert "(9, 9)" in partial.failed[1]["reason"] and len(partial.samples) == 3
    assert partial.scores == evaluation.scores and partial.fingerprint == evaluation.fingerprint
    report = make_report(model, partial)
    write_report(tmp_path, report, partial, model, processor, data, Protocol(), Accelerator())
    assert json.loads((tmp_path / "report.json").read_text())["failed"] == partial.failed
    assert "Samples that could not be evaluated (2)\n\n- tiny: " in (tmp_path / "report.md").read_text()


def test_depths_that_the_protocol_leaves_out_are_not_scored(model):
    rows, tasks = load_rooms("test", 3, (32, 48)), model.config.tasks
    protocol = Protocol(depth_crop="garg", max_depth=4.0)
    found = evaluate(model, DeGMixImageProcessorPil(tasks=tasks), map_columns(rows, tasks), protocol)
    depths = torch.from_numpy(np.stack([np.array(depth) for depth in rows["depth"]]))
    num_scored = int((crop_depth(depths, "garg", 4.0) > 0).sum())
    assert 0 < num_scored < (depths > 0).sum()
    assert found.metrics["depth"].sums["valid"] == num_scored


def test_samples_can_be_scored_in_other_processes(model, data, evaluation):
    tasks, processor = model.config.tasks, DeGMixImageProcessorPil(tasks=model.config.tasks)
    sample = WholeImageCollator(processor, tasks)([data[1]])
    predictions = predict_whole_image(model, processor, sample["pixels"], Protocol())[0]
    sample_arguments = (tasks, Protocol(), predictions, {}, sample["labels"])
    score, arguments = pickle.loads(pickle.dumps((score_sample, sample_arguments)))
    metrics, *_ = pickle.loads(pickle.dumps(score(*arguments)))
    assert metrics["edge"].compute()["ods_f"] == evaluation.samples[1]["edge_ods_f"]


def test_the_protocol_is_checked():
    for scales in ((), (0.0,), (float("nan"),)):
        with pytest.raises(ValueError, match="`scales` must be positive"):
            Protocol(scales=scales)
    with pytest.raises(ValueError, match="`field_of_view`"):
        Protocol(calibration=True, field_of_view=180)
    with pytest.raises(ValueError, match="`window_size`"):
        Protocol(window_size=(512, 16))
    with pytest.raises(ValueError, match="overlap of windows"):
        Protocol(window_size=(512, 512), window_overlap=1)
