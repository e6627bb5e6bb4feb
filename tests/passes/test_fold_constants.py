"""fold_constants: what is made of weights alone becomes a constant."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import deltafx
from deltafx.ops.base import constant
from deltafx.passes.fold_constants import fold_constants
from tests.exactness import exact_over
from tests.passes.graphs import Tiny, calls, node, rewritten, whole


def conv_with(weight):
    return Tiny(lambda m, x: F.conv2d(x, weight(m.conv.weight)), conv=nn.Conv2d(2, 3, 1))


@pytest.mark.parametrize(
    ("weight", "count"),
    [
        (lambda w: 2 * w, 1),
        (lambda w: w - w.sum((1, 2, 3), keepdim=True), 2),
        (lambda w: w.reshape(1, 3, 2).transpose(1, 2).reshape(2, 3).t().reshape(3, 2, 1, 1), 5),
        (lambda w: w.flip(0).chunk(3)[1].expand(3, 2, 1, 1), 3),
        (lambda w: w + torch.arange(2.0).reshape(2, 1, 1), 1),
        (lambda w: w.max(0, keepdim=True)[0] + w, 3),
    ],
    ids=["factor", "mean", "views", "parts", "factory", "two results"],
)
def test_weights_are_computed_once(weight, count):
    net = conv_with(weight)
    gm, got = rewritten(fold_constants, net, whole(1, 2, 3, 3))
    assert got == count
    assert calls(gm) == ["conv2d"]
    assert torch.equal(constant(node(gm, "conv2d").args[1]), weight(net.conv.weight))


def test_a_weight_and_what_is_made_of_it():
    net = Tiny(
        lambda m, x: m.conv(x) + F.conv2d(x, 2 * m.conv.weight), conv=nn.Conv2d(2, 3, 1, bias=False)
    )
    gm, count = rewritten(fold_constants, net, whole(1, 2, 3, 3))
    assert count == 1
    assert sum(n.op == "get_attr" for n in gm.graph.nodes) == 2


@pytest.mark.parametrize(
    "f",
    [
        lambda m, x: F.conv2d(x, m.conv.weight * x.sum()),
        lambda m, x: m.conv(x),
        lambda m, x: torch.relu(x),
    ],
    ids=["depends on the frame", "as it is", "no weight"],
)
def test_near_misses(f):
    _, count = rewritten(fold_constants, Tiny(f, conv=nn.Conv2d(2, 3, 1)), whole(1, 2, 3, 3))
    assert count == 0


def test_random_numbers_are_drawn_in_every_frame():
    net = Tiny(lambda m, x: x + torch.rand_like(m.conv.weight).sum(), conv=nn.Conv2d(2, 3, 1))
    compiled = deltafx.compile(net, threshold=0)
    x = whole(1, 2, 3, 3)
    assert not torch.equal(compiled(x), compiled(x))


class Standardised(nn.Module):
    """A convolution with weight standardisation, one with weight norm, a reshaped scale."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 4, 3))
        self.gain = nn.Parameter(torch.rand(8))

    def __deepcopy__(self, memo):  # parametrized modules have none of their own
        copied = Standardised()
        copied.load_state_dict(self.state_dict())
        return copied.eval()

    def forward(self, x):
        w = self.a.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return self.b(
            torch.relu(F.conv2d(x, w, self.a.bias, padding=1)) * self.gain.view(1, 8, 1, 1)
        )


def test_they_follow_the_weights():
    model = Standardised().eval()
    compiled = deltafx.compile(model, threshold=0)
    frames = [torch.randn(1, 3, 9, 9) for _ in range(2)]
    exact_over(model, compiled, frames)
    assert compiled.explain().delta_share == 1
    assert not [n for n in compiled.explain() if n.kind == "dense"]
    with torch.no_grad():
        model.a.weight.mul_(model.a.weight)
        model.gain.add_(1)
        model.b.parametrizations.weight.original0.mul_(2)
    exact_over(model, compiled, frames)
