"""A small net around any function of maps, a clip for it, and the check that it is followed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import deltafx
from tests.exactness import exact_over


class Net(nn.Module):
    """Convs around a function of maps."""

    def __init__(self, function: Callable[..., Any], channels: int = 3) -> None:
        super().__init__()
        self.a = nn.Conv2d(channels, 6, 3, padding=1)
        self.b = nn.Conv2d(6, 6, 1)
        self.function = function
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def clip(*shape: int, count: int = 8) -> list[Tensor]:
    """Frames with a static one, a moving box and a cut among them."""
    frames = [torch.randn(shape) for _ in range(2)]
    out = [frames[0], frames[0]]
    for i in range(count - 3):
        frame = out[-1].clone()
        frame[..., i : i + 3, i : i + 3] = torch.randn_like(frame[..., i : i + 3, i : i + 3])
        out.append(frame)
    return [*out, frames[1]]


def follows(model: nn.Module, *shape: int) -> deltafx.DeltaModule:
    """The compiled model follows the model, over a clip and a reset."""
    compiled = deltafx.compile(model, threshold=0)
    exact_over(model, compiled, clip(*shape))
    compiled.reset()
    exact_over(model, compiled, clip(*shape))
    return compiled
