"""fold_affines: norms and factors vanish into the convolution, or the affine, before them."""

import pytest
import torch
from torch import nn

from deltafx.ops.base import constant
from deltafx.passes.fold_affines import fold_affines
from tests.passes.graphs import Tiny, before, calls, node, rewritten, whole

pytestmark = pytest.mark.usefixtures("on_device")


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 3, groups=2),
        nn.Conv2d(4, 6, (1, 3), stride=2, dilation=2), nn.ConvTranspose2d(4, 6, 2, stride=2),
        nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.Conv2d(4, 8, 3, groups=4),
    ],
)  # fmt: skip
def test_a_norm_folds_into_a_convolution(conv):
    net = Tiny(lambda m, x: m.norm(m.conv(x)), conv=conv, norm=nn.BatchNorm2d(conv.out_channels))
    gm, count = rewritten(fold_affines, net, whole(2, 4, 6, 6))
    assert count == 1
    assert calls(gm) == ["conv_transpose2d" if conv.transposed else "conv2d"]
    assert list(gm.graph.nodes)[-2].name == "conv"


def test_several_fold_one_after_another():
    net = Tiny(
        lambda m, x: (2 * m.norm(m.conv(x)) + 3) * 4,
        conv=nn.Conv2d(2, 3, 1),
        norm=nn.BatchNorm2d(3),
    )
    gm, count = rewritten(fold_affines, net, whole(1, 2, 4, 4))
    assert count == 4
    assert calls(gm) == ["conv2d"]


def test_affines_fold_into_affines_with_the_last_activation():
    net = Tiny(lambda m, x: torch.relu(m.norm(x) * 2 - 1), norm=nn.BatchNorm2d(2))
    gm, count = rewritten(fold_affines, net, whole(1, 2, 4, 4))
    assert count == 2
    assert calls(gm) == ["affine", "affine"]  # an activation by itself is not for this pass
    assert [n.kwargs.get("act", "identity") for n in gm.graph.nodes if n.kwargs][-1] == "relu"


def test_the_weight_is_rounded_once():
    conv, norm = nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(2)
    net = Tiny(lambda m, x: m.norm(m.conv(x)), conv=conv, norm=norm)
    with torch.no_grad():
        conv.weight.copy_(torch.randn(2, 2, 1, 1))
        norm.weight.copy_(torch.randn(2))
    gm, context = before(fold_affines, net, whole(1, 2, 4, 4))
    assert fold_affines(gm, context) == 1
    exact = (
        conv.weight.double()
        * (norm.weight.double() / (norm.running_var + norm.eps).sqrt())[:, None, None, None]
    )
    assert torch.equal(constant(node(gm, "conv2d").kwargs["weight"]), exact.float())


@pytest.mark.parametrize(
    "f",
    [
        lambda m, x: m.norm(torch.relu(m.conv(x))),  # not the activation's result
        lambda m, x: (lambda y: m.norm(y) + y)(m.conv(x)),  # read twice
        lambda m, x: m.norm(m.pool(x)),
        lambda m, x: torch.relu(m.conv(x)),  # nothing to fold, an activation alone
    ],
    ids=["after relu", "read twice", "after a pool", "activation"],
)
def test_near_misses(f):
    net = Tiny(f, conv=nn.Conv2d(2, 2, 1), norm=nn.BatchNorm2d(2), pool=nn.MaxPool2d(2))
    gm, count = rewritten(fold_affines, net, whole(1, 2, 4, 4))
    assert count == 0
    assert "affine" in calls(gm)


def test_a_convolution_called_twice_keeps_its_weight():
    net = Tiny(
        lambda m, x: m.conv(m.norm(m.conv(x))), conv=nn.Conv2d(2, 2, 1), norm=nn.BatchNorm2d(2)
    )
    nn.init.constant_(net.norm.weight, 0.5)
    gm, count = rewritten(fold_affines, net, whole(1, 2, 4, 4))
    assert count == 1
    first, second = (constant(n.kwargs["weight"]) for n in gm.graph.nodes if n.kwargs)
    assert torch.equal(second, net.conv.weight)
    assert not torch.equal(first, second)
