"""Clips on the device: what the benchmark feeds, frame by frame, [N, 3, H, W] in the model's dtype.

Every clip starts with a frame that is not timed and holds a still scene with noise-free motion, so
that how much changes is known. All frames are made before anything is timed.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

T = TypeVar("T")
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
VTEST = Path(__file__).resolve().parents[2] / "models_zoo" / "clips" / "vtest.avi"


def normalized(rgb: Tensor, device: str) -> Tensor:
    """uint8 [N, 3, H, W] as the zoo's models want it, fp32 channels_last."""
    x = (rgb.to(device).float() / 255 - MEAN.to(device)) / STD.to(device)
    return x.contiguous(memory_format=torch.channels_last)


@functools.lru_cache(maxsize=4)
def texture(n: int, h: int, w: int, seed: int) -> Tensor:
    """A natural-looking still, uint8 [n, 3, h, w]: noise at several scales."""
    generator = torch.Generator().manual_seed(seed)
    picture = torch.zeros(n, 3, h, w)
    for scale in (4, 16, 64):
        grid = torch.rand(n, 3, h // scale + 2, w // scale + 2, generator=generator)
        picture += F.interpolate(grid, size=(h, w), mode="bicubic") * scale**0.5
    low, high = picture.amin((1, 2, 3), keepdim=True), picture.amax((1, 2, 3), keepdim=True)
    return ((picture - low) / (high - low) * 255).byte()


def moving_box(n: int, h: int, w: int, share: float, frames: int) -> list[Tensor]:
    """A textured box over `share` of a still picture, elsewhere in every frame; uint8."""
    still, moving = texture(n, h, w, 1), texture(n, h, w, 2)
    side_h, side_w = int(h * share**0.5), int(w * share**0.5)
    clip = []
    for i in range(frames):
        frame = still.clone()
        if share > 0:
            y, x = (h // 8 + 4 * i) % (h - side_h + 1), (w // 8 + 8 * i) % (w - side_w + 1)
            frame[:, :, y : y + side_h, x : x + side_w] = moving[:, :, :side_h, :side_w]
        clip.append(frame)
    return clip


def all_new(n: int, h: int, w: int, frames: int) -> list[Tensor]:
    """Another picture in every frame; uint8."""
    return [texture(n, h, w, 10 + i) for i in range(frames)]


def read_vtest(count: int) -> Tensor:
    """The first frames of vtest.avi, uint8 [count, 3, 576, 768]."""
    try:
        pictures = _read_with_av(count)
    except ImportError:  # PyAV is not everywhere that there is a GPU
        pictures = _read_with_opencv(count)
    return torch.from_numpy(np.stack(pictures).copy()).permute(0, 3, 1, 2)


def _read_with_av(count: int) -> list[np.ndarray]:
    from deltafx.video import VideoReader

    with VideoReader(str(VTEST)) as reader:
        return list(itertools.islice(reader, count))


def _read_with_opencv(count: int) -> list[np.ndarray]:
    import cv2

    capture = cv2.VideoCapture(str(VTEST))
    return [bgr[:, :, ::-1] for _ in range(count) for ok, bgr in [capture.read()] if ok]


def vtest(n: int, frames: int) -> list[Tensor]:
    """`n` windows of vtest.avi as `n` streams; uint8 [n, 3, 576, 768] a frame."""
    distance = 4  # the clip has 88 frames
    clip = read_vtest(distance * (n - 1) + frames)
    return [clip[[i + distance * s for s in range(n)]] for i in range(frames)]


def there_and_back(clip: Sequence[T]) -> list[T]:
    """The frames of a clip and, but for both ends, back again: what can be repeated with no cut."""
    return [*clip, *reversed(clip[1:-1])]


def jpeg(rgb: Tensor, quality: int = 95) -> Tensor:
    """uint8 [N, 3, H, W] as it comes out of a JPEG."""
    from torchvision.io import decode_jpeg, encode_jpeg

    return torch.stack([decode_jpeg(encode_jpeg(p.contiguous(), quality)) for p in rgb.cpu()])
