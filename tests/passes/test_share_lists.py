"""share_lists: which convolutions' candidates are found in one launch, and that none is missed."""

import dataclasses
import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from deltafx.passes.compute_everywhere import compute_everywhere
from deltafx.passes.lower_ops import lower_ops
from deltafx.passes.run_beside import BESIDE
from deltafx.passes.share_lists import FURTHER, LIST, share_lists
from deltafx.state import (
    allocate,
    allocated_bytes,
    counts_name,
    list_name,
    list_room,
    mask_name,
    threshold_name,
)
from deltafx.verify import verify
from tests.passes.graphs import Tiny, before, whole, with_lists

module = importlib.import_module("deltafx.passes.share_lists")
find_candidates = torch.ops.deltafx.find_candidates.default


def bottleneck(stride=1, downsample=False):
    """Of two channels; the residual is added behind the last of its convolutions."""
    modules = {
        "first": nn.Conv2d(2, 2, 3, padding=1), "one": nn.Conv2d(2, 2, 1),
        "two": nn.Conv2d(2, 2, 3, stride, 1), "three": nn.Conv2d(2, 2, 1),
        "down": nn.Conv2d(2, 2, 1, stride),
    }  # fmt: skip

    def block(m, x):
        x = m.first(x).relu()
        y = m.three(m.two(m.one(x).relu()).relu())
        return (y + (m.down(x) if downsample else x)).relu()

    return Tiny(block, **modules)


def shared(
    net,
    x,
    monkeypatch,
    bears=lambda node, plan, wider, ahead=False: node.name not in ("first", "one"),
):
    """The planned graph as for a device with lists, and the context."""
    monkeypatch.setattr(module, "bears_list", bears)
    return with_lists(share_lists, net, x)


def found(gm):
    """By leader, whose lists are made along: node, source, stride."""
    return {
        n.name: [(f.node.name, f.source and f.source.name, f.stride) for f in n.meta[FURTHER]]
        for n in gm.graph.nodes
        if FURTHER in n.meta
    }


def test_a_block_with_its_input_as_residual(monkeypatch):
    gm, context, count = shared(bottleneck(), whole(2, 2, 6, 7), monkeypatch)
    assert found(gm) == {"two": [("three", "first", 1)]}
    assert count == 1
    numbers = {n.name: n.meta[LIST] for n in gm.graph.nodes if LIST in n.meta}
    assert numbers == {"two": 0, "three": 1}
    assert context.plan.lists == (list_room(84, 2), list_room(84, 2))
    assert share_lists(gm, context) == 0, "a second run finds nothing"


@pytest.mark.parametrize("stride", [1, 2])
def test_a_block_with_a_downsample(stride, monkeypatch):
    """Which runs beside the others: it leads no list and is in none, and its list is its own."""
    gm, context, count = shared(bottleneck(stride, True), whole(2, 2, 6, 7), monkeypatch)
    assert {n.name: n.meta[BESIDE] for n in gm.graph.nodes if BESIDE in n.meta} == {"down": 1}
    assert found(gm) == {"two": [("three", "down", 1)]}
    assert count == 1
    numbers = {n.name: n.meta[LIST] for n in gm.graph.nodes if LIST in n.meta}
    assert numbers == {"two": 0, "three": 2}
    sites = 84 if stride == 1 else 24
    assert context.plan.lists == (list_room(84, 2), *2 * (list_room(sites, 2),))


def test_convolutions_of_the_same_windows(monkeypatch):
    def heads(m, x):
        y = m.a(x)
        return torch.cat([m.b(y), m.c(y), m.d(y), m.e(y)], 1).sign()

    net = Tiny(
        heads, a=nn.Conv2d(2, 2, 1), b=nn.Conv2d(2, 2, 3, padding=1),
        c=nn.Conv2d(2, 3, 3, padding=1), d=nn.Conv2d(2, 3, 3, padding=2, dilation=2),
        e=nn.Conv2d(2, 2, 3, padding=1),
    )  # fmt: skip
    wider = {}

    def bears(node, plan, sites):
        wider[node.name] = sites
        return node.name != "a"

    gm, _, _ = shared(net, whole(1, 2, 6, 7), monkeypatch, bears)
    assert found(gm) == {"b": [("c", None, 1), ("e", None, 1)]}
    assert set(wider.values()) == {0.0}


@pytest.mark.parametrize(
    ("f", "why"),
    [
        (lambda m, x: m.wide(m.two(m.one(x))).sign(), "a window of several sites"),
        (lambda m, x: m.down(m.two(m.one(x))).sign(), "a smaller map"),
        (lambda m, x: m.padded(m.two(m.one(x))).sign(), "a larger map"),
        (lambda m, x: m.three(m.two(m.one(x)).sign()).sign(), "something between them"),
        (
            lambda m, x: (lambda a, b: (m.three(a) + b).sign())(m.two(m.one(x)), m.wide(x)),
            "a residual that comes later",
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_lists_that_are_not_shared(f, why, monkeypatch):
    net = Tiny(
        f, one=nn.Conv2d(2, 2, 1), two=nn.Conv2d(2, 2, 3, padding=1), three=nn.Conv2d(2, 2, 1),
        wide=nn.Conv2d(2, 2, 5, padding=2), down=nn.Conv2d(2, 2, 1, 2),
        padded=nn.Conv2d(2, 2, 1, padding=1),
    )  # fmt: skip
    gm, _, _ = shared(net, whole(1, 2, 6, 7), monkeypatch)
    assert not found(gm).get("two"), why


def test_what_has_no_room_is_left_alone(monkeypatch):
    """Asked first for the convolution itself, and then with the sites that the other may add."""
    asked = []

    def bears(node, plan, wider):
        asked.append((node.name, wider))
        return node.name == "two"

    gm, context, count = shared(bottleneck(), whole(1, 2, 6, 7), monkeypatch, bears)
    assert (found(gm), count, len(context.plan.lists)) == ({}, 0, 1)
    assert ("two", 0) in asked
    assert ("three", 0.7) in asked


def test_no_lists_on_the_cpu():
    with torch.device("cpu"):
        gm, context = before(share_lists, bottleneck(), whole(1, 2, 6, 7))
    assert context.plan.lists == ()
    assert share_lists(gm, context) == 0
    graph, _ = lower_ops(gm, context)
    convs = [n for n in graph.nodes if n.target is torch.ops.deltafx.conv2d.default]
    assert convs
    assert all(n.args[-3:] == (None, False, False) for n in convs)


def test_the_lists_in_the_lowered_graph(monkeypatch):
    gm, context, _ = shared(bottleneck(2, True), whole(2, 2, 6, 7), monkeypatch)
    graph, _ = lower_ops(gm, context)
    verify(graph, "lowered", context.plan)
    calls = {n.meta["lowered_from"]: n for n in graph.nodes if "lowered_from" in n.meta}
    memory = {n: calls[n].args[-3].target for n in ("first", "one", "down", "two", "three")}
    assert list(memory.values()) == [list_name(i) for i in (0, 0, 1, 0, 2)]
    listed = {name: n.args[-2] for name, n in calls.items() if "conv2d" in str(n.target)}
    assert listed == {"first": False, "one": False, "two": True, "three": True, "down": False}
    (find,) = (n for n in graph.nodes if n.target is find_candidates)
    assert find.next is calls["two"] or find.next.op == "get_attr"
    names = [a.name for a in find_candidates._schema.arguments]
    given = {
        k: a.target if isinstance(a, fx.Node) else a
        for k, a in zip(names, find.args, strict=False)
    }  # fmt: skip
    assert given == {
        "memory": list_name(0), "counts": counts_name("two"), "x_mask": mask_name("one"),
        "residual_mask": None, "kernel": [3, 3], "stride": [2, 2], "padding": [1, 1],
        "dilation": [1, 1], "memory_1": list_name(2), "counts_1": counts_name("three"),
        "mask_1": mask_name("down"), "stride_1": 1,
    }  # fmt: skip
    everywhere, _ = compute_everywhere(gm, graph, context.plan)
    assert not [n for n in everywhere.nodes if n.target is find_candidates]
    tensors = allocate(context.plan)
    assert allocated_bytes(tensors.values()) == context.plan.bytes()
    for i, ints in enumerate(context.plan.lists):
        assert tensors[list_name(i)].shape == (ints,)
        assert tensors[list_name(i)].dtype == torch.int32
        assert not tensors[list_name(i)].any()


@pytest.mark.parametrize("threshold", [0.0, 10.0])
@pytest.mark.parametrize(
    "net", [bottleneck(), bottleneck(1, True), bottleneck(2, True)],
    ids=["input", "downsample", "strided"],
)  # fmt: skip
def test_no_candidate_is_missed(net, threshold, monkeypatch):
    """Over frames: each list, as the update masks before its launch make it, holds all of them."""
    with torch.device("cpu"):
        x = whole(2, 2, 12, 13)
        gm, _, _ = shared(net, x, monkeypatch, lambda node, plan, wider: True)
        plain, context = before(share_lists, net, x)
        graph, constants = lower_ops(plain, context)
        state = allocate(context.plan)
    state["thresholds_"].fill_(threshold)
    state[threshold_name("input_0_encoded")].fill_(0)
    frame = fx.GraphModule({**constants, **state}, graph)
    plan = context.plan
    leaders = [n for n in gm.graph.nodes if FURTHER in n.meta]
    assert {n.name for n in leaders} == {"first", "two"}
    further_sites = 0

    def mask(name):
        return state[mask_name(plan.places[name].slot)]

    for i in range(6):
        frame(x)
        for leader in leaders:
            stride = leader.kwargs.get("stride", (1, 1))
            source = mask(leader.kwargs["x"].name)[:, None].float()
            own = F.max_pool2d(source, 3, tuple(stride), 1)[:, 0].bool()
            assert own.sum() == state[counts_name(leader.name)][0]
            for f in leader.meta[FURTHER]:
                listed = own.clone()
                if f.source is not None:
                    listed |= mask(f.source.name)[:, :: f.stride, :: f.stride]
                inputs = [f.node.kwargs["x"], f.node.kwargs.get("residual")]
                needed = torch.zeros_like(listed)
                for node in filter(None, inputs):
                    step = f.stride if node is f.source else 1
                    needed |= mask(node.name)[:, ::step, ::step]
                assert needed.sum() == state[counts_name(f.node.name)][0]
                assert not (needed & ~listed).any(), (i, f.node.name)
                further_sites += int((listed & ~needed).sum())
        if i < 4:
            x = x.clone()
            x[i % 2, :, i : i + 3, 2 * i : 2 * i + 4] += 1
        else:
            assert i == 4 or not any(state[counts_name(n)].any() for n in plan.nodes[1:]), "static"
    assert further_sites > 0 or threshold == 0, "nothing was truncated"


def test_who_reads_another_list_leads_nowhere(monkeypatch):
    """Two heads of the same windows; one reads a list of more sites, and so may who reads that."""

    def heads(m, x):
        y = m.b(m.a(x))
        return m.d(m.c(y)).sign() + m.e(y).sign()

    net = Tiny(heads, **{k: nn.Conv2d(2, 2, 1) for k in "abcde"})
    for listed, expected in ((False, {"c", "d"}), (True, {"e"})):
        monkeypatch.setattr(module, "bears_list", lambda node, *rest, **options: node.name != "a")
        gm, context = before(share_lists, net, whole(1, 2, 6, 7))
        context.plan = dataclasses.replace(context.plan, lists=(1,))
        nodes = {n.name: n for n in gm.graph.nodes}
        if listed:
            nodes["c"].meta[LIST] = 7
        share_lists(gm, context)
        readers = {f.node.name for f in nodes["b"].meta.get(FURTHER, ())}
        assert readers == expected, (listed, readers)
