"""insert_casts: autocast, the caller's and the model's own, becomes casts in the graph."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import deltafx
from deltafx.passes.insert_casts import autocast_state, insert_casts, no_autocast
from tests.branching_net import BranchingNet, clip
from tests.exactness import exact_over
from tests.passes.graphs import Tiny, calls, normalized, run, whole


def autocast(dtype=torch.bfloat16, enabled=True):
    return torch.autocast("cpu", dtype=dtype, enabled=enabled)


def conv_in_bf16(m, x):
    with autocast():
        y = m.conv(x)
    return y.float() + x.sum()


def test_the_models_own_autocast():
    net, x = Tiny(conv_in_bf16, conv=nn.Conv2d(2, 3, 1)), whole(1, 2, 4, 4)
    gm = normalized(net, x)
    assert [c for c in calls(gm) if c in ("to", "conv2d")] == ["to", "to", "to", "conv2d", "to"]
    (got,) = run(gm, x)
    assert torch.equal(got, net(x))
    assert got.dtype == torch.float32
    assert insert_casts(gm) == 0


def test_the_callers_autocast():
    net, x = Tiny(lambda m, x: F.relu(m.conv(x)), conv=nn.Conv2d(2, 3, 1)), whole(1, 2, 4, 4)
    with autocast():
        gm = normalized(net, x)
        expected = net(x)
    (got,) = run(gm, x)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, expected)


def test_a_part_without_autocast():
    def f(m, x):
        with autocast():
            y = m.a(x)
            with autocast(enabled=False):
                return m.b(y.float())

    net, x = Tiny(f, a=nn.Conv2d(2, 3, 1), b=nn.Conv2d(3, 2, 1)), whole(1, 2, 4, 4)
    gm = normalized(net, x)
    assert [n.meta["val"].dtype for n in gm.graph.nodes if "conv2d" in str(n.target)] == [
        torch.bfloat16, torch.float32,
    ]  # fmt: skip
    assert torch.equal(run(gm, x)[0], net(x))


def test_without_autocast_nothing_is_cast():
    net = Tiny(lambda m, x: m.conv(x), conv=nn.Conv2d(2, 3, 1))
    gm = normalized(net, whole(1, 2, 4, 4))
    assert insert_casts(gm) == 0
    assert calls(gm) == ["conv2d"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_frames_with_and_without(mode):
    model = BranchingNet()
    compiled = deltafx.compile(model, threshold=0)
    with mode():
        for enabled in (False, True, False):
            with autocast(enabled=enabled):
                exact_over(model, compiled, clip(1, 3, 9, 9))


def test_the_state_is_told_and_left():
    assert autocast_state() == (None, None)
    with autocast():
        assert autocast_state() == (torch.bfloat16, None)
        with no_autocast():
            assert autocast_state() == (None, None)
        assert autocast_state() == (torch.bfloat16, None)
