"""Video in and out, through PyAV (FFmpeg).

In: a file, an address that FFmpeg can open (rtsp://, http://, ...), a webcam ("0", "/dev/video0").
Out: RGB frames as uint8 arrays [H, W, 3], one by one; and the way back, frames into an mp4 file.
Nothing is read ahead, so that a live source stays live.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Literal

import av
import numpy as np

from deltafx.errors import VideoError

_WEBCAMS = {
    "linux": ("v4l2", "/dev/video{}"),
    "darwin": ("avfoundation", "{}"),
    "win32": ("dshow", "video={}"),
}
_DEFAULT_FPS = Fraction(25)


class VideoReader:
    """Frames of a video, in order; a context manager and an iterable that can be gone through once.

    Args:
        source: A path, an address, or the number or device file of a webcam.
        size: (height, width) in pixels to which frames are scaled; None leaves them as they are.

    Attributes:
        size: (height, width) of the frames handed out.
        fps: Frames a second as the container tells, 25 if it does not.
        frame_count: The number of frames as the container tells, None if it does not.

    Raises:
        VideoError: If the source cannot be opened or has no video in it.
    """

    def __init__(self, source: str, *, size: tuple[int, int] | None = None) -> None:
        self.source = source
        try:
            self._container = _open_input(source)
        except (av.FFmpegError, OSError, ValueError) as error:
            raise VideoError(f"cannot open {source!r}: {_reason(error)}") from error
        if not self._container.streams.video:
            self._container.close()
            raise VideoError(f"{source!r} has no video in it")
        stream = self._container.streams.video[0]
        stream.thread_type = "AUTO"
        self.size = size or (stream.height, stream.width)
        self.fps = stream.average_rate or stream.guessed_rate or _DEFAULT_FPS
        self.frame_count = stream.frames or None

    def __iter__(self) -> Iterator[np.ndarray]:
        """Decode frame after frame.

        Yields:
            uint8 arrays [H, W, 3], RGB; each has its own memory.

        Raises:
            VideoError: If a frame cannot be decoded.
        """
        height, width = self.size
        done = 0
        try:
            for frame in self._container.decode(video=0):
                yield frame.to_ndarray(
                    format="rgb24", width=width, height=height, interpolation="BILINEAR"
                )
                done += 1
        except av.FFmpegError as error:
            raise VideoError(
                f"{self.source!r} cannot be decoded after {done} frames: {_reason(error)}"
            ) from error

    def close(self) -> None:
        """Let go of the source; a second call does nothing."""
        self._container.close()

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class VideoWriter:
    """Writes RGB frames into an H.264 mp4 file that common players show; a context manager.

    The file is made with the first frame, so an unused writer leaves nothing behind. Frames of odd
    height or width lose their last row or column, which 4:2:0 video cannot hold.

    Args:
        path: The file, which is overwritten.
        fps: Frames a second.
    """

    def __init__(self, path: str | Path, *, fps: Fraction | float) -> None:
        self.path = Path(path)
        self._fps = Fraction(fps).limit_denominator(1001)
        self._container: av.container.OutputContainer | None = None
        self._stream: av.VideoStream | None = None

    def write(self, frame: np.ndarray) -> None:
        """Append a frame.

        Args:
            frame: uint8 [H, W, 3], RGB, at least 2x2, all frames of one size.

        Raises:
            VideoError: If the file cannot be written or the size differs from the first frame's.
        """
        height, width = frame.shape[0] // 2 * 2, frame.shape[1] // 2 * 2
        try:
            if self._container is None or self._stream is None:
                self._container, self._stream = self._open(height, width)
            if (self._stream.height, self._stream.width) != (height, width):
                raise VideoError(
                    f"{self.path} has frames of {self._stream.width}x{self._stream.height}, "
                    f"got one of {frame.shape[1]}x{frame.shape[0]}"
                )
            even = np.ascontiguousarray(frame[:height, :width])
            picture = av.VideoFrame.from_ndarray(even, format="rgb24")
            self._container.mux(self._stream.encode(picture))
        except (av.FFmpegError, ValueError) as error:
            raise VideoError(f"cannot write {self.path}: {_reason(error)}") from error

    def close(self) -> None:
        """Finish the file; a second call does nothing."""
        if self._container is None or self._stream is None:
            return
        container, stream = self._container, self._stream
        self._container = self._stream = None
        try:
            container.mux(stream.encode(None))
        except av.FFmpegError as error:
            raise VideoError(f"cannot write {self.path}: {_reason(error)}") from error
        finally:
            container.close()

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self, height: int, width: int) -> tuple[av.container.OutputContainer, av.VideoStream]:
        container = av.open(str(self.path), "w", format="mp4")
        codec: Literal["libx264", "mpeg4"] = "libx264"
        if codec not in av.codecs_available:  # builds of FFmpeg without GPL parts
            codec = "mpeg4"
        stream = container.add_stream(codec, rate=self._fps)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        container.start_encoding()  # opens the file now and not dozens of frames later
        return container, stream


def _open_input(source: str) -> av.container.InputContainer:
    camera = re.fullmatch(r"(?:/dev/video)?(\d+)", source)
    if camera and not Path(source).is_file():
        driver, pattern = _WEBCAMS.get(sys.platform, _WEBCAMS["linux"])
        return av.open(pattern.format(camera.group(1)), format=driver)
    # RTSP over UDP loses packets silently, and a lost packet looks like a change of the picture.
    options = {"rtsp_transport": "tcp"} if source.startswith("rtsp") else {}
    return av.open(source, options=options)


def _reason(error: BaseException) -> str:
    """Return FFmpeg's own words without the error number and the repeated path."""
    return getattr(error, "strerror", None) or str(error)
