"""plan_state: every delta node gets a place; nothing is allocated.

Enters: the graph with `meta["delta"]`. Leaves: `context.plan`, a frozen `StatePlan`. A
concatenation's producers write into slices of its slot, so that it costs nothing:

    concat(maps=[a, b])             a -> slot[0:Ca]   b -> slot[Ca:Ca+Cb]

Concatenations are placed from the widest down; one whose parts already lie side by side (DenseNet)
is a slice of another's slot. A part that cannot be moved there (it is a view, or lies in another
concatenation) is copied by a `gather_channels`, which works at active sites only.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from deltafx.ops import delta_op, is_view
from deltafx.ops.base import Call, value
from deltafx.ops.encode import encode
from deltafx.ops.gather_channels import gather_channels
from deltafx.ops.views import concat, slice_channels
from deltafx.passes.context import Context, insert_call
from deltafx.state import Place, Slot, StatePlan, list_room


def plan_state(gm: fx.GraphModule, context: Context) -> int:
    """Plans; returns the number of slots."""
    places = _place_concats(gm)
    slots: dict[str, Slot] = {}
    for node in gm.graph.nodes:
        if not node.meta.get("delta") or node.target is slice_channels:
            continue
        if node not in places:
            places[node] = Place(node.name, 0, _channels(node))
        if places[node].slot == node.name:
            n, c, h, w = (int(s) for s in value(node).shape)
            slots[node.name] = Slot(node.name, (n, _room(node, c), h, w), value(node).dtype)
    workspaces: dict[str, tuple[int, ...]] = {}
    for node in gm.graph.nodes:
        if node.target is slice_channels and node.meta.get("delta"):
            outer = places[node.kwargs["x"]]
            start = outer.start + node.kwargs["start"]
            places[node] = Place(outer.slot, start, node.kwargs["length"])
        op = delta_op(node)
        if op is not None and op.workspace is not None:
            for name, shape in op.workspace(node).items():
                workspaces[f"{name}_{node.name}"] = shape
    operators = [n for n in gm.graph.nodes if n.meta.get("delta") and not is_view(n)]
    device = value(operators[0]).device if operators else _device(gm)
    context.plan = StatePlan(
        slots=slots,
        places={node.name: place for node, place in places.items()},
        nodes=tuple(n.name for n in operators),
        truncating={n.name: _channels(n) for n in operators if n.meta["truncates"]},
        workspaces=workspaces,
        device=device,
        lists=(_longest_list(operators),) if device.type == "cuda" and operators else (),
    )
    return len(slots)


def _longest_list(operators: list[fx.Node]) -> int:
    """How many ints a list takes up that is long enough for every operator that takes one.

    What keeps sums has an int behind it for each of them.
    """
    rooms = [0]
    for node in operators:
        op, (n, _, h, w) = delta_op(node), value(node).shape
        assert op is not None
        if any(a.name == "memory" for a in op.operator._schema.arguments):
            sums = op.workspace(node).values() if op.workspace is not None else ()
            rooms.append(list_room(n * h * w, n) + sum(math.prod(s[:-1]) for s in sums))
    return max(rooms)


def _room(node: fx.Node, channels: int) -> int:
    """An image's channels in half precision lie four apart on CUDA, where one load reads a site."""
    image = node.target is encode and channels < 4
    half = value(node).device.type == "cuda" and value(node).dtype.itemsize == 2
    return 4 if image and half else channels


def _device(gm: fx.GraphModule) -> Any:
    inputs = (value(n).device for n in gm.graph.nodes if n.op == "placeholder")
    return next(inputs, torch.device("cpu"))


def _channels(node: fx.Node) -> int:
    return int(value(node).shape[1])


def _place_concats(gm: fx.GraphModule) -> dict[fx.Node, Place]:
    concats = [n for n in gm.graph.nodes if n.target is concat and n.meta.get("delta")]
    places: dict[fx.Node, Place] = {}
    for node in sorted(concats, key=_channels, reverse=True):
        if node in places:
            continue  # a part of a wider one
        found = _side_by_side(node, places)
        if found is not None:
            places[node] = found
        else:
            _place(gm, node, Place(node.name, 0, _channels(node)), places)
    return places


def _side_by_side(node: fx.Node, places: dict[fx.Node, Place]) -> Place | None:
    """The slice that a concatenation already is, if its parts lie in order in one slot."""
    maps: Any = node.kwargs["maps"]
    first = places.get(maps[0])
    if first is None:
        return None
    start = first.start
    for part in maps:
        if places.get(part) != Place(first.slot, start, _channels(part)):
            return None
        start += _channels(part)
    return Place(first.slot, first.start, _channels(node))


def _place(gm: fx.GraphModule, node: fx.Node, place: Place, places: dict[fx.Node, Place]) -> None:
    """Places a concatenation and, slice by slice, its parts."""
    places[node] = place
    start = place.start
    parts: list[fx.Node] = []
    for part in node.kwargs["maps"]:
        slice_ = Place(place.slot, start, _channels(part))
        start += _channels(part)
        movable = part not in places and part.target is not slice_channels
        if not movable:
            name = f"{node.name}_copy_{len(parts)}"
            part = insert_call(gm, Call(gather_channels, {"x": part}), node, value(part), name)
            part.meta |= {"delta": True, "truncates": False, "region": node.meta["region"]}
        if part.target is concat:
            _place(gm, part, slice_, places)
        else:
            places[part] = slice_
        parts.append(part)
    node.kwargs = {"maps": parts}
