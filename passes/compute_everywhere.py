"""compute_everywhere: the same frame with convolutions and gates computed at all of their sites.

    deltafx.conv2d(acc, mask, counts, x, x_mask, packed, ...)
    conv2d_everywhere(acc, not_finite, x, weight, ...)

Enters: the graph before and after lowering. Leaves: a lowered graph over the same state, which
gives the same results for every frame, and is the faster one where most of the picture changed. All
other operators stay; whoever runs the graph sets all masks before, so that they follow.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from deltafx.ops.base import constant, value
from deltafx.ops.everywhere import binary_everywhere, conv2d_everywhere
from deltafx.state import NOT_FINITE, Slot, StatePlan, acc_name, place_name


def compute_everywhere(
    gm: fx.GraphModule, lowered: fx.Graph, plan: StatePlan
) -> tuple[fx.Graph, dict[str, Tensor]]:
    """Makes the graph; returns it with the weights that `lowered` holds packed only."""
    filled = _filled_up(plan)
    graph = fx.Graph()
    graph.output(graph.graph_copy(lowered, {}))
    sources = {node.name: node for node in gm.graph.nodes}
    constants: dict[str, Tensor] = {}
    with graph.inserting_before(next(iter(graph.nodes))):
        not_finite = graph.get_attr(NOT_FINITE)
    for node in list(graph.nodes):
        if node.target is torch.ops.deltafx.conv2d.default:
            source = sources[node.meta["lowered_from"]]
            given = _given(node)
            plain = given["groups"] == 1 and given["pre_scale"] is None
            slot = filled.get(given["x"].target) if plain else None
            made = _constants(source, slot)
            constants |= {f"everywhere_{source.name}_{k}": t for k, t in made.items()}
            with graph.inserting_before(node):
                own = {k: graph.get_attr(f"everywhere_{source.name}_{k}") for k in made}
                if slot is not None:
                    own["x"] = graph.get_attr(acc_name(slot.name))
            _replace(
                graph,
                node,
                conv2d_everywhere,
                {"not_finite": not_finite, "packed": given["weight"], **own},
            )
        elif node.target is torch.ops.deltafx.binary.default and _given(node)["act"] in _ACTS:
            _replace(graph, node, binary_everywhere, {})
        elif node.target is torch.ops.deltafx.pool2d.default:
            node.args = tuple({**_given(node), "listed": False}.values())  # all are candidates
        elif node.target is torch.ops.deltafx.find_candidates.default:
            graph.erase_node(node)
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    return graph, constants


_ACTS = ("identity", "relu")


def _given(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator's call by their names."""
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [a.name for a in node.target._schema.arguments]
    return dict(zip(names, node.args, strict=True))


def _replace(graph: fx.Graph, node: fx.Node, function: Any, more: dict[str, fx.Node]) -> None:
    """Calls `function` in an operator's place, with what it takes of the operator's arguments."""
    given = {**_given(node), **more}
    parameters = inspect.signature(function).parameters.values()
    call = tuple(given[p.name] for p in parameters if p.default is p.empty)
    with graph.inserting_before(node):
        graph.call_function(function, call).meta = dict(node.meta)
    graph.erase_node(node)


def _filled_up(plan: StatePlan) -> dict[str, Slot]:
    """Slots wider than what is in them, by the attribute of that: an image's, filled by zeros.

    They can be read whole, as whole vectors, with weights of zero for the rest.
    """
    found = {}
    for slot in plan.slots.values():
        places = {p for p in plan.places.values() if p.slot == slot.name}
        if len(places) == 1 and (place := places.pop()).channels < slot.shape[1]:
            found[place_name(plan, place)] = slot
    return found


def _constants(source: fx.Node, filled: Slot | None) -> dict[str, Tensor]:
    """A convolution's weight and bias as cuDNN wants them, for all channels of a filled-up slot."""
    like = value(source)
    weight, bias = constant(source.kwargs["weight"]), constant(source.kwargs.get("bias"))
    assert weight is not None
    if filled is not None:
        weight = F.pad(weight, (0, 0, 0, 0, 0, filled.shape[1] - weight.shape[1]))
    bias = torch.zeros(weight.shape[0]) if bias is None else bias
    return {
        "weight": weight.to(like.device, like.dtype).contiguous(memory_format=torch.channels_last),
        "rounded_bias": bias.to(like.device, like.dtype).contiguous(),
    }


__all__ = ["compute_everywhere"]
