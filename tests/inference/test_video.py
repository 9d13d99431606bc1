"""Videos written and read again: pictures, times, rotation; and files that are broken in all sorts of ways."""

import struct
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image


av = pytest.importorskip("av")

from transformers_degmix.inference.video import VideoWriter, read_frames, survey_video  # noqa: E402


RATE = Fraction(25)
QUARTER_TURN = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)  # clockwise


def picture(index: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Red at the left; the rest grows brighter from frame to frame."""
    image = Image.new("RGB", size, (8 * index,) * 3)
    image.paste((250, 0, 0), (0, 0, size[0] // 4, size[1]))
    return image


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "frames.mp4"
    write(path, [index / RATE for index in range(30)])
    return path


def write(path, times, codec=None, size=(64, 48)):
    with open(path, "wb") as file, VideoWriter(file, RATE, codec) as writer:
        for index, time in enumerate(times):
            writer.write(picture(index, size), float(time))


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
@pytest.mark.parametrize("size", [(64, 48), (63, 47)])
def test_pictures_and_times_stay(tmp_path, codec, size):
    # 23.976, 29.97, 50 and 600ths of a second, and a pause
    times = [0.2, 0.2 + 1001 / 24000, 0.3, 0.3 + 1001 / 30000, 0.4, 0.42, 0.42 + 7 / 600, 3.0]
    write(tmp_path / "frames.mp4", times, codec, size)
    frames = list(read_frames(tmp_path / "frames.mp4"))
    assert [frame.time for frame in frames] == pytest.approx(times, abs=1e-5)
    for index, frame in enumerate(frames):
        assert frame.image.size == (64, 48)
        found, expected = np.array(frame.image)[:46, :62].astype(int), np.array(picture(index))[:46, :62]
        assert np.abs(found - expected).mean() < 8


def test_frames_without_times_of_their_own_get_later_ones(tmp_path):
    write(tmp_path / "frames.mp4", [0.0, 0.0, 1.0, 0.5])
    times = [frame.time for frame in read_frames(tmp_path / "frames.mp4")]
    assert len(times) == 4 and times == sorted(times) and times[-1] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("suffix", ["mkv", "avi", "mov", "webm"])
def test_other_containers(tmp_path, suffix):
    with av.open(tmp_path / f"frames.{suffix}", "w") as container:
        stream = container.add_stream({"avi": "mpeg4", "webm": "libvpx"}.get(suffix, "libx264"), rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(12):
            frame = av.VideoFrame.from_image(picture(index))
            frame.pts, frame.time_base = index, 1 / RATE
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert [frame.time for frame in read_frames(tmp_path / f"frames.{suffix}")] == pytest.approx(np.arange(12) / 25)
    assert survey_video(tmp_path / f"frames.{suffix}").num_frames == 12


@pytest.mark.parametrize(("num_samples", "indices"), [(1, [0]), (2, [0, 16]), (3, [0, 8, 16, 24]), (30, range(30))])
def test_samples_are_spread_over_the_video(path, num_samples, indices):
    survey = survey_video(path, num_samples)
    assert survey.num_frames == 30 and survey.rate == RATE
    brightness = [sample.getpixel((40, 20))[0] for sample in survey.samples]
    assert brightness == pytest.approx([8 * index for index in indices], abs=4)


def test_one_frame_is_a_video(tmp_path):
    write(tmp_path / "frames.mp4", [0])
    assert (survey_video(tmp_path / "frames.mp4").num_frames, len(list(read_frames(tmp_path / "frames.mp4")))) == (
        1,
        1,
    )


def test_frames_are_turned_upright(path, tmp_path):
    content = path.read_bytes()
    matrix = content.index(b"tkhd") + 44
    (tmp_path / "turned.mp4").write_bytes(content[:matrix] + QUARTER_TURN + content[matrix + 36 :])
    image = next(read_frames(tmp_path / "turned.mp4")).image
    assert image.size == (48, 64) and survey_video(tmp_path / "turned.mp4").samples[0].size == (48, 64)
    red = np.array(image)[..., 0] > 128
    assert red[:14].all() and not red[18:].any()  # the left is now at the top


def broken_files(path, folder):
    """Name -> content, and what is said of it."""
    content = path.read_bytes()
    damaged = bytearray(content)
    start = content.index(b"mdat") + (content.index(b"moov") - content.index(b"mdat")) // 2
    damaged[start : start + 200] = bytes(range(200))
    with av.open(folder / "sound.mp4", "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with av.open(folder / "none.avi", "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    return {
        "text.mp4": (b"no video" * 99, "Invalid data"),
        "empty.mp4": (b"", "Invalid data"),
        "cut_off.mp4": (content[: len(content) // 2], "Invalid data"),
        "damaged.mp4": (bytes(damaged), "Invalid data"),
        "codec.mp4": (content.replace(b"avc1", b"zzz1").replace(b"avcC", b"zzzC"), "it is of an unknown codec"),
        "sound.mp4": (None, "it has no pictures"),
        "none.avi": (None, "it has no frames"),
        "missing.mp4": (None, "No such file"),
    }


def test_broken_files_are_named_with_what_is_wrong(path, tmp_path):
    for name, (content, message) in broken_files(path, tmp_path).items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        for read in (survey_video, lambda path: list(read_frames(path))):
            with pytest.raises(ValueError, match=f"cannot read a video from .*{name}: {message}"):
                read(tmp_path / name)
