"""list_ahead: the candidates of a block's convolutions are found beside the first of them.

Enters: the planned graph. Leaves: the same calls; of some convolutions `meta` says what is found
beside them, and which list others read; the plan has these lists.

    m = conv2d(x=r, weight=1x1)                beside it: the windows of n that touch what r changed
    n = conv2d(x=m, weight=3x3)                reads that list,
    o = conv2d(x=n, weight=1x1, residual=r)    and so do these two
    p = conv2d(x=o, weight=1x1)

No site of `m` is active where none of `r` is, none of `n` that is not in the list, and so on: the
list holds all of their candidates. It is there before `m` is done, so whoever reads it knows its
sites before its inputs are there. It may hold more than the candidates, where something was
truncated: sites that are computed and found unchanged. CUDA only.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import fx

from deltafx.ops.conv2d import conv2d
from deltafx.ops.encode import encode
from deltafx.passes.context import Context
from deltafx.passes.share_lists import (
    LIST,
    MOST_FURTHER,
    bears_list,
    is_ours,
    kept_after,
    window_of,
)
from deltafx.state import StatePlan, list_room

AHEAD = "ahead"
"""In `meta` of a convolution: the `ListAhead` that is found beside it."""


@dataclasses.dataclass(frozen=True)
class ListAhead:
    """A list that is made beside the convolution before those that read it.

    Attributes:
        source: Whose active sites the windows of the first reader are to touch.
        readers: The convolutions that read it, in order.
    """

    source: fx.Node
    readers: tuple[fx.Node, ...]


def list_ahead(gm: fx.GraphModule, context: Context) -> int:
    """Finds them; returns how many convolutions read such a list."""
    plan: StatePlan = context.plan
    if not plan.lists:
        return 0
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    alone = plan.alone()
    rooms = list(plan.lists)
    read_until: dict[int, int] = {}  # by list: where its last reader stands
    count = 0
    for node in gm.graph.nodes:
        found = _found_beside(node, order, plan, alone)
        if found is None:
            continue
        # A list that `node` itself may still be reading is not made anew beside it.
        free = (number for number, last in read_until.items() if last < order[node])
        number = next(free, len(rooms))
        if number == len(rooms):
            rooms.append(0)
        first = found.readers[0]
        slot = plan.slots[plan.places[first.name].slot]
        rooms[number] = max(rooms[number], list_room(slot.sites, slot.shape[0]))
        for reader in found.readers:
            reader.meta[LIST] = number
        read_until[number] = max(order[reader] for reader in found.readers)
        node.meta[AHEAD] = found
        count += len(found.readers)
    context.plan = dataclasses.replace(plan, lists=tuple(rooms))
    return count


def _found_beside(
    node: fx.Node, order: dict[fx.Node, int], plan: StatePlan, alone: set[str]
) -> ListAhead | None:
    """What can be found beside a convolution, and should be."""
    if not is_ours(node) or not window_of(node).is_own_site:
        return None
    if node.kwargs.get("residual") is not None or node.kwargs.get("groups", 1) != 1:
        return None
    source: Any = node.kwargs["x"]
    # The frame's own comparison has nothing before it that something could run beside.
    if not source.meta.get("delta") or source.target is encode or source.name not in alone:
        return None
    if not plan.kept(source.name):
        return None  # computed where it did not change, too
    behind = [n for n in node.users if is_ours(n) and LIST not in n.meta]
    if len(behind) != 1:
        return None
    first = behind[0]
    if first.kwargs.get("residual") is not None or max(window_of(first).kernel) == 1:
        return None
    readers = _readers(first, source, order, plan)
    if len(readers) == 1 or not bears_list(first, plan, kept_after(node), ahead=True):
        return None
    # What is not truncated is active wherever it is computed: then nobody else may read it.
    if not first.meta["truncates"] and set(first.users) != {readers[1]}:
        return None
    return ListAhead(source, readers)


def _readers(
    first: fx.Node, source: fx.Node, order: dict[fx.Node, int], plan: StatePlan
) -> tuple[fx.Node, ...]:
    """A convolution, and those behind it that can read the same list, and should."""
    wider = kept_after(first)
    readers = [first]
    while len(readers) <= MOST_FURTHER:
        last = readers[-1]

        def reads(node: fx.Node, last: fx.Node = last) -> bool:
            if not is_ours(node) or LIST in node.meta or node.kwargs["x"] is not last:
                return False
            residual: Any = node.kwargs.get("residual")
            inside = residual is None or residual in readers or _within(residual, first, source)
            return inside and window_of(node).is_own_site and node.meta["truncates"]

        behind = [n for n in last.users if reads(n) and bears_list(n, plan, wider, ahead=True)]
        if not behind:
            break
        readers.append(min(behind, key=order.__getitem__))
    return tuple(readers)


def _within(node: fx.Node, first: fx.Node, source: fx.Node) -> bool:
    """Whether a node's active sites are among the windows of `first` that touch one of `source`.

    So it is for `source`, and for a convolution that reads just the middle of these windows.
    """
    window = window_of(first)
    if not window.has_middle:
        return False
    if node is source:
        return window.stride == [1, 1]
    if node.target is not conv2d or not node.meta.get("delta") or node.kwargs["x"] is not source:
        return False
    its = window_of(node)
    return its.is_point and its.stride == window.stride and node.kwargs.get("residual") is None


__all__ = ["AHEAD", "ListAhead", "list_ahead"]
