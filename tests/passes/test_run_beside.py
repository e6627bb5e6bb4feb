"""run_beside: which convolutions need not wait, that nobody else touches their memory meanwhile."""

import dataclasses

import pytest
import torch
from torch import nn

from deltafx.ops import delta_op
from deltafx.passes.compute_everywhere import compute_everywhere
from deltafx.passes.lower_ops import lower_ops
from deltafx.passes.run_beside import BESIDE, run_beside
from deltafx.state import (
    acc_name,
    allocate,
    allocated_bytes,
    counts_name,
    list_name,
    list_room,
    mask_name,
)
from deltafx.verify import verify
from tests.passes.graphs import Tiny, assert_same, before, run, whole
from tests.tangled_net import TangledNet

FIRST = list_room(1000, 2)


def with_lists(gm, context):
    """The planned graph as for a device with lists; how many run beside others."""
    context.plan = dataclasses.replace(context.plan, lists=(FIRST,))
    return run_beside(gm, context)


def beside(net, x):
    """The graph after the pass and the context; asserts what holds for every pass."""
    with torch.device("cpu"):
        gm, context = before(run_beside, net, x)
        count = with_lists(gm, context)
        verify(gm.graph, "planned", context.plan)
        with torch.no_grad():
            out = net(x)
        assert_same(run(gm, x), list(out) if isinstance(out, (list, tuple)) else [out])
        plan, shape = context.plan, str(gm.graph)
        assert run_beside(gm, context) == 0
        assert (context.plan, str(gm.graph)) == (plan, shape), "a second run changed something"
    assert count == len(marked(gm))
    return gm, context


def marked(gm):
    """By name, the number of the list of each that runs beside others."""
    return {n.name: n.meta[BESIDE] for n in gm.graph.nodes if BESIDE in n.meta}


def operators(gm):
    return [n.name for n in gm.graph.nodes if delta_op(n)]


def tiny(f):
    return Tiny(
        f, stem=nn.Conv2d(2, 2, 3, padding=1), one=nn.Conv2d(2, 2, 1),
        two=nn.Conv2d(2, 2, 3, padding=1), three=nn.Conv2d(2, 2, 1), down=nn.Conv2d(2, 2, 1),
        pool=nn.MaxPool2d(3, 1, 1), spread=nn.Conv2d(2, 2, 3, padding=1, groups=2),
    )  # fmt: skip


def bottleneck(m, x):
    x = m.stem(x).relu()
    y = m.three(m.two(m.one(x).relu()).relu())
    return (y + m.down(x)).relu()


def test_the_convolution_of_a_shortcut():
    gm, context = beside(tiny(bottleneck), whole(2, 2, 5, 6))
    assert marked(gm) == {"down": 1}
    assert operators(gm)[1:] == ["stem", "down", "one", "two", "three"]
    assert context.plan.lists == (FIRST, list_room(60, 2))


def test_no_lists_on_the_cpu():
    with torch.device("cpu"):
        gm, context = before(run_beside, tiny(bottleneck), whole(1, 2, 5, 6))
    shape = str(gm.graph)
    assert run_beside(gm, context) == 0
    assert (str(gm.graph), context.plan.lists) == (shape, ())


@pytest.mark.parametrize(
    ("f", "found"),
    [
        (
            lambda m, x: (lambda y: m.one(y) * m.two(y) * m.three(y))(m.stem(x)),
            {"three", "two"},
        ),
        (lambda m, x: (lambda y: (m.two(m.one(y)), m.down(y)))(m.stem(x)), {"down"}),
        (lambda m, x: (lambda y: m.two(m.one(y)) * m.pool(m.down(y)))(m.stem(x)), {"down", "two"}),
        (lambda m, x: (lambda y: m.pool(y) * m.down(y))(m.stem(x)), {"down"}),
        (lambda m, x: (lambda y: m.pool(m.pool(y)) * m.spread(y))(m.stem(x)), {"spread"}),
        (
            lambda m, x: (lambda y: m.two(m.one(y)) * m.down(y).cumsum(2))(m.stem(x)),
            {"down", "two"},
        ),
    ],
    ids=["all but one", "an output", "a pool reads it", "a pool", "depthwise", "a dense reader"],
)  # fmt: skip
def test_what_runs_beside_others(f, found):
    gm, context = beside(tiny(f), whole(1, 2, 5, 6))
    assert set(marked(gm)) == found
    assert sorted(marked(gm).values()) == list(range(1, len(found) + 1))
    assert len(context.plan.lists) == 1 + len(found)


@pytest.mark.parametrize(
    "f",
    [
        lambda m, x: m.three(m.two(m.one(m.stem(x)))),
        lambda m, x: (lambda y: torch.cat([m.one(y), m.two(y), m.down(y)], 1))(m.stem(x)),
        lambda m, x: (lambda y: (m.one(y), m.pool(y)))(x),
        lambda m, x: (lambda y: m.pool(m.pool(y)) * m.pool(y))(m.stem(x)),
    ],
    ids=["a chain", "parts of one slot", "the frame's own readers", "pools alone"],
)
def test_what_stays_in_its_row(f):
    gm, context = beside(tiny(f), whole(1, 2, 5, 6))
    assert marked(gm) == {}
    assert context.plan.lists == (FIRST,)


def test_a_map_whose_parts_are_read_shares_its_mask():
    def f(m, x):
        y = m.stem(x)
        z = m.down(y)
        return m.two(m.one(y)) * m.pool(z), m.pool(z[:, :1])

    gm, _ = beside(tiny(f), whole(1, 2, 5, 6))
    assert "down" not in marked(gm)


def test_a_part_of_a_slot_that_is_still_written_into_is_not_read_beside():
    """`down` reads a part that is there, and `one` marks sites in the same mask meanwhile."""

    def f(m, x):
        y = m.stem(x)
        a = m.pool(y)
        d = m.down(a)
        b = m.two(m.three(y))
        return torch.cat([a, b], 1), d

    gm, context = beside(tiny(f), whole(1, 2, 5, 6))
    places = context.plan.places
    down = next(n for n in gm.graph.nodes if n.name == "down")
    source = down.kwargs["x"].name
    shared = [n for n, p in places.items() if p.slot == places[source].slot]
    assert len(shared) == 3, "the map lies in a concatenation"
    assert "down" not in marked(gm)


def test_one_that_reads_another_stays():
    def f(m, x):
        y = m.stem(x)
        return m.pool(m.pool(m.pool(y))), m.two(m.down(y))

    gm, _ = beside(tiny(f), whole(1, 2, 5, 6))
    assert set(marked(gm)) == {"down"}
    assert operators(gm)[-1] == "two"


def test_in_the_lowered_graph():
    """Marked, with a list of their own, which everything else leaves alone."""
    gm, context = beside(tiny(bottleneck), whole(2, 2, 5, 6))
    graph, _ = lower_ops(gm, context)
    verify(graph, "lowered", context.plan)
    (side,) = (n for n in graph.nodes if BESIDE in n.meta)
    assert side.meta["lowered_from"] == "down"
    names = [a.name for a in side.target._schema.arguments]
    args = dict(zip(names, side.args, strict=True))
    own = {"acc": acc_name, "mask": mask_name, "counts": counts_name}
    for name, of in own.items():
        assert args[name].target == of("down")
    assert (args["memory"].target, args["listed"]) == (list_name(1), False)
    touching = [n for n in graph.nodes if any(a is args["memory"] for a in n.all_input_nodes)]
    assert touching == [side]
    for n in graph.nodes:
        if n is not side and "lowered_from" in n.meta:
            assert n.args[-3].target == list_name(0) or n.target != side.target
    everywhere, _ = compute_everywhere(gm, graph, context.plan)
    assert "down" in [n.meta.get("lowered_from") for n in everywhere.nodes]
    with torch.device("cpu"):
        tensors = allocate(context.plan)
    assert allocated_bytes(tensors.values()) == context.plan.bytes()


@pytest.mark.parametrize("seed", range(40))
def test_of_any_net(seed):
    """Whatever stands between one and its first reader leaves its memory alone, and its inputs."""
    with torch.device("cpu"), torch.no_grad():
        gm, context = before(run_beside, TangledNet(seed), torch.randn(1, 3, 5, 6))
        with_lists(gm, context)
        verify(gm.graph, "planned", context.plan)
    plan, nodes = context.plan, list(gm.graph.nodes)
    assert sorted(marked(gm).values()) == list(range(1, len(plan.lists)))
    for i, node in enumerate(nodes):
        if BESIDE not in node.meta:
            continue
        slot, sources = plan.slots[node.name], node.all_input_nodes
        assert plan.lists[node.meta[BESIDE]] == list_room(slot.sites, slot.shape[0])
        assert [p for p in plan.places.values() if p.slot == node.name] == [plan.places[node.name]]
        reader = min(nodes.index(n) for n in node.users)
        read = {plan.places[n.name].slot for n in sources if n.op != "get_attr"}
        others = [n for n in nodes[i + 1 : reader] if delta_op(n) and n.meta.get("delta")]
        assert any(BESIDE not in n.meta for n in others)
        for other in others:
            assert plan.places[other.name].slot not in {node.name, *read}
        assert not any(BESIDE in n.meta for n in (*sources, *node.users))
