import json
from dataclasses import replace
from io import BytesIO
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from transformers_degmix.training.arguments import TrainingArguments
from transformers_degmix.training.data import ShardedBatchSampler, load_split


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
    data = load_split(args, "eval", DEPTH)
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
    with pytest.raises(ValueError, match=r"lacks the columns 'depth'.* FOLDER/train/metadata\.jsonl"):
        depths(tmp_path, "train", False)


@given(
    num_images=st.integers(1, 40),
    batch_size=st.integers(1, 5),
    num_processes=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
def test_processes_share_the_batches_of_one(num_images, batch_size, num_processes, epoch):
    def batches(batch_size, rank, num_processes):
        sampler = ShardedBatchSampler(num_images, batch_size, 7, rank, num_processes)
        sampler.epoch = epoch
        assert len(list(sampler)) == len(sampler)
        return list(sampler)

    whole = batches(batch_size * num_processes, 0, 1)
    shards = [batches(batch_size, rank, num_processes) for rank in range(num_processes)]
    assert [list(chain(*parts)) for parts in zip(*shards, strict=True)] == whole
    seen = list(chain(*whole))
    assert len(set(seen)) == len(seen) and len(seen) > num_images - batch_size * num_processes


def test_order_is_of_seed_and_epoch():
    def order(seed, epoch):
        sampler = ShardedBatchSampler(50, 5, seed, 0, 1)
        sampler.epoch = epoch
        return list(sampler)

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1) != order(1, 0)


@given(st.integers(0, 10))
def test_start_leaves_out(start):
    sampler = ShardedBatchSampler(31, 3, 0, 1, 2)
    whole = list(sampler)
    sampler.start = start
    assert list(sampler) == whole[start:]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_samples_can_be_left_out(tmp_path, monkeypatch, num_workers):
    said = []
    monkeypatch.setattr("transformers_degmix.training.data.logger.warning", said.append)
    tasks = {"depth": {"kind": "depth"}}
    args = TrainingArguments(output_dir="o", dataset=str(save_rows(tmp_path)), num_workers=num_workers)
    with pytest.raises(ValueError, match="sample 1: column 'image': cannot read"):
        list(load_split(args, "train", tasks))
    skipping = replace(args, skip_unreadable=True)
    data = load_split(skipping, "train", tasks)
    assert [np.asarray(row["depth"]).max() for row in data] == [1, 3, 4, 6, 7, 8]
    assert said[0].startswith("2 of 8 samples are left out:\nsample 1: column 'image': cannot read the image")
    assert "\nsample 4: training would stop: column 'depth': expected metres of at least 0" in said[0]
    with pytest.raises(ValueError, match=r"2 of 8 samples.*`max_unreadable` \(20.0%\).*sample 1:.*sample 4:"):
        load_split(replace(skipping, max_unreadable=0.2), "train", tasks)


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
