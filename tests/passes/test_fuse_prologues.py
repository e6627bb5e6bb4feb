"""fuse_prologues: what stands before a convolution alone becomes its prologue."""

import pytest
import torch.nn.functional as F
from torch import nn

from deltafx.ops.conv2d import conv2d
from deltafx.passes.fuse_prologues import fuse_prologues
from tests.passes.graphs import Tiny, calls, node, rewritten, whole

pytestmark = pytest.mark.usefixtures("on_device")


def tiny(f):
    return Tiny(
        f, conv=nn.Conv2d(2, 2, 3, padding=1), other=nn.Conv2d(2, 2, 1), norm=nn.BatchNorm2d(2),
        prelu=nn.PReLU(2), up=nn.ConvTranspose2d(2, 2, 1), wide=nn.Conv2d(2, 2, 3),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("f", "act"),
    [
        (lambda m, x: m.conv(m.norm(x).relu()), "relu"),
        (lambda m, x: m.conv(m.norm(x)), "identity"),
        (lambda m, x: m.conv(x.relu()), "relu"),
        (lambda m, x: m.conv(x * 2), "identity"),
        (lambda m, x: m.conv(F.hardswish(m.norm(x))), "hardswish"),
        (lambda m, x: m.conv(m.norm(x).relu()) + x, "relu"),
    ],
    ids=["norm relu", "norm", "relu", "factor", "hardswish", "with a residual"],
)
def test_a_prologue(f, act):
    gm, count = rewritten(fuse_prologues, tiny(f), whole(1, 2, 5, 5))
    assert count == 1
    assert calls(gm) == ["conv2d"]
    kwargs = node(gm, "conv2d").kwargs
    assert kwargs["pre_act"] == act
    assert {"pre_scale", "pre_shift"} <= set(kwargs)


def test_a_pre_activation_chain():
    net = tiny(lambda m, x: m.other(m.norm(m.conv(m.norm(x).relu()).relu() * 1 + x).relu()))
    gm, count = rewritten(fuse_prologues, net, whole(1, 2, 5, 5))
    assert count >= 1
    pre = [n for n in gm.graph.nodes if n.target is conv2d and "pre_scale" in n.kwargs]
    assert len(pre) == count


@pytest.mark.parametrize(
    "f",
    [
        lambda m, x: (lambda y: m.conv(y) + m.other(y))(m.norm(x)),  # two readers
        lambda m, x: m.conv(m.prelu(x)),  # an activation with weights
        lambda m, x: m.conv(F.leaky_relu(x, 0.5)),  # and with numbers
        lambda m, x: m.up(m.norm(x)),  # transposed convolutions have no prologue
        lambda m, x: m.conv(F.max_pool2d(x, 2).relu()),  # fused backwards already
    ],
    ids=["two readers", "prelu", "leaky_relu", "transposed", "pool"],
)
def test_near_misses(f):
    _, count = rewritten(fuse_prologues, tiny(f), whole(1, 2, 5, 5))
    assert count == 0
