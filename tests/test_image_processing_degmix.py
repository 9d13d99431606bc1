"""Image processors: expectations are computed here with NumPy and PIL, apart from the library."""

import base64
import json
import logging
import math
import struct
import threading
import zlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, TiffImagePlugin
from torch.nn import functional as F
from transformers.modeling_outputs import DepthEstimatorOutput, SemanticSegmenterOutput
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import ModelOutput, is_torchvision_available

from transformers_degmix import DeGMixConfig, DeGMixImageProcessor, DeGMixImageProcessorPil
from transformers_degmix.images_degmix import load_image
from transformers_degmix.tasks import TASK_KINDS


MEAN = np.array([0.485, 0.456, 0.406]).reshape(3, 1, 1)
STD = np.array([0.229, 0.224, 0.225]).reshape(3, 1, 1)
ALL_KINDS = {
    "semseg": "segmentation",
    "sal": "saliency",
    "depth": "depth",
    "normals": "normals",
    "edge": "boundary",
}
ORIENTATION = 0x0112


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(params=["pil", pytest.param("torchvision", marks=pytest.mark.vision)])
def processor_class(request):
    return DeGMixImageProcessor if request.param == "torchvision" else DeGMixImageProcessorPil


@pytest.fixture
def plain(processor_class):
    """A processor that shows what an image becomes before rescaling and normalisation."""
    return processor_class(do_rescale=False, do_normalize=False, tasks=ALL_KINDS)


def random_image(rng, height, width):
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def pixels_of(processor, image, **kwargs):
    return processor(image, return_tensors="pt", **kwargs).pixel_values[0].numpy()


def logits_for(tasks, batch_size, height, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    channels = {"segmentation": 5, "saliency": 2, "depth": 1, "normals": 3, "boundary": 1}
    return ModelOutput(
        logits={
            name: torch.randn(batch_size, channels[kind], height, width, generator=generator).to(dtype)
            for name, kind in tasks.items()
        }
    )


# Images


def test_image_is_rescaled_normalised_and_not_resized(processor_class, rng):
    image = random_image(rng, 37, 53)
    inputs = processor_class()(image, return_tensors="pt")
    assert list(inputs) == ["pixel_values"]
    assert inputs.pixel_values.dtype == torch.float32
    expected = (image.transpose(2, 0, 1) / 255 - MEAN) / STD
    np.testing.assert_allclose(inputs.pixel_values.numpy(), expected[None], atol=1e-5)


def test_layouts_and_containers_of_one_image_are_equal(processor_class, rng, tmp_path):
    image = random_image(rng, 37, 53)
    Image.fromarray(image).save(tmp_path / "image.png")
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "png")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    first = np.ascontiguousarray(image.transpose(2, 0, 1))
    images = [
        image,
        first,
        torch.from_numpy(first),
        torch.from_numpy(first).bfloat16(),
        Image.fromarray(image),
        str(tmp_path / "image.png"),
        tmp_path / "image.png",
        url,
    ]
    pixel_values = processor_class()(images, return_tensors="pt").pixel_values
    assert pixel_values.shape == (len(images), 3, 37, 53)
    assert (pixel_values == pixel_values[:1]).all()
    assert torch.equal(processor_class()(first[None], return_tensors="pt").pixel_values, pixel_values[:1])


def test_input_data_format_decides_where_shapes_do_not(plain):
    image = np.arange(3 * 40 * 3, dtype=np.uint8).reshape(3, 40, 3)
    np.testing.assert_array_equal(pixels_of(plain, image), image)
    np.testing.assert_array_equal(pixels_of(plain, image, input_data_format="channels_last"), image.transpose(2, 0, 1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(plain, rng, tmp_path, orientation):
    upright = random_image(rng, 6, 9)
    # What a camera stores, for each value of the tag: the inverse of the turn that the tag asks for.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = str(tmp_path / "image.png")
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
    for image in (path, Image.open(path)):
        np.testing.assert_array_equal(pixels_of(plain, image), upright.transpose(2, 0, 1))


def test_rotated_jpeg_file(plain, rng, tmp_path):
    smooth = Image.fromarray(random_image(rng, 3, 4)).resize((64, 48), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    path = str(tmp_path / "image.jpg")
    smooth.save(path, exif=exif, quality=95)
    pixels = pixels_of(plain, path)
    assert pixels.shape == (3, 64, 48)
    expected = np.rot90(np.array(smooth), -1).transpose(2, 0, 1).astype(float)
    assert np.abs(pixels - expected).mean() < 3


def exif_block(orientation: int, *entries: bytes) -> bytes:
    """EXIF with an orientation and further entries of 12 bytes, as no library would write it."""
    entries = (struct.pack("<HHIHH", ORIENTATION, 3, 1, orientation, 0), *entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + bytes(4)


MALFORMED_EXIF = {
    "text of a bytes object": (b"b'Exif\\x00", False),
    "negative unsigned rational, which cannot be written": (
        exif_block(6, struct.pack("<HHI", 0x11A, 8, 1) + struct.pack("<hh", -3, 0)),
        True,
    ),
    "offset behind the end": (exif_block(6, struct.pack("<HHII", 0x10F, 2, 99, 10**6)), True),
    "no entries": (b"Exif\0\0II*\0", False),
    "orientation 9": (exif_block(9), False),
}


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
@pytest.mark.parametrize("name", MALFORMED_EXIF)
def test_malformed_exif_costs_no_photo(plain, rng, tmp_path, name, ending):
    exif, is_turned = MALFORMED_EXIF[name]
    path = tmp_path / f"image.{ending}"
    Image.fromarray(random_image(rng, 6, 9)).save(path, exif=exif)
    expected = np.asarray(Image.open(path)).astype(float)
    expected = (np.rot90(expected, -1) if is_turned else expected).transpose(2, 0, 1)
    for image in (path, Image.open(path), load_image(path)):
        np.testing.assert_array_equal(pixels_of(plain, image), expected)
    label = {"semseg": Image.open(path).convert("L")}
    assert plain(Image.open(path), labels=label, return_tensors="pt").labels["semseg"].shape[1:] == expected.shape[1:]


@pytest.mark.parametrize("error", [SyntaxError("bad"), struct.error("a\nb"), KeyError(9), MemoryError(), IndexError()])
@pytest.mark.parametrize("when", ["open", "load"])
def test_errors_of_decoders_are_of_one_type_and_line_and_name_the_file(tmp_path, monkeypatch, error, when):
    class Decoder(ImageFile.ImageFile):
        format = "BROKEN"

        def _open(self):
            self._mode, self._size = "L", (4, 3)
            if when == "open":
                raise error

        def load(self):
            raise error

    monkeypatch.setattr(Image, "ID", ["BROKEN"])
    monkeypatch.setitem(Image.OPEN, "BROKEN", (Decoder, None))
    (tmp_path / "photo.raw").write_bytes(bytes(100))
    with pytest.raises(ValueError, match=r"photo\.raw'?: \S") as caught:
        load_image(tmp_path / "photo.raw")
    assert "\n" not in str(caught.value)
    if when == "load":
        with pytest.raises(ValueError, match=r"image 0: \S"):
            DeGMixImageProcessorPil()(Image.open(tmp_path / "photo.raw"))


def png_with_significant_bits(image: Image.Image, *bits: int) -> bytes:
    file, chunk = BytesIO(), b"sBIT" + bytes(bits)
    image.save(file, "PNG")
    content = file.getvalue()
    if not bits:
        return content
    chunk = struct.pack(">I", len(bits)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return content[:33] + chunk + content[33:]


def tiff(values: np.ndarray, tag: int | None = None, value=None) -> bytes:
    file, info = BytesIO(), TiffImagePlugin.ImageFileDirectory_v2()
    if tag:
        info[tag] = value
    Image.fromarray(values).save(file, "TIFF", tiffinfo=info)
    return file.getvalue()


RAMP = np.linspace(0, 1, 40, dtype=np.float32).reshape(5, 8)
MAX_SAMPLE_VALUE, S_MAX_SAMPLE_VALUE, WHITE_LEVEL = 281, 341, 50717


@pytest.mark.parametrize(
    "content",
    [
        *(png_with_significant_bits(Image.fromarray(np.uint16(RAMP * (2**n - 1))), n) for n in (10, 12, 14)),
        png_with_significant_bits(Image.fromarray(np.uint16(RAMP * 65535)), 16),
        # As the standard wants it: the bits that count are the upper ones.
        png_with_significant_bits(Image.fromarray(np.uint16(RAMP * 4095) * 16), 12),
        # So are the values of a dark picture, which would fit into the lower bits.
        png_with_significant_bits(Image.fromarray(np.uint16(RAMP * 255) * 16), 12),
        tiff(np.uint16(RAMP * 1023), MAX_SAMPLE_VALUE, 1023),
        tiff(np.uint16(RAMP * 3900), MAX_SAMPLE_VALUE, 3900),
        tiff(np.uint16(RAMP * 16383), WHITE_LEVEL, 16383),
        tiff(RAMP, S_MAX_SAMPLE_VALUE, 1.0),
        tiff(RAMP * 4095, S_MAX_SAMPLE_VALUE, 4095.0),
        tiff(RAMP * 255, S_MAX_SAMPLE_VALUE, 255.0),
        # values that cannot be white: the last is the range of the type
        *(tiff(RAMP * 255, S_MAX_SAMPLE_VALUE, value) for value in (-1.0, float("nan"), float(np.finfo("f4").max))),
        tiff(RAMP * 255),
        tiff(np.uint16(RAMP * 65535)),
        tiff(np.uint16(RAMP * 0)),
    ],
)
def test_values_are_scaled_as_the_file_says(plain, tmp_path, caplog, content):
    path = tmp_path / "image"
    path.write_bytes(content)
    stored = np.asarray(Image.open(path)).astype(float)
    expected = RAMP * (stored.max() / 257 if stored.max() in (0, 4080) else 255)
    np.testing.assert_allclose(pixels_of(plain, path)[0], expected, atol=13 if stored.max() == 3900 else 0.3)
    assert not caplog.text


@pytest.mark.parametrize(
    "content, factor",
    [
        (tiff(RAMP), "255"),
        (tiff(RAMP * 4095), "0.062271"),
        (tiff(np.uint16(RAMP * 4000)), "16.004"),
        (png_with_significant_bits(Image.fromarray(np.uint16(RAMP * 1000))), "64.062"),
    ],
)
def test_values_of_another_range_are_warned_of(tmp_path, caplog, content, factor):
    (tmp_path / "dark").write_bytes(content)
    load_image(tmp_path / "dark")
    assert f"{tmp_path / 'dark'}: no value is above" in caplog.text
    assert f"scale: {factor}}}" in caplog.text


def test_eight_of_sixteen_bits_of_rgb_are_scaled_or_warned_of(plain, tmp_path, caplog):
    """Of colour in 16 bits, PIL gives the upper 8."""
    values = np.uint16(RAMP * 4095)
    rows = b"".join(b"\0" + np.stack([row] * 3, -1).astype(">u2").tobytes() for row in values)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 8, 5, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]

    def png(*chunks) -> bytes:
        packed = (struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks)
        return b"\x89PNG\r\n\x1a\n" + b"".join(packed)

    (tmp_path / "unstated.png").write_bytes(png(*chunks))
    load_image(tmp_path / "unstated.png")
    assert "unstated.png: no value is above 3855" in caplog.text
    caplog.clear()
    (tmp_path / "stated.png").write_bytes(png(chunks[0], (b"sBIT", bytes([12] * 3)), *chunks[1:]))
    np.testing.assert_allclose(pixels_of(plain, tmp_path / "stated.png")[0], RAMP * 255, atol=16)
    assert not caplog.text


def test_grey_palette_and_cmyk_become_rgb(plain, rng):
    grey = rng.integers(0, 256, (8, 10), dtype=np.uint8)
    for image in (Image.fromarray(grey), grey, grey[None], grey[..., None]):
        np.testing.assert_array_equal(pixels_of(plain, image), np.stack([grey] * 3))
    bits = grey > 127
    for image in (Image.fromarray(bits), bits, torch.from_numpy(bits)):
        np.testing.assert_array_equal(pixels_of(plain, image), np.stack([bits * 255] * 3))
    np.testing.assert_array_equal(pixels_of(plain, Image.fromarray(bits), do_convert_rgb=False), bits[None] * 255)

    palette = rng.integers(0, 256, (256, 3), dtype=np.uint8)
    indexed = Image.fromarray(grey, "L").convert("P")
    indexed.putpalette(palette.tobytes())
    indexed.putdata(grey.ravel().tolist())
    np.testing.assert_array_equal(pixels_of(plain, indexed), palette[grey].transpose(2, 0, 1))

    cmyk = rng.integers(0, 256, (8, 10, 4), dtype=np.uint8)
    expected = (255 - cmyk[..., :3].astype(float)) * (255 - cmyk[..., 3:].astype(float)) / 255
    pixels = pixels_of(plain, Image.fromarray(cmyk, "CMYK"))
    np.testing.assert_allclose(pixels, expected.transpose(2, 0, 1), atol=1)


def test_transparency_is_composited_over_white(plain, rng):
    rgba = rng.integers(0, 256, (8, 10, 4), dtype=np.uint8)
    color, alpha = rgba[..., :3].astype(float), rgba[..., 3:] / 255
    expected = (alpha * color + (1 - alpha) * 255).transpose(2, 0, 1)
    for image in (Image.fromarray(rgba, "RGBA"), rgba, rgba.transpose(2, 0, 1), torch.from_numpy(rgba)):
        np.testing.assert_allclose(pixels_of(plain, image), expected, atol=1e-3)
    np.testing.assert_allclose(pixels_of(plain, rgba / 255), expected / 255, atol=1e-5)

    grey_alpha = Image.fromarray(np.ascontiguousarray(rgba[..., [0, 3]]), "LA")
    expected = alpha[..., 0] * color[..., 0] + (1 - alpha[..., 0]) * 255
    np.testing.assert_allclose(pixels_of(plain, grey_alpha), np.stack([expected] * 3), atol=1e-3)

    indexed = Image.new("P", (4, 4), 1)
    indexed.putpalette([10, 20, 30, 40, 50, 60])
    indexed.info["transparency"] = 1
    assert (pixels_of(plain, indexed) == 255).all()


def test_sixteen_bits_are_scaled_to_eight_not_clipped(plain, rng, tmp_path):
    values = rng.integers(0, 65536, (8, 10)).astype(np.uint16)
    values[0, :2] = 0, 65535
    expected = np.stack([values / 257] * 3)
    assert expected.max() == 255
    Image.fromarray(values).save(tmp_path / "image.png")
    Image.fromarray(values).save(tmp_path / "image.tiff")
    big_endian = Image.frombytes("I;16B", (10, 8), values.astype(">u2").tobytes())
    images = [
        values,
        values[None],
        np.stack([values] * 3),
        torch.from_numpy(values),
        Image.fromarray(values),
        Image.fromarray(values.astype(np.int32)),
        big_endian,
        str(tmp_path / "image.png"),
        str(tmp_path / "image.tiff"),
    ]
    assert {image.mode for image in images if isinstance(image, Image.Image)} == {"I;16", "I", "I;16B"}
    for image in images:
        np.testing.assert_allclose(pixels_of(plain, image), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["a.gif", "a.WEBP", "a.png", "a [1] ü.tif", "a.jpg"])
def test_the_first_of_several_pictures(plain, rng, tmp_path, name):
    first, second = (Image.fromarray(random_image(rng, 3, 4)).resize((40, 32)) for _ in range(2))
    file_format = "MPO" if name == "a.jpg" else None  # as phones call them
    first.save(tmp_path / name, file_format, save_all=True, append_images=[second], lossless=True, quality=95)
    found = pixels_of(plain, tmp_path / name)
    # of the second it would be ten times as much
    assert np.abs(found - np.moveaxis(np.asarray(first, float), -1, 0)).mean() < 10


@pytest.mark.parametrize("content, reason", [(b"", "the file is empty"), (b"no image", "not an image of a format")])
def test_files_that_hold_no_image(tmp_path, content, reason):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=f"a.png': {reason}"):
        load_image(tmp_path / "a.png")


def test_urls(plain, rng, tmp_path):
    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            if self.path != "/cut":
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"less")

        def log_message(self, *_):
            pass

    image = random_image(rng, 8, 10)
    Image.fromarray(image).save(tmp_path / "a b é.png")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_port}"
        for url in (f"http://{address}/a b é.png", f"HTTP://{address}/a%20b%20%C3%A9.png?size=1"):
            np.testing.assert_array_equal(pixels_of(plain, url), image.transpose(2, 0, 1))
        for name, reason in (("cut", "IncompleteRead"), ("gone.png", "404")):
            with pytest.raises(ValueError, match=f"cannot read an image from 'http://{address}/{name}': .*{reason}"):
                load_image(f"http://{address}/{name}")
        server.shutdown()


def test_floats_are_kept(plain, rng):
    image = rng.normal(100, 100, (3, 8, 10)).astype(np.float32)
    np.testing.assert_array_equal(pixels_of(plain, image), image)
    np.testing.assert_array_equal(pixels_of(plain, Image.fromarray(image[0])), image[[0, 0, 0]])


def test_channels_are_kept_without_conversion(processor_class):
    processor = processor_class(do_convert_rgb=False, do_rescale=False, do_normalize=False)
    assert pixels_of(processor, Image.new("L", (5, 4), 7)).shape == (1, 4, 5)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((2, 4, 5), np.uint8), r"image 1: .*channels.*got \(2, 4, 5\)"),
        (np.zeros((1, 3, 4, 5), np.uint8), r"image 1: .*got \(1, 3, 4, 5\)"),
        (np.full((3, 4, 5), np.nan), "image 1: .*NaN"),
        (torch.full((3, 4, 5), math.inf), "image 1: .*infinity"),
        (Image.fromarray(np.full((4, 5), 70000, np.int32)), "image 1: .*65535.*70000"),
        (np.full((4, 4, 5), 9.0), "image 1: expected alpha from 0 to 1, got 9"),
        (np.zeros((0, 10, 3)), r"image 1: .*got \(0, 10, 3\)"),
        (None, "image 1: expected an image or an array of numbers, got a NoneType"),
        (b"bytes", "image 1: .*got a bytes"),
        (np.zeros((3, 4, 5), complex), "image 1: .*got a ndarray"),
        ("no such file.png", "no such file.png"),
    ],
)
def test_bad_images_are_named(processor_class, image, message):
    with pytest.raises(ValueError, match=message):
        processor_class()([np.zeros((3, 4, 5), np.uint8), image], return_tensors="pt")


def test_bad_settings_are_named(processor_class, rng):
    processor, image = processor_class(), random_image(rng, 40, 50)
    with pytest.raises(ValueError, match="at least one image"):
        processor([])
    with pytest.raises(ValueError, match="image 0 of 40 x 50 is larger than `pad_size`, 64 x 48"):
        processor(image, pad_size={"height": 64, "width": 48})
    with pytest.raises(ValueError, match="`size_divisor` must be at least 1, got 0"):
        processor_class(size_divisor=0)
    with pytest.raises(ValueError, match="do_center_crop"):
        processor(image, do_center_crop=True, crop_size=32)
    with pytest.raises(ValueError, match="longest_edge"):
        processor(image, do_resize=True, size={"longest_edge": 32})
    for resample in (9, "bicubic"):
        for call in (processor_class, partial(processor, image)):
            with pytest.raises(ValueError, match=rf"`resample` must be one of .*BICUBIC \(3\).*got {resample!r}"):
                call(resample=resample)
    for tasks, found in (({"rain": "weather"}, "'weather'"), ({"rain": {"num_labels": 3}}, "None")):
        with pytest.raises(ValueError, match=rf"tasks\['rain'\].*'boundary', 'depth'.*got {found}"):
            processor_class(tasks=tasks)
    with pytest.raises(ValueError, match="`tasks` as a list needs a `name` in each, got None"):
        processor_class(tasks=[{"kind": "depth"}])
    with pytest.raises(ValueError, match="`labels` must be a dictionary of task -> maps, got a ndarray"):
        processor(image, labels=np.zeros((40, 50)))


def test_floats_that_rescaling_would_make_black_are_warned_of(processor_class, rng, caplog):
    logging.Logger.warning_once.cache_clear()
    image = rng.random((3, 32, 40))
    for harmless, options in ((image, {"do_rescale": False}), (255 * image, {}), (0 * image, {})):
        processor_class()(harmless, return_tensors="pt", **options)
    assert not caplog.text
    processor_class()([255 * image, image], return_tensors="pt")
    assert "no value of an image is above 1" in caplog.text and "do_rescale=False" in caplog.text


# Geometry


@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=3),
    divisor=st.one_of(st.none(), st.integers(1, 17)),
)
@settings(max_examples=50)
def test_padding_is_centred_and_cropped_again(sizes, divisor):
    processor = DeGMixImageProcessorPil(
        do_rescale=False, do_normalize=False, size_divisor=divisor, tasks={"depth": "depth", "semseg": "segmentation"}
    )
    images = [np.full((3, *size), index + 1, np.float32) for index, size in enumerate(sizes)]
    depths = [1 + np.arange(size[0] * size[1], dtype=np.float32).reshape(size) for size in sizes]
    # 255 metres mean unknown.
    depths = [np.where(depth == 255, 0.5, depth) for depth in depths]
    labels = {"depth": depths, "semseg": [np.full(size, 3, np.uint8) for size in sizes]}
    inputs = processor(images, labels, return_tensors="pt")

    height, width = inputs.pixel_values.shape[-2:]
    for length, longest in zip((height, width), np.max(sizes, axis=0)):
        assert length % (divisor or 1) == 0
        assert 0 <= length - longest < (divisor or 1)
    for index, (h, w) in enumerate(sizes):
        top, left = (height - h) // 2, (width - w) // 2
        bottom, right = height - h - top, width - w - left
        assert bottom - top in (0, 1) and right - left in (0, 1)
        borders = ((top, bottom), (left, right))
        np.testing.assert_array_equal(
            inputs.pixel_values[index], np.pad(images[index], ((0, 0), *borders), constant_values=0)
        )
        np.testing.assert_array_equal(
            inputs.labels["depth"][index], np.pad(depths[index], borders, constant_values=255)
        )
        np.testing.assert_array_equal(
            inputs.labels["semseg"][index],
            np.pad(labels["semseg"][index].astype(np.int64), borders, constant_values=255),
        )

    # A model that sees the depth perfectly gets back every pixel, and only the image's own.
    semseg = F.one_hot(inputs.labels["semseg"].clamp(max=4), 5).movedim(-1, 1).float()
    outputs = ModelOutput(logits={"depth": inputs.labels["depth"].unsqueeze(1), "semseg": semseg})
    for maps, depth in zip(processor.post_process_dense_prediction(outputs, sizes), depths):
        np.testing.assert_array_equal(maps["depth"], depth)
        assert maps["semseg"].shape == depth.shape and (maps["semseg"] == 3).all()


def test_padding_is_zero_after_normalisation(processor_class):
    black = np.zeros((30, 31, 3), np.uint8)
    pixels = pixels_of(processor_class(pad_size={"height": 33, "width": 40}), black)
    assert pixels.shape == (3, 33, 40)
    inside = np.zeros((33, 40), bool)
    inside[1:31, 4:35] = True
    assert (pixels[:, ~inside] == 0).all()
    np.testing.assert_allclose(pixels[:, inside], np.broadcast_to((-MEAN / STD)[..., 0], (3, 930)), rtol=1e-6)


def test_without_padding_images_keep_their_sizes(processor_class, rng):
    images = [random_image(rng, 20, 30), random_image(rng, 25, 15)]
    labels = {"depth": [np.ones(image.shape[:2]) for image in images]}
    inputs = processor_class(do_pad=False)(images, labels)
    assert [tuple(pixels.shape) for pixels in inputs.pixel_values] == [(3, 20, 30), (3, 25, 15)]
    assert [tuple(label.shape) for label in inputs.labels["depth"]] == [(20, 30), (25, 15)]


@pytest.mark.parametrize(
    ("size", "resized"),
    [
        ({"height": 48, "width": 33}, (48, 33)),
        ({"shortest_edge": 32}, (32, 46)),
        ({"shortest_edge": 32, "longest_edge": 40}, (28, 40)),
        ({"max_height": 64, "max_width": 64}, (44, 64)),
    ],
)
def test_images_and_labels_are_resized_alike(processor_class, rng, size, resized):
    processor = processor_class(do_resize=True, size=size, do_rescale=False, do_normalize=False, tasks=ALL_KINDS)
    image, label = random_image(rng, 55, 80), rng.integers(0, 40, (55, 80), dtype=np.uint8)
    inputs = processor(image, {"semseg": label}, return_tensors="pt")
    assert tuple(inputs.pixel_values.shape[-2:]) == resized
    # PIL rounds to 8 bits, the processor does not.
    expected = np.array(Image.fromarray(image).resize(resized[::-1], Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    np.testing.assert_allclose(inputs.pixel_values[0], expected, atol=1.01)
    expected = np.array(Image.fromarray(label).resize(resized[::-1], Image.Resampling.NEAREST))
    np.testing.assert_array_equal(inputs.labels["semseg"][0], expected)


@pytest.mark.parametrize("resample", Image.Resampling)
def test_filters_are_those_of_pil(processor_class, rng, resample):
    image = rng.integers(80, 176, (55, 71, 3), dtype=np.uint8)  # filters that overshoot stay in 8 bits
    for height, width in ((32, 40), (80, 100)):
        size = {"height": height, "width": width}
        expected = np.array(Image.fromarray(image).resize((width, height), resample)).transpose(2, 0, 1)
        plain = processor_class(do_rescale=False, do_normalize=False)
        pixels = pixels_of(plain, image, do_resize=True, size=size, resample=resample)
        # PIL rounds to 8 bits, rows and columns one after the other; the processor does not.
        np.testing.assert_allclose(pixels, expected, atol=1.5)
        for same in (int(resample), resample):
            processor = processor_class(do_resize=True, size=size, resample=same)
            by_default = pixels_of(processor, image, do_rescale=False, do_normalize=False)
            np.testing.assert_array_equal(by_default, pixels)
            assert json.loads(processor.to_json_string())["resample"] == resample


@pytest.mark.vision
def test_filters_may_be_those_of_torchvision(processor_class, rng, tmp_path):
    from torchvision.transforms import InterpolationMode as modes

    image, options = random_image(rng, 20, 30), {"do_resize": True, "size": {"height": 14, "width": 12}}
    assert {mode.name for mode in modes} - {"NEAREST_EXACT"} == {resample.name for resample in Image.Resampling}
    for mode in modes:
        resample = Image.Resampling[mode.name.removesuffix("_EXACT")]
        expected = pixels_of(processor_class(**options, resample=resample), image)
        processor = processor_class(**options, resample=mode)
        processor.save_pretrained(tmp_path)
        for other in (processor, processor_class.from_pretrained(tmp_path)):
            np.testing.assert_array_equal(pixels_of(other, image), expected)
        np.testing.assert_array_equal(pixels_of(processor_class(**options), image, resample=mode), expected)


@given(sizes=st.lists(st.integers(1, 60), min_size=4, max_size=4))
@settings(max_examples=50)
def test_nearest_takes_the_same_pixels_of_images_and_labels(sizes):
    height, width, *resized = sizes
    label = np.arange(height * width, dtype=np.uint16).reshape(height, width) % 255
    for processor_class in {DeGMixImageProcessorPil, DeGMixImageProcessor}:
        processor = processor_class(do_resize=True, resample=0, do_rescale=False, do_normalize=False)
        image, size = np.stack([label] * 3).astype(np.float32), dict(zip(("height", "width"), resized))
        inputs = processor(image, {"semseg": label}, size=size, return_tensors="pt")
        assert (inputs.pixel_values == inputs.labels["semseg"]).all()


# Labels


def test_eight_bit_labels_are_decoded(plain, rng):
    size = (6, 7)
    image = np.zeros((*size, 3), np.uint8)
    ids = rng.integers(0, 5, size, dtype=np.uint8)
    ids[0, 0] = 255
    salient = rng.integers(0, 2, size, dtype=np.uint8)
    metres = rng.integers(0, 9, size, dtype=np.uint8)
    normals = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    strength = rng.integers(0, 256, size, dtype=np.uint8)
    palette = Image.fromarray(ids).convert("P")
    palette.putdata(ids.ravel().tolist())
    palette.putpalette(list(range(255, -1, -1)) * 3)
    arrays = {"semseg": ids, "sal": salient, "depth": metres, "normals": normals, "edge": strength}
    pictures = {task: Image.fromarray(label) for task, label in arrays.items()} | {"semseg": palette}
    tensors = {task: torch.from_numpy(label) for task, label in arrays.items()}
    for labels in (arrays, pictures, tensors):
        labels = plain(image, labels, return_tensors="pt").labels
        assert list(labels) == list(ALL_KINDS)
        assert {task: label.dtype for task, label in labels.items()} == {
            "semseg": torch.int64,
            "sal": torch.int64,
            "depth": torch.float32,
            "normals": torch.float32,
            "edge": torch.float32,
        }
        np.testing.assert_array_equal(labels["semseg"], ids[None])
        np.testing.assert_array_equal(labels["sal"], salient[None])
        np.testing.assert_array_equal(labels["depth"], np.where(metres == 0, 255, metres)[None])
        np.testing.assert_allclose(labels["normals"], (normals / 127.5 - 1).transpose(2, 0, 1)[None], atol=1e-6)
        np.testing.assert_allclose(labels["edge"], strength[None] / 255, rtol=1e-6)


def test_other_dtypes_are_values(plain, rng):
    size = (6, 7)
    image = np.zeros((*size, 3), np.uint8)
    normals = rng.normal(size=(*size, 3))
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    normals[2, 3] = 0
    expected_normals = np.where((normals == 0).all(-1, keepdims=True), 255, normals).transpose(2, 0, 1)
    bits = rng.random(size) < 0.5
    metres = rng.uniform(1, 9, size).astype(np.float32)
    millimetres = rng.integers(1, 9000, size).astype(np.uint16)
    for normals_label in (normals, normals.transpose(2, 0, 1), torch.from_numpy(normals)):
        label = plain(image, {"normals": normals_label}, return_tensors="pt").labels["normals"]
        np.testing.assert_allclose(label, expected_normals[None], rtol=1e-6)
    for bits_label in (bits, Image.fromarray(bits)):
        labels = plain(image, {"edge": bits_label, "sal": bits_label}, return_tensors="pt").labels
        np.testing.assert_array_equal(labels["edge"], bits[None].astype(np.float32))
        np.testing.assert_array_equal(labels["sal"], bits[None].astype(np.int64))
    for depth in (metres, metres[None], Image.fromarray(metres), np.flip(np.flip(metres, 0).copy(), 0)):
        np.testing.assert_array_equal(plain(image, {"depth": depth}, return_tensors="pt").labels["depth"][0], metres)
    for depth in (millimetres, Image.fromarray(millimetres), millimetres.astype(">u2")):
        label = plain(image, {"depth": depth}, return_tensors="pt").labels["depth"][0]
        np.testing.assert_array_equal(label, np.where(millimetres == 255, 255, millimetres))


def test_normals_padding_and_partly_ignored_pixels_are_ignored(processor_class):
    normals = np.zeros((3, 4, 5), np.float32)
    normals[2] = 1
    normals[0, 1, 2] = 255
    processor = processor_class(tasks=ALL_KINDS, pad_size={"height": 4, "width": 6})
    label = processor(np.zeros((3, 4, 5), np.uint8), {"normals": normals}, return_tensors="pt").labels["normals"][0]
    expected = np.pad(normals, ((0, 0), (0, 0), (0, 1)), constant_values=255)
    expected[:, 1, 2] = 255
    np.testing.assert_array_equal(label, expected)


def test_labels_of_batches(plain):
    images = np.zeros((2, 3, 4, 5), np.uint8)
    stacked = np.arange(40, dtype=np.int64).reshape(2, 4, 5)
    pictures = [Image.fromarray(label.astype(np.uint8)) for label in stacked]
    for images_form in (images, list(images), tuple(images)):
        for maps in (stacked, torch.from_numpy(stacked), list(stacked), pictures):
            labels = plain(images_form, {"semseg": maps}, return_tensors="pt").labels
            np.testing.assert_array_equal(labels["semseg"], stacked)
    labels = plain(images[0], {"semseg": [stacked[0]]}, return_tensors="np").labels
    assert isinstance(labels["semseg"], np.ndarray)
    np.testing.assert_array_equal(labels["semseg"], stacked[:1])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"rain": [np.zeros((4, 5))] * 2}, r"\['semseg', 'sal', 'depth', 'normals', 'edge'\], got 'rain'"),
        ({"depth": [np.ones((4, 5))]}, r"labels\['depth'\]` has 1 maps for 2 images"),
        ({"depth": [np.ones((4, 5)), np.ones((5, 4))]}, r"labels\['depth'\]` of image 1: .*\(1, 4, 5\).*got \(5, 4\)"),
        ({"normals": [np.ones((4, 5))] * 2}, r"labels\['normals'\]` of image 0: .*\(3, 4, 5\).*got \(4, 5\)"),
        ({"edge": [np.ones((4, 5)), np.full((4, 5), np.nan)]}, r"labels\['edge'\]` of image 1: .*NaN"),
        ({"semseg": ["a.png", "b.png"]}, r"labels\['semseg'\]` of image 0"),
    ],
)
def test_bad_labels_are_named(plain, labels, message):
    with pytest.raises(ValueError, match=message):
        plain([np.zeros((3, 4, 5), np.uint8)] * 2, labels, return_tensors="pt")


def test_labels_follow_the_images_to_their_device_and_keep_their_dtype(plain):
    inputs = plain(np.zeros((3, 4, 5), np.uint8), {"depth": np.ones((4, 5))}, return_tensors="pt")
    inputs = inputs.to("meta", torch.float16)
    assert inputs.pixel_values.device.type == inputs.labels["depth"].device.type == "meta"
    assert inputs.pixel_values.dtype == torch.float16 and inputs.labels["depth"].dtype == torch.float32
    assert plain(np.zeros((3, 4, 5), np.uint8), return_tensors="pt").to("meta").pixel_values.device.type == "meta"


# Post-processing


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_maps_are_activated(plain, dtype):
    outputs = logits_for(ALL_KINDS, 2, 9, 11, dtype)
    predictions = plain.post_process_dense_prediction(outputs)
    assert len(predictions) == 2
    for index, maps in enumerate(predictions):
        logits = {task: task_logits[index].double().numpy() for task, task_logits in outputs.logits.items()}
        assert list(maps) == list(ALL_KINDS)
        assert maps["semseg"].dtype == torch.int64
        assert all(maps[task].dtype == torch.float32 for task in ALL_KINDS if task != "semseg")
        np.testing.assert_array_equal(maps["semseg"], logits["semseg"].argmax(0))
        np.testing.assert_allclose(maps["depth"], np.maximum(logits["depth"][0], 0), rtol=1e-6)
        length = np.linalg.norm(logits["normals"], axis=0)
        np.testing.assert_allclose(maps["normals"], logits["normals"] / length, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(maps["sal"], sigmoid(logits["sal"][1] - logits["sal"][0]), rtol=1e-4)
        np.testing.assert_allclose(maps["edge"], sigmoid(logits["edge"][0]), rtol=1e-4)


@pytest.mark.parametrize("size", [{"shortest_edge": 16, "longest_edge": 64}, {"max_height": 64, "max_width": 64}])
@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.NEAREST])
def test_strips_keep_a_pixel(processor_class, rng, size, resample):
    processor = processor_class(do_resize=True, size=size, resample=resample, tasks={"depth": "depth"})
    inputs = processor(random_image(rng, 2, 300), {"depth": np.ones((2, 300))}, return_tensors="pt")
    assert inputs.pixel_values.shape == (1, 3, 1, 64) and inputs.labels["depth"].shape == (1, 1, 64)
    (maps,) = processor.post_process_dense_prediction(logits_for({"depth": "depth"}, 1, 1, 64), [(2, 300)])
    assert maps["depth"].shape == (2, 300)


def test_resize_and_padding_are_undone(processor_class):
    processor = processor_class(do_resize=True, size={"shortest_edge": 32}, size_divisor=32, tasks=ALL_KINDS)
    sizes = [(48, 70), (80, 48)]
    inputs = processor([np.zeros((*size, 3), np.uint8) for size in sizes], return_tensors="pt")
    assert inputs.pixel_values.shape == (2, 3, 64, 64)
    outputs = logits_for(ALL_KINDS, 2, 64, 64)
    # 32 x 46 in rows 16..47 and columns 9..54; 53 x 32 in rows 5..57 and columns 16..47
    parts = [(slice(16, 48), slice(9, 55)), (slice(5, 58), slice(16, 48))]
    for target_sizes in (sizes, torch.tensor(sizes)):
        for index, maps in enumerate(processor.post_process_dense_prediction(outputs, target_sizes)):
            rows, columns = parts[index]
            logits = {
                task: F.interpolate(task_logits[index : index + 1, :, rows, columns], sizes[index], mode="bilinear")[0]
                for task, task_logits in outputs.logits.items()
            }
            assert torch.equal(maps["semseg"], logits["semseg"].argmax(0))
            torch.testing.assert_close(maps["depth"], logits["depth"][0].clamp(min=0))
            torch.testing.assert_close(maps["edge"], logits["edge"][0].sigmoid())
            torch.testing.assert_close(maps["normals"].norm(dim=0), torch.ones(sizes[index]))
            assert all(maps[task].min() >= 0 and maps[task].max() <= 1 for task in ("sal", "edge"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_confidence_is_of_the_logits_in_the_images_size(dtype):
    processor = DeGMixImageProcessorPil(do_resize=True, size={"height": 40, "width": 60}, tasks=ALL_KINDS)
    outputs = logits_for(ALL_KINDS, 2, 64, 64, dtype)
    sizes = [(48, 70), (80, 48)]
    results = processor.post_process_dense_prediction(outputs, sizes, return_confidence=True)
    plain = processor.post_process_dense_prediction(outputs, sizes)
    for index, (maps, confidences) in enumerate(results):
        assert list(confidences) == list(ALL_KINDS)
        for task, confidence in confidences.items():
            assert torch.equal(maps[task], plain[index][task])
            logits = outputs.logits[task][index : index + 1, :, 12:52, 2:62].float()
            logits = F.interpolate(logits, sizes[index], mode="bilinear")
            expected = TASK_KINDS[ALL_KINDS[task]].confidence(logits)[0]
            assert confidence.dtype == torch.float32 and torch.equal(confidence, expected)


def test_post_processing_errors(processor_class):
    processor = processor_class(tasks={"depth": "depth"})
    outputs = logits_for({"depth": "depth"}, 2, 32, 32)
    with pytest.raises(ValueError, match="1 sizes for 2 images"):
        processor.post_process_dense_prediction(outputs, [(32, 32)])
    with pytest.raises(ValueError, match=r"an image of 33 x 32 .*does not fit into logits of 32 x 32"):
        processor.post_process_dense_prediction(outputs, [(32, 32), (33, 32)])
    for value in (math.nan, math.inf):
        outputs.logits["depth"][1, 0, 3, 4] = value
        with pytest.raises(ValueError, match="the logits are NaN or infinite"):
            processor.post_process_dense_prediction(outputs, [(32, 32), (32, 32)])
    with pytest.raises(ValueError, match=r"logits of \['sal', 'edge'\]; .*\['depth'\]"):
        processor.post_process_dense_prediction(
            logits_for({"sal": "saliency", "depth": "depth", "edge": "boundary"}, 1, 32, 32)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target_sizes", [None, [(48, 70), (80, 48)], torch.tensor([(48, 70), (80, 48)])])
def test_maps_of_one_task_are_those_of_all(target_sizes, dtype):
    processor = DeGMixImageProcessorPil(do_resize=True, size={"height": 40, "width": 60}, tasks=ALL_KINDS)
    outputs = logits_for(ALL_KINDS, 2, 64, 64, dtype)
    expected = processor.post_process_dense_prediction(outputs, target_sizes)
    logits = outputs.logits

    def assert_same(name, found):
        assert len(found) == 2
        assert all(torch.equal(maps, by_task[name]) for maps, by_task in zip(found, expected))

    for all_or_one in (outputs, DepthEstimatorOutput(predicted_depth=logits["depth"].squeeze(1))):
        found = processor.post_process_depth_estimation(all_or_one, target_sizes)
        assert_same("depth", [maps["predicted_depth"] for maps in found])
    for all_or_one in (outputs, ModelOutput(normals=logits["normals"])):
        found = processor.post_process_normal_estimation(all_or_one, target_sizes)
        assert_same("normals", [maps["normals"] for maps in found])
    for all_or_one in (outputs, SemanticSegmenterOutput(logits=logits["semseg"])):
        assert_same("semseg", processor.post_process_semantic_segmentation(all_or_one, target_sizes))
        found = processor.post_process_semantic_segmentation(all_or_one, target_sizes, return_segmentation_scores=True)
        assert_same("semseg", [maps.segmentation for maps in found])
        assert_same("semseg", [maps.segmentation_scores.argmax(0) for maps in found])
        assert all(maps.segmentation_scores.dtype == torch.float32 for maps in found)


def test_the_task_is_chosen_where_several_are_of_a_kind():
    kinds = {"walls": "segmentation", "floor": "segmentation", "depth": "depth"}
    processor, outputs = DeGMixImageProcessorPil(tasks=kinds), logits_for(kinds, 1, 32, 32)
    expected = processor.post_process_dense_prediction(outputs)[0]
    for task in ("walls", "floor"):
        found = processor.post_process_semantic_segmentation(outputs, task=task)[0]
        assert torch.equal(found, expected[task])
    for task in (None, "depth", "rain"):
        with pytest.raises(ValueError, match=rf"`task` .*'segmentation', \['walls', 'floor'\], got {task!r}"):
            processor.post_process_semantic_segmentation(outputs, task=task)
    with pytest.raises(ValueError, match="no task is of the kind 'normals'; .*'floor': 'segmentation'"):
        processor.post_process_normal_estimation(outputs)
    with pytest.raises(ValueError, match="2 sizes for 1 images"):
        processor.post_process_depth_estimation(outputs, [(32, 32)] * 2)


# Saving and loading


def test_tasks_are_taken_from_the_config_and_keep_their_order(processor_class, tmp_path):
    tasks = {"walls": {"kind": "segmentation", "num_labels": 3}, "edge": {"kind": "boundary"}, "a": {"kind": "depth"}}
    config = DeGMixConfig(tasks=tasks)
    kinds = {"walls": "segmentation", "edge": "boundary", "a": "depth"}
    for form in (config.tasks, config.to_dict()["tasks"], kinds):
        processor = processor_class(tasks=form)
        assert list(processor.tasks.items()) == list(kinds.items())
    processor.save_pretrained(tmp_path)
    assert list(processor_class.from_pretrained(tmp_path).tasks.items()) == list(kinds.items())
    for processor in (processor_class(), processor_class(tasks=None)):
        assert list(processor.tasks.items()) == [(n, t["kind"]) for n, t in DeGMixConfig().tasks.items()]


def test_round_trip(processor_class, rng, tmp_path):
    processor = processor_class(
        do_resize=True, size={"shortest_edge": 40}, size_divisor=16, image_mean=[0.5, 0.4, 0.3], tasks=ALL_KINDS
    )
    processor.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is DeGMixImageProcessor
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "DeGMixImageProcessor"
    assert json.loads(loaded.to_json_string()) == json.loads(processor.to_json_string())
    image = random_image(rng, 50, 70)
    for other in (loaded, AutoImageProcessor.from_pretrained(tmp_path, backend="pil")):
        np.testing.assert_allclose(pixels_of(other, image), pixels_of(processor, image), atol=1e-4)
    assert isinstance(other, DeGMixImageProcessorPil)
    assert processor_class.from_pretrained(tmp_path, size_divisor=8).size_divisor == 8


@pytest.mark.vision
@pytest.mark.parametrize("resample", Image.Resampling)
def test_backends_agree(rng, resample):
    assert DeGMixImageProcessor is not DeGMixImageProcessorPil
    images = [
        random_image(rng, 50, 70),
        Image.fromarray(random_image(rng, 64, 41)),
        Image.fromarray(rng.integers(0, 256, (40, 44, 4), dtype=np.uint8), "RGBA"),
        rng.integers(0, 65536, (45, 52)).astype(np.uint16),
    ]
    sizes = [(50, 70), (64, 41), (40, 44), (45, 52)]
    labels = {"semseg": [rng.integers(0, 9, size, dtype=np.uint8) for size in sizes]}
    for kwargs in ({"size_divisor": 32}, {"do_resize": True, "size": {"shortest_edge": 36}, "resample": resample}):
        pil, torchvision = (
            processor_class(**kwargs)(images, labels, return_tensors="pt")
            for processor_class in (DeGMixImageProcessorPil, DeGMixImageProcessor)
        )
        # Resizing rounds its weights to float32 in torchvision, not in PIL; random images show it most.
        atol = 1e-4 if "size" in kwargs else 1e-5
        torch.testing.assert_close(torchvision.pixel_values, pil.pixel_values, atol=atol, rtol=0)
        assert torch.equal(torchvision.labels["semseg"], pil.labels["semseg"])


def test_processor_without_torchvision_is_the_pil_one():
    if is_torchvision_available():
        pytest.skip("torchvision is there")
    assert DeGMixImageProcessor is DeGMixImageProcessorPil
