"""verify: a hand-broken graph is caught, and the node named."""

import dataclasses

import pytest
import torch
from torch import nn

from deltafx.config import Config
from deltafx.errors import VerificationError
from deltafx.ops.affine import affine
from deltafx.passes import PIPELINE, Context
from deltafx.passes.lower_ops import lower_ops
from deltafx.verify import verify
from tests.passes.graphs import Tiny, node, normalized, whole

pytestmark = pytest.mark.usefixtures("on_device")

aten = torch.ops.aten


def after(stage):
    """A small graph in a stage, with its context."""
    net = Tiny(
        lambda m, x: torch.cat([m.b(m.a(x).relu()), x], 1).sin(),
        a=nn.Conv2d(2, 2, 3, padding=1), b=nn.Conv2d(2, 2, 1),
    )  # fmt: skip
    gm, context = normalized(net, whole(1, 2, 5, 5)), Context(Config())
    last = max([i for i, (_, s) in enumerate(PIPELINE) if s == stage])
    for rewrite, _ in PIPELINE[: last + 1]:
        rewrite(gm, context)
    verify(gm.graph, stage, context.plan)
    return gm, context


def insert(gm, target, *args, **kwargs):
    """A call before the output, whose result is returned too."""
    out = next(n for n in gm.graph.nodes if n.op == "output")
    with gm.graph.inserting_before(out):
        new = gm.graph.call_function(target, args, kwargs)
    out.args = ([*out.args[0], new],)
    new._rename("broken")
    return new


def expect(gm, stage, reason, name="broken", plan=None):
    with pytest.raises(VerificationError, match=f"after {stage}: node '{name}' .*{reason}"):
        verify(gm.graph, stage, plan)


@pytest.mark.parametrize("stage", ["normalized", "raised", "assigned"])
def test_a_node_without_a_value(stage):
    gm, _ = after(stage)
    insert(gm, aten.relu.default, node(gm, "sin"))
    expect(gm, stage, "has no meta")


def test_a_call_of_a_method():
    gm, _ = after("normalized")
    out = next(n for n in gm.graph.nodes if n.op == "output")
    with gm.graph.inserting_before(out):
        new = gm.graph.create_node("call_method", "relu", (node(gm, "sin"),), name="broken")
    new.meta["val"] = node(gm, "sin").meta["val"]
    expect(gm, "normalized", "is a call_method")


def test_an_attribute_that_is_no_tensor():
    gm, _ = after("normalized")
    gm.number = 3
    first = next(iter(gm.graph.nodes))
    with gm.graph.inserting_before(first):
        new = gm.graph.create_node("get_attr", "number", name="broken")
    new.meta["val"] = 3
    expect(gm, "normalized", "reads no tensor")


def test_a_write_into_an_argument():
    gm, _ = after("normalized")
    sin = node(gm, "sin")
    insert(gm, aten.relu_.default, sin).meta["val"] = sin.meta["val"]
    expect(gm, "normalized", "writes into its argument")


def test_a_python_function():
    gm, _ = after("raised")
    sin = node(gm, "sin")
    insert(gm, torch.relu, sin).meta["val"] = sin.meta["val"]
    expect(gm, "raised", "no ATen overload")


def test_positional_arguments_of_a_dense_function():
    gm, _ = after("raised")
    sin = node(gm, "sin")
    insert(gm, affine, sin).meta["val"] = sin.meta["val"]
    expect(gm, "raised", "positional")


def test_a_dense_tensor_where_a_delta_one_is_needed():
    gm, _ = after("assigned")
    sin = node(gm, "sin")
    new = insert(gm, affine, x=sin)
    new.meta |= {"val": sin.meta["val"], "delta": True}
    expect(gm, "assigned", "reads 'sin', which is dense")


def test_a_node_without_a_place():
    gm, context = after("planned")
    name = node(gm, "encode").name
    places = {k: v for k, v in context.plan.places.items() if k != name}
    plan = dataclasses.replace(context.plan, places=places)
    expect(gm, "planned", "has no place", name, plan)


def test_a_place_in_no_slot():
    gm, context = after("planned")
    name = node(gm, "encode").name
    slots = {k: v for k, v in context.plan.slots.items() if k != context.plan.places[name].slot}
    plan = dataclasses.replace(context.plan, slots=slots)
    expect(gm, "planned", "does not exist", plan=plan, name=name)


def test_a_place_that_does_not_fit():
    gm, context = after("planned")
    name = node(gm, "encode").name
    wrong = dataclasses.replace(context.plan.places[name], channels=1)
    plan = dataclasses.replace(context.plan, places={**context.plan.places, name: wrong})
    expect(gm, "planned", "does not fit", name, plan)


def test_a_write_into_an_accumulator():
    gm, context = after("planned")
    graph, _ = lower_ops(gm, context)
    verify(graph, "lowered", context.plan)
    acc = next(n for n in graph.nodes if n.op == "get_attr" and n.target.startswith("acc_"))
    out = next(n for n in graph.nodes if n.op == "output")
    with graph.inserting_before(out):
        graph.create_node("call_function", aten.zero_.default, (acc,), name="broken")
    with pytest.raises(VerificationError, match="'broken' writes into the state"):
        verify(graph, "lowered", context.plan)
