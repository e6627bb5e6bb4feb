"""What the benchmarks feed: models with meaningful weights, and frames."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

from deltafx import models_zoo
from deltafx.video import VideoReader

SIZE = (576, 768)


def clip_frames(video: str, count: int, start: int = 0) -> list[np.ndarray]:
    """Frames [576, 768, 3], uint8 RGB, of a clip; fewer if it is shorter."""
    with VideoReader(video, size=SIZE) as reader:
        return list(islice(iter(reader), start, start + count))


def jpeg(frame: np.ndarray, quality: int = 95) -> np.ndarray:
    """A frame after a trip through JPEG (4:2:0)."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=quality, subsampling=2)
    return np.array(Image.open(buffer))


def mobilenet_v2_trunk() -> tuple[nn.Module, models_zoo.Preprocessing]:
    """MobileNetV2's trunk with its ImageNet weights."""
    entry = models_zoo.load("mobilenet_v2_trunk")
    return entry.module, entry.preprocessing


def resnet50_trunk(frames: Tensor) -> nn.Module:
    """ResNet-50 without its head: seeded weights, batch norm statistics of real frames."""
    torch.manual_seed(0)
    model = torchvision.models.resnet50(weights=None).eval()
    trunk = nn.Sequential(*list(model.children())[:-2]).eval()
    models_zoo.calibrate_batch_norm(trunk, frames)
    return trunk


def moving_box(background: Tensor, share: float, count: int) -> Iterator[Tensor]:
    """A still picture with a textured box over `share` of it that moves 8 pixels a frame.

    Args:
        background: [1, 3, H, W].
        share: Of the sites that the box covers.
        count: Frames.
    """
    height, width = background.shape[2:]
    side_y, side_x = round(height * share**0.5), round(width * share**0.5)
    box = torch.randn(1, 3, side_y, side_x, generator=torch.Generator().manual_seed(1))
    for i in range(count):
        frame = background.clone()
        y = (8 * i) % max(1, height - side_y)
        x = (8 * i) % max(1, width - side_x)
        frame[:, :, y : y + side_y, x : x + side_x] = box
        yield frame


def noise(like: Tensor, count: int) -> Iterator[Tensor]:
    """Frames that have nothing in common."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(count):
        yield torch.randn(like.shape, generator=generator)
