"""list_ahead: the candidates of several convolutions are found beside the one before them.

Enters: the planned graph. Leaves: the same calls; of some convolutions `meta` says that their
candidates are found ahead of them, and the plan has lists for that.

    m = conv2d(x=r, weight=1x1)                 beside it: the windows of n that touch an active site of r
    n = conv2d(x=m, weight=3x3)                 takes that list
    q = conv2d(x=n, weight=1x1, residual=r)     and so do these, before n is done
    s = conv2d(x=q, weight=1x1)

No site of `m` is active where none of `r` is, so the list holds all candidates of `n`, and of those
that read it site by site. It may hold more, where some of these were truncated: sites that are
computed and found unchanged. CUDA only.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from typing import Any

from torch import fx

from deltafx.ops.base import constant
from deltafx.ops.conv2d import conv2d
from deltafx.ops.encode import encode
from deltafx.passes.context import Context
from deltafx.passes.run_beside import BESIDE
from deltafx.passes.share_lists import FURTHER, LIST, FurtherList, _is_ours, _window, bears_list
from deltafx.state import StatePlan, list_room

AHEAD = "ahead"

_MOST = 2


def list_ahead(gm: fx.GraphModule, context: Context) -> int:
    plan: StatePlan = context.plan
    if not plan.lists or os.environ.get("DX_AHEAD") == "0":
        return 0
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    owners = Counter(place.slot for place in plan.places.values())
    rooms = list(plan.lists)
    sets: list[tuple[list[int], int]] = []  # lists, and the order of the last that reads them
    count = 0
    for m in gm.graph.nodes:
        found = _group(m, order, plan, owners)
        if found is None:
            continue
        n, readers = found
        free = next((i for i, (_, last) in enumerate(sets) if last < order[m]), None)
        if free is None:
            free = len(sets)
            sets.append(([len(rooms)], -1))
            rooms.append(0)
        (number,) = sets[free][0]
        slot = plan.slots[plan.places[n.name].slot]
        for node in (n, *readers):
            node.meta[LIST] = number
            rooms[number] = max(rooms[number], list_room(slot.sites, slot.shape[0]))
        n.meta[FURTHER] = tuple(FurtherList(q, None, 1) for q in readers)
        m.meta[AHEAD] = n
        sets[free] = ([number], max(order[node] for node in (n, *readers)))
        count += 1 + len(readers)
    context.plan = dataclasses.replace(plan, lists=tuple(rooms))
    return count


def _plain(node: fx.Node) -> bool:
    """Pointwise, and nothing but its input makes a site a candidate."""
    kernel, _, padding, _ = _window(node)
    return kernel == [1, 1] and padding == [0, 0] and node.kwargs.get("residual") is None


def _group(m: fx.Node, order: Any, plan: StatePlan, owners: Any) -> Any:
    if not _is_ours(m) or not _plain(m) or _window(m)[1] != [1, 1]:
        return None
    r: Any = m.kwargs["x"]
    if r.op == "placeholder" or r.target is encode or not r.meta.get("delta"):
        return None
    if plan.places[r.name].slot != r.name or owners[r.name] > 1:
        return None
    after = [u for u in m.users if _is_ours(u) and u.kwargs["x"] is m and u.kwargs.get("residual") is None]
    if len(after) != 1 or LIST in after[0].meta:
        return None
    n = after[0]
    kernel, stride, padding, dilation = _window(n)
    dw = n.kwargs.get("groups", 1) > 1 and os.environ.get("DX_DW") == "1"
    if max(kernel) == 1 or not (n.meta["truncates"] or dw):
        return None
    if not dw and not bears_list(n, plan, 0.25, True):
        return None
    centred = all(p % d == 0 and p // d < k for p, d, k in zip(padding, dilation, kernel))
    reach = max((k - 1) * d / (2 * s) for k, s, d in zip(kernel, stride, dilation, strict=True))
    wider = max(0.25, 0.7 * reach)

    def within(node: Any) -> bool:
        if node in inside:
            return True
        if not centred:
            return False
        if node is r and stride == [1, 1]:
            return True
        return (
            node.target is conv2d and node.meta.get("delta") and node.kwargs["x"] is r
            and _plain(node) and _window(node)[1] == stride
        )

    inside = {n}
    readers: list[fx.Node] = []
    most = int(os.environ.get("DX_MOST", _MOST))
    at = n
    while len(readers) < most:
        nexts = [u for u in at.users if _is_ours(u) and u.kwargs["x"] is at and LIST not in u.meta]
        nexts = [u for u in nexts if _window(u)[0] == [1, 1] and _window(u)[2] == [0, 0] and _window(u)[1] == [1, 1]]
        nexts = [u for u in nexts if u.kwargs.get("residual") is None or within(u.kwargs["residual"])]
        nexts = [u for u in nexts if u.meta["truncates"] and bears_list(u, plan, wider, True)]
        if not nexts:
            break
        at = min(nexts, key=order.__getitem__)
        inside.add(at)
        readers.append(at)
    return (n, readers) if readers else None


__all__ = ["AHEAD", "list_ahead"]
