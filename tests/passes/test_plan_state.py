"""plan_state: places, before anything is allocated."""

import pytest
import torch
from torch import nn

from deltafx.passes.plan_state import plan_state
from deltafx.state import Place, allocate, allocated_bytes
from tests.passes.graphs import Tiny, before, calls, rewritten, whole

pytestmark = pytest.mark.usefixtures("on_device")


def planned(f, *shape, **modules):
    torch.manual_seed(0)
    net, x = Tiny(f, **modules), whole(*shape)
    rewritten(plan_state, net, x)
    gm, context = before(plan_state, net, x)
    count = plan_state(gm, context)
    assert count == len(context.plan.slots)
    return gm, context.plan


def three():
    return {name: nn.Conv2d(2, 3, 1) for name in "abc"}


def test_every_node_has_its_slot():
    _, plan = planned(
        lambda m, x: m.b(m.a(x).relu().repeat(1, 1, 1, 1)[:, :2]), 1, 2, 4, 5, **three()
    )
    assert plan.slots["a"].shape == (1, 3, 4, 5)
    assert plan.places["a"] == Place("a", 0, 3)


def test_the_parts_of_a_concatenation_are_written_in_place():
    gm, plan = planned(
        lambda m, x: torch.cat([m.a(x), m.b(x), m.c(x)], 1).sign(), 1, 2, 4, 4, **three()
    )
    assert set(plan.slots) == {"input_0_encoded", "cat"}
    assert plan.places["cat"] == Place("cat", 0, 9)
    assert [plan.places[n] for n in "abc"] == [Place("cat", 3 * i, 3) for i in range(3)]
    assert "gather_channels" not in calls(gm)


def test_nested_concatenations_share_a_slot():
    def f(m, x):
        inner = torch.cat([m.a(x), m.b(x)], 1)
        return torch.cat([m.c(x), inner], 1).sign() + inner.sum() * 0

    _, plan = planned(f, 1, 2, 4, 4, **three())
    assert plan.places["cat"] == Place("cat_1", 3, 6)
    assert plan.places["b"] == Place("cat_1", 6, 3)
    assert set(plan.slots) == {"input_0_encoded", "cat_1"}


def test_densenet_lies_in_one_slot():
    def f(m, x):
        a = m.a(x)
        b = m.b(x)
        first = torch.cat([a, b], 1)
        return first.relu(), torch.cat([a, b, m.c(x)], 1).sign()

    gm, plan = planned(f, 1, 2, 4, 4, **three())
    assert plan.places["cat"] == Place("cat_1", 0, 6)
    assert "gather_channels" not in calls(gm)


@pytest.mark.parametrize(
    "f",
    [
        lambda m, x: torch.cat([m.a(x), m.b(x)[:, 1:]], 1),
        lambda m, x: (lambda y: torch.cat([y, y], 1))(m.a(x)),
        lambda m, x: (lambda y, z: (torch.cat([y, z], 1), torch.cat([z, y], 1)))(m.a(x), m.b(x)),
    ],
    ids=["a slice", "twice the same", "in two orders"],
)
def test_what_cannot_be_moved_is_copied(f):
    gm, plan = planned(f, 1, 2, 4, 4, **three())
    copies = [n for n in gm.graph.nodes if n.op == "call_function" and "copy" in n.name]
    assert copies
    assert not {c.name for c in copies} & set(plan.truncating)


def test_a_slice_is_a_part_of_its_source():
    _, plan = planned(lambda m, x: m.c(m.a(x)[:, 1:]), 1, 2, 4, 4, **three())
    assert Place("a", 1, 2) in plan.places.values()


def test_a_slice_of_a_slice_of_a_concatenation():
    _, plan = planned(
        lambda m, x: torch.cat([m.a(x), m.b(x)], 1)[:, 1:][:, 1:4].sign(), 1, 2, 4, 4, **three()
    )
    assert Place("cat", 2, 3) in plan.places.values()


@pytest.mark.parametrize(
    "f",
    [
        lambda m, x: m.a(x),
        lambda m, x: torch.cat([m.a(x), m.b(x)], 1) * m.c(x).mean((2, 3), keepdim=True)[:, :1],
        lambda m, x: x.sign(),
    ],
    ids=["one", "with a workspace", "nothing"],
)
def test_the_bytes_are_known_before_and_right(f):
    net = Tiny(f, **three())
    gm, context = before(plan_state, net, whole(2, 2, 17, 19))
    plan_state(gm, context)
    tensors = allocate(context.plan)
    assert allocated_bytes(tensors.values()) == context.plan.bytes()
    assert all(t.is_contiguous() or t.dim() == 4 for t in tensors.values())
