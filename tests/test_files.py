"""Files appear whole or not at all, whoever else writes."""

import os
from pathlib import Path

import pytest

from transformers_degmix.files import check_writable, locked, remove_unfinished, whole_directory, write_whole


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


def test_only_what_a_killed_process_left_of_the_given_names_is_removed(tmp_path):
    def leave(path: Path) -> set[Path]:
        """A file and a directory that are being written, as they are after a kill."""
        left = set()

        def note(_=None):
            left.update(path.parent.glob(f".{path.name}.unfinished*"))

        path.parent.mkdir(exist_ok=True)
        write_whole(path, note)
        path.unlink()
        with whole_directory(path):
            note()
        path.rmdir()
        (first, second) = sorted(left, key=lambda path: path.name.count("."))
        (first / "new").mkdir(parents=True)
        second.touch()
        return left

    own = [tmp_path / "best", tmp_path / "data" / "a.parquet"]
    others = [tmp_path / "worst", tmp_path / "b.parquet", tmp_path / "data" / "best", tmp_path / "runs" / "best"]
    left, kept = (set().union(*map(leave, paths)) for paths in (own, others))
    kept.add(tmp_path / "poem.unfinished.txt")
    (tmp_path / "poem.unfinished.txt").touch()
    assert all(path.exists() for path in left)
    remove_unfinished(tmp_path, "best", "data/*.parquet")
    assert not any(path.exists() for path in left) and all(path.exists() for path in kept)


def test_a_locked_directory_is_for_one_process(tmp_path):
    path = tmp_path / "new" / "run"
    with locked(path), pytest.raises(ValueError, match="another process is writing .*run"), locked(path):
        pytest.fail("locked twice")
    assert not any(path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write to .*file"), locked(tmp_path / "file" / "run"):
        pytest.fail("a file is no directory")


def test_a_directory_that_cannot_be_made_is_refused_before_the_work(tmp_path):
    file = tmp_path / "file"
    file.touch()
    check_writable(tmp_path / "new" / "report")
    for path in (file / "report", file / "more" / "report", Path("/proc/report")):
        with pytest.raises(OSError, match=f"cannot make {path}: ({file}: Not a directory|/proc: No such file)"):
            check_writable(path)
    assert os.listdir(tmp_path) == ["file"]
