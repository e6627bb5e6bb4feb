"""adaptive_pool2d: maximum or average over windows that cut the input into a given size."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from deltafx.ops.activation import activate
from deltafx.ops.base import Call, DeltaOp, Raised, Refusal, arguments, is_map, value
from deltafx.ops.global_pool2d import global_pool2d

aten = torch.ops.aten


def adaptive_pool2d(
    x: Tensor,
    kind: str,
    size: Sequence[int],
    act: str = "identity",
    act_params: Sequence[float] = (),
    act_weight: Tensor | None = None,
) -> Tensor:
    """The dense function.

    Args:
        x: [N, C, H, W], float.
        kind: `"max"` or `"avg"`.
        size: (H', W').
        act: The activation's name.
        act_params: Its numbers.
        act_weight: [C], for `prelu`.

    Returns:
        [N, C, H', W'].
    """
    pool = F.adaptive_max_pool2d if kind == "max" else F.adaptive_avg_pool2d
    return activate(pool(x, list(size)), act, act_params, act_weight)


def raise_adaptive_avg(node: fx.Node) -> Raised:
    """`aten.adaptive_avg_pool2d(x, size)` -> `adaptive_pool2d`, `global_pool2d` for size 1."""
    x = arguments(node)["self"]
    if not is_map(x):
        return Refusal("the input of this pool is not [N, C, H, W]")
    size = tuple(int(s) for s in value(node).shape[2:])
    if size == (1, 1):
        return Call(global_pool2d, {"x": x})
    return Call(adaptive_pool2d, {"x": x, "kind": "avg", "size": size})


def raise_adaptive_max(node: fx.Node) -> Raised:
    """`getitem(aten.adaptive_max_pool2d(x, size), 0)` -> `adaptive_pool2d(x=, kind="max", ...)`."""
    pool: Any = node.args[0]
    if pool.target != aten.adaptive_max_pool2d.default or node.args[1] != 0:
        return None
    x = pool.args[0]
    if not is_map(x):
        return Refusal("the input of this pool is not [N, C, H, W]")
    size = tuple(int(s) for s in value(node).shape[2:])
    return Call(adaptive_pool2d, {"x": x, "kind": "max", "size": size})


def prepare(node: fx.Node, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The accumulator tells the size."""
    return {k: v for k, v in kwargs.items() if k != "size"}


OP = DeltaOp(adaptive_pool2d, prepare=prepare)

RAISE = {
    aten.adaptive_avg_pool2d.default: raise_adaptive_avg,
    operator.getitem: raise_adaptive_max,
}
