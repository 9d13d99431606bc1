"""Reads the archives (.tar.gz, .zip) and folders of benchmarks, and the images, .mat and .npy files in them.

All errors name the file.
"""

import errno
import gzip
import json
import shutil
import tarfile
import zipfile
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import scipy.io
from PIL import Image

from ..images_degmix import load_image


def unpack(archives: list[Path], target: Path):
    """Unpacks .tar.gz and .zip archives into one new folder `target`, which appears whole or not at all.

    No member of an archive is written outside `target`, and no link leads out of it.

    Raises:
        ValueError: an archive is truncated or damaged, or a member is a device or leads out of the archive.
    """
    unfinished = target.with_name(f"{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        for archive in archives:
            try:
                _unpack(archive, unfinished)
            except tarfile.FilterError as error:
                raise ValueError(f"{archive}: {error}") from error
            except Exception as error:  # the decompressors raise any type
                # A number means the file system, such as a full disk, unless the archive led to a position before 0.
                if getattr(error, "errno", None) not in (None, errno.EINVAL):
                    raise
                raise ValueError(f"{archive} is truncated or damaged, or neither .tar.gz nor .zip: {error}") from error
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _unpack(archive: Path, target: Path):
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as members:
            members.extractall(target)
        return
    with gzip.open(archive) as stream:
        with tarfile.open(fileobj=stream, mode="r|") as members:
            members.extractall(target, filter="data")
        # tar does not read up to the checksum at the end.
        while stream.read(2**20):
            pass


def find_root(folder: Path, *entries: str) -> Path:
    """`folder`, or the only folder up to two levels below it and not hidden, that holds all `entries`.

    Raises:
        ValueError: no folder holds them, or several do on the highest level that has any.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is neither a folder nor an archive")
    for level in ([folder], folder.glob("[!.]*/"), folder.glob("[!.]*/[!.]*/")):
        roots = sorted(path for path in level if all((path / entry).exists() for entry in entries))
        if len(roots) > 1:
            raise ValueError(f"{', '.join(entries)} are in more than one place: {', '.join(map(str, roots))}")
        if roots:
            return roots[0]
    raise ValueError(f"neither {folder} nor a folder in it holds {', '.join(entries)}")


def read_ids(path: Path) -> list[str]:
    """The image ids in a text file, one per line.

    Raises:
        ValueError: the file cannot be read or has no ids, or an id occurs twice or is not a file name.
    """
    try:
        ids = path.read_text(encoding="utf-8").split()
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the image ids from {path}: {error}") from error
    if not ids:
        raise ValueError(f"{path} lists no images")
    for image_id in ids:
        if PureWindowsPath(image_id).name != image_id:
            raise ValueError(f"{path} lists {image_id!r}, which is not a file name")
    if len(set(ids)) < len(ids):
        twice = next(image_id for image_id in ids if ids.count(image_id) > 1)
        raise ValueError(f"{path} lists {twice!r} twice")
    return ids


def read_splits(folder: Path) -> dict[str, list[str]]:
    """The image ids of "train", from `train.txt`, and "validation", from `val.txt`; see [`read_ids`]."""
    return {"train": read_ids(folder / "train.txt"), "validation": read_ids(folder / "val.txt")}


def check_header(path: Path):
    """Raises ValueError if a file is missing or its header is not that of its suffix (.png, .jpg, .npy, .mat, .json).

    Pixels are not decoded. A truncated .npy is found, because its header tells the length.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    read = {".npy": read_npy, ".mat": scipy.io.whosmat, ".json": read_json}.get(path.suffix, _open_image)
    try:
        read(path)
    except Exception as error:  # PIL's and SciPy's parsers raise any type
        raise ValueError(f"{path} cannot be read: {error}") from error


def _open_image(path: Path):
    with Image.open(path):
        pass


def read_image(path: Path, *modes: str) -> np.ndarray:
    """The pixels of an image `(height, width)` or `(height, width, channels)`; palette indices for mode P.

    Raises:
        ValueError: the file is missing or damaged, or the image has none of these PIL modes.
    """
    image = load_image(path)
    if image.mode not in modes:
        raise ValueError(f"{path}: expected an image of mode {' or '.join(modes)}, got {image.mode}")
    return np.array(image)


def read_bytes(path: Path) -> bytes:
    """The bytes of an image file, which is decoded once as a check.

    Raises:
        ValueError: the file is missing or damaged.
    """
    load_image(path)
    return path.read_bytes()


def read_npy(path: Path) -> np.ndarray:
    """The array of a .npy file, mapped into memory.

    Raises:
        ValueError: the file is missing, truncated or not an array.
    """
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"cannot read an array from {path}: {error}") from error


def read_mat(path: Path, variable: str) -> Any:
    """A variable of a .mat file. Structs become dictionaries, and arrays of structs become lists of them.

    Raises:
        ValueError: the file is missing or damaged, or has no such variable.
    """
    try:
        return scipy.io.loadmat(path, simplify_cells=True, variable_names=[variable])[variable]
    except KeyError as error:
        raise ValueError(f"{path} has no variable {variable!r}") from error
    except Exception as error:  # SciPy's parser raises any type
        raise ValueError(f"cannot read {path}: {error}") from error


def read_json(path: Path) -> Any:
    """Raises ValueError if the file is missing or not JSON."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
