"""Reads, decodes, turns upright and resizes photos and label maps."""

import math
import os
import string
from collections.abc import Callable
from http.client import HTTPException
from io import BytesIO
from typing import Any, TypeAlias
from urllib.parse import quote
from urllib.request import urlopen

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor
from transformers.image_utils import ChannelDimension
from transformers.utils import logging

from .tasks import TaskKind


try:
    import pillow_heif

    pillow_heif.register_heif_opener()
except ImportError:

    def _open_heif(*_):
        raise ValueError("HEIC needs pillow-heif: pip install transformers-degmix[heic]")

    Image.register_open("HEIF", _open_heif, lambda start: start[4:11] in (b"ftyphei", b"ftyphev"))

logger = logging.get_logger(__name__)

Size = tuple[int, int]
LabelMap: TypeAlias = Image.Image | np.ndarray | Tensor


# Keys of `Image.info`: the value that means white in the file, in the units of [`to_pixels`], which maps it to 255; a
# warning that the values can be meant in another range.
WHITE, DOUBT = "transformers_degmix.white", "transformers_degmix.doubt"

# TIFF's tags for the largest value: WhiteLevel (of DNG), SMaxSampleValue, MaxSampleValue; and for the number of bits
_MAXIMUM_TAGS, _BITS_TAG = (50717, 341, 281), 258

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(source: str | os.PathLike, timeout: float | None = None) -> Image.Image:
    """Reads a photo from a path or an `http:`, `https:` or `data:` URL, see [`decode_image`].

    A warning names photos whose values can be meant in another range.

    Args:
        source: where the image is.
        timeout: seconds to wait for a server.

    Raises:
        ValueError: there is no readable image; the message names the source.
    """
    source = os.fspath(source)
    try:
        if source[:8].lower().startswith(("http://", "https://", "data:")):
            with urlopen(quote(source, safe=string.punctuation), timeout=timeout) as response:
                image = decode_image(BytesIO(response.read()))
        else:
            image = decode_image(source)
    except (OSError, ValueError, HTTPException) as error:
        raise ValueError(f"cannot read an image from {source[:200]!r}: {error}") from error
    if DOUBT in image.info:
        logger.warning(f"{source[:200]}: {image.info[DOUBT]}")
    return image


def decode_image(
    file: str | os.PathLike | BytesIO,
    formats: tuple[str, ...] | None = None,
    before_decoding: Callable[[Image.Image], Any] | None = None,
    ignore_orientation: bool = False,
) -> Image.Image:
    """An image file -> its first picture, upright. All photos, and the images of data sets, are opened here.

    `transformers.image_utils.load_image` converts to RGB, which clips 16-bit images and drops transparency; here the
    image keeps its mode.

    Args:
        file: its path or content.
        formats: PIL's names of the allowed formats.
        before_decoding: is called with the image when its size is known, before its pixels are decoded.
        ignore_orientation: whether to keep the image as it is stored, and drop its EXIF.

    Raises:
        ValueError: there is no readable image; the message is one line, which does not name the file.
    """
    try:
        image: Image.Image = Image.open(file, formats=formats)
    except Image.DecompressionBombError as error:
        lifted = "`--max-pixels` lifts it, in Python `PIL.Image.MAX_IMAGE_PIXELS = None`"
        raise ValueError(f"too large: {error} {lifted}") from error
    except UnidentifiedImageError as error:
        if not (len(file.getbuffer()) if isinstance(file, BytesIO) else os.path.getsize(file)):
            raise ValueError("the file is empty") from error
        known = f" ({', '.join(formats)})" if formats else ""
        raise ValueError(f"not an image of a format that can be read{known}") from error
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error, KeyError, ...
        raise ValueError(_one_line(error)) from error
    if before_decoding:
        before_decoding(image)
    try:
        white = _white_candidates(image)
        image.load()
        image = _without_exif(image.copy()) if ignore_orientation else upright(image)
        if white:
            image.info.update(_describe_range(image, *white))
        return image
    except Exception as error:
        raise ValueError(f"damaged: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _white_candidates(image: Any) -> tuple[float, float] | None:
    """The largest value that an image of more than 8 bits can hold, and the largest that its file states, or 0.

    For other images, `None`. The image must not be decoded yet.
    """
    if image.mode != "F" and not image.mode.startswith("I") and ";16" not in str(image.tile):
        return None
    largest = 255 if image.mode == "F" else 65535
    if image.format == "PNG":
        # PIL skips the chunk sBIT. It has read the file up to the pixels.
        place = image.fp.tell()
        image.fp.seek(0)
        bits = image.fp.read(place).partition(b"sBIT")[2][:1]
        return largest, 2 ** bits[0] - 1 if bits else 0
    tags = getattr(image, "tag_v2", {})
    stated = next((float(np.max(tags[tag])) for tag in _MAXIMUM_TAGS if tag in tags), 0)
    if not 0 < stated < 2**32:  # also NaN, and the largest float, which some writers give for the range of the type
        stated = 0
    if image.mode != "F" and not stated and np.max(tags.get(_BITS_TAG, 16)) < 16:
        stated = 2 ** int(np.max(tags[_BITS_TAG])) - 1
    # Rounded up to full bits, because it can also be the largest value of this image.
    return largest, 2 ** math.ceil(math.log2(stated + 1)) - 1 if stated else 0


def _describe_range(image: Image.Image, largest: float, stated: float) -> dict[str, Any]:
    """[`WHITE`], [`DOUBT`] or nothing, for `Image.info`, from the values of [`_white_candidates`]."""
    unit = largest / 255
    found = np.max(image.getextrema()) * (1 if len(image.getbands()) == 1 else unit)
    if 0 < found <= stated:
        # Dark, and already scaled to the full range: PNG wants that, and then sBIT only says how many bits are exact.
        is_scaled = image.mode != "F" and not (np.asarray(image) % ((largest + 1) // (stated + 1))).any()
        return {} if is_scaled else {WHITE: stated / unit}
    if not 0 < found < math.inf:  # or NaN
        return {}
    bits = math.ceil(math.log2(max(found, 1) + 1))
    used = 2**bits - 1
    if 1 < found <= 255 if largest == 255 else bits > 14:
        return {}
    return {
        DOUBT: f"no value is above {found:g}, but {largest} is taken for white: is {used} meant? Then write it into "
        "the file (TIFF: MaxSampleValue, for floats SMaxSampleValue; PNG: the bits, as sBIT) or, for a data set, "
        f"`columns: {{image: {{scale: {largest / used:.5g}}}}}`"
    }


def to_pixels(
    image: Image.Image | np.ndarray | Tensor,
    do_convert_rgb: bool,
    input_data_format: str | ChannelDimension | None = None,
) -> np.ndarray:
    """Image -> float32 array `(channels, height, width)`, the same for every backend and version of Transformers.

    - PIL images are turned upright as their EXIF orientation says.
    - 16-bit values (modes `I;16`, `I`; uint16) are divided by 257, so that 65535 becomes 255, and not clipped.
    - All other values are kept, floats (mode `F` too) included.
    - The value that means white, if [`decode_image`] has found one in the file, becomes 255.
    - With `do_convert_rgb`, palettes, CMYK and the like become RGB, one channel becomes three, and transparency is
      composited over white: 255, or 1 in float arrays.

    Args:
        image: PIL image, or array `(height, width)`, `(channels, height, width)` or `(height, width, channels)`.
        do_convert_rgb: whether the result must have three channels.
        input_data_format: where the channels of an array are; by default inferred, first axis first.

    Raises:
        ValueError: the shape is not that of an image, or values are NaN, infinite or out of range, or a PIL image
            cannot be decoded.
    """
    white = 255
    if isinstance(image, Image.Image):
        white = image.info.get(WHITE, 255)
        try:
            array = _pil_to_array(image, do_convert_rgb)
        except Exception as error:  # of every type, from PIL's decoders
            raise ValueError(_one_line(error)) from error
        input_data_format = ChannelDimension.LAST
    elif isinstance(image, Tensor):
        # NumPy has no bfloat16.
        array = (image.detach().float() if image.is_floating_point() else image).cpu().numpy()
    else:
        array = np.asarray(image)

    if array.dtype.kind == "b":
        array = array * np.uint8(255)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"expected an image or an array of numbers, got a {type(image).__name__}")
    shape = array.shape
    if array.ndim == 2:
        array = array[None]
    elif array.ndim == 3 and (
        input_data_format == ChannelDimension.LAST or (input_data_format is None and shape[0] not in (1, 3, 4))
    ):
        array = np.moveaxis(array, -1, 0)
    if array.ndim != 3 or len(array) not in (1, 3, 4) or not array.size:
        raise ValueError(
            "expected the shape (height, width), (channels, height, width) or (height, width, channels) with 1, 3 or "
            f"4 channels, got {shape}"
        )
    pixels = np.array(array, np.float32, order="C")
    if array.dtype.newbyteorder("=") == np.uint16:
        pixels /= 257
    if white != 255:
        pixels *= 255 / white
    if array.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise ValueError("expected finite values, got NaN or infinity")
    if do_convert_rgb and len(pixels) == 4:
        opaque = 1 if np.issubdtype(array.dtype, np.floating) else 255
        alpha = pixels[3] / opaque
        if alpha.min() < 0 or alpha.max() > 1:
            raise ValueError(f"expected alpha from 0 to {opaque}, got {pixels[3].min()} to {pixels[3].max()}")
        pixels = alpha * pixels[:3] + (1 - alpha) * opaque
    if do_convert_rgb and len(pixels) == 1:
        pixels = pixels.repeat(3, axis=0)
    return pixels


def to_photo(image: Image.Image | np.ndarray | Tensor) -> Image.Image:
    """Image -> 8-bit RGB picture of it, upright, of the values of [`to_pixels`], which raises the same errors."""
    pixels = to_pixels(image, do_convert_rgb=True)  # a copy, and four times the image's size: changed in place
    return Image.fromarray(np.moveaxis(np.rint(pixels, out=pixels).clip(0, 255, out=pixels), 0, -1).astype(np.uint8))


def image_size(image: Image.Image | np.ndarray) -> Size:
    """(height, width) of an image or an array whose channels, if any, are first or last."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    return image.shape[:2] if image.ndim == 2 or image.shape[0] not in (1, 3, 4) else image.shape[1:]


def orientation_of(image: Image.Image) -> int:
    """From 1 (upright) to 8. EXIF that cannot be read is taken for none."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # of every type, from PIL's parsers
        return 1
    return orientation if orientation in _TURNS else 1


def upright(image: Image.Image) -> Image.Image:
    """Turns an image as its EXIF says, and then drops the EXIF. Unreadable EXIF is ignored.

    `ImageOps.exif_transpose` writes the other tags again, and fails where they cannot be written.
    """
    turn = _TURNS.get(orientation_of(image))
    return image if turn is None else _without_exif(image.transpose(turn))


def _without_exif(image: Image.Image) -> Image.Image:
    for name in ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"):
        image.info.pop(name, None)
    return image


def _pil_to_array(image: Image.Image, do_convert_rgb: bool) -> np.ndarray:
    image = upright(image)
    if image.mode == "I":
        # 32 bits that hold the 16 of a PNG or TIFF
        array = np.array(image)
        if array.min() < 0 or array.max() > 65535:
            raise ValueError(f"expected values from 0 to 65535 in mode I, got {array.min()} to {array.max()}")
        return array.astype(np.uint16)
    if do_convert_rgb and image.mode != "F" and not image.mode.startswith("I;16"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    return np.array(image)


def to_label(label: LabelMap, kind: TaskKind, size: Size) -> Tensor:
    """Label map of an image of `size` -> `(kind.label_channels, height, width)` of dtype `kind.label_dtype`.

    8-bit maps (uint8; PIL modes L, P and RGB) are decoded by `kind.decode`; in mode P, values are the palette's
    indices or, if the palette is grey, its levels. Other dtypes hold the values themselves, booleans (mode 1) 0 and 1.

    Raises:
        ValueError: the map has another shape, NaN or infinite values, or fractions as class ids.
    """
    return torch.from_numpy(decode_label(to_coded_label(label, kind, size), kind))


def to_coded_label(label: LabelMap, kind: TaskKind, size: Size) -> np.ndarray:
    """[`to_label`] without decoding: an array that owns its memory, uint8 if the map is, else `kind.array_dtype`."""
    if isinstance(label, Tensor):
        # NumPy has no bfloat16.
        label = (label.detach().float() if label.is_floating_point() else label).cpu()
    label = stored_values(label, kind)
    found, expected = label.shape, (kind.label_channels, *size)
    if found == (*size, kind.label_channels):
        label = np.moveaxis(label, -1, 0)
    elif found == size:
        label = label[None]
    if label.shape != expected:
        message = f"expected the shape {expected} or {(*size, kind.label_channels)}, got {found}"
        if found[:2] == size[::-1]:
            message += " (`image: {ignore_orientation: true}` in `columns` takes images as they are stored)"
        elif label.ndim in (2, 3) and image_size(label) != size:
            message += " (`resize: true` in `columns` resizes maps of another size)"
        raise ValueError(message)
    if label.dtype.kind == "f" and not (finite := np.isfinite(label)).all():
        number = label[~finite][0]
        name, yaml = ("NaN", ".nan") if np.isnan(number) else ("infinity", ".inf" if number > 0 else "-.inf")
        raise ValueError(
            f"expected finite values, got {name} in {1 - finite.mean():.1%} of the pixels (`invalid: {yaml}` in "
            "`columns` leaves them out)"
        )
    if label.dtype.kind == "f" and kind.has_class_ids and (between := label % 1 != 0).any():
        raise ValueError(
            f"expected whole numbers, got {label[between][0]:g}, and others in {between.mean():.1%} of the pixels "
            "(`scale: 1` in `columns` rounds them, `scale: 255` is for ids that were divided by it)"
        )
    return np.array(label, np.uint8 if label.dtype == np.uint8 else kind.array_dtype, order="C")


def necessary_channels(image: Image.Image, kind: TaskKind) -> Image.Image:
    """A label image without redundant channels.

    These are opaque alpha and, if the kind has one channel, RGB that is grey everywhere. Some tools always add them.
    """
    if len(image.getbands()) == kind.label_channels:
        return image
    if image.mode in ("LA", "RGBA") and image.getextrema()[-1] == (255, 255):
        image = image.convert(image.mode[:-1])
    if image.mode == "RGB" and kind.label_channels == 1:
        red, green, blue = image.split()
        if red.tobytes() == green.tobytes() == blue.tobytes():
            return red
    return image


def stored_values(label: Image.Image | np.ndarray | Tensor, kind: TaskKind) -> np.ndarray:
    """A label map as an array, upright, and not decoded."""
    if not isinstance(label, Image.Image):
        return np.asarray(label)
    label = necessary_channels(upright(label), kind)
    indices = np.asarray(label)
    if label.mode != "P":
        return indices
    # Tools and optimisers that store grey maps with a palette renumber its entries.
    colors = np.array(label.getpalette(), np.uint8).reshape(-1, 3)
    used = np.unique(indices)
    is_grey = used[-1] < len(colors) and (colors == colors[:, :1]).all()
    return colors[:, 0][indices] if is_grey and len(np.unique(colors[used, 0])) == len(used) else indices


def decode_label(label: np.ndarray, kind: TaskKind) -> np.ndarray:
    """What [`to_coded_label`] gives -> the values, of dtype `kind.array_dtype`."""
    return kind.decode(label).astype(kind.array_dtype, copy=False) if label.dtype == np.uint8 else label


def resize_nearest(maps: Tensor, size: Size) -> Tensor:
    """`(..., height, width)` -> `(..., *size)`, each pixel from the one whose centre is nearest.

    If two are equally near, it is the later one. In PIL and torchvision, that depends on rounding.
    """
    rows, columns = (torch.from_numpy(nearest(old, new)) for old, new in zip(maps.shape[-2:], size))
    return maps[..., rows[:, None], columns]


def nearest(old: int, new: int) -> np.ndarray:
    """For each of `new` pixels in a line, which of the `old` ones has the nearest centre."""
    return ((np.arange(new) + 0.5) * old / new).astype(np.int64)
