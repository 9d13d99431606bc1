"""Reads the frames of videos, upright and in order, and writes videos of pictures at the same times.

Needs the extra `video`. Sound is neither read nor written.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from os import PathLike
from types import TracebackType
from typing import BinaryIO

import av
from PIL import Image


# Seconds. The times of frames of all usual rates, and milliseconds, are multiples of it to within 9 millionths of a
# second. MPEG-4 allows no finer base.
TIME_BASE = Fraction(1, 60000)


@dataclass(frozen=True)
class Frame:
    """A picture of a video.

    Attributes:
        image: upright, RGB.
        time: at which it is shown, in seconds.
    """

    image: Image.Image
    time: float


@dataclass(frozen=True)
class Survey:
    """What is known of a video after all of it was decoded.

    Attributes:
        num_frames: at least 1.
        rate: frames a second, on average.
        samples: frames evenly spread over the video, the first among them.
    """

    num_frames: int
    rate: Fraction
    samples: list[Image.Image]


def read_frames(path: str | PathLike) -> Iterator[Frame]:
    """The frames of a video, each turned upright as the file says.

    Raises:
        ValueError: there is no video, or no frame in it, or it is damaged; the message names the file.
    """
    for frame in _decode(path):
        yield Frame(_upright(frame), frame.time)


def survey_video(path: str | PathLike, num_samples: int = 8) -> Survey:
    """Decodes a whole video, which takes a small part of the time that a model needs for its frames.

    This finds damage before any other work, and counts the frames, even if the file does not.

    Args:
        num_samples: the least number of samples, if there are as many frames; there are fewer than twice as many.
            While decoding, they are kept as the file stores them, mostly in 1.5 bytes a pixel.

    Raises:
        ValueError: see [`read_frames`].
    """
    samples, stride, num_frames, first, last = [], 1, 0, 0.0, 0.0
    for frame in _decode(path):
        if num_frames % stride == 0:
            if len(samples) == 2 * num_samples - 1:
                samples, stride = samples[::2], 2 * stride
            if num_frames % stride == 0:
                samples.append(frame)
        first, last = (first if num_frames else frame.time), frame.time
        num_frames += 1
    rate = Fraction((num_frames - 1) / (last - first)).limit_denominator(1001) if last > first else Fraction(25)
    return Survey(num_frames, rate, [_upright(frame) for frame in samples])


def _decode(path: str | PathLike) -> Iterator[av.VideoFrame]:
    try:
        with av.open(path) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise ValueError("it has no pictures")
            if stream.codec_context is None:
                raise ValueError("it is of an unknown codec")
            stream.thread_type = "AUTO"
            num_frames = 0
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    raise ValueError(f"frame {num_frames} is damaged")
                if frame.pts is None:  # the format has no times
                    frame.pts, frame.time_base = num_frames, 1 / (stream.average_rate or Fraction(25))
                num_frames += 1
                yield frame
            if not num_frames:
                raise ValueError("it has no frames")
    except (av.FFmpegError, ValueError) as error:
        reason = error.strerror if isinstance(error, av.FFmpegError) else error
        raise ValueError(f"cannot read a video from {path}: {reason}") from error


def _upright(frame: av.VideoFrame) -> Image.Image:
    image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


class VideoWriter:
    """Writes pictures of one size as an MP4: H.264, or MPEG-4 if PyAV was built without an H.264 encoder.

    Use it in a `with` block. The file is complete at the end of the block.

    Args:
        file: seekable.
        rate: pictures a second, on average.
        codec: by default the best available.
    """

    def __init__(self, file: BinaryIO, rate: Fraction, codec: str | None = None):
        self.container = av.open(file, "w", format="mp4")
        codec = codec or ("libx264" if "libx264" in av.codecs_available else "mpeg4")
        self.stream = self.container.add_stream(codec, rate=rate, time_base=TIME_BASE)
        self.stream.pix_fmt = "yuv420p"
        if codec == "mpeg4":
            self.stream.codec_context.qmin, self.stream.codec_context.qmax = 2, 4  # its default is the worst quality
        self.last = -1

    def write(self, picture: Image.Image, time: float):
        """Adds a picture that is shown from `time` on, in seconds. Pictures come in order."""
        if self.last < 0:
            # Colours have half the resolution, so both sides must be even.
            self.stream.width, self.stream.height = (length + length % 2 for length in picture.size)
        size = self.stream.width, self.stream.height
        if picture.size != size:
            even = Image.new("RGB", size, "white")
            even.paste(picture)
            picture = even
        frame = av.VideoFrame.from_image(picture)
        self.last = frame.pts = max(self.last + 1, round(time / TIME_BASE))
        frame.time_base = TIME_BASE
        self.container.mux(self.stream.encode(frame))

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if kind is None:
            self.container.mux(self.stream.encode())
        self.container.close()
