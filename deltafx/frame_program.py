"""FrameProgram: a compiled model as a plain module, for `torch.export`.

Enters: an instance and its tensors. Leaves: a module over frames alone, whose buffers are the state
and whose graph says everything that happens in a frame: which part of which arena a node reads and
writes, and when thresholds are 0. It depends on the operators and on nothing else of deltafx, so
what `torch.export.export` makes of it can be saved, loaded and run elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from deltafx.passes.emit_instance import Instance
from deltafx.state import (
    COUNTS,
    MASKS,
    SCALES,
    SCRATCH,
    THRESHOLDS,
    StatePlan,
    acc_name,
    counts_name,
    list_name,
    mask_name,
    place_name,
    scale_name,
    scale_room,
    threshold_name,
)

aten = torch.ops.aten

PHASE, HELD = "phase", "held_thresholds"


class FrameProgram(nn.Module):
    """One input signature of a compiled model; made by `DeltaModule.frame_program`.

    It has its own copy of the state and of the packed weights: it goes on from the frame that was
    seen last, and follows no weights.
    """

    def __init__(
        self,
        instance: Instance,
        tensors: Mapping[str, Tensor],
        thresholds: Tensor | None,
        refresh_every: int,
        age: int,
    ) -> None:
        """Copies the tensors.

        Args:
            instance: The compiled model.
            tensors: Its state and constants by attribute name.
            thresholds: Those of a frame that is no refresh; of none, where nothing truncates.
            refresh_every: Every so many frames all thresholds are 0; 0 is never.
            age: Frames since the last refresh.
        """
        super().__init__()
        plan = instance.plan
        held = torch.zeros_like(tensors[THRESHOLDS]) if thresholds is None else thresholds
        kept = {MASKS, COUNTS, SCALES, *instance.constants, *plan.workspaces}
        kept |= {acc_name(s.name) for s in plan.slots.values() if s.scratch is None}
        kept |= {SCRATCH} if plan.scratch_bytes() else set()
        kept |= {list_name(i) for i in range(len(plan.lists))}
        buffers = {name: _copied(tensors[name]) for name in kept}
        # Not a count: AOTInductor folds a buffer of one value, though it is written to.
        phase = torch.arange(refresh_every) == (-age) % max(1, refresh_every)
        buffers |= {HELD: _copied(held), PHASE: phase.to(plan.device)}
        graph = _with_views(instance.graph, plan, refresh_every)
        used = {node.target for node in graph.nodes if node.op == "get_attr"}
        self.frame = fx.GraphModule({n: b for n, b in buffers.items() if n in used}, graph)
        self.out_spec = instance.out_spec

    def forward(self, *frames: Tensor) -> Any:
        """Feeds one frame.

        Args:
            *frames: The tensors among the model's arguments, in order.

        Returns:
            What the model returns.
        """
        return pytree.tree_unflatten(list(self.frame(*frames)), self.out_spec)


def _copied(t: Tensor) -> Tensor:
    return t.detach().clone(memory_format=torch.preserve_format)


def _with_views(lowered: fx.Graph, plan: StatePlan, refresh_every: int) -> fx.Graph:
    """The lowered graph over arenas alone: what was an attribute for a part is a view of one."""
    graph = fx.Graph()
    parts = _parts(plan)
    made: dict[str, fx.Node] = {}
    renamed: dict[fx.Node, fx.Node] = {}

    def call(target: Callable[..., Any], *args: Any) -> fx.Node:
        return graph.call_function(target, args)

    def attribute(name: str) -> fx.Node:
        if name not in made:
            if name == THRESHOLDS:
                made[name] = _thresholds(graph, refresh_every)
            elif name in parts:
                base, views = parts[name]
                node = attribute(base)
                for target, *args in views:
                    node = call(target, node, *args)
                made[name] = node
            else:
                made[name] = graph.get_attr(name)
        return made[name]

    for node in lowered.nodes:
        if node.op == "get_attr":
            renamed[node] = attribute(str(node.target))
        elif node.op == "output":
            graph.output(fx.node.map_arg(node.args[0], renamed.__getitem__))
        else:
            renamed[node] = graph.node_copy(node, renamed.__getitem__)
    graph.lint()
    return graph


def _thresholds(graph: fx.Graph, refresh_every: int) -> fx.Node:
    """The thresholds of this frame: 0 where the first of the phases is true; then they move up."""
    held = graph.get_attr(HELD)
    if not refresh_every:
        return held
    zeros = graph.call_function(aten.zeros_like.default, (held,))
    if refresh_every == 1:
        return zeros
    phase = graph.get_attr(PHASE)
    due = graph.call_function(aten.select.int, (phase, 0, 0))
    chosen = graph.call_function(aten.where.self, (due, zeros, held))
    moved = graph.call_function(aten.roll.default, (phase, [-1]))
    graph.call_function(aten.copy_.default, (phase, moved))
    return chosen


def _parts(plan: StatePlan) -> dict[str, tuple[str, list[tuple[Any, ...]]]]:
    """By the name of an attribute that is a view: its base, and the calls that make the view."""
    parts: dict[str, tuple[str, list[tuple[Any, ...]]]] = {}
    starts = plan.first_sites()
    for slot in plan.slots.values():
        n, c, h, w = slot.shape
        if slot.scratch is not None:
            own = (aten.slice.Tensor, 0, slot.scratch, slot.scratch + slot.map_bytes)
            rows = [(aten.view.dtype, slot.dtype), (aten.view.default, [n, h, w, c])]
            turned = (aten.permute.default, [0, 3, 1, 2])
            parts[acc_name(slot.name)] = (SCRATCH, [own, *rows, turned])
        first = starts[slot.name]
        cut = (aten.slice.Tensor, 0, first, first + slot.sites)
        parts[mask_name(slot.name)] = (MASKS, [cut, (aten.view.default, [n, h, w])])
    for name, some in plan.parts():
        n = plan.slots[name].shape[0]
        turn = (aten.slice.Tensor, 0, some.first(n), some.first(n) + n // some.count)
        parts[acc_name(name, some)] = (acc_name(name), [turn])
        parts[mask_name(name, some)] = (mask_name(name), [turn])
    for place in plan.places.values():
        name, base = place_name(plan, place), acc_name(place.slot)
        if name != base:
            end = place.start + place.channels
            parts[name] = (base, [(aten.slice.Tensor, 1, place.start, end)])
    for i, (node, part) in enumerate(plan.rows()):
        parts[counts_name(node, part)] = (COUNTS, [(aten.select.int, 0, i)])
    first = 0
    for i, (node, channels) in enumerate(plan.truncating.items()):
        parts[threshold_name(node)] = (THRESHOLDS, [(aten.select.int, 0, i)])
        parts[scale_name(node)] = (SCALES, [(aten.slice.Tensor, 0, first, first + channels)])
        first += scale_room(channels)
    return parts


__all__ = ["FrameProgram"]
