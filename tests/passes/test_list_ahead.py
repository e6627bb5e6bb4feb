"""list_ahead: whose candidates are found beside the convolution before, and that none is missed."""

import dataclasses
import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from deltafx.passes.compute_everywhere import compute_everywhere
from deltafx.passes.list_ahead import AHEAD, list_ahead
from deltafx.passes.lower_ops import lower_ops
from deltafx.passes.run_beside import BESIDE
from deltafx.passes.share_lists import LIST
from deltafx.state import allocate, counts_name, list_name, list_room, mask_name, threshold_name
from deltafx.verify import verify
from tests.passes.graphs import Tiny, before, whole, with_lists

module = importlib.import_module("deltafx.passes.list_ahead")
find_candidates = torch.ops.deltafx.find_candidates.default


def blocks(*kinds):
    """Blocks of two channels behind a 3x3 convolution: plain, with a shortcut, strided."""
    modules = {"stem": nn.Conv2d(2, 2, 3, padding=1)}
    for i, kind in enumerate(kinds):
        stride = 2 if kind == "strided" else 1
        modules |= {
            f"one{i}": nn.Conv2d(2, 2, 1), f"two{i}": nn.Conv2d(2, 2, 3, stride, 1),
            f"three{i}": nn.Conv2d(2, 2, 1), f"down{i}": nn.Conv2d(2, 2, 1, stride),
        }  # fmt: skip

    def run(m, x):
        x = m.stem(x).relu()
        for i, kind in enumerate(kinds):
            one, two, three, down = (getattr(m, f"{n}{i}") for n in ("one", "two", "three", "down"))
            x = (three(two(one(x).relu()).relu()) + (x if kind == "plain" else down(x))).relu()
        return x

    return Tiny(run, **modules)


def ahead(net, x, monkeypatch, bears=lambda node, plan, wider, ahead: ahead):
    """The planned graph as for a device with lists, and the context."""
    monkeypatch.setattr(module, "bears_list", bears)
    return with_lists(list_ahead, net, x)


def found(gm):
    """By the convolution that it runs beside: the source, and the readers."""
    return {
        n.name: (n.meta[AHEAD].source.name, [r.name for r in n.meta[AHEAD].readers])
        for n in gm.graph.nodes
        if AHEAD in n.meta
    }


def numbers(gm):
    """The list that each reads."""
    return {n.name: n.meta[LIST] for n in gm.graph.nodes if LIST in n.meta}


def test_blocks_in_a_row(monkeypatch):
    """A block's list goes up to the next one's first convolution; two lists take turns."""
    net = blocks("plain", "strided", "plain", "down")
    gm, context, count = ahead(net, whole(2, 2, 8, 9), monkeypatch)
    assert found(gm) == {
        "one0": ("stem", ["two0", "three0", "one1"]),
        "one1": ("three0", ["two1", "three1", "one2"]),
        "one2": ("three1", ["two2", "three2", "one3"]),
        "one3": ("three2", ["two3", "three3"]),
    }
    assert count == 11
    first = len(context.plan.lists) - 2
    assert numbers(gm) == {
        "two0": first, "three0": first, "one1": first,
        "two1": first + 1, "three1": first + 1, "one2": first + 1,
        "two2": first, "three2": first, "one3": first,
        "two3": first + 1, "three3": first + 1,
    }  # fmt: skip
    assert context.plan.lists[first:] == (list_room(2 * 72, 2), list_room(2 * 20, 2))
    assert list_ahead(gm, context) == 0, "a second run finds nothing"


def test_the_first_reader_is_not_truncated(monkeypatch):
    """Its sites are all active: nobody but the next convolution of the list may read them."""

    def block(m, x):
        x = m.stem(x).relu()
        return (m.three(m.two(m.one(x).relu()).relu()) + x).sign()

    def reads_it_too(m, x):
        x = m.stem(x).relu()
        y = m.two(m.one(x).relu()).relu()
        return (m.three(y) + x).sign() + y.sign()

    monkeypatch.setattr(module, "bears_list", lambda *args, **options: True)
    for function, expected in ((block, {"one": ("stem", ["two", "three"])}), (reads_it_too, {})):
        net = Tiny(
            function, stem=nn.Conv2d(2, 2, 3, padding=1), one=nn.Conv2d(2, 2, 1),
            two=nn.Conv2d(2, 2, 3, padding=1), three=nn.Conv2d(2, 2, 1),
        )  # fmt: skip
        gm, context = before(list_ahead, net, whole(1, 2, 6, 7))
        context.plan = dataclasses.replace(context.plan, lists=(1,))
        (two,) = (n for n in gm.graph.nodes if n.name == "two")
        two.meta["truncates"] = False
        list_ahead(gm, context)
        assert found(gm) == expected


@pytest.mark.parametrize(
    ("f", "why"),
    [
        (lambda m, x: m.three(m.two(m.one(x))).sign(), "the frame's comparison is the source"),
        (lambda m, x: m.three(m.two(m.down(m.stem(x)))).sign(), "the first one is strided"),
        (lambda m, x: m.three(m.two(m.wide(m.stem(x)))).sign(), "the first one has windows"),
        (
            lambda m, x: (lambda y: m.three(m.two(m.one(y) + y)).sign())(m.stem(x)),
            "the first one adds a residual",
        ),
        (lambda m, x: m.three(m.two(m.grouped(m.stem(x)))).sign(), "the first one is grouped"),
        (lambda m, x: m.three(m.three(m.one(m.stem(x)))).sign(), "no window"),
        (lambda m, x: m.wide(m.two(m.one(m.stem(x)))).sign(), "no reader site by site"),
        (
            lambda m, x: (lambda y: m.three(m.two(y)) + m.wide(y))(m.one(m.stem(x))).sign(),
            "two readers of the first",
        ),
        (
            lambda m, x: m.three(m.two(m.one(torch.cat([m.stem(x), m.wide(x)], 1)[:, :2]))).sign(),
            "others write into the source's mask",
        ),
        (
            lambda m, x: (lambda y: (m.three(m.two(m.one(y))) + m.wide(y)).sign())(m.stem(x)),
            "a residual from outside",
        ),
        (
            lambda m, x: (lambda y: (m.three(m.aside(m.one(y))) + y).sign())(m.stem(x)),
            "windows without the site in their middle",
        ),
        (
            lambda m, x: m.two(m.aside(m.one(m.stem(x)))).sign(),
            "no reader of such windows site by site",
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_lists_that_are_not_found_ahead(f, why, monkeypatch):
    net = Tiny(
        f, stem=nn.Conv2d(2, 2, 3, padding=1), one=nn.Conv2d(2, 2, 1),
        two=nn.Conv2d(2, 2, 3, padding=1), three=nn.Conv2d(2, 2, 1),
        wide=nn.Conv2d(2, 2, 3, padding=1), down=nn.Conv2d(2, 2, 1, 2),
        aside=nn.Conv2d(2, 2, 2, padding=1, dilation=2), grouped=nn.Conv2d(2, 2, 1, groups=2),
    )  # fmt: skip
    gm, _, _ = ahead(net, whole(1, 2, 6, 7), monkeypatch)
    assert not found(gm), why


def test_what_has_no_room_is_left_alone(monkeypatch):
    asked = []

    def bears(node, plan, wider, ahead):
        asked.append((node.name, wider, ahead))
        return node.name != "three0"

    gm, context, count = ahead(blocks("plain"), whole(1, 2, 6, 7), monkeypatch, bears)
    assert (found(gm), count, len(context.plan.lists)) == ({}, 0, 1)
    assert asked == [("three0", 0.7, True)]
    asked.clear()
    ahead(blocks("plain"), whole(1, 2, 6, 7), monkeypatch, lambda *a, **k: asked.append(1) or True)
    assert len(asked) == 2, "for the reader, and for the first"


def test_no_lists_on_the_cpu():
    with torch.device("cpu"):
        gm, context = before(list_ahead, blocks("plain"), whole(1, 2, 6, 7))
    assert list_ahead(gm, context) == 0


def test_in_the_lowered_graph(monkeypatch):
    gm, context, _ = ahead(blocks("plain", "strided"), whole(2, 2, 6, 7), monkeypatch)
    graph, _ = lower_ops(gm, context)
    verify(graph, "lowered", context.plan)
    calls = [n for n in graph.nodes if n.op == "call_function"]
    names = [n.meta.get("lowered_from", str(n.target)) for n in calls]
    finds = [i for i, n in enumerate(calls) if n.target is find_candidates]
    assert [names[i + 1] for i in finds] == ["one0", "one1"]
    assert all(BESIDE in calls[i].meta for i in finds)
    second = [a.target if isinstance(a, fx.Node) else a for a in calls[finds[1]].args]
    own = list_name(numbers(gm)["two1"])
    assert second == [
        own, counts_name("two1"), mask_name("three0"), None, [3, 3], [2, 2], [1, 1], [1, 1],
        own, counts_name("three1"), None, 1,
    ]  # fmt: skip
    flags = {n.meta["lowered_from"]: n.args[-2:] for n in calls if "conv2d" in str(n.target)}
    assert flags == {
        "stem": (False, False), "one0": (False, False), "two0": (True, False),
        "three0": (True, False), "one1": (True, True), "down1": (False, False),
        "two1": (True, False), "three1": (True, False),
    }  # fmt: skip
    everywhere, _ = compute_everywhere(gm, graph, context.plan)
    assert not [n for n in everywhere.nodes if n.target is find_candidates]


@pytest.mark.parametrize("threshold", [0.0, 10.0])
@pytest.mark.parametrize("kind", ["plain", "down", "strided"])
def test_no_candidate_is_missed(kind, threshold, monkeypatch):
    """Over frames, with thresholds that change: each list holds all candidates of its readers."""
    with torch.device("cpu"):
        x = whole(2, 2, 12, 13)
        net = blocks(kind, "plain")
        gm, _, _ = ahead(net, x, monkeypatch)
        plain, context = before(list_ahead, net, x)
        graph, constants = lower_ops(plain, context)
        state = allocate(context.plan)
    state["thresholds_"].fill_(threshold)
    state[threshold_name("input_0_encoded")].fill_(0)
    frame = fx.GraphModule({**constants, **state}, graph)
    plan = context.plan
    lists = [n.meta[AHEAD] for n in gm.graph.nodes if AHEAD in n.meta]
    assert len(lists) == 2
    further_sites = 0

    def mask(node):
        return state[mask_name(plan.places[node.name].slot)]

    for i in range(8):
        if i == 5:
            state["thresholds_"].fill_(0)
        frame(x)
        for made in lists:
            stride = tuple(made.readers[0].kwargs.get("stride", (1, 1)))
            source = mask(made.source)[:, None].float()
            listed = F.max_pool2d(source, 3, stride, 1)[:, 0].bool()
            for reader in made.readers:
                number = int(state[counts_name(reader.name)][0])
                if reader is made.readers[0]:
                    below = mask(reader.kwargs["x"])[:, None].float()
                    needed = F.max_pool2d(below, 3, stride, 1)[:, 0].bool()
                else:
                    inputs = (reader.kwargs["x"], reader.kwargs.get("residual"))
                    needed = torch.stack([mask(n) for n in inputs if n is not None]).any(0)
                assert needed.sum() == number
                assert not (needed & ~listed).any(), (i, reader.name)
                further_sites += int((listed & ~needed).sum())
        if i < 6:
            x = x.clone()
            x[i % 2, :, i : i + 3, 2 * i : 2 * i + 4] += 1
    assert further_sites > 0 or threshold == 0, "nothing was truncated"
