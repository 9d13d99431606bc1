"""Unpacking: nothing outside of the target, nothing half; and files that are not what they should be are named."""

import errno
import gzip
import io
import os
import shutil
import tarfile
import zipfile

import numpy as np
import pytest
import scipy.io
from PIL import Image

from transformers_degmix.data.archives import (
    check_header,
    find_root,
    read_bytes,
    read_ids,
    read_image,
    read_json,
    read_mat,
    read_npy,
    unpack,
)


def member(name, kind=tarfile.REGTYPE, content=b"", link=""):
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname, info.mode = kind, len(content), link, 0
    return info, io.BytesIO(content)


def write_tar(path, *members):
    with tarfile.open(path, "w:gz") as tar:
        for info, content in members:
            tar.addfile(info, content)
    return path


def test_unpack(tmp_path):
    content = np.random.default_rng(0).bytes(100_000)
    members = member("./top", tarfile.DIRTYPE), member("./top/a/b.bin", content=content), member("empty")
    unpack([write_tar(tmp_path / "a.tar.gz", *members)], tmp_path / "out")
    assert (tmp_path / "out/top/a/b.bin").read_bytes() == content  # although the member's mode lets nobody read it
    assert (tmp_path / "out/empty").read_bytes() == b""
    assert sorted(os.listdir(tmp_path)) == ["a.tar.gz", "out"]


@pytest.mark.parametrize(
    "bad",
    [
        member("../evil"),
        member("a/../../evil"),
        member("link", tarfile.SYMTYPE, link="/etc"),
        member("link", tarfile.SYMTYPE, link="../evil"),
        member("link", tarfile.LNKTYPE, link="../evil"),
        member("device", tarfile.CHRTYPE),
    ],
    ids=lambda bad: f"{bad[0].name}-{bad[0].type}",
)
def test_unsafe_member_is_named_and_nothing_is_left(tmp_path, bad):
    folder = tmp_path / "folder"
    folder.mkdir()
    archive = write_tar(folder / "a.tar.gz", member("good", content=b"x"), bad)
    with pytest.raises(ValueError) as error:
        unpack([archive], folder / "out")
    assert repr(bad[0].name) in str(error.value) and str(archive) in str(error.value)
    assert os.listdir(tmp_path) == ["folder"] and os.listdir(folder) == ["a.tar.gz"]


def damaged(content):
    yield "half", content[: len(content) // 2]
    yield "without checksum", content[:-8]
    yield "one bit", content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]
    yield "nothing", b""
    yield "no gzip", b"not an archive"
    yield "no tar", gzip.compress(b"not an archive" * 100)


def test_damaged_archives(tmp_path):
    content = np.random.default_rng(0).bytes(100_000)
    whole = write_tar(tmp_path / "a.tar.gz", member("a", content=content)).read_bytes()
    for name, part in damaged(whole):
        (tmp_path / "a.tar.gz").write_bytes(part)
        with pytest.raises(ValueError, match="a.tar.gz is truncated or damaged, or neither"):
            unpack([tmp_path / "a.tar.gz"], tmp_path / "out")
        assert os.listdir(tmp_path) == ["a.tar.gz"], name


def write_zip(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_zip_archives_share_a_folder(tmp_path):
    content = np.random.default_rng(0).bytes(100_000)
    archives = [
        write_zip(tmp_path / "a.zip", **{"README": b"a", "a/": b"", "a/b/c.bin": content}),
        write_zip(tmp_path / "b.zip", **{"README": b"b", "b/c.bin": b"x"}),
    ]
    unpack(archives, tmp_path / "out")
    assert (tmp_path / "out/a/b/c.bin").read_bytes() == content and (tmp_path / "out/b/c.bin").read_bytes() == b"x"
    assert (tmp_path / "out/README").read_bytes() == b"b"


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/evil", "..\\evil", "C:/evil"])
def test_unsafe_zip_members_stay_inside(tmp_path, name):
    folder = tmp_path / "folder"
    folder.mkdir()
    unpack([write_zip(folder / "a.zip", **{"good": b"x", name: b"x"})], folder / "out")
    assert (folder / "out/good").exists()
    assert os.listdir(tmp_path) == ["folder"] and sorted(os.listdir(folder)) == ["a.zip", "out"]


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zips_damaged_anywhere(tmp_path, compression):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("é", b"x" * 20)
    content = path.read_bytes()
    messages = set()
    for position in range(len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 200]) + content[position + 1 :])
        try:
            unpack([path], tmp_path / "out")
        except ValueError as error:
            messages.add(str(error))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert len(messages) > 3 and all(f"{path} is truncated or damaged" in message for message in messages)


def test_a_full_disk_is_no_damage(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(OSError, match="No space left"):
        unpack([write_zip(tmp_path / "a.zip", a=b"x")], tmp_path / "out")
    assert os.listdir(tmp_path) == ["a.zip"]


def test_damaged_zips(tmp_path):
    good = write_zip(tmp_path / "good.zip", a=b"x")
    bad = write_zip(tmp_path / "bad.zip", a=np.random.default_rng(0).bytes(100_000))
    content = bad.read_bytes()
    for damaged in (content[: len(content) // 2], content[:50_000] + b"no" + content[50_002:], b""):
        bad.write_bytes(damaged)
        with pytest.raises(ValueError, match="bad.zip is truncated or damaged, or neither"):
            unpack([good, bad], tmp_path / "out")
        assert sorted(os.listdir(tmp_path)) == ["bad.zip", "good.zip"]


def test_find_root(tmp_path):
    (tmp_path / "a" / "images").mkdir(parents=True)
    assert find_root(tmp_path, "images") == find_root(tmp_path / "a", "images") == tmp_path / "a"
    with pytest.raises(ValueError, match="holds images, depth"):
        find_root(tmp_path, "images", "depth")
    (tmp_path / "b" / "images").mkdir(parents=True)
    with pytest.raises(ValueError, match="more than one place"):
        find_root(tmp_path, "images")
    (tmp_path / "d/e/gt_sets").mkdir(parents=True)
    assert find_root(tmp_path, "gt_sets") == tmp_path / "d/e"
    with pytest.raises(ValueError, match="neither a folder"):
        find_root(tmp_path / "c", "images")


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "lists no images"), ("a\n../b\n", "'../b', which is not a file name"), ("a\nb\na\n", "lists 'a' twice")],
)
def test_lists_of_ids(tmp_path, text, message):
    (tmp_path / "ids.txt").write_text("a\r\nb\n\n")
    assert read_ids(tmp_path / "ids.txt") == ["a", "b"]
    (tmp_path / "ids.txt").write_text(text)
    with pytest.raises(ValueError, match=f"ids.txt {message}|{message}"):
        read_ids(tmp_path / "ids.txt")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    for name in ("missing.txt", "latin.txt"):
        with pytest.raises(ValueError, match=f"cannot read the image ids from .*{name}: "):
            read_ids(tmp_path / name)


def test_bad_files_are_named(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60), np.uint8)).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", np.ones((9, 9)))
    scipy.io.savemat(tmp_path / "a.mat", {"LabelMap": np.ones((9, 9))})
    (tmp_path / "a.json").write_text('{"a": 1}')
    readers = {
        "a.png": lambda path: read_image(path, "L"),
        "a.npy": read_npy,
        "a.mat": lambda path: read_mat(path, "LabelMap"),
        "a.json": read_json,
    }
    for name, read in readers.items():
        path = tmp_path / name
        check_header(path)
        read(path)
        content = path.read_bytes()
        path.write_bytes(content[: 2 * len(content) // 3])
        with pytest.raises(ValueError, match=name):
            read(path)
        path.write_bytes(b"no data")
        for function in (read, check_header):
            with pytest.raises(ValueError, match=name):
                function(path)
        path.unlink()
        for function in (read, check_header):
            with pytest.raises(ValueError, match=name):
                function(path)


def test_modes_variables_and_whole_images(tmp_path):
    Image.new("LA", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a.png: expected an image of mode L or P, got LA"):
        read_image(tmp_path / "a.png", "L", "P")
    assert read_bytes(tmp_path / "a.png") == (tmp_path / "a.png").read_bytes()
    scipy.io.savemat(tmp_path / "a.mat", {"other": np.ones(3)})
    with pytest.raises(ValueError, match="a.mat has no variable 'LabelMap'"):
        read_mat(tmp_path / "a.mat", "LabelMap")
