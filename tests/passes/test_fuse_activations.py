"""fuse_activations: an activation becomes the end of the op before it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deltafx.passes.fuse_activations import fuse_activations
from tests.passes.graphs import Tiny, calls, node, rewritten, whole

pytestmark = pytest.mark.usefixtures("on_device")

PRODUCERS = {
    "conv2d": lambda m, x: m.conv(x),
    "conv_transpose2d": lambda m, x: m.up(x),
    "pool2d": lambda m, x: F.max_pool2d(x, 2),
    "adaptive_pool2d": lambda m, x: F.adaptive_avg_pool2d(x, 2),
    "global_pool2d": lambda m, x: F.adaptive_avg_pool2d(x, 1),
    "resize2d": lambda m, x: F.interpolate(x, scale_factor=2),
    "binary": lambda m, x: x + x,
    "affine": lambda m, x: x + 2,
    "gather_channels": lambda m, x: x.view(1, 2, 1, 4, 4).transpose(1, 2).reshape(1, 2, 4, 4),
}


def tiny(f):
    modules = {
        "conv": nn.Conv2d(2, 2, 1), "up": nn.ConvTranspose2d(2, 2, 2), "prelu": nn.PReLU(2)
    }  # fmt: skip
    return Tiny(f, **modules)


@pytest.mark.parametrize("name", PRODUCERS)
def test_a_relu_fuses_into_every_op(name):
    gm, count = rewritten(fuse_activations, tiny(lambda m, x: PRODUCERS[name](m, x).relu()),
                          whole(1, 2, 4, 4))  # fmt: skip
    assert count == 1
    assert calls(gm) == [name]
    assert node(gm, name).kwargs["act"] == "relu"


ACTS = {
    "relu6": F.relu6, "hardtanh": lambda x: F.hardtanh(x, -2, 2), "silu": F.silu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.25), "hardswish": F.hardswish, "mish": F.mish,
    "hardsigmoid": F.hardsigmoid, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "elu": lambda x: F.elu(x, 0.5),
    "softplus": lambda x: F.softplus(x, 2, 8), "selu": F.selu,
}  # fmt: skip


@pytest.mark.parametrize("name", ACTS)
def test_every_activation_fuses(name):
    net = tiny(lambda m, x: ACTS[name](m.conv(x)))
    gm, count = rewritten(fuse_activations, net, whole(1, 2, 4, 4))
    assert count == 1
    assert calls(gm) == ["conv2d"]


def test_prelu_takes_its_weight_along():
    gm, count = rewritten(
        fuse_activations, tiny(lambda m, x: m.prelu(m.conv(x))), whole(1, 2, 4, 4)
    )
    assert count == 1
    assert tuple(node(gm, "conv2d").kwargs["act_weight"].meta["val"].shape) == (2,)


@pytest.mark.parametrize(
    "f",
    [
        lambda m, x: (lambda y: y.relu() + y)(m.conv(x)),
        lambda m, x: F.pad(x, (1, 1)).relu(),
        lambda m, x: torch.cat([x, x], 1).relu(),
        lambda m, x: x.relu(),
        lambda m, x: x.sin().relu(),
    ],
    ids=["read twice", "after a pad", "after a cat", "of the input", "of a dense op"],
)
def test_near_misses(f):
    _, count = rewritten(fuse_activations, tiny(f), whole(1, 2, 4, 4))
    assert count == 0


def test_only_one_activation_fits():
    net = tiny(lambda m, x: m.conv(x).relu().sigmoid())
    gm, count = rewritten(fuse_activations, net, whole(1, 2, 4, 4))
    assert count == 1
    assert calls(gm) == ["conv2d", "affine"]
