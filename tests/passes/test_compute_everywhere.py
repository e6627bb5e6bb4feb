"""compute_everywhere, and how a frame is cut behind the comparison of its inputs."""

import dataclasses

import pytest
import torch
from torch import fx, nn

from deltafx import choose_ways
from deltafx.cuda_graph import split_frame
from deltafx.ops.everywhere import binary_everywhere, conv2d_everywhere
from deltafx.passes.compute_everywhere import compute_everywhere
from deltafx.passes.lower_ops import lower_ops
from deltafx.passes.plan_state import plan_state
from deltafx.state import COUNTS, MASKS, NOT_FINITE, acc_name, allocate
from deltafx.verify import verify
from tests.passes.graphs import Tiny, TinyPair, before, whole

pytestmark = pytest.mark.usefixtures("on_device")


def everywhere_of(net, x):
    """The graphs of a frame, and the attributes that they run on."""
    gm, context = before(plan_state, net, x)
    plan_state(gm, context)
    lowered, constants = lower_ops(gm, context)
    everywhere, more = compute_everywhere(gm, lowered, context.plan)
    verify(everywhere, "lowered", context.plan)
    state = allocate(context.plan)
    flag = {NOT_FINITE: torch.zeros(1, dtype=torch.int32)}
    return lowered, everywhere, {**constants, **more, **state, **flag}


def executed(everywhere, tensors):
    """A frame as the executor runs it."""
    parts = split_frame(everywhere)
    head, body = (fx.GraphModule(tensors, graph) for graph in (parts.head, parts.body))

    def run(x):
        head(x)
        tensors[MASKS].fill_(True)
        return body(x)

    return run


def called(graph, function):
    return [n for n in graph.nodes if n.target is function]


def net():
    """A concatenation, a residual, a gate, a grouped and a transposed convolution, a pool."""

    def forward(m, x):
        y = torch.cat([m.a(x).relu(), m.g(x)], 1)
        y = torch.relu(m.b(y) + y)
        return m.t(m.pool(y * m.gate(y.mean((2, 3), keepdim=True)).sigmoid()))

    return Tiny(
        forward, a=nn.Conv2d(4, 4, 3, padding=1), g=nn.Conv2d(4, 4, 3, padding=1, groups=4),
        b=nn.Conv2d(8, 8, 1), gate=nn.Conv2d(8, 8, 1), pool=nn.MaxPool2d(2),
        t=nn.ConvTranspose2d(8, 3, 2, 2),
    )  # fmt: skip


def test_it_leaves_the_state_that_the_lowered_graph_leaves():
    model, x = net(), whole(2, 4, 6, 8)
    lowered, everywhere, tensors = everywhere_of(model, x)
    assert len(called(everywhere, conv2d_everywhere)) == 4
    assert len(called(everywhere, binary_everywhere)) == 1
    assert not called(everywhere, torch.ops.deltafx.conv2d.default)
    assert called(everywhere, torch.ops.deltafx.conv_transpose2d.default)
    frames = [fx.GraphModule(tensors, lowered), executed(everywhere, tensors)]
    with torch.no_grad():
        for run in (*frames, frames[0]):
            x = whole(2, 4, 6, 8)
            torch.testing.assert_close(list(run(x)), [model(x)])


def test_what_is_lost_comes_back():
    model, x = net(), whole(1, 4, 6, 6)
    _, everywhere, tensors = everywhere_of(model, x)
    for name, tensor in tensors.items():
        if name.startswith("acc_"):
            tensor.fill_(float("nan"))
    with torch.no_grad():
        torch.testing.assert_close(list(executed(everywhere, tensors)(x)), [model(x)])


def test_a_frame_in_two_parts_is_the_frame():
    model, x = net(), whole(1, 4, 6, 6)
    lowered, _, tensors = everywhere_of(model, x)
    parts = split_frame(lowered)
    assert parts.may_skip
    assert parts.masks == ("mask_input_0_encoded",)
    head, body = (fx.GraphModule(tensors, graph) for graph in (parts.head, parts.body))
    with torch.no_grad():
        assert head(x) == ()
        assert tensors["mask_input_0_encoded"].all()
        assert tensors[MASKS].sum() == 36
        torch.testing.assert_close(list(body(x)), [model(x)])
        assert (tensors[COUNTS][:, 0] > 0).all()


def test_an_image_is_read_with_what_fills_it_up():
    """As in half precision on CUDA, where three channels lie four apart."""
    model, x = Tiny(lambda m, x: m.a(x).relu(), a=nn.Conv2d(3, 8, 3, padding=1)), whole(1, 3, 6, 6)
    gm, context = before(plan_state, model, x)
    plan_state(gm, context)
    plan = context.plan
    (name,) = (n for n, slot in plan.slots.items() if slot.shape[1] == 3)
    wider = dataclasses.replace(plan.slots[name], shape=(1, 4, 6, 6))
    context.plan = plan = dataclasses.replace(plan, slots={**plan.slots, name: wider})
    lowered, constants = lower_ops(gm, context)
    everywhere, more = compute_everywhere(gm, lowered, plan)
    (call,) = called(everywhere, conv2d_everywhere)
    (weight,) = (t for key, t in more.items() if key.endswith("weight"))
    assert weight.shape == (8, 4, 3, 3)
    assert call.args[2].target == acc_name(name)
    flag = {NOT_FINITE: torch.zeros(1, dtype=torch.int32)}
    run = executed(everywhere, {**constants, **more, **allocate(plan), **flag})
    with torch.no_grad():
        torch.testing.assert_close(list(run(x)), [model(x)])


def clip_net(f):
    return Tiny(f, a=nn.Conv3d(2, 3, 3, padding=1), b=nn.Conv3d(3, 2, (1, 3, 3)))


def test_a_clip_is_compared_picture_by_picture():
    model, x = clip_net(lambda m, x: m.b(m.a(x).relu()).mean((2, 3, 4))), whole(1, 2, 4, 6, 4)
    lowered, everywhere, tensors = everywhere_of(model, x)
    parts = split_frame(lowered)
    assert parts.may_skip
    assert parts.masks == ("mask_input_0_planes",)
    with torch.no_grad():
        for run in (fx.GraphModule(tensors, lowered), executed(everywhere, tensors)):
            torch.testing.assert_close(list(run(x)), [model(x)])


def test_a_body_may_read_a_picture_of_the_frame():
    model = clip_net(lambda m, x: (m.a(x), x[:, :, 1].cumsum(-1)))
    lowered, _, tensors = everywhere_of(model, x := whole(1, 2, 4, 6, 4))
    parts = split_frame(lowered)
    assert not parts.may_skip
    head, body = (fx.GraphModule(tensors, graph) for graph in (parts.head, parts.body))
    with torch.no_grad():
        head(x)
        torch.testing.assert_close(list(body(x)), list(model(x)))


def test_a_body_that_reads_the_frame_must_not_be_skipped():
    model = Tiny(lambda m, x: m.a(x) + x.cumsum(-1), a=nn.Conv2d(2, 2, 1))
    lowered, _, _ = everywhere_of(model, whole(1, 2, 3, 3))
    assert not split_frame(lowered).may_skip


@pytest.mark.parametrize(
    ("forward", "in_place"),
    [
        (lambda m, x, y: m.a(x) + m.a(y), (True, True)),
        (lambda m, x, y: m.a(x) + y.cumsum(-1), (True, False)),
        (lambda m, x, y: (m.a(x) + m.a(y), y), (True, False)),
        (lambda m, x, y: m.a(x) + m.a(y) + y.cumsum(-1), (True, False)),
    ],
)
def test_what_one_comparison_reads_is_read_in_place(forward, in_place):
    model = TinyPair(forward, a=nn.Conv2d(2, 2, 1))
    gm, context = before(plan_state, model, whole(1, 2, 3, 3), whole(1, 2, 3, 3))
    plan_state(gm, context)
    lowered, _ = lower_ops(gm, context)
    everywhere, _ = compute_everywhere(gm, lowered, context.plan)
    assert split_frame(lowered).in_place == in_place
    assert split_frame(everywhere).in_place == in_place
    # And whatever else runs in a frame leaves it alone.
    for graph in (lowered, everywhere):
        given = [n for n in split_frame(graph).body.nodes if n.op == "placeholder"]
        assert all(not n.users for n, alone in zip(given, in_place, strict=True) if alone)


def test_a_clip_is_not_read_in_place():
    model = clip_net(lambda m, x: m.b(m.a(x).relu()))
    lowered, _, _ = everywhere_of(model, whole(1, 2, 4, 6, 4))
    assert split_frame(lowered).in_place == (False,)


@pytest.mark.parametrize("frugal", [False, True])
@pytest.mark.parametrize("best", ["gemm", "fused"])
def test_the_best_way_is_written_into_the_graph(best, frugal, monkeypatch):
    """Of the convolutions that have several; and all are the frame.

    It is the quickest, or where memory is short the quickest of those that need the least.
    """
    several = {"relu": ("fused", "gemm", "apart")}
    monkeypatch.setattr(choose_ways, "ways", lambda act, **_: several.get(act, ("apart",)))
    monkeypatch.setattr(choose_ways, "_TELLING", ("act",))
    with torch.device("cpu"):  # which has all the ways, as all are one there
        model, x = net(), whole(1, 4, 6, 6)
        _, everywhere, tensors = everywhere_of(model, x)
    tried = []

    def measure(call):
        call()
        way = call.keywords["way"]
        tried.append(way)
        if frugal:
            little, much = choose_ways.LITTLE - 1, choose_ways.LITTLE
            return {best: (2.0, little), "apart": (3.0, 0)}.get(way, (1.0, much))
        return (1.0, choose_ways.LITTLE) if way == best else (2.0, 0)

    parts = split_frame(everywhere)
    fx.GraphModule(tensors, parts.head)(x)
    tensors[MASKS].fill_(True)
    with torch.no_grad():
        gm = fx.GraphModule(tensors, parts.body)
        choose_ways.choose_ways(gm, (x,), measure, frugal=frugal)
        kwargs = [n.kwargs for n in called(parts.body, conv2d_everywhere)]
        assert kwargs.count({"way": best}) == len(tried) // 3 > 0
        assert kwargs.count({}) == len(kwargs) - len(tried) // 3 > 0
        result = fx.GraphModule(tensors, parts.body)(x)
        torch.testing.assert_close(list(result), [model(x)])
