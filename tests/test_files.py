"""Files appear whole or not at all, whoever else writes."""

import os
from pathlib import Path

import pytest

from transformers_degmix.files import whole_directory, write_whole


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("after", [False, True])
def test_an_interrupt_leaves_the_old_or_the_new_directory(tmp_path, monkeypatch, number, after):
    """At Ctrl-C just before or after a rename."""
    path, rename, count = tmp_path / "a", Path.rename, 0
    path.mkdir()
    (path / "old").touch()

    def interrupted(self, target):
        nonlocal count
        count += 1
        if after:
            rename(self, target)
        if count == number:
            raise KeyboardInterrupt
        if not after:
            rename(self, target)

    with pytest.raises(KeyboardInterrupt), whole_directory(path, overwrite=True) as directory:
        (directory / "new").touch()
        monkeypatch.setattr(Path, "rename", interrupted)
    assert os.listdir(tmp_path) == ["a"] and os.listdir(path) in (["old"], ["new"])


def test_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "a"

    def write(file):
        file.write(b"outer")
        write_whole(path, lambda inner: inner.write(b"inner"))
        assert path.read_bytes() == b"inner"

    write_whole(path, write)
    assert path.read_bytes() == b"outer" and os.listdir(tmp_path) == ["a"]
