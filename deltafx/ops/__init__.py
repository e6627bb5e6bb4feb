"""The delta ops: one file an op, everything about it under its one name.

Importing this loads the shared object with the C++ operators. `DELTA_OPS` maps a dense function to
its op; `RAISE` maps an ATen operator to the rule that turns its calls into delta ops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from deltafx.ops import (
    adaptive_pool2d,
    affine,
    binary,
    conv2d,
    conv_transpose2d,
    encode,
    fakes,
    gather_channels,
    global_pool2d,
    layer_norm,
    library,
    pad2d,
    pool2d,
    resize2d,
    separable_conv2d,
    views,
)
from deltafx.ops.base import DeltaOp, Raised

library.load()
fakes.register()

_MODULES = (
    encode,
    conv2d,
    separable_conv2d,
    conv_transpose2d,
    pool2d,
    adaptive_pool2d,
    global_pool2d,
    resize2d,
    binary,
    affine,
    layer_norm,
    gather_channels,
    pad2d,
)

DELTA_OPS: dict[Callable[..., Any], DeltaOp] = {m.OP.dense: m.OP for m in _MODULES}

RAISE: dict[Any, Callable[[fx.Node], Raised]] = {
    target: rule
    for module in (*_MODULES, views)
    for target, rule in getattr(module, "RAISE", {}).items()
}


def delta_op(node: fx.Node) -> DeltaOp | None:
    """The delta op that a node calls (its dense function), if any."""
    return DELTA_OPS.get(node.target) if node.op == "call_function" else None


def is_view(node: fx.Node) -> bool:
    """Whether a node is a view of accumulators."""
    return node.op == "call_function" and node.target in views.VIEWS


__all__ = ["DELTA_OPS", "RAISE", "DeltaOp", "delta_op", "is_view"]
