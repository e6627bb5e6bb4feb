"""raise_ops: ATen calls become dense functions, or stay with a reason."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deltafx.passes.raise_ops import raise_ops
from tests.passes.graphs import Tiny, TinyPair, before, calls, rewritten, whole

pytestmark = pytest.mark.usefixtures("on_device")

RAISED = {
    "conv2d": lambda m, x: m.conv(x),
    "same": lambda m, x: F.conv2d(x, m.conv.weight, padding="same"),
    "valid": lambda m, x: F.conv2d(x, m.conv.weight, padding="valid"),
    "conv_transpose2d": lambda m, x: m.up(x),
    "batch_norm": lambda m, x: m.norm(x),
    "relu": lambda m, x: x.relu(),
    "clamp": lambda m, x: x.clamp(-1, 2),
    "clamp_min": lambda m, x: x.clamp(min=1),
    "relu6": lambda m, x: F.relu6(x),
    "prelu": lambda m, x: F.prelu(x, m.conv.bias),
    "leaky_relu": lambda m, x: F.leaky_relu(x, 0.25),
    "max_pool2d": lambda m, x: F.max_pool2d(x, 2, ceil_mode=True),
    "avg_pool2d": lambda m, x: F.avg_pool2d(
        x, 2, 1, 1, count_include_pad=False, divisor_override=4
    ),
    "adaptive": lambda m, x: F.adaptive_avg_pool2d(x, (3, 2)),
    "adaptive_max": lambda m, x: F.adaptive_max_pool2d(x, (3, 2)),
    "global": lambda m, x: F.adaptive_avg_pool2d(x, 1),
    "mean": lambda m, x: x.mean((-2, -1), keepdim=True),
    "nearest": lambda m, x: F.interpolate(x, scale_factor=2),
    "bilinear": lambda m, x: F.interpolate(x, (12, 12), mode="bilinear"),
    "add": lambda m, x: x + x,
    "gate": lambda m, x: x * x.mean((2, 3), keepdim=True),
    "maximum": lambda m, x: torch.maximum(x, x + 1),
    "max of two": lambda m, x: torch.max(x, 2 - x),
    "add a number": lambda m, x: x + 3,
    "number minus": lambda m, x: 3 - x,
    "per channel": lambda m, x: x * m.scale,
    "divide": lambda m, x: x / 4,
    "addcmul": lambda m, x: torch.addcmul(m.scale, m.scale + 1, x, value=2),
    "addcmul the other way": lambda m, x: torch.addcmul(m.scale, x, m.scale),
    "cat": lambda m, x: torch.cat([x, x], 1),
    "cat of negative": lambda m, x: torch.cat([x, x], -3),
    "slice": lambda m, x: x[:, 1:],
    "slice from behind": lambda m, x: x[:, -1:],
    "pad": lambda m, x: F.pad(x, (1, 2), value=3.0),
    "crop": lambda m, x: F.pad(x, (1, -2, 0, -1)),
}


def net(f):
    torch.manual_seed(0)
    made = Tiny(
        f, conv=nn.Conv2d(2, 2, 3, padding=1), up=nn.ConvTranspose2d(2, 3, 2, stride=2),
        norm=nn.BatchNorm2d(2), even=nn.Conv2d(2, 2, 2),
    )  # fmt: skip
    made.scale = nn.Parameter(whole(2, 1, 1))
    return made


@pytest.mark.parametrize("name", RAISED)
def test_raised(name):
    gm, count = rewritten(raise_ops, net(RAISED[name]), 4 * whole(2, 2, 6, 6))
    assert count >= 1
    aten = [n for n in gm.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    assert not aten, f"{calls(gm)}"


STAYS = {
    "one-sided padding": (lambda m, x: F.conv2d(x, m.even.weight, padding="same"), "symmetric"),
    "wide padding": (lambda m, x: F.conv2d(x, m.conv.weight, padding=5), "wider than the kernel"),
    "computed weight": (lambda m, x: F.conv2d(x, m.conv.weight + x.max()), "computed by the model"),
    "batch statistics": (
        lambda m, x: F.batch_norm(x, None, None, training=True) * 0,
        "statistics of the batch",
    ),
    "upper clamp": (lambda m, x: x.clamp(max=1), "without a lower bound"),
    "computed prelu": (lambda m, x: F.prelu(x, x.mean((0, 2, 3)).round()), "computed by the model"),
    "mean over channels": (lambda m, x: x.mean(1, keepdim=True), "not over the sites"),
    "mean over rows": (lambda m, x: x.mean(2), "not over the sites"),
    "alpha": (lambda m, x: torch.add(x, x, alpha=2), "alpha"),
    "a map of constants": (lambda m, x: x + torch.ones(6, 6), "from site to site"),
    "a row of gates": (lambda m, x: x + x[:, :, :1], "not a gate"),
    "widened": (lambda m, x: x[:, :1] + torch.ones(1, 2, 1, 1), "widens the operand"),
    "tensor over": (lambda m, x: torch.tensor(3.0) / (x * 0 + 1), "constant divided"),
    "addcmul of maps": (lambda m, x: torch.addcmul(x, x, m.scale), "constants per channel"),
    "widening addcmul": (lambda m, x: torch.addcmul(m.scale, m.scale, x[:, :1]), "per channel"),
    "cat of rows": (lambda m, x: torch.cat([x, x], 2), "not over the channels"),
    "every second": (lambda m, x: x[:, ::2], "not of the channels"),
    "slice of rows": (lambda m, x: x[:, :, 1:3], "not of the channels"),
    "reflection": (lambda m, x: F.pad(x, (1, 1, 1, 1), mode="reflect"), "reflect"),
    "padded channels": (lambda m, x: F.pad(x, (0, 0, 0, 0, 1, 1)), "not over the sites"),
    "a vector": (lambda m, x: x.sum((2, 3)).relu(), "not [N, C, H, W]"),
    "unknown": (lambda m, x: x.sign(), "there is no delta op for it"),
    "double": (lambda m, x: x.double().relu(), "float64 is not a dtype"),
    "half": (lambda m, x: x.half().relu(), "float16 is not a dtype"),
    "written into": (lambda m, x: _written(x).relu(), "writes into its memory"),
    "mixed": (lambda m, x: x + x.bfloat16(), "differ in dtype"),
}


def _written(x):
    y = x + 1
    y[:, 0] = 2
    return y


@pytest.mark.parametrize("name", STAYS)
def test_refused_with_a_reason(name, device):
    if device.type == "cuda" and name == "half":
        pytest.skip("CUDA has operators for it")
    f, reason = STAYS[name]
    gm, context = before(raise_ops, net(f), whole(2, 2, 6, 6))
    raise_ops(gm, context)
    assert any(reason in r for r in context.refusals.values()), context.refusals
    rewritten(raise_ops, net(f), whole(2, 2, 6, 6))


def test_empty_maps_stay():
    _, count = rewritten(
        raise_ops, Tiny(lambda m, x: torch.cat([x[:, :0], x], 1)), whole(1, 2, 3, 3)
    )
    assert count == 0


def test_maps_of_other_ranks_stay():
    model = TinyPair(lambda m, x, y: (x + y[0], m.a(x)), a=nn.Conv1d(2, 2, 1))
    _, count = rewritten(raise_ops, model, whole(1, 2, 4), whole(1, 1, 2, 4))
    assert count == 0
