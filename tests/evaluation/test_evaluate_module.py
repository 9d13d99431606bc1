import evaluate
import pytest
import torch
from test_metrics import TASKS, random_batch

from transformers_degmix.evaluation import METRICS, BoundaryMetric, evaluate_module


# configuration -> task, and what its metric takes beside it
CONFIGURATIONS = {
    "segmentation": ("semseg", {"num_labels": 5}),
    "saliency": ("sal", {}),
    "depth": ("depth", {}),
    "normals": ("normals", {}),
    "boundary": ("edge", {"tolerance": 0.1}),
    "exact_boundary": ("edge", {}),
}


def load(name, cache_dir, **options):
    return evaluate.load(
        evaluate_module.__file__, name, cache_dir=str(cache_dir), **CONFIGURATIONS[name][1], **options
    )


def expected_scores(name, *batches):
    task = TASKS[CONFIGURATIONS[name][0]]
    metric = BoundaryMetric(task, 0.1) if name == "boundary" else METRICS[task["kind"]](task)
    for prediction, label in batches:
        metric.update(prediction, label)
    scores = metric.compute()
    return {**scores, "per_class_iou": metric.per_class_iou()} if name == "segmentation" else scores


def check_scores(scores, expected):
    assert set(scores) == set(expected)
    for name, value in expected.items():
        assert scores[name] == pytest.approx(value), name


def test_there_is_a_test_of_every_configuration(tmp_path):
    with pytest.raises(ValueError, match="`config_name` must be one of .*, got 'semseg'") as error:
        evaluate.load(evaluate_module.__file__, "semseg", cache_dir=str(tmp_path))
    assert all(repr(name) in str(error.value) for name in CONFIGURATIONS)
    assert set(evaluate_module.CONFIGURATIONS) == set(CONFIGURATIONS)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("segmentation", {}, "`num_labels` must be the number of classes, got None"),
        ("segmentation", {"num_labels": 0}, "`num_labels` must be the number of classes, got 0"),
        ("depth", {"tolerance": 0.1}, "`tolerance` is for 'boundary', not for 'depth'"),
        ("boundary", {"tolerance": -1}, "`tolerance` is a fraction"),
    ],
)
def test_options_that_are_refused(tmp_path, name, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate.load(evaluate_module.__file__, name, cache_dir=str(tmp_path), **options)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_batches_add_up_and_are_forgotten(name, tmp_path):
    module = load(name, tmp_path)
    first, second, third = (random_batch(CONFIGURATIONS[name][0], 2, 12, 14, seed) for seed in range(3))
    for prediction, label in (first, second):
        module.add_batch(predictions=prediction, references=label)
    check_scores(module.compute(), expected_scores(name, first, second))
    prediction, label = third
    module.add(prediction=prediction[0].numpy(), reference=label[0].tolist())
    check_scores(
        module.compute(predictions=prediction[1:].tolist(), references=label[1:].numpy()), expected_scores(name, third)
    )


def test_images_of_different_sizes(tmp_path):
    module = load("depth", tmp_path)
    batches = [random_batch("depth", 1, 6, width) for width in (5, 9)]
    predictions, labels = ([batch[i][0] for batch in batches] for i in (0, 1))
    check_scores(module.compute(predictions=predictions, references=labels), expected_scores("depth", *batches))


def test_cache_holds_sums(tmp_path):
    module = load("depth", tmp_path)
    prediction, label = random_batch("depth", 2, 300, 400)
    module.add_batch(predictions=prediction, references=label)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
    module.compute()
    assert not list(tmp_path.rglob("*.arrow"))


def test_bad_input(tmp_path):
    module = load("segmentation", tmp_path)
    prediction, label = random_batch("semseg")
    with pytest.raises(ValueError, match="4 predictions and 3 references"):
        module.add_batch(predictions=prediction, references=label[:3])
    with pytest.raises(ValueError, match="got 7"):
        module.add_batch(predictions=prediction.clamp(min=7), references=label)
    with pytest.raises(ValueError, match="no valid pixel"):
        module.compute()
    check_scores(
        module.compute(predictions=prediction, references=label), expected_scores("segmentation", (prediction, label))
    )


def one_of_two(rank: int, folder: str):
    results = {}
    for name, (task, _) in CONFIGURATIONS.items():
        module = load(name, folder, num_process=2, process_id=rank)
        prediction, label = random_batch(task, 3, 12, 14)
        mine = slice(0, 1) if rank == 0 else slice(1, 3)  # of unequal sizes
        module.add_batch(predictions=prediction[mine], references=label[mine])
        results[name] = module.compute()
    torch.save(results, f"{folder}/{rank}.pt")


def test_sums_of_two_processes_are_merged(tmp_path):
    torch.multiprocessing.start_processes(one_of_two, (str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name, (task, _) in CONFIGURATIONS.items():
        check_scores(first[name], expected_scores(name, random_batch(task, 3, 12, 14)))
        assert second[name] is None
