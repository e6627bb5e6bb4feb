"""Random small 3-D CNNs for the property tests, as `tests.nets` has 2-D ones."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.nets import ACTIVATIONS, Apply, Net, Wiring, randomize

KERNELS = [(1, 1, 1), (3, 3, 3), (3, 1, 1), (1, 3, 3), (2, 2, 2), (5, 1, 3), (1, 1, 2)]
WIDTHS = [1, 3, 4, 9, 17, 40]


class Gate(nn.Module):
    """A factor per channel made of the mean over pictures and sites."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.excite = nn.Conv3d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.excite(F.adaptive_avg_pool3d(x, 1)).sigmoid()


def add_conv(w: Wiring, i: int) -> None:
    channels = w.shapes[i][0]
    kernel = w.pick(KERNELS)
    dilation = (w.pick([1, 1, 2, 3]), w.pick([1, 1, 2]), 1)
    padding = tuple(
        w.pick([0, reach // 2, reach // 2])
        for reach in ((k - 1) * d for k, d in zip(kernel, dilation, strict=True))
    )
    groups = w.pick([1, 1, 1, channels])
    width = channels * w.pick([1, 2]) if groups > 1 else w.pick(WIDTHS)
    conv = nn.Conv3d(
        channels, width, kernel, stride=(w.pick([1, 1, 2, 3]), w.pick([1, 1, 2]), 1),
        padding=w.pick([padding, padding, "valid"]), dilation=dilation, groups=groups,
        bias=w.pick([True, False]),
    )  # fmt: skip
    parts: list[nn.Module] = [conv]
    if w.pick([True, False]):
        parts.append(nn.BatchNorm3d(width))
    if w.pick([True, True, False]):
        parts.append(ACTIVATIONS[w.pick(sorted(ACTIVATIONS))](width))
    if w.pick([True, False, False, False]):
        parts = [nn.BatchNorm3d(channels), nn.ReLU(inplace=len(w.shapes) > 9), *parts]
    w.add(nn.Sequential(*parts), i)


def add_same(w: Wiring, i: int) -> None:
    channels = w.shapes[i][0]
    w.add(nn.Conv3d(channels, channels, w.pick([1, 3]), padding="same"), i)


def add_pool(w: Wiring, i: int) -> None:
    ceil = w.pick([True, False])
    w.add(w.pick([
        nn.MaxPool3d(2, ceil_mode=ceil), nn.MaxPool3d(3, 2, 1, ceil_mode=ceil),
        nn.MaxPool3d((1, 3, 3), 1, (0, 1, 1)), nn.MaxPool3d((2, 1, 2), 1, dilation=(2, 1, 1)),
        nn.MaxPool3d((3, 1, 1), 1, (1, 0, 0)),
        nn.AvgPool3d(2, ceil_mode=ceil), nn.AvgPool3d((1, 3, 3), 1, (0, 1, 1)),
        nn.AvgPool3d(3, 2, 1, ceil_mode=ceil, count_include_pad=False),
        nn.AvgPool3d(3, 2, 1, ceil_mode=ceil), nn.AvgPool3d((3, 1, 1), 1, divisor_override=2),
        nn.AdaptiveAvgPool3d((2, 3, 5)), nn.AdaptiveAvgPool3d((None, 2, 2)),
        nn.AdaptiveAvgPool3d(1),
    ]), i)  # fmt: skip


def add_pointwise(w: Wiring, i: int) -> None:
    channels = w.shapes[i][0]
    act = ACTIVATIONS[w.pick(sorted(ACTIVATIONS))](channels)
    w.add(w.pick([act, nn.BatchNorm3d(channels), nn.Dropout3d(), Gate(channels)]), i)


def add_binary(w: Wiring, i: int) -> None:
    name, function = w.pick([
        ("add", torch.add), ("add relu", lambda a, b: F.relu(a + b)), ("sub", torch.sub),
        ("mul", torch.mul), ("max", torch.maximum), ("number", lambda a, b: 2 * a - 1),
    ])  # fmt: skip
    w.add(Apply(name, function), i, w.pick(w.like(i, slice(None))))


def add_cat(w: Wiring, i: int) -> None:
    other = w.pick(w.like(i, slice(1, None)))
    w.add(Apply("cat", lambda *maps: torch.cat(maps, 1)), i, other)


def add_part(w: Wiring, i: int) -> None:
    name, function = w.pick([
        ("channels", lambda x: x[:, 1:]), ("chunk", lambda x: x.chunk(2, 1)[1]),
        ("every second", lambda x: x[:, :, ::2]), ("last two", lambda x: x[:, :, -2:]),
        ("turn", lambda x: torch.cat([x[:, :, 1:], x[:, :, :1]], 2)),
    ])  # fmt: skip
    w.add(Apply(name, function), i)


def add_dense(w: Wiring, i: int) -> None:
    name, function = w.pick([
        ("cumsum", lambda x: x.cumsum(2) / x.shape[2]), ("flip", lambda x: x.flip(3)),
        ("softmax", lambda x: x.softmax(1)),
    ])  # fmt: skip
    w.add(Apply(name, function), i)


STEPS = [
    add_conv, add_conv, add_conv, add_conv, add_same, add_pool, add_pool, add_pointwise, add_binary,
    add_binary, add_cat, add_part, add_dense,
]  # fmt: skip


def add_head(w: Wiring, i: int) -> None:
    """What makes a volume something else."""
    name, function = w.pick([
        ("mean", lambda x: x.mean((2, 3, 4))), ("over time", lambda x: x.mean(2)),
        ("pool", lambda x: F.adaptive_avg_pool3d(x, 1).flatten(1)),
        ("picture", lambda x: x[:, :, -1]), ("flat", lambda x: x.flatten(2)),
        ("maximum", lambda x: x.amax(2)),
    ])  # fmt: skip
    w.add(Apply(name, function), i)


@st.composite
def volume_nets(draw: Any) -> tuple[Net, tuple[int, ...]]:
    """A net in eval mode, with the shape [C, T, H, W] of its input."""
    torch.manual_seed(draw(st.integers(0, 1_000)))
    size = st.integers(3, 11)
    shape = (
        draw(st.sampled_from([1, 3, 4])), draw(st.integers(1, 8)), draw(size), draw(size)
    )  # fmt: skip
    w = Wiring(draw, [shape], [], [])
    with torch.no_grad():
        for _ in range(draw(st.integers(1, 6))):
            w.pick(STEPS)(w, w.some_map())
        last = len(w.shapes) - 1
        if draw(st.booleans()):
            add_head(w, last)
        outputs = [len(w.shapes) - 1] if draw(st.booleans()) else [len(w.shapes) - 1, last]
        return randomize(Net(w.modules, w.wires, outputs)), shape
