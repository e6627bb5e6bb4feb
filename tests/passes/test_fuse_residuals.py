"""fuse_residuals: an add becomes part of the convolution that is ready later."""

import pytest
import torch
from torch import nn

from deltafx.passes.fuse_activations import fuse_activations
from deltafx.passes.fuse_residuals import fuse_residuals
from tests.passes.graphs import Tiny, before, calls, node, rewritten, run, whole

pytestmark = pytest.mark.usefixtures("on_device")


def tiny(f):
    return Tiny(
        f, a=nn.Conv2d(2, 2, 3, padding=1), b=nn.Conv2d(2, 2, 1), up=nn.ConvTranspose2d(2, 2, 1)
    )


@pytest.mark.parametrize(
    "f",
    [lambda m, x: m.a(x) + x, lambda m, x: x + m.a(x), lambda m, x: m.a(x) + x.sin().round()],
    ids=["left", "right", "dense"],
)
def test_a_residual(f):
    gm, count = rewritten(fuse_residuals, tiny(f), whole(1, 2, 4, 4))
    assert count == 1
    assert "binary" not in calls(gm)
    assert "residual" in node(gm, "conv2d").kwargs


def test_a_transposed_convolution_takes_one_too():
    gm, count = rewritten(fuse_residuals, tiny(lambda m, x: m.up(x) + x), whole(1, 2, 4, 4))
    assert count == 1
    assert "residual" in node(gm, "conv_transpose2d").kwargs


def test_the_activation_behind_the_add_fuses_afterwards():
    net = tiny(lambda m, x: (m.a(x) + x).relu())
    x = whole(1, 2, 4, 4)
    gm, context = before(fuse_residuals, net, x)
    assert fuse_residuals(gm, context) == 1
    assert fuse_activations(gm, context) in (0, 1)
    conv = node(gm, "conv2d")
    assert (conv.kwargs["act"], conv.kwargs.get("residual_after_act", False)) == ("relu", False)
    assert calls(gm) == ["conv2d"]
    assert torch.equal(run(gm, x)[0], net(x))


def test_an_activation_before_the_add():
    net = tiny(lambda m, x: m.a(x).relu() + x)
    gm, count = rewritten(fuse_residuals, net, whole(1, 2, 4, 4))
    assert count == 1
    assert node(gm, "conv2d").kwargs["residual_after_act"] is True


@pytest.mark.parametrize(
    ("f", "takes", "residual"),
    [
        (lambda m, x: m.a(x) + m.b(x), "b", "a"),
        (lambda m, x: (lambda y: m.b(x) + y)(m.a(x)), "b", "a"),
        (lambda m, x: m.a(x.sign()) + m.b(x), "a", "b"),
        (lambda m, x: (lambda y, z: m.b(y) + m.a(z))(x.sign(), x.abs()), "a", "b"),
        (lambda m, x: (lambda y, z: m.b(z) + m.a(y))(x.sign(), x.abs()), "b", "a"),
    ],
    ids=["one input", "the other way round", "earlier", "both", "both the other way round"],
)
def test_of_two_convolutions_the_one_that_is_ready_later_takes_the_add(f, takes, residual):
    """The one whose inputs are computed later; of the same inputs the one that stands later."""
    gm, count = rewritten(fuse_residuals, tiny(f), whole(1, 2, 4, 4))
    assert count == 1
    later = [n for n in gm.graph.nodes if "residual" in n.kwargs]
    assert [(n.name, n.kwargs["residual"].name) for n in later] == [(takes, residual)]


def test_the_convolution_of_a_shortcut_is_the_residual():
    """As in ResNet, where it stands last but could be computed first."""

    def block(m, x):
        y = m.a(x.sign()).relu()
        z = m.b(y)
        return (z + m.c(x)).relu()

    net = Tiny(block, a=nn.Conv2d(2, 2, 3, padding=1), b=nn.Conv2d(2, 2, 1), c=nn.Conv2d(2, 2, 1))
    gm, count = rewritten(fuse_residuals, net, whole(1, 2, 4, 4))
    assert count == 1
    (last,) = (n for n in gm.graph.nodes if "residual" in n.kwargs)
    assert (last.name, last.kwargs["residual"].name) == ("b", "c")


def test_chains_of_adds_fuse_one_by_one():
    net = tiny(lambda m, x: m.b(m.a(x) + x) + (m.a(x) + x))
    gm, count = rewritten(fuse_residuals, net, whole(1, 2, 4, 4))
    assert count == 3
    assert "binary" not in calls(gm)


def test_a_residual_that_comes_after_the_convolution():
    """The convolution moves down to where its residual is known."""

    def f(m, x):
        y = m.a(x)
        return y + x.sin().round()

    rewritten(fuse_residuals, tiny(f), whole(1, 2, 4, 4))


@pytest.mark.parametrize(
    "f",
    [
        lambda m, x: (lambda y: y + y)(m.a(x)),
        lambda m, x: (lambda y: (y + x, y))(m.a(x)),
        lambda m, x: m.a(x) - x,
        lambda m, x: m.a(x) * x,
        lambda m, x: m.a(x) + m.b(x).mean((2, 3), keepdim=True).round(),
        lambda m, x: (m.a(x).relu() + x).relu(),
        lambda m, x: x.relu() + x,
    ],
    ids=["itself", "read twice", "sub", "mul", "a gate", "two activations", "no convolution"],
)
def test_near_misses(f):
    gm, count = rewritten(fuse_residuals, tiny(f), whole(1, 2, 4, 4))
    assert count == 0
    assert "binary" in calls(gm)
