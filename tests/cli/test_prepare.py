"""The command, from miniature archives to `load_dataset`."""

import os
import shutil
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from commands import run_command
from filelock import FileLock
from PIL import Image
from test_cityscapes import IDS, check_cityscapes_row, write_cityscapes
from test_nyud import check_nyud_row, write_nyud
from test_pascal_context import check_pascal_context_row, write_pascal_context

from transformers_degmix.data import prepare
from transformers_degmix.data.benchmarks import BENCHMARKS, CITYSCAPES_CATEGORIES, CITYSCAPES_CLASSES
from transformers_degmix.data.mapping import map_columns, name_classes
from transformers_degmix.data.rooms import load_rooms


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the script's `main` in this process: arguments -> error message or None; what was printed."""
    monkeypatch.setattr(prepare, "SHARD_SIZE", 2)

    def run(*arguments):
        capsys.readouterr()
        error = run_command(monkeypatch, "prepare", *arguments)
        captured = capsys.readouterr()
        return error, captured.out + captured.err

    return run


def load(output):
    return datasets.load_dataset(str(output), cache_dir=str(output.parent / f"cache_{output.name}"))


def rows(data):
    return {(split, row["image_id"]): row for split in data for row in data[split]}


def pack(root: Path) -> Path:
    archive = root.parent / f"{root.name}.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(root, root.name)
    return archive


def nyud(folder):
    root = write_nyud(folder, train=("0001", "0003", "0004"))
    return root, lambda split, row: check_nyud_row(row, root, row["image_id"])


def pascal_context(folder):
    root = write_pascal_context(folder)
    return root, lambda split, row: check_pascal_context_row(row, root, row["image_id"])


def cityscapes(folder):
    root, names = write_cityscapes(folder), {"train": "train", "validation": "val"}
    return root, lambda split, row: check_cityscapes_row(row, root, names[split], row["image_id"], CITYSCAPES_CLASSES)


@pytest.mark.parametrize("make", [nyud, pascal_context, cityscapes])
def test_folder_and_archive_pixel_by_pixel(run, tmp_path, make):
    root, check = make(tmp_path)
    assert run(make.__name__, root, tmp_path / "a")[0] is None
    assert run(make.__name__, pack(root), tmp_path / "b")[0] is None
    first, second = load(tmp_path / "a"), load(tmp_path / "b")
    assert first["train"].features == second["train"].features
    for (split, _), row in rows(first).items():
        check(split, row)
    tasks = BENCHMARKS[make.__name__].task_fields()
    for data in first.values():  # and nothing looks wrong about it
        assert not map_columns(data, name_classes(tasks, data.features)).warnings
    tables = [
        [pyarrow.parquet.read_table(path) for path in sorted((tmp_path / name / "data").iterdir())] for name in "ab"
    ]
    assert all(one.equals(other) for one, other in zip(*tables, strict=True))
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_names_counts_and_card(run, tmp_path):
    root, _ = nyud(tmp_path)
    _, text = run("nyud", root, tmp_path / "out")
    assert f"{tmp_path / 'out'}: 3 train images, 1 validation images" in text
    assert sorted(os.listdir(tmp_path / "out/data")) == [
        "train-00000-of-00002.parquet",
        "train-00001-of-00002.parquet",
        "validation-00000-of-00001.parquet",
    ]
    card = (tmp_path / "out/README.md").read_text()
    for part in ("license: other", "| train | 3 |", "| validation | 1 |", "NYU Depth V2", "| `normals` | normals |"):
        assert part in card
    assert "degmix prepare nyud NYUDv2 out\n" in card and str(tmp_path) not in card
    assert load(tmp_path / "out")["train"].features["semseg_classes"].feature.names[:2] == ["wall", "floor"]


def test_packages_of_cityscapes(run, tmp_path):
    root, check = cityscapes(tmp_path)
    packages = tmp_path / "packages"
    packages.mkdir()
    for folder in ("leftImg8bit", "gtFine", "disparity", "camera"):
        shutil.make_archive(str(packages / f"{folder}_trainvaltest"), "zip", root, folder)
    (packages / "gtCoarse.zip").write_bytes(b"not needed")
    damaged = packages / "camera_trainvaltest.zip"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-100])
    assert f"{damaged} is truncated or damaged" in run("cityscapes", packages, tmp_path / "out")[0]
    damaged.write_bytes(content)
    assert run("cityscapes", packages, tmp_path / "out")[0] is None
    for (split, _), row in rows(load(tmp_path / "out")).items():
        check(split, row)


def test_packages_of_cityscapes_beside_other_folders(run, tmp_path, monkeypatch):
    root, check = cityscapes(tmp_path / "unpacked")
    for folder in ("leftImg8bit", "gtFine", "disparity", "camera"):
        shutil.make_archive(str(tmp_path / f"{folder}_trainvaltest"), "zip", root, folder)
    shutil.move(tmp_path / "unpacked", tmp_path / ".other.partial")  # of another job
    shutil.copytree(tmp_path / ".other.partial" / root.name / "gtFine", tmp_path / "gtFine")  # one of four
    monkeypatch.chdir(tmp_path)
    error, text = run("cityscapes", ".", "out")
    assert error is None and "unpacking" in text
    shutil.move(tmp_path / ".other.partial", tmp_path / "unpacked")
    error, text = run("cityscapes", ".", "again")
    assert error is None and "unpacking" not in text
    for output in ("out", "again"):
        for (split, _), row in rows(load(tmp_path / output)).items():
            check(split, row)


def test_categories_and_disparity_in_two_processes(run, tmp_path):
    root = write_cityscapes(tmp_path, cameras=False)
    error, _ = run("cityscapes", root, tmp_path / "out", "--classes", 7, "--num-proc", 2)
    assert error is None
    data = load(tmp_path / "out")
    for split, folder in (("train", "train"), ("validation", "val")):
        assert data[split]["image_id"] == IDS[folder]
        for row in data[split]:
            check_cityscapes_row(row, root, folder, row["image_id"], CITYSCAPES_CATEGORIES, scored=1)
    assert "--classes 7" in (tmp_path / "out/README.md").read_text()


def test_rooms_are_those_of_load_rooms(run, tmp_path):
    assert run("rooms", "2,1", tmp_path / "out")[0] is None
    ours = load(tmp_path / "out")["train"]
    theirs = load_rooms("train", 2, cache_dir=str(tmp_path / "cache"))
    assert ours.features == theirs.features
    for one, other in zip(ours, theirs, strict=True):
        assert all(np.array_equal(np.array(one[name]), np.array(other[name])) for name in ours.features)
    for counts in ("2", "0,1", "a,b"):
        assert repr(counts) in run("rooms", counts, tmp_path / "other")[0]


def damage(root):
    """Five images, of which three have files that are bad in their own way each."""
    (root / "edge/0001.png").unlink()
    (root / "normals/0003.png").write_bytes(b"no image")
    np.save(root / "depth/0004.npy", np.full((6, 8), np.nan))
    return ["train 0001: ", "train 0003: ", "train 0004: "]


def test_all_bad_files_are_listed_and_nothing_is_written(run, tmp_path):
    root = write_nyud(tmp_path, train=("0001", "0003", "0004", "0005"))
    bad = damage(root)
    error, text = run("nyud", root, tmp_path / "out")
    # The two that show without decoding, before any conversion.
    assert bad[0] in error and "edge/0001.png does not exist" in error and "normals/0003.png" in error
    assert bad[2] not in error and "converting" not in text
    assert not list(tmp_path.glob(".out.partial/dataset/data/*")) and not (tmp_path / "out").exists()

    write_nyud(tmp_path / "good", train=("0001", "0003"))
    for name in ("edge/0001.png", "normals/0003.png"):
        (root / name).write_bytes((tmp_path / "good/NYUDv2" / name).read_bytes())
    error, _ = run("nyud", root, tmp_path / "out")
    assert bad[2] in error and "depth: expected finite values" in error and bad[0] not in error
    assert not (tmp_path / "out").exists()


def test_bad_images_are_left_out(run, tmp_path):
    root = write_nyud(tmp_path, train=("0001", "0003", "0004", "0005"))
    bad = damage(root)
    error, text = run("nyud", root, tmp_path / "out", "--skip-bad")
    assert error is None and all(f"left out: {name}" in text for name in bad)
    data = rows(load(tmp_path / "out"))
    assert list(data) == [("train", "0005"), ("validation", "0002")]
    for (_, image_id), row in data.items():
        check_nyud_row(row, root, image_id)
    card = (tmp_path / "out/README.md").read_text()
    assert "| train | 1 |" in card and all(f"- {name[:-2]}\n" in card for name in bad) and "--skip-bad" in card


def test_long_lists_are_cut(run, tmp_path):
    root = write_nyud(tmp_path, train=[f"1{index:03d}" for index in range(25)])
    for path in (root / "edge").glob("1*"):
        path.unlink()
    error, _ = run("nyud", root, tmp_path / "out")
    assert "train 1019" in error and "train 1020" not in error and "... and 5 more" in error
    assert "no image of the train split" in run("nyud", root, tmp_path / "out", "--skip-bad")[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("packed", [False, True])
def test_an_interrupted_run_goes_on(run, tmp_path, monkeypatch, packed):
    root, check = nyud(tmp_path)
    source = pack(root) if packed else root
    replace, moved = Path.replace, []

    def interrupted(self, target):
        if len(moved) == 1:
            raise KeyboardInterrupt
        moved.append(target)
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        error, _ = run("nyud", source, tmp_path / "out")
    assert error == "interrupted"
    first = tmp_path / ".out.partial/dataset/data/train-00000-of-00002.parquet"
    assert moved == [first] and not (tmp_path / "out").exists()
    before = first.stat().st_mtime_ns
    error, text = run("nyud", source, tmp_path / "out")
    assert error is None and "unpacking" not in text
    assert (tmp_path / "out/data" / first.name).stat().st_mtime_ns == before
    assert len(list((tmp_path / "out/data").iterdir())) == 3
    for (split, _), row in rows(load(tmp_path / "out")).items():
        check(split, row)
    assert not (tmp_path / ".out.partial").exists()


def test_a_repaired_file_and_another_source_are_not_taken_for_what_was_done(run, tmp_path):
    root = write_nyud(tmp_path, train=("0001", "0003", "0004"))
    (root / "edge/0004.png").write_bytes(b"no image")
    assert run("nyud", root, tmp_path / "out", "--skip-bad")[0] is None
    (tmp_path / "out").rename(tmp_path / "before")

    # The second shard fails, after the first is done; then a file of the first changes.
    np.save(root / "depth/0004.npy", np.full((6, 8), -1.0))
    write_nyud(tmp_path / "good", train=("0004",))
    (root / "edge/0004.png").write_bytes((tmp_path / "good/NYUDv2/edge/0004.png").read_bytes())
    assert "depth: expected values of 0 or more" in run("nyud", root, tmp_path / "out")[0]
    Image.fromarray(np.full((6, 8), 7, np.uint8)).save(root / "edge/0001.png")
    np.save(root / "depth/0004.npy", np.ones((6, 8), np.float32))
    assert run("nyud", root, tmp_path / "out")[0] is None
    data = rows(load(tmp_path / "out"))
    assert len(data) == 4 and all(check_nyud_row(row, root, key[1]) is None for key, row in data.items())

    # What is left of a job for one source does not get into that of another.
    (tmp_path / "out").rename(tmp_path / "second")
    np.save(root / "depth/0004.npy", np.full((6, 8), -1.0))
    assert run("nyud", root, tmp_path / "out")[0]
    other = write_cityscapes(tmp_path)
    assert run("cityscapes", other, tmp_path / "out")[0] is None
    assert set(load(tmp_path / "out")["train"]["image_id"]) == set(IDS["train"])
    assert len(list((tmp_path / "out/data").iterdir())) == 2


def test_one_process_at_a_time(run, tmp_path):
    root, _ = nyud(tmp_path)
    (tmp_path / ".out.partial").mkdir()
    with FileLock(tmp_path / ".out.partial/lock"):
        assert f"another process is writing {tmp_path / 'out'}" in run("nyud", root, tmp_path / "out")[0]
    assert run("nyud", root, tmp_path / "out")[0] is None


def test_bad_sources_and_outputs(run, tmp_path):
    root, _ = nyud(tmp_path)
    archive = pack(root)
    content = archive.read_bytes()
    archive.write_bytes(content[: len(content) // 2])
    assert "NYUDv2.tar.gz is truncated or damaged" in run("nyud", archive, tmp_path / "out")[0]
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("../evil"))
    assert "'../evil' would be extracted to" in run("nyud", archive, tmp_path / "out")[0]
    assert not (tmp_path / "evil").exists()
    assert "nowhere is neither a folder nor an archive" in run("nyud", tmp_path / "nowhere", tmp_path / "out")[0]
    assert "holds leftImg8bit, gtFine, disparity" in run("cityscapes", root, tmp_path / "out")[0]
    (root / "gt_sets/val.txt").write_text("")
    assert "val.txt lists no images" in run("nyud", root, tmp_path / "out")[0]
    assert not (tmp_path / "out").exists()
    assert f"{root} exists and is not empty" in run("nyud", root, root)[0]
    assert run("nyud", root, tmp_path / "out", "--classes", 7)[0] == 2
    assert run("nyud", root, tmp_path / "out", "--num-proc", 0)[0] == 2
    assert run("nyud", root, tmp_path / "out", "--push-to-hub", "a/b/c")[0] == 2
