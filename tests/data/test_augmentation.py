import torch
from small_models import ALL_KINDS, random_labels
from transformers import BatchFeature

from transformers_degmix.data.augmentation import random_horizontal_flip


KINDS = {name: task["kind"] for name, task in ALL_KINDS.items()}


def batch():
    labels = random_labels(ALL_KINDS, 3, 4, 5)
    return BatchFeature({"pixel_values": torch.arange(180.0).view(3, 3, 4, 5), "labels": labels})


def test_images_and_labels_are_mirrored_together():
    flipped = random_horizontal_flip(batch(), KINDS, probability=1.0)
    original = batch()
    assert torch.equal(flipped["pixel_values"], original["pixel_values"].flip(-1))
    for task in ("semseg", "human_parts", "sal", "depth", "edge"):
        assert torch.equal(flipped["labels"][task], original["labels"][task].flip(-1))
    mirrored = original["labels"]["normals"].flip(-1)
    mirrored[:, 0] = torch.where(mirrored[:, 0] == 255, 255, -mirrored[:, 0])  # ignored stays ignored
    assert torch.equal(flipped["labels"]["normals"], mirrored)


def test_twice_is_the_identity():
    twice = random_horizontal_flip(random_horizontal_flip(batch(), KINDS, 1.0), KINDS, 1.0)
    assert torch.equal(twice["pixel_values"], batch()["pixel_values"])
    assert all(torch.equal(twice["labels"][task], label) for task, label in batch()["labels"].items())


def test_each_image_decides_for_itself():
    torch.manual_seed(0)
    seen = set()
    for _ in range(20):
        flipped = random_horizontal_flip(batch(), KINDS)["pixel_values"] != batch()["pixel_values"]
        seen.add(tuple(flipped.flatten(1).any(dim=1).tolist()))
    assert len(seen) > 2


def test_never():
    assert torch.equal(random_horizontal_flip(batch(), KINDS, 0.0)["pixel_values"], batch()["pixel_values"])
