"""fuse_separables: a depthwise convolution goes into the pointwise one that alone reads it."""

import pytest
import torch.nn.functional as F
from torch import nn

from deltafx.ops.separable_conv2d import separable_conv2d
from deltafx.passes.fuse_separables import fuse_separables
from tests.passes.graphs import Tiny, calls, node, rewritten, whole


def tiny(f):
    return Tiny(
        f, deep=nn.Conv2d(4, 4, 3, padding=1, groups=4), point=nn.Conv2d(4, 4, 1),
        wide=nn.Conv2d(4, 8, 3, padding=1, groups=4), from_wide=nn.Conv2d(8, 4, 1),
        grouped=nn.Conv2d(4, 4, 3, padding=1, groups=2), strided=nn.Conv2d(4, 4, 1, 2),
        square=nn.Conv2d(4, 4, 3, padding=1), smaller=nn.Conv2d(4, 4, 3, 2, 1, groups=4),
        norm=nn.BatchNorm2d(4), prelu=nn.PReLU(4),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (lambda m, x: m.point(m.deep(x)), {}),
        (lambda m, x: m.point(F.relu6(m.norm(m.deep(x)))), {"depthwise_act": "relu6"}),
        (lambda m, x: m.point(m.smaller(x).relu()), {"stride": (2, 2)}),
        (lambda m, x: m.norm(m.point(m.deep(x))).relu(), {"act": "relu"}),
        (lambda m, x: x + m.point(m.deep(x).relu()), {}),
    ],
    ids=["plain", "norm and act", "stride", "act behind", "residual"],
)
def test_it_fuses(f, expected):
    gm, count = rewritten(fuse_separables, tiny(f), whole(1, 4, 6, 7))
    assert count == 1
    assert calls(gm) == ["separable_conv2d"]
    kwargs = node(gm, "separable_conv2d").kwargs
    assert {k: kwargs[k] for k in expected} == expected


def test_two_in_a_row():
    net = tiny(lambda m, x: m.point(m.smaller(m.point(m.deep(x)).relu())))
    gm, count = rewritten(fuse_separables, net, whole(1, 4, 6, 7))
    assert count == 2
    assert all(n.target is separable_conv2d for n in gm.graph.nodes if n.op == "call_function")


@pytest.mark.parametrize(
    "f",
    [
        lambda m, x: (lambda y: m.point(y) + y)(m.deep(x)),  # another reader
        lambda m, x: m.strided(m.deep(x)),
        lambda m, x: m.square(m.deep(x)),
        lambda m, x: m.point(m.grouped(x)),
        lambda m, x: m.from_wide(m.wide(x)),  # two channels out for one in
        lambda m, x: m.point(m.prelu(m.deep(x))),  # an activation with weights
        lambda m, x: m.point(m.deep(x) + x),  # a residual between them
    ],
    ids=["two readers", "strided", "not pointwise", "groups", "multiplier", "prelu", "residual"],
)
def test_near_misses(f):
    _, count = rewritten(fuse_separables, tiny(f), whole(1, 4, 6, 7))
    assert count == 0
