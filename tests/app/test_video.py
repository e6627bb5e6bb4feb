"""Decoding against an independent decoder, encoding against decoding, and the errors on the way."""

from pathlib import Path

import av
import numpy as np
import pytest

from deltafx.errors import VideoError
from deltafx.models_zoo import clip_path
from deltafx.video import VideoReader, VideoWriter


def test_reader_hands_out_every_frame_as_rgb() -> None:
    path = clip_path("carphone")
    with av.open(str(path)) as container:
        expected = [frame.to_image() for frame in container.decode(video=0)]
    with VideoReader(str(path)) as reader:
        assert reader.size == (144, 176)
        assert reader.frame_count == len(expected)
        assert round(float(reader.fps), 2) == 29.97
        frames = list(reader)
    assert len(frames) == len(expected)
    for frame, image in zip(frames, expected, strict=True):
        assert frame.dtype == np.uint8
        assert np.abs(frame.astype(int) - np.asarray(image).astype(int)).max() <= 2


def test_frames_have_their_own_memory() -> None:
    with VideoReader(str(clip_path("carphone"))) as reader:
        frames = iter(reader)
        first = next(frames)
        kept = first.copy()
        next(frames)
    assert np.array_equal(first, kept)


def test_reader_scales() -> None:
    with VideoReader(str(clip_path("carphone")), size=(50, 62)) as reader:
        frame = next(iter(reader))
    assert frame.shape == (50, 62, 3)
    with VideoReader(str(clip_path("carphone"))) as reader:
        full = next(iter(reader))
    assert abs(float(frame.mean()) - float(full.mean())) < 3


def test_a_missing_file_is_named() -> None:
    with pytest.raises(VideoError, match=r"nowhere\.mp4"):
        VideoReader("nowhere.mp4")


def test_a_file_that_is_no_video_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.mp4"
    path.write_text("this is not a video\n" * 50)
    with pytest.raises(VideoError, match="cannot open"):
        VideoReader(str(path))


def test_a_missing_webcam_is_refused() -> None:
    with pytest.raises(VideoError, match="cannot open '97'"):
        VideoReader("97")


@pytest.mark.parametrize("size", [(64, 96), (33, 47)])
def test_what_is_written_can_be_read_back(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "out.mp4"
    frames = [np.full((*size, 3), level, np.uint8) for level in (20, 120, 220)]
    with VideoWriter(path, fps=10) as writer:
        for frame in frames:
            writer.write(frame)
    with VideoReader(str(path)) as reader:
        assert float(reader.fps) == pytest.approx(10, rel=0.01)
        assert reader.size == (size[0] // 2 * 2, size[1] // 2 * 2)
        levels = [float(frame.mean()) for frame in reader]
    assert levels == pytest.approx([20, 120, 220], abs=4)


def test_writer_refuses_another_size(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "out.mp4", fps=25) as writer:
        writer.write(np.zeros((32, 32, 3), np.uint8))
        with pytest.raises(VideoError, match="32x32"):
            writer.write(np.zeros((32, 64, 3), np.uint8))


def test_writer_names_the_file_it_cannot_write(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "no" / "such" / "folder.mp4", fps=25)
    with pytest.raises(VideoError, match=r"folder\.mp4"):
        writer.write(np.zeros((32, 32, 3), np.uint8))


def test_an_unused_writer_leaves_no_file(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "out.mp4", fps=25):
        pass
    assert not (tmp_path / "out.mp4").exists()
