"""Video files: their frames, upright and in order, and new ones of pictures at the same times.

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


# Seconds. The frames of all usual rates and milliseconds are whole numbers of it, to 9 millionths of a second; and it
# is as fine as MPEG-4 allows.
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
    """What is known of a video that was decoded from its first frame to the last.

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
    """Decodes a video as a whole, which takes a small part of the time that a model needs for its frames.

    So damage is found before any work is done, and frames are counted that the file does not count.

    Args:
        num_samples: at least so many samples where there are as many frames, fewer than twice as many. They are in
            memory as the file stores them, 1.5 bytes a pixel mostly.

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
                if frame.pts is None:  # of formats that have no times
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
    """Writes pictures of one size as an MP4: H.264, or MPEG-4 where PyAV was built without an encoder of that.

    To be used in a `with` block, at whose end the file is complete.

    Args:
        file: to write into, seekable.
        rate: pictures a second, on average.
        codec: by default the best there is.
    """

    def __init__(self, file: BinaryIO, rate: Fraction, codec: str | None = None):
        self.container = av.open(file, "w", format="mp4")
        codec = codec or ("libx264" if "libx264" in av.codecs_available else "mpeg4")
        self.stream = self.container.add_stream(codec, rate=rate, time_base=TIME_BASE)
        self.stream.pix_fmt = "yuv420p"
        if codec == "mpeg4":
            self.stream.codec_context.qmin, self.stream.codec_context.qmax = 2, 4  # it takes the worst quality itself
        self.last = -1

    def write(self, picture: Image.Image, time: float):
        """Adds a picture that is shown from `time` on, in seconds, after those before."""
        if self.last < 0:
            # Colours have half of the resolution, in whole pixels.
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


__all__ = ["Frame", "Survey", "VideoWriter", "read_frames", "survey_video"]
