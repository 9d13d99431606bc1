"""The collator: rows to batches, reproducible, with missing labels and with labels that cannot be."""

import numpy as np
import pytest
import torch
from datasets import load_dataset
from PIL import Image
from small_models import ALL_KINDS
from torch.utils.data import DataLoader

from transformers_degmix.data.augmentation import Augmentation
from transformers_degmix.data.collator import DeGMixDataCollator
from transformers_degmix.data.rooms import ROOMS_TASKS, load_rooms
from transformers_degmix.image_processing_pil_degmix import DeGMixImageProcessorPil


SIZE = (32, 48)
NOTHING_AT_RANDOM = {
    "scale": (1.0, 1.0),
    "flip_probability": 0.0,
    "brightness": 0.0,
    "contrast": (1.0, 1.0),
    "saturation": (1.0, 1.0),
    "hue": 0.0,
}


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    return load_rooms("train", 6, SIZE, cache_dir=str(tmp_path_factory.mktemp("cache")))


def collator(augmentation=None, tasks=ROOMS_TASKS, **options):
    processor = DeGMixImageProcessorPil(tasks=tasks, **options)
    return DeGMixDataCollator(processor, augmentation, tasks=tasks)


def equal(a, b):
    return torch.equal(a["pixel_values"], b["pixel_values"]) and all(
        torch.equal(a["labels"][task], b["labels"][task]) for task in a["labels"]
    )


def row(height=8, width=9):
    """A row whose labels are right for `ALL_KINDS`."""
    rng = np.random.default_rng(0)
    normals = rng.standard_normal((height, width, 3)).astype(np.float32)
    return {
        "image": Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)),
        "semseg": Image.fromarray(rng.integers(0, 5, (height, width), np.uint8)),
        "human_parts": Image.fromarray(rng.integers(0, 3, (height, width), np.uint8)),
        "sal": Image.fromarray(rng.integers(0, 2, (height, width), np.uint8)),
        "depth": Image.fromarray(rng.uniform(0.5, 9, (height, width)).astype(np.float32)),
        "normals": normals / np.linalg.norm(normals, axis=-1, keepdims=True),
        "edge": Image.fromarray(255 * rng.integers(0, 2, (height, width), np.uint8)),
    }


def test_without_augmentation_it_is_the_processor(rooms):
    rows = list(rooms)
    processor = DeGMixImageProcessorPil(tasks=ROOMS_TASKS, do_resize=True, size={"shortest_edge": 24})
    expected = processor(
        images=[row["image"] for row in rows],
        labels={task: [row[task] for row in rows] for task in ROOMS_TASKS},
        return_tensors="pt",
    )
    batch = DeGMixDataCollator(processor)(rows)
    assert batch["pixel_values"].shape == (6, 3, 24, 36)
    assert equal(batch, expected)


@pytest.mark.parametrize("options", [{}, {"do_resize": True, "size": {"shortest_edge": 24}}])
def test_augmentation_of_which_nothing_is_drawn(rooms, options):
    rows, plain = list(rooms), collator(**options)(list(rooms))
    augmented = collator(Augmentation(plain["pixel_values"].shape[-2:], **NOTHING_AT_RANDOM), **options)(rows)
    torch.testing.assert_close(augmented["pixel_values"], plain["pixel_values"], atol=1e-4, rtol=0)
    for task, label in plain["labels"].items():
        assert torch.equal(augmented["labels"][task], label)


def test_scale_is_relative_to_what_the_processor_resizes_to(rooms):
    half = Augmentation((24, 36), **{**NOTHING_AT_RANDOM, "scale": (0.5, 0.5)})
    batch = collator(half, do_resize=True, size={"shortest_edge": 24})(list(rooms))
    seen = torch.zeros(6, 24, 36, dtype=torch.bool)
    seen[:, 6:18, 9:27] = True
    assert torch.equal(batch["labels"]["semseg"] != 255, seen)
    assert torch.equal(batch["pixel_values"].any(dim=1), seen)


def test_small_images_are_padded_in_the_centre(rooms):
    plain, padded = collator()(list(rooms)), collator(Augmentation((39, 50), **NOTHING_AT_RANDOM))(list(rooms))
    inside = np.s_[..., 3:35, 1:49]
    torch.testing.assert_close(padded["pixel_values"][inside], plain["pixel_values"], atol=1e-4, rtol=0)
    padded["pixel_values"][inside] = 0
    assert not padded["pixel_values"].any()
    for task, label in padded["labels"].items():
        assert torch.equal(label[inside], plain["labels"][task])
        label[inside] = 255
        assert (label == 255).all()


def test_batches_do_not_depend_on_the_workers(rooms):
    def epochs(num_workers, numbers):
        collate = collator(Augmentation((24, 24)))
        loader = DataLoader(rooms, 2, num_workers=num_workers, persistent_workers=num_workers > 0, collate_fn=collate)
        for number in numbers:
            collate.set_epoch(number)
            yield list(loader)

    first, second, again = epochs(0, (0, 1, 0))
    assert not any(equal(a, b) for a, b in zip(first, second))
    assert all(equal(a, b) for a, b in zip(first, again))
    for num_workers in (1, 2):
        for here, there in zip((second, first), epochs(num_workers, (1, 0))):
            assert len(here) == len(there) == 3
            assert all(equal(a, b) for a, b in zip(here, there))


def test_samples_do_not_depend_on_their_batch(rooms):
    collate, rows = collator(Augmentation((24, 24))), list(rooms)
    together = collate(rows)
    for index, single in enumerate(rows):
        alone = collate([single])
        assert torch.equal(alone["pixel_values"][0], together["pixel_values"][index])
        assert all(torch.equal(alone["labels"][task][0], together["labels"][task][index]) for task in ROOMS_TASKS)


def test_each_image_draws_for_itself():
    """Of many images that differ in one pixel, about half are flipped."""
    columns = Image.fromarray(np.arange(9, dtype=np.uint8)[None].repeat(8, axis=0))
    rows = []
    for index in range(64):
        image = gray((0, 0, 0), "RGB")
        image.putpixel((4, 4), (index, 0, 0))
        rows.append({"image": image, "columns": columns})
    tasks = {"columns": {"kind": "segmentation", "num_labels": 9}}
    augmentation = Augmentation((8, 9), **{**NOTHING_AT_RANDOM, "flip_probability": 0.5})
    flipped = collator(augmentation, tasks=tasks)(rows)["labels"]["columns"][:, 0, 0] == 8
    assert 16 <= flipped.sum() <= 48


def test_seeds_differ(rooms):
    processor, augmentation = DeGMixImageProcessorPil(tasks=ROOMS_TASKS), Augmentation((24, 24))
    one, two = (DeGMixDataCollator(processor, augmentation, seed=seed)(list(rooms)) for seed in (1, 2))
    assert not equal(one, two)


def test_streaming(rooms, tmp_path):
    rooms.to_parquet(tmp_path / "train.parquet")
    stream = load_dataset(str(tmp_path), split="train", streaming=True, cache_dir=str(tmp_path / "cache"))
    collate = collator(Augmentation((24, 24)))
    batches = list(DataLoader(stream, 3, collate_fn=collate))
    assert all(equal(a, b) for a, b in zip(batches, DataLoader(rooms, 3, collate_fn=collate), strict=True))


@pytest.mark.parametrize("augmentation", [None, Augmentation((24, 24))])
def test_missing_labels_are_ignored(rooms, augmentation):
    collate, rows = collator(augmentation), list(rooms)[:3]
    complete = collate(rows)
    # All but the segmentation, which decides on crops.
    del rows[0]["normals"], rows[2]["sal"]
    rows[1] = {**rows[1], "depth": None, "edge": None}
    batch = collate(rows)
    assert torch.equal(batch["pixel_values"], complete["pixel_values"])
    missing = {"normals": 0, "sal": 2, "depth": 1, "edge": 1}
    for task, label in batch["labels"].items():
        expected = complete["labels"][task]
        if task in missing:
            assert not (expected[missing[task]] == 255).all()
            expected[missing[task]] = 255
        assert torch.equal(label, expected)


@pytest.mark.parametrize("augmentation", [None, Augmentation(SIZE, **NOTHING_AT_RANDOM)])
def test_images_without_any_class_but_0_are_ignored_where_the_task_says_so(rooms, augmentation):
    rows = list(rooms)[:3]
    parts = np.zeros((3, *SIZE), np.uint8)
    parts[1, 5, 5] = 2
    parts[2, :, :9] = 255
    for one, part in zip(rows, parts):
        one["limbs"] = one["semseg"] = Image.fromarray(part)
    tasks = {"limbs": {"kind": "segmentation", "ignore_empty": True}, "semseg": {"kind": "segmentation"}}
    labels = collator(augmentation, tasks=tasks)(rows)["labels"]
    assert (labels["limbs"][[0, 2]] == 255).all()
    assert torch.equal(labels["limbs"][1], torch.from_numpy(parts[1]).long())
    assert torch.equal(labels["semseg"], torch.from_numpy(parts).long())


def test_rooms_without_people_have_no_parts(rooms):
    is_empty = torch.tensor([not np.any(row["human_parts"]) for row in rooms])
    label = collator()(list(rooms))["labels"]["human_parts"]
    assert is_empty.any() and torch.equal((label == 255).flatten(1).all(dim=1), is_empty)


def test_right_labels_pass():
    batch = collator(tasks=ALL_KINDS)([row(), row()])
    assert batch["labels"]["normals"].shape == (2, 3, 8, 9)


def gray(value, mode="L"):
    return Image.new(mode, (9, 8), value)


def test_class_ids_in_sixteen_bits():
    ids = np.arange(72).reshape(8, 9) % 5
    for stored in (ids.astype(np.uint16), ids.astype(np.int32)):
        batch = collator(tasks=ALL_KINDS)([{**row(), "semseg": Image.fromarray(stored)}])
        assert np.array_equal(batch["labels"]["semseg"][0], ids)


@pytest.mark.parametrize(
    "task, label, message",
    [
        ("image", None, "expected"),
        ("image", Image.new("F", (9, 8), float("nan")), "NaN"),
        ("semseg", Image.new("L", (8, 9)), r"\(8, 9, 1\), got \(9, 8\)"),
        ("semseg", gray(5), "class ids from 0 to 4, or 255, got 5"),
        ("semseg", np.full((8, 9), -1), "class ids from 0 to 4, or 255, got -1"),
        ("semseg", gray(1, "RGB"), "mode 1 or L or P, got RGB"),
        ("sal", gray(2), "0, 1 or 255, got 2"),
        ("depth", gray(float("nan"), "F"), "NaN"),
        ("depth", gray(-0.5, "F"), "metres of at least 0, got -0.5"),
        ("depth", Image.fromarray(np.full((8, 9), 1500, np.uint16)), r"mode F, got I;16: .*0\.001 .*1/256.*1/5000"),
        ("normals", np.full((8, 9, 3), 0.1, np.float32), "vectors of length 1 or 0, got 0.17"),
        ("normals", gray((255, 255, 255), "RGB"), "vectors of length 1 or 0, got 1.73"),
        ("normals", gray(0), "mode RGB, got L"),
        ("edge", np.full((8, 9), 1.5, np.float32), "strengths from 0 to 1, or 255, got 1.5"),
    ],
)
@pytest.mark.parametrize("augmentation", [None, Augmentation((4, 4))])
def test_labels_that_cannot_be(task, label, message, augmentation):
    rows = [row(), {**row(), "image_id": "lounge_7", task: label}]
    with pytest.raises(ValueError, match=f"^`{task}` of row 1 of the batch, 'lounge_7': .*{message}"):
        collator(augmentation, tasks=ALL_KINDS)(rows)
    with pytest.raises(ValueError, match=f"^`{task}` of row 0 of the batch: "):
        collator(augmentation, tasks=ALL_KINDS)([{**rows[1], "image_id": None}])


@pytest.mark.parametrize("augmentation", [None, Augmentation((8, 9))])
def test_ignored_and_unknown_pixels_pass(augmentation):
    ignored = {
        "semseg": gray(255),
        "sal": gray(255),
        "depth": gray(0, "F"),
        "normals": np.zeros((8, 9, 3), np.float32),
        "edge": np.full((8, 9), 255, np.float32),
    }
    labels = collator(augmentation, tasks=ALL_KINDS)([{**row(), **ignored}])["labels"]
    assert all((labels[task] == 255).all() for task in ignored)
    # 8 bits hold zero to 1/255 only.
    collator(tasks=ALL_KINDS)([{**row(), "normals": gray((127, 128, 127), "RGB")}])


def test_some_normals_may_be_shorter():
    normals = np.zeros((160, 160, 3), np.float32)
    normals[..., 2] = 1
    normals[:, :4, 2] = 0.5  # as creases are after a data set was resized
    rows = [{"image": Image.new("RGB", (160, 160)), "normals": normals}]
    collate = collator(tasks={"normals": {"kind": "normals"}})
    assert torch.equal(collate(rows)["labels"]["normals"][0].permute(1, 2, 0), torch.from_numpy(normals))
    normals[:, :40, 2] = 0.5
    with pytest.raises(ValueError, match="length 1 or 0, got 0.5"):
        collate(rows)


def test_class_ids_of_tasks_without_a_number_of_classes():
    collate = DeGMixDataCollator(DeGMixImageProcessorPil(tasks={"semseg": "segmentation"}))
    assert (collate([{"image": gray(0, "RGB"), "semseg": gray(254)}])["labels"]["semseg"] == 254).all()
    with pytest.raises(ValueError, match="0 to 254"):
        collate([{"image": gray(0, "RGB"), "semseg": np.full((8, 9), 256)}])
