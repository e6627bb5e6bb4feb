"""run_beside: convolutions that nothing waits for yet run beside the operators that follow.

Enters: the planned graph. Leaves: the same calls; of some convolutions `meta` says that they run
beside others, each stands right behind what it reads, and the plan has a list for each.

    b = conv2d(x=a)                     b = conv2d(x=a)
    c = conv2d(x=b)                     d = conv2d(x=a)      beside b and c
    d = conv2d(x=a)                     c = conv2d(x=b)
    e = conv2d(x=c, residual=d)         e = conv2d(x=c, residual=d)

A convolution of few candidates takes a part of the GPU and about the same time whatever its size.
Whoever captures a frame may let `d` start together with `b` and wait for it no sooner than at `e`
(`deltafx.beside`). What `d` writes is its own until then: a slot with nobody else's place in it,
and its list. What it reads is written by nobody meanwhile. So neither is a map that is not kept.
One that reads another of them, or is read by one, stays in its row. CUDA only.
"""

from __future__ import annotations

import dataclasses

from torch import fx

from deltafx.ops import delta_op
from deltafx.ops.conv2d import conv2d
from deltafx.ops.encode import encode, is_frame
from deltafx.passes.context import Context
from deltafx.state import StatePlan, list_room

BESIDE = "beside"
"""In `meta` of a convolution that runs beside others: the number of its list."""


def run_beside(gm: fx.GraphModule, context: Context) -> int:
    """Finds them; returns how many."""
    plan: StatePlan = context.plan
    if not plan.lists:
        return 0
    lists = list(plan.lists)
    while (found := _best(gm.graph, plan)) is not None:
        node, source = found
        slot = plan.slots[node.name]
        node.meta[BESIDE] = len(lists)
        lists.append(list_room(slot.sites, slot.shape[0]))
        _move(node, source)
    count = len(lists) - len(plan.lists)
    context.plan = dataclasses.replace(plan, lists=tuple(lists))
    return count


def _best(graph: fx.Graph, plan: StatePlan) -> tuple[fx.Node, fx.Node] | None:
    """The convolution that the most operators could run beside, and the last node that it reads."""
    order: dict[fx.Node, int] = {}
    calls: dict[fx.Node, int] = {}  # operators in a row up to each node
    written: dict[str, int] = {}  # where the last operator stands that writes into a slot
    row = 0
    for i, node in enumerate(graph.nodes):
        row += _is_in_row(node)
        order[node], calls[node] = i, row
        if delta_op(node) and node.meta.get("delta"):
            written[plan.places[node.name].slot] = i
    alone, in_parts = plan.alone(), {slot for slot, _ in plan.seen_in_parts}
    best, most = None, (0, 0)
    for node in graph.nodes:
        if node.target is not conv2d or not _is_in_row(node) or not node.users:
            continue
        if node.name not in alone:
            continue  # an update mask that others write into as well
        inputs = [n for n in node.all_input_nodes if n.op != "get_attr"]
        if not all(n.meta.get("delta") and plan.kept(n.name) for n in (node, *inputs)):
            continue  # memory of a dense call, or not kept: which another may get next
        if any(BESIDE in n.meta for n in (*inputs, *node.users)) or node.name in in_parts:
            continue  # a part is written or read as if it were memory of its own
        source = max(inputs, key=order.__getitem__)
        if any(written[plan.places[n.name].slot] > order[source] for n in inputs):
            continue  # a part of a slot that others still write into
        reader = min(node.users, key=order.__getitem__)
        meanwhile = calls[reader] - _is_in_row(reader) - calls[source] - 1
        # Without a call before it there would be none to begin beside.
        if calls[source] > 0 and meanwhile > 0 and (meanwhile, order[node]) > most:
            best, most = (node, source), (meanwhile, order[node])
    return best


def _is_in_row(node: fx.Node) -> bool:
    """Whether a node is an operator that others wait for in turn; the frame's own come before."""
    if delta_op(node) is None or not node.meta.get("delta") or BESIDE in node.meta:
        return False
    return node.target is not encode or not is_frame(node.kwargs["x"])


def _move(node: fx.Node, source: fx.Node) -> None:
    """Moves a node to right behind another, with the constants that are made on the way there."""
    constants = []
    between = source.next
    while between is not node:
        if between in node.all_input_nodes:
            constants.append(between)
        between = between.next
    for moved in (node, *reversed(constants)):
        if source.next is not moved:
            source.append(moved)


__all__ = ["BESIDE", "run_beside"]
