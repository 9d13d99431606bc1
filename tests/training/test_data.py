import json
import os
from dataclasses import replace
from io import BytesIO
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, DatasetDict, Features, IterableDataset
from datasets import Image as ImageFeature
from datasets import config as datasets_config
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from transformers_degmix import DeGMixImageProcessorPil
from transformers_degmix.data.augmentation import Augmentation
from transformers_degmix.data.collator import DeGMixDataCollator
from transformers_degmix.data.mapping import map_columns
from transformers_degmix.data.splits import DataSplit
from transformers_degmix.training.arguments import TrainingArguments
from transformers_degmix.training.data import (
    MixedDataset,
    MixedStream,
    ShardedBatchSampler,
    TrainBatches,
    build_eval_loader,
    draw_epoch,
    load_split,
    share_epoch,
)
from transformers_degmix.training.sources import Source


DEPTH = {"depth": {"kind": "depth"}}


def write_split(folder: Path, *depths: float | None) -> Path:
    """An image for each depth, and a map where there is one."""
    folder.mkdir(parents=True)
    lines = []
    for index, depth in enumerate(depths):
        Image.new("RGB", (4, 3)).save(folder / f"{index}.png")
        lines.append({"file_name": f"{index}.png", "depth_file_name": None})
        if depth is not None:
            Image.new("F", (4, 3), depth).save(folder / f"{index}.tif")
            lines[-1]["depth_file_name"] = f"{index}.tif"
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def depths(folder: Path, split: str, streaming: bool) -> list[float | None]:
    args = TrainingArguments(output_dir="o", dataset=str(folder), eval_split=split, streaming=streaming)
    data = load_split(args, args.sources[0], "eval", DEPTH)
    rows = data if streaming else (data[index] for index in range(len(data)))
    return [None if row["depth"] is None else np.asarray(row["depth"]).mean() for row in rows]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["data", "data [v2] (1)*"])
def test_labels_may_be_null_throughout_a_split(tmp_path, name, streaming):
    for split, values in {"train": (2, None), "validation": (None, None), "test": (5, 6)}.items():
        write_split(tmp_path / name / split, *values)
        assert depths(tmp_path / name, split, streaming) == list(values)  # with the splits so far
    assert depths(tmp_path / name, "train", streaming) == [2, None]
    with pytest.raises(ValueError, match="more"):
        depths(tmp_path / name, "more", streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["data", "data [v2]"])
def test_data_sets_that_were_saved_to_disk(tmp_path, name, streaming):
    path = str(write_split(tmp_path / "train", 2) / "0.tif")
    rows = Dataset.from_dict({"image": [path] * 3, "depth": [path, None, path]})
    for column in ("image", "depth"):
        rows = rows.cast_column(column, ImageFeature())
    rows.save_to_disk(tmp_path / name, num_shards=2)
    DatasetDict({"validation": rows}).save_to_disk(tmp_path / "several" / name)
    assert depths(tmp_path / name, "train", streaming) == [2, None, 2]
    assert depths(tmp_path / "several" / name, "validation", streaming) == [2, None, 2]
    with pytest.raises(ValueError, match=r"split 'validation'.*\['train'\]"):
        depths(tmp_path / name, "validation", streaming)
    split = DataSplit(str(tmp_path / name), "train", streaming=streaming)
    assert split.fingerprint(split.open()) == split.fingerprint(split.open())


@pytest.mark.parametrize("name", ["data", "data [v2]"])
def test_parts_of_a_split(tmp_path, name):
    for split, values in {"train": (2, None, 3), "validation": (None, None)}.items():
        write_split(tmp_path / name / split, *values)
    for part, values in {"train[:2]": [2, None], "train[-1:]": [3], "train[:34%]": [2]}.items():
        assert depths(tmp_path / name, part, False) == values
    for several in ("train+validation", "train[:1]+validation"):
        with pytest.raises(ValueError, match="can only be read one by one"):
            depths(tmp_path / name, several, False)


@pytest.mark.parametrize("name", ["data", "data [v2] (1)*"])
def test_fingerprints_of_streams_change_with_their_files(tmp_path, name):
    split = DataSplit(str(tmp_path / name), "train", streaming=True)
    folder = write_split(tmp_path / name / "train", 2, 3)
    before, again = (split.fingerprint(split.open()) for _ in range(2))
    os.utime(folder / "0.tif", (0, 0))
    assert before == again != split.fingerprint(split.open())


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["image", "bytes and path", "binary", "array"])
def test_labels_may_be_null_throughout_a_parquet_file(tmp_path, form, streaming):
    """Whose types, of the first file alone, `datasets` takes for those of all."""
    image, depth = BytesIO(), BytesIO()
    Image.new("RGB", (4, 3)).save(image, "PNG")
    Image.new("F", (4, 3), 2).save(depth, "TIFF")
    image, depth = image.getvalue(), depth.getvalue()
    if form == "array":
        depth = [[2.0] * 4] * 3
    elif form != "binary":
        image, depth = ({"bytes": content, "path": None} for content in (image, depth))
    null, labelled = {"image": image, "depth": None}, {"image": image, "depth": depth}
    for name, row in {"train-00000-of-00002": null, "train-00001-of-00002": labelled, "validation": null}.items():
        data = Dataset.from_list([row] * 2)
        if form == "image":
            data = data.cast_column("image", ImageFeature())
            data = data.cast_column("depth", ImageFeature()) if row is labelled else data
        data.to_parquet(tmp_path / f"{name}.parquet")
    assert depths(tmp_path, "train", streaming) == [None, None, 2, 2]
    assert depths(tmp_path, "validation", streaming) == [None, None]


@pytest.mark.parametrize("streaming", [False, True])
def test_arrays_of_numpy_as_label_files(tmp_path, streaming):
    folder = write_split(tmp_path / "train", 3)
    np.save(folder / "0.npy", np.full((3, 4), 2, np.float32))
    metadata = folder / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("0.tif", "0.npy"))
    assert depths(tmp_path, "train", streaming) == [2]


def test_splits_may_be_links(tmp_path):
    real = write_split(tmp_path / "elsewhere", 3)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(real)
    assert depths(tmp_path / "data", "train", False) == [3]


@pytest.mark.parametrize("metadata", [None, "metadata.jsonl"])
def test_folders_of_another_layout_are_shown_the_right_one(tmp_path, metadata):
    for split in ("train", "validation"):
        for part in ("images", "masks"):
            (tmp_path / split / part).mkdir(parents=True)
            Image.new("RGB", (4, 3)).save(tmp_path / split / part / "0.png")
    if metadata:
        row = {"file_name": "train/images/0.png", "semseg_file_name": "train/masks/0.png"}
        (tmp_path / metadata).write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"lacks column 'depth'.* FOLDER/train/metadata\.jsonl"):
        depths(tmp_path, "train", False)


SIZES_AND_WEIGHTS = st.lists(st.tuples(st.integers(1, 40), st.floats(0.01, 100)), min_size=1, max_size=4)


@given(
    sources=SIZES_AND_WEIGHTS,
    batch_size=st.integers(1, 5),
    num_processes=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
def test_processes_share_the_batches_of_one(sources, batch_size, num_processes, epoch):
    sizes, weights = zip(*sources)
    num_images, shares = sum(sizes), share_epoch(sizes, weights)

    def batches(batch_size, rank, num_processes):
        sampler = ShardedBatchSampler(sizes, shares, batch_size, 7, rank, num_processes)
        sampler.epoch = epoch
        assert len(list(sampler)) == len(sampler)
        return list(sampler)

    whole = batches(batch_size * num_processes, 0, 1)
    shards = [batches(batch_size, rank, num_processes) for rank in range(num_processes)]
    assert [list(chain(*parts)) for parts in zip(*shards, strict=True)] == whole
    seen = list(chain(*whole))
    assert len(set(seen)) == len(seen) and len(seen) > num_images - batch_size * num_processes


@given(SIZES_AND_WEIGHTS)
def test_sources_have_the_shares_that_their_weights_promise(sources):
    sizes, weights = zip(*sources)
    shares = share_epoch(sizes, weights)
    assert sum(shares) == sum(sizes)
    for share, weight in zip(shares, weights):
        assert abs(share - sum(sizes) * weight / sum(weights)) < 1 + 1e-9
    assert share_epoch(sizes, sizes) == list(sizes)


@given(sources=SIZES_AND_WEIGHTS, num_epochs=st.integers(1, 4), seed=st.integers(0, 9))
def test_images_of_a_source_come_equally_often(sources, num_epochs, seed):
    sizes, weights = zip(*sources)
    shares, total, seen = share_epoch(sizes, weights), sum(sizes), []
    for epoch in range(num_epochs):
        drawn = draw_epoch(sizes, shares, seed, epoch).tolist()
        assert len(set(drawn)) == len(drawn) == total  # the second time in an epoch, an image has another index
        seen += [index % total for index in drawn]
    counts = np.bincount(seen, minlength=total)
    for size, share, start in zip(sizes, shares, np.cumsum([0, *sizes])):
        own = counts[start : start + size]
        assert own.sum() == num_epochs * share and own.max() - own.min() <= 1


@given(num_images=st.integers(1, 40), seed=st.integers(0, 9), epoch=st.integers(0, 3))
def test_one_source_has_the_order_of_one_shuffle(num_images, seed, epoch):
    order = np.random.default_rng([seed, epoch]).permutation(num_images)
    assert (draw_epoch([num_images], [num_images], seed, epoch) == order).all()


def test_order_is_of_seed_and_epoch():
    def order(seed, epoch):
        sampler = ShardedBatchSampler([20, 30], [35, 15], 5, seed, 0, 1)
        sampler.epoch = epoch
        return list(sampler)

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1) != order(1, 0)


@given(st.integers(0, 10))
def test_start_leaves_out(start):
    sampler = ShardedBatchSampler([31], [31], 3, 0, 1, 2)
    whole = list(sampler)
    sampler.start = start
    assert list(sampler) == whole[start:]


SOURCES = [Source(name=name, dataset="x", train_split="train", eval_split="test") for name in ("a", "b")]


def test_an_image_that_comes_again_in_an_epoch_is_named_and_augmented_anew():
    images = {"image": [Image.fromarray(np.full((6, 8, 3), 60 * index + 60, np.uint8)) for index in range(3)]}
    parts = [map_columns(Dataset.from_dict(images).select(rows), {}) for rows in ([0, 1], [2])]
    data = MixedDataset(SOURCES, parts)
    assert [data[index]["image_id"] for index in range(3)] == ["a: 0", "a: 1", "b: 0"]
    again = data[2 + len(data)]
    assert again["image_id"] == "b: 0" and again["repetition"] == 1 and again["image"] == data[2]["image"]
    tasks = {"depth": {"kind": "depth"}}
    collator = DeGMixDataCollator(DeGMixImageProcessorPil(tasks=tasks), Augmentation(size=(6, 8)), 0, tasks)
    first, second, same = (collator([row])["pixel_values"] for row in (data[2], again, data[2]))
    assert torch.equal(first, same) and not torch.equal(first, second)


def stream(length: int, num_shards: int = 1) -> IterableDataset:
    def rows(shards):
        for shard in shards:
            for index in range(shard, length, num_shards):
                yield {"image_id": str(index)}

    return IterableDataset.from_generator(rows, gen_kwargs={"shards": list(range(num_shards))})


def drawn(mixed: MixedStream, epoch: int, num_workers: int = 0) -> list[str]:
    mixed.set_epoch(epoch)
    return [row["image_id"] for row in DataLoader(mixed, batch_size=None, num_workers=num_workers)]


def test_streams_are_mixed_by_weight_until_all_have_ended():
    mixed = MixedStream(SOURCES, [stream(200), stream(20)], [4, 1], seed=0, rank=0)
    order = drawn(mixed, 0)
    assert {*order} == {f"a: {index}" for index in range(200)} | {f"b: {index}" for index in range(20)}
    share = sum(name.startswith("a") for name in order) / len(order)
    assert share == pytest.approx(0.8, abs=4 * (0.8 * 0.2 / len(order)) ** 0.5)
    assert order == drawn(mixed, 0) != drawn(mixed, 1)
    assert order != drawn(MixedStream(SOURCES, [stream(200), stream(20)], [4, 1], seed=0, rank=1), 0)
    ended = next(index for index, name in enumerate(order) if order.count(name) > 1 and name in order[:index])
    assert order[ended] == "b: 0"  # begins again
    alone = MixedStream(SOURCES[:1], [stream(5)], [1], seed=0, rank=0)
    assert drawn(alone, 0) == [f"a: {index}" for index in range(5)]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shuffled_stream_has_an_order_for_each_epoch(monkeypatch, num_workers):
    monkeypatch.setattr(datasets_config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.01)  # at the end of shuffled streams
    alone = MixedStream(SOURCES[:1], [stream(30).shuffle(0, buffer_size=10)], [1], seed=0, rank=0)
    loader = DataLoader(alone, batch_size=None, num_workers=num_workers, persistent_workers=num_workers > 0)
    orders = []
    for epoch in (0, 1, 0):
        alone.set_epoch(epoch)
        orders.append([row["image_id"] for row in loader])
    assert orders[0] == orders[2] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_loaders_mix_what_they_read_of_streams():
    mixed = MixedStream(SOURCES, [stream(40, num_shards=2), stream(3)], [1, 1], seed=0, rank=0)
    order = drawn(mixed, 0, num_workers=2)
    assert {*order} == {f"a: {index}" for index in range(40)} | {f"b: {index}" for index in range(3)}


@pytest.mark.parametrize(("num_workers", "num_processes"), [(0, 1), (2, 1), (0, 2)])
def test_as_many_images_of_a_stream_are_used_as_the_recipe_says(tmp_path, monkeypatch, num_workers, num_processes):
    """However many read them, and however many are in each file."""
    monkeypatch.setattr(datasets_config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.01)  # at the end of shuffled streams
    for number, depths in enumerate((range(1, 4), range(11, 61))):
        rows = {
            "image": [Image.new("RGB", (4, 3))] * len(depths),
            "depth": [Image.new("F", (4, 3), d) for d in depths],
        }
        for split in ("train", "validation"):
            Dataset.from_dict(rows).to_parquet(tmp_path / f"{split}-{number:05d}-of-00002.parquet")
    fields = {"num_workers": num_workers, "num_train_images": 10, "num_eval_images": 10, "batch_size": 1}
    args = TrainingArguments(output_dir="o", dataset=str(tmp_path), streaming=True, augmentation=None, **fields)
    read = {"train": [], "eval": []}
    for rank in range(num_processes):
        process = SimpleNamespace(process_index=rank, num_processes=num_processes)
        run = (DeGMixImageProcessorPil(tasks=DEPTH), DEPTH, process)
        read["train"] += TrainBatches(args, args.sources, *run).loader
        read["eval"] += build_eval_loader(args, args.sources[0], *run)
    for batches in read.values():
        assert sorted(batch["labels"]["depth"][0, 0, 0] for batch in batches) == [1, 2, 3, *range(11, 18)]


def test_workers_of_streams_cannot_change_in_a_run():
    args = TrainingArguments(output_dir="o", dataset="d")
    assert "num_workers" not in args.decisive() and "num_workers" in replace(args, streaming=True).decisive()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_samples_can_be_left_out(tmp_path, monkeypatch, num_workers):
    said = []
    monkeypatch.setattr("transformers_degmix.training.data.logger.warning", said.append)
    tasks = {"depth": {"kind": "depth"}}
    args = TrainingArguments(output_dir="o", dataset=str(save_rows(tmp_path)), num_workers=num_workers)
    with pytest.raises(ValueError, match="sample 1: column 'image': cannot read"):
        list(load_split(args, args.sources[0], "train", tasks))
    skipping = replace(args, skip_unreadable=True)
    data = load_split(skipping, skipping.sources[0], "train", tasks)
    assert [np.asarray(row["depth"]).max() for row in data] == [1, 3, 4, 6, 7, 8]
    assert said[0].startswith("2 of 8 samples are left out:\nsample 1: column 'image': cannot read the image")
    assert "\nsample 4: training would stop: column 'depth': expected metres of at least 0" in said[0]
    with pytest.raises(ValueError, match=r"2 of 8 samples.*`max_unreadable` \(20.0%\).*sample 1:.*sample 4:"):
        load_split(replace(skipping, max_unreadable=0.2), args.sources[0], "train", tasks)


def test_evaluation_reads_masks_as_training_does(tmp_path):
    """Also if none of the samples that tell what 255 means is in its split."""
    full, empty = (Image.fromarray(np.uint8([[level, 0, 0]] * 2)) for level in (255, 0))
    for split, masks in {"train": [full, empty], "validation": [empty, full, *[empty] * 62]}.items():
        rows = {"image": [Image.new("RGB", (3, 2))] * len(masks), "sal": masks}
        Dataset.from_dict(rows).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    tasks = {"sal": {"kind": "saliency"}}
    args = TrainingArguments(output_dir="o", dataset=str(tmp_path), batch_size=1)
    with pytest.raises(ValueError, match="sample 1: column 'sal': 0 and 255 are the only values"):
        load_split(args, args.sources[0], "eval", tasks)[1]
    (source,) = TrainBatches(args, args.sources, DeGMixImageProcessorPil(tasks=tasks), tasks, Accelerator()).sources
    assert load_split(args, source, "eval", tasks)[1]["sal"].tolist() == [[1, 0, 0]] * 2


def save_rows(folder):
    """Eight images, of which the second is cut off; depth is 1, 2, ... everywhere, but negative for the fifth."""
    photo = BytesIO()
    Image.new("RGB", (8, 6)).save(photo, "PNG")
    images = [{"bytes": photo.getvalue()[: None if index != 1 else -30], "path": None} for index in range(8)]
    depths = [Image.new("F", (8, 6), -1.0 if index == 4 else index + 1.0) for index in range(8)]
    features = Features({"image": ImageFeature(), "depth": ImageFeature()})
    data = Dataset.from_dict({"image": images, "depth": depths}, features)
    data.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return folder / "data"
