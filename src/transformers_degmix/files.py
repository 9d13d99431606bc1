"""Files and directories that appear whole or not at all, here and on the Hub."""

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

from filelock import FileLock, Timeout


# In the names of files and directories that are being written. If it is there later, a killed process left it.
UNFINISHED = ".unfinished"


@contextmanager
def whole_directory(path: str | PathLike, overwrite: bool = False) -> Iterator[Path]:
    """A new directory to write into, moved to `path` if the block ends without an error and removed otherwise.

    It is made beside `path`, so that moving it is a rename. What it overwrites is renamed away just before.

    Args:
        path: where the directory is to appear. Missing parents are created.
        overwrite: whether `path` may exist and have content.

    Raises:
        FileExistsError: `path` is a file, or a directory with content and `overwrite` is not set.
        OSError: it cannot be made.
    """
    path = Path(path).absolute()
    check_writable(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{path.name}{UNFINISHED}", dir=path.parent) as scratch:
        # Not the temporary directory itself, which only its owner can read.
        new, old = Path(scratch, "new"), Path(scratch, "old")
        new.mkdir()
        yield new
        check_writable(path, overwrite)
        try:
            if path.exists():
                path.rename(old)
            new.rename(path)
        except BaseException:  # Ctrl-C too
            if old.exists() and not path.exists():
                old.rename(path)
            raise


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Creates a directory if it is missing, and locks it against other processes.

    Raises:
        ValueError: another process has locked it.
        OSError: it cannot be written.
    """
    lock = FileLock(directory / ".lock", timeout=0)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise ValueError(f"another process is writing {directory}") from error
    except OSError as error:
        raise OSError(f"cannot write to {directory}: {error}") from error
    try:
        yield
    finally:
        Path(lock.lock_file).unlink()
        lock.release()


def remove_unfinished(directory: Path, *names: str):
    """Removes what killed processes left of some files and directories in a [`locked`] directory, and nothing else.

    Args:
        directory: that they were to appear in.
        names: patterns of [`Path.glob`] for them, such as `data/*.parquet`.
    """
    for name in map(Path, names):
        for path in directory.glob(str(name.with_name(f".{name.name}{UNFINISHED}*"))):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


def check_writable(path: str | PathLike, overwrite: bool = False):
    """Raises the errors of [`whole_directory`] before the work is done."""
    path = Path(path).absolute()
    if path.is_dir():
        if not overwrite and any(path.iterdir()):
            raise FileExistsError(f"{path} exists and is not empty")
    elif path.exists():
        raise FileExistsError(f"{path} exists and is not a directory")
    parent = next(parent for parent in path.parents if parent.exists())
    try:
        TemporaryDirectory(prefix=f".{path.name}{UNFINISHED}", dir=parent).cleanup()
    except OSError as error:
        raise OSError(f"cannot make {path}: {parent}: {error.strerror}") from error


def write_whole(path: Path, write: Callable[[BinaryIO], Any]):
    """Lets `write` fill a file beside `path`, which takes that name only when it is complete."""
    # The process's id tells whose it is, but another machine or a restarted container can have the same.
    aside = path.with_name(f".{path.name}{UNFINISHED}.{secrets.token_hex(4)}.{os.getpid()}")
    try:
        with open(aside, "xb") as file:
            write(file)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def hub_errors() -> Iterator[None]:
    """Turns every error inside, from the Hub or on the way there, into an OSError with a message of one line."""
    try:
        yield
    except Exception as error:  # of every type: the Hub's, its HTTP client's, RuntimeError around either
        reasons = (error, error.__cause__) if isinstance(error, RuntimeError) else (error,)
        raise OSError(" ".join(" ".join(map(str, reasons)).split())) from error
