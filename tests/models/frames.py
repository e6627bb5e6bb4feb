"""Frames of the shipped clips, as the tests of whole models feed them."""

from __future__ import annotations

import torch
from torch import Tensor

from deltafx.models_zoo import Preprocessing, clip_path
from deltafx.video import VideoReader

PLAIN = Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
"""For models that normalise inside: 0 to 1."""


def clip(
    name: str, size: tuple[int, int], count: int, preprocessing: Preprocessing | None = None
) -> Tensor:
    """The first frames [count, 3, H, W] of a shipped clip, scaled to a size."""
    preprocessing = preprocessing or Preprocessing()
    frames = []
    with VideoReader(str(clip_path(name)), size=size) as reader:
        for frame in reader:
            frames.append(preprocessing(frame).contiguous())
            if len(frames) == count:
                return torch.cat(frames)
    raise AssertionError(f"{name} has fewer than {count} frames")


def scene(size: tuple[int, int]) -> list[Tensor]:
    """Eight frames of two streams; the second stream runs behind the first one's clip."""
    one, two = clip("vtest", size, 6), clip("carphone", size, 4)
    nan = torch.stack([one[2], two[1]])
    nan[0, :, 10:30, 40:70] = float("nan")
    return [
        torch.stack(pair)
        for pair in [
            (one[0], two[0]), (one[1], two[1]), (one[1], two[1]), nan.unbind(), (one[3], two[2]),
            (two[3], one[4]), (two[3], one[5]), (two[2], one[5]),
        ]
    ]  # fmt: skip
