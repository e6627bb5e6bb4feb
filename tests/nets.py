"""Random small CNNs for the property tests: a hypothesis strategy that wires modules together.

A net is a list of modules, each reading earlier feature maps, so that branches, skips, gates and
modules used twice come up by themselves. Which op fits where is found by running it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

LARGEST = 40_000
"""Values of a feature map, at most."""


class Net(nn.Module):
    """Modules wired by number: map 0 is the input, map i + 1 the result of module i."""

    def __init__(
        self, modules: list[nn.Module], wires: list[tuple[int, ...]], outputs: list[int]
    ) -> None:
        super().__init__()
        self.steps = nn.ModuleList(modules)
        self.wires = wires
        self.outputs = outputs

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [x]
        for step, wire in zip(self.steps, self.wires, strict=True):
            maps.append(step(*[maps[i] for i in wire]))
        return [maps[i] for i in self.outputs]


class Apply(nn.Module):
    """A function of maps, as a module."""

    def __init__(self, name: str, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.name = name
        self.function = function

    def forward(self, *maps: Tensor) -> Tensor:
        return self.function(*maps)

    def extra_repr(self) -> str:
        return self.name


class Gate(nn.Module):
    """Squeeze and excite: a factor per channel made of the mean over the sites."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, max(1, channels // 4), 1)
        self.excite = nn.Conv2d(max(1, channels // 4), channels, 1)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        g = F.adaptive_avg_pool2d(x, 1)
        return x * self.act(self.excite(F.relu(self.squeeze(g))))


class Split(nn.Module):
    """One half of the channels through a convolution, the other as it is; then a shuffle."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.half = channels // 2
        self.conv = nn.Conv2d(channels - self.half, channels - self.half, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x[:, : self.half], x[:, self.half :]
        return torch.cat([F.relu(self.conv(b)), a], 1)


class Block(nn.Module):
    """ConvNeXt's: depthwise, layer norm and linear over channels-last, a scale, a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.spread = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.widen = nn.Linear(channels, 2 * channels)
        self.narrow = nn.Linear(2 * channels, channels)
        self.scale = nn.Parameter(torch.rand(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.spread(x).permute(0, 2, 3, 1))
        y = self.narrow(F.gelu(self.widen(y))).permute(0, 3, 1, 2)
        return x + self.scale * y


def shuffle(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


ACTIVATIONS: dict[str, Callable[[int], nn.Module]] = {
    "relu": lambda c: nn.ReLU(inplace=True),
    "relu6": lambda c: nn.ReLU6(),
    "hardtanh": lambda c: nn.Hardtanh(-0.7, 0.4),
    "leaky_relu": lambda c: nn.LeakyReLU(0.2, inplace=True),
    "prelu": lambda c: nn.PReLU(c),
    "prelu_1": lambda c: nn.PReLU(),
    "silu": lambda c: nn.SiLU(),
    "hardswish": lambda c: nn.Hardswish(inplace=True),
    "hardsigmoid": lambda c: nn.Hardsigmoid(),
    "sigmoid": lambda c: nn.Sigmoid(),
    "tanh": lambda c: nn.Tanh(),
    "gelu": lambda c: nn.GELU(),
    "gelu_tanh": lambda c: nn.GELU("tanh"),
    "elu": lambda c: nn.ELU(0.7),
    "selu": lambda c: nn.SELU(),
    "mish": lambda c: nn.Mish(),
    "softplus": lambda c: nn.Softplus(2.0, 10.0),
}

KERNELS = [(1, 1), (3, 3), (5, 5), (1, 7), (7, 1), (2, 2), (3, 1)]
WIDTHS = [1, 3, 4, 8, 17, 70]


@dataclasses.dataclass
class Wiring:
    """A net while it grows."""

    draw: Any
    shapes: list[tuple[int, ...]]
    modules: list[nn.Module]
    wires: list[tuple[int, ...]]

    def pick(self, items: Any) -> Any:
        return self.draw(st.sampled_from(items))

    def some_map(self) -> int:
        """Mostly the newest one."""
        back = self.pick([1, 1, 1, 1, 2, 3])
        return max(0, len(self.shapes) - back)

    def like(self, i: int, same: slice) -> list[int]:
        """Maps whose shape agrees with map i in some dimensions."""
        return [j for j, s in enumerate(self.shapes) if s[same] == self.shapes[i][same]]

    def add(self, module: nn.Module, *wire: int) -> None:
        """Takes a module in if it can be applied there."""
        zeros = [torch.zeros(2, *self.shapes[i]) for i in wire]
        try:
            shape = tuple(module.eval()(*zeros).shape[1:])
        except (RuntimeError, ValueError, IndexError, TypeError):
            return
        if min(shape) < 1 or torch.Size(shape).numel() > LARGEST:
            return
        self.modules.append(module)
        self.wires.append(wire)
        self.shapes.append(shape)


def _activation(w: Wiring, channels: int) -> nn.Module:
    return ACTIVATIONS[w.pick(sorted(ACTIVATIONS))](channels)


def add_conv(w: Wiring, i: int) -> None:
    channels = w.shapes[i][0]
    kernel = w.pick(KERNELS)
    groups = w.pick([1, 1, 1, channels, 2 if channels % 2 == 0 else 1])
    width = w.pick(WIDTHS)
    width = channels * w.pick([1, 1, 2]) if groups == channels else -(-width // groups) * groups
    dilation = w.pick([1, 1, 2])
    padding = tuple(w.pick([0, d, d]) for d in ((k - 1) * dilation // 2 for k in kernel))
    conv = nn.Conv2d(
        channels, width, kernel, stride=w.pick([1, 1, 2]), padding=padding, dilation=dilation,
        groups=groups, bias=w.pick([True, False]),
    )  # fmt: skip
    parts: list[nn.Module] = [conv]
    if w.pick([True, False]):
        parts.append(nn.BatchNorm2d(width))
    if w.pick([True, True, False]):
        parts.append(_activation(w, width))
    if w.pick([True, False, False, False]):
        parts = [nn.BatchNorm2d(channels), nn.ReLU(), *parts]
    w.add(nn.Sequential(*parts), i)


def add_conv_transpose(w: Wiring, i: int) -> None:
    channels, stride, kernel = w.shapes[i][0], w.pick([1, 2]), w.pick([2, 3, 4])
    conv = nn.ConvTranspose2d(
        channels, w.pick([1, 4, 9]), kernel, stride=stride, padding=w.pick([0, 1]),
        output_padding=w.pick([0, stride - 1]), bias=w.pick([True, False]),
    )  # fmt: skip
    w.add(nn.Sequential(conv, _activation(w, conv.out_channels)), i)


def add_norm(w: Wiring, i: int) -> None:
    w.add(nn.BatchNorm2d(w.shapes[i][0]), i)


def add_activation(w: Wiring, i: int) -> None:
    w.add(_activation(w, w.shapes[i][0]), i)


def add_binary(w: Wiring, i: int) -> None:
    name, function = w.pick([
        ("add", torch.add), ("add", torch.add), ("add relu", lambda a, b: F.relu(a + b)),
        ("sub", torch.sub), ("mul", torch.mul), ("div", lambda a, b: a / (1 + b.sigmoid())),
        ("max", torch.maximum),
    ])  # fmt: skip
    w.add(Apply(name, function), i, w.pick(w.like(i, slice(None))))


def add_cat(w: Wiring, i: int) -> None:
    others = w.draw(st.lists(st.sampled_from(w.like(i, slice(1, None))), min_size=1, max_size=2))
    w.add(Apply("cat", lambda *maps: torch.cat(maps, 1)), i, *others)


def add_part(w: Wiring, i: int) -> None:
    name, function = w.pick([
        ("chunk", lambda x: x.chunk(2, 1)[1]), ("slice", lambda x: x[:, 1:]),
        ("split", lambda x: x.split([1, x.shape[1] - 1], 1)[0]), ("shuffle", shuffle),
    ])  # fmt: skip
    w.add(Apply(name, function), i)


def add_gate(w: Wiring, i: int) -> None:
    act = ACTIVATIONS[w.pick(["sigmoid", "hardsigmoid"])](0)
    w.add(Gate(w.shapes[i][0], act), i)


def add_pool(w: Wiring, i: int) -> None:
    ceil = w.pick([True, False])
    w.add(w.pick([
        nn.MaxPool2d(2, ceil_mode=ceil), nn.MaxPool2d(3, 2, 1, ceil_mode=ceil),
        nn.MaxPool2d(3, 1, 1), nn.MaxPool2d(2, 1, dilation=2),
        nn.AvgPool2d(2, ceil_mode=ceil), nn.AvgPool2d(3, 1, 1),
        nn.AvgPool2d(3, 2, 1, ceil_mode=ceil, count_include_pad=False),
        nn.AdaptiveAvgPool2d((3, 5)), nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d((2, 3)),
    ]), i)  # fmt: skip


def add_resize(w: Wiring, i: int) -> None:
    w.add(w.pick([
        nn.Upsample(scale_factor=2), nn.Upsample(scale_factor=1.7),
        nn.Upsample((9, 14), mode="nearest-exact"),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Upsample(scale_factor=0.6, mode="bilinear"),
        nn.Upsample((11, 6), mode="bilinear", align_corners=True),
    ]), i)  # fmt: skip


def add_pad(w: Wiring, i: int) -> None:
    pad = w.pick([(1, 2, 0, 1), (0, -1, 1, 0), (2, 2, 2, 2)])
    w.add(nn.ConstantPad2d(pad, w.pick([0.0, 0.5])), i)


def add_block(w: Wiring, i: int) -> None:
    channels = w.shapes[i][0]
    w.add(w.pick([Block, Split])(channels), i)


def add_dense(w: Wiring, i: int) -> None:
    name, function = w.pick([
        ("softmax", lambda x: x.softmax(1)), ("sin", torch.sin), ("flip", lambda x: x.flip(3)),
        ("reflect", lambda x: F.pad(x, (1, 1, 1, 1), "reflect")),
    ])  # fmt: skip
    w.add(Apply(name, function), i)


def add_again(w: Wiring, i: int) -> None:
    """A module that is there already, once more: shared weights."""
    if w.modules:
        w.add(w.pick(w.modules), i)


STEPS = [
    add_conv, add_conv, add_conv, add_conv_transpose, add_norm, add_activation, add_binary,
    add_binary, add_cat, add_part, add_gate, add_pool, add_resize, add_pad, add_block, add_dense,
    add_again,
]  # fmt: skip


def randomize(model: nn.Module) -> nn.Module:
    """Random statistics and weights for all norms, so that none is the identity."""
    for m in model.modules():
        if isinstance(m, (nn.BatchNorm2d, nn.BatchNorm3d)):
            m.running_mean.normal_(0, 0.5)
            m.running_var.uniform_(0.3, 2)
            m.weight.data.uniform_(-0.5, 1.5)
            m.bias.data.normal_(0, 0.5)
        elif isinstance(m, nn.LayerNorm):
            m.weight.data.uniform_(0.5, 1.5)
            m.bias.data.normal_()
        elif isinstance(m, nn.PReLU):
            m.weight.data.uniform_(-0.5, 0.5)
    return model.eval()


@st.composite
def nets(draw: Any) -> tuple[Net, tuple[int, int, int]]:
    """A net in eval mode, with the shape [C, H, W] of its input."""
    torch.manual_seed(draw(st.integers(0, 1_000)))
    shape = (
        draw(st.sampled_from([1, 3, 4])), draw(st.integers(5, 21)), draw(st.integers(5, 21))
    )  # fmt: skip
    w = Wiring(draw, [shape], [], [])
    with torch.no_grad():
        for _ in range(draw(st.integers(1, 9))):
            w.pick(STEPS)(w, w.some_map())
        last = len(w.shapes) - 1
        outputs = [last] if draw(st.booleans()) else [last, draw(st.integers(0, last))]
        return randomize(Net(w.modules, w.wires, outputs)), shape  # type: ignore[return-value]
