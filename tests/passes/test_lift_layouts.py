"""lift_layouts: what is done on channels-last or flat maps is done on the maps."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deltafx.passes.lift_layouts import lift_layouts
from tests.passes.graphs import Tiny, calls, node, rewritten, whole

pytestmark = pytest.mark.usefixtures("on_device")

NHWC, NCHW = (0, 2, 3, 1), (0, 3, 1, 2)


def test_a_linear_over_channels_is_a_pointwise_convolution():
    net = Tiny(
        lambda m, x: m.b(F.relu(m.a(x.permute(NHWC)))).permute(NCHW),
        a=nn.Linear(3, 5), b=nn.Linear(5, 2),
    )  # fmt: skip
    gm, count = rewritten(lift_layouts, net, whole(2, 3, 4, 5))
    assert count == 3
    assert [c for c in calls(gm) if c != "permute"] == ["conv2d", "affine", "conv2d"]
    assert [n.name for n in gm.graph.nodes if n.target in _dense(gm)] == ["a", "relu", "b"]


def _dense(gm):
    return {n.target for n in gm.graph.nodes if n.op == "call_function" and n.kwargs}


def test_a_layer_norm_over_channels():
    norm = nn.LayerNorm(4)
    net = Tiny(lambda m, x: m.norm(x.permute(NHWC)).permute(NCHW), norm=norm)
    x = whole(1, 4, 3, 3)
    x[:, 1:] = x[:, :1] + torch.tensor([0.0, 2, 2]).reshape(3, 1, 1)  # deviation 1, mean whole
    norm.eps = 0.0
    gm, count = rewritten(lift_layouts, net, x)
    assert count == 1
    assert "layer_norm" in calls(gm)
    assert tuple(node(gm, "layer_norm").meta["val"].shape) == (1, 4, 3, 3)


def test_scales_and_residuals_on_channels_last():
    scale = whole(3, least=1)
    net = Tiny(
        lambda m, x: (
            x + (m.a(x.permute(NHWC)) * scale).permute(NCHW), m.a(x.permute(NHWC)) + scale
        ),
        a=nn.Linear(3, 3),
    )  # fmt: skip
    _, count = rewritten(lift_layouts, net, whole(1, 3, 4, 4))
    assert count == 4  # two linears, the scale, the shift; the residual is on maps


def test_an_add_of_two_channels_last_maps():
    net = Tiny(
        lambda m, x: (m.a(x.permute(NHWC)) + x.permute(NHWC)).permute(NCHW), a=nn.Linear(3, 3)
    )
    gm, count = rewritten(lift_layouts, net, whole(1, 3, 4, 4))
    assert count == 2
    assert node(gm, "binary").kwargs["op"] == "add"


def test_a_flattened_classifier():
    net = Tiny(
        lambda m, x: m.b(F.relu(m.a(torch.flatten(x, 1)))), a=nn.Linear(24, 6), b=nn.Linear(6, 3)
    )
    gm, count = rewritten(lift_layouts, net, whole(2, 2, 3, 4))
    assert count == 3
    shapes = [tuple(n.meta["val"].shape) for n in gm.graph.nodes if n.target in _dense(gm)]
    assert shapes == [(2, 6, 1, 1), (2, 6, 1, 1), (2, 3, 1, 1)]


@pytest.mark.parametrize(
    "flat",
    [
        lambda x: x.mean((2, 3)),
        lambda x: x.mean([-1, -2]),
        lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
        lambda x: F.adaptive_avg_pool2d(x, 1).reshape(x.shape[0], -1),
        lambda x: F.adaptive_avg_pool2d(x, 1).squeeze(),
    ],
    ids=["mean", "negative", "flatten", "reshape", "squeeze"],
)
def test_heads_behind_a_global_pool(flat):
    net = Tiny(lambda m, x: m.a(flat(x)), a=nn.Linear(2, 3))
    gm, count = rewritten(lift_layouts, net, whole(2, 2, 4, 4))
    assert count >= 1
    assert "conv2d" in calls(gm)
    assert "linear" not in calls(gm)


def test_back_and_forth_is_nothing():
    net = Tiny(lambda m, x: x.permute(NHWC).permute(NCHW) + 1)
    gm, _ = rewritten(lift_layouts, net, whole(1, 2, 3, 4))
    add = node(gm, "add")
    assert add.args[0].op == "placeholder"


@pytest.mark.parametrize(
    ("f", "module"),
    [
        (lambda m, x: m.a(x), nn.Linear(5, 2)),  # over the columns
        (lambda m, x: m.a(x.permute(0, 2, 1, 3)), nn.Linear(5, 2)),
        (lambda m, x: m.a(x.flatten(2)), nn.Linear(20, 2)),
        (lambda m, x: m.a(x.flatten(0, 1).flatten(1)), nn.Linear(20, 2)),
        (lambda m, x: x.mean(2), nn.Identity()),
        (lambda m, x: F.softmax(x.flatten(1), 1) * 0, nn.Identity()),
    ],
)
def test_other_layouts_stay(f, module):
    gm, count = rewritten(lift_layouts, Tiny(f, a=module), whole(1, 3, 4, 5))
    assert count == 0
    assert {"conv2d", "affine", "global_pool2d"}.isdisjoint(calls(gm))


def test_a_linear_whose_weight_is_computed_stays():
    net = Tiny(lambda m, x: F.linear(x.flatten(1), m.a.weight * x.max()), a=nn.Linear(12, 2))
    _, count = rewritten(lift_layouts, net, whole(1, 3, 2, 2))
    assert count == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_dtypes_that_have_no_operator_stay(dtype, device):
    if device.type == "cuda" and dtype == torch.float16:
        pytest.skip("CUDA has operators for it")
    net = Tiny(lambda m, x: m.a(x.mean((2, 3))), a=nn.Linear(2, 3)).to(dtype)
    _, count = rewritten(lift_layouts, net, whole(1, 2, 2, 2).to(dtype))
    assert count == 0


def split_attention(m, x):
    """ResNeSt's, with a gate of whole numbers in the place of its softmax."""
    groups = x.reshape(x.shape[0], 2, 3, *x.shape[2:])
    pooled = groups.sum(1).amax((2, 3), keepdim=True)
    gate = torch.cat([pooled, 2 - pooled], 1).reshape(x.shape[0], 2, 3, 1, 1)
    return (groups * gate).sum(1)


def selective_kernel(m, x):
    """SKNet's: paths are stacked, and the gate is made in five dimensions."""
    paths = torch.stack([m.a(x), m.b(x)], 1)
    pooled = paths.sum(1).amax((2, 3), keepdim=True)
    gate = torch.stack([pooled, 1 - pooled], 1).clamp(max=2)
    return (gate * paths).sum(dim=1)


@pytest.mark.parametrize(
    ("f", "count"), [(split_attention, 3), (selective_kernel, 5)], ids=["split", "selective"]
)
def test_attention_over_groups_of_channels(f, count):
    net = Tiny(f, a=nn.Conv2d(6, 6, 1), b=nn.Conv2d(6, 6, 3, padding=1))
    gm, got = rewritten(lift_layouts, net, whole(2, 6, 4, 5))
    assert got == count
    assert not {"sum", "mul"} & set(calls(gm))
    assert calls(gm).count("slice_channels") == 4
    assert [n.kwargs["op"] for n in gm.graph.nodes if n.kwargs.get("op")] == ["add", "mul", "add"]


def test_groups_are_seen_through():
    net = Tiny(lambda m, x: x.reshape(1, 2, 3, 4, 4).reshape(1, 6, 4, 4))
    gm, _ = rewritten(lift_layouts, net, whole(1, 6, 4, 4))
    assert calls(gm) == []


def test_three_groups():
    net = Tiny(lambda m, x: x.reshape(1, 3, 2, 4, 4).sum(1))
    gm, _ = rewritten(lift_layouts, net, whole(1, 6, 4, 4))
    assert calls(gm) == ["slice_channels"] * 2 + ["binary", "slice_channels", "binary"]


@pytest.mark.parametrize(
    "f",
    [
        lambda m, x: x.reshape(1, 2, 3, 4, 4).sum(2),
        lambda m, x: x.reshape(1, 2, 3, 4, 4).sum(1, keepdim=True),
        lambda m, x: x.reshape(1, 2, 3, 4, 4).sum((1, 2)),
        lambda m, x: x.reshape(1, 6, 2, 2, 4).sum(1),
        lambda m, x: x.reshape(1, 2, 3, 4, 4) * x.reshape(1, 2, 3, 4, 4)[:, :1],
        lambda m, x: torch.stack([x, x], 2).sum(1),
    ],
)
def test_other_groups_stay(f):
    _, count = rewritten(lift_layouts, Tiny(f), whole(1, 6, 4, 4))
    assert count == 0


def test_parts_of_channels_last_maps():
    def f(m, x):
        a, b, c = torch.split(m.a(x.permute(NHWC)), [1, 2, 3], dim=-1)
        return torch.cat([b, a * 2, c[..., -2:]], -1).permute(NCHW)

    gm, _ = rewritten(lift_layouts, Tiny(f, a=nn.Linear(3, 6)), whole(1, 3, 4, 4))
    assert not {"cat", "slice", "permute", "linear"} & set(calls(gm))


def test_a_layer_norm_behind_the_pool():
    net = Tiny(lambda m, x: m.a(x.amax((2, 3), keepdim=True).flatten(1)), a=nn.LayerNorm(2))
    net.a.eps = 0.0
    x = whole(1, 1, 3, 3).repeat(1, 2, 1, 1)
    x[:, 1] += 2  # deviation 1
    gm, count = rewritten(lift_layouts, net, x)
    assert count == 1
    assert "layer_norm" in calls(gm)
