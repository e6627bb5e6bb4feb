"""What must hold after each stage; `verify` names the node that breaks it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from deltafx.errors import VerificationError
from deltafx.ops import delta_op, is_view
from deltafx.ops.base import constant
from deltafx.state import StatePlan


def verify(graph: fx.Graph, stage: str, plan: StatePlan | None = None) -> None:
    """Checks the invariants of a stage.

    Args:
        graph: The graph that the stage left.
        stage: `"normalized"`, `"raised"`, `"assigned"`, `"planned"` or `"lowered"`.
        plan: For the last two.

    Raises:
        VerificationError: One is broken; the message names the node.
    """
    graph.lint()
    for node in graph.nodes:
        for check in _CHECKS[stage]:
            reason = check(node, plan)
            if reason:
                raise VerificationError(f"after {stage}: node {node.name!r} {reason}")


def _has_value(node: fx.Node, plan: StatePlan | None) -> str:
    return "" if node.op == "output" or "val" in node.meta else "has no meta['val']"


def _known_kind(node: fx.Node, plan: StatePlan | None) -> str:
    if node.op in ("call_module", "call_method"):
        return f"is a {node.op}"
    if node.op == "get_attr" and constant(node) is None:
        return "reads no tensor"
    return ""


def _functional(node: fx.Node, plan: StatePlan | None) -> str:
    if node.op != "call_function" or node.meta.get("mutated"):
        return ""
    if isinstance(node.target, torch._ops.OpOverload):
        return "writes into its argument" if node.target._schema.is_mutable else ""
    known = node.target is operator.getitem or delta_op(node) or is_view(node)
    return "" if known else f"calls {node.target}, which is no ATen overload"


def _keywords_only(node: fx.Node, plan: StatePlan | None) -> str:
    ours = delta_op(node) or is_view(node)
    return "has positional arguments" if ours and node.args else ""


def _reads_delta(node: fx.Node, plan: StatePlan | None) -> str:
    op = delta_op(node)
    if op is None or not node.meta.get("delta"):
        return ""
    for name in op.inputs:
        source: Any = node.kwargs.get(name)
        if source is not None and not source.meta.get("delta"):
            return f"reads {source.name!r}, which is dense, as a delta input"
    return ""


def _has_place(node: fx.Node, plan: StatePlan | None) -> str:
    if not node.meta.get("delta"):
        return ""
    assert plan is not None
    place = plan.places.get(node.name)
    if place is None:
        return "has no place"
    slot = plan.slots.get(place.slot)
    if slot is None:
        return f"lies in the slot {place.slot!r}, which does not exist"
    val: Tensor = node.meta["val"]
    n, c, h, w = slot.shape
    n *= plan.turns.get(node.name, 1) if slot.scratch is not None else 1
    fits = (val.shape[0], *val.shape[2:]) == (n, h, w) and place.channels == val.shape[1]
    if not fits or place.start + place.channels > c or val.dtype != slot.dtype:
        return f"does not fit its place {place} in {slot}"
    return ""


def _state_is_ours(node: fx.Node, plan: StatePlan | None) -> str:
    """Only delta operators, and the clearing of the masks, write into anything."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return ""
    if target.namespace == "deltafx" or not target._schema.is_mutable:
        return ""
    first = node.args[0] if node.args else None
    if isinstance(first, fx.Node) and first.op == "get_attr" and first.target != "masks":
        return "writes into the state or a constant"
    return ""


_BASE: list[Callable[[fx.Node, StatePlan | None], str]] = [_has_value, _known_kind, _functional]

_CHECKS: dict[str, list[Callable[[fx.Node, StatePlan | None], str]]] = {
    "normalized": _BASE,
    "raised": [*_BASE, _keywords_only],
    "assigned": [*_BASE, _keywords_only, _reads_delta],
    "planned": [*_BASE, _keywords_only, _reads_delta, _has_place],
    "lowered": [_state_is_ours],
}
