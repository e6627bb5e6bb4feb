"""binary: y = act(a op b) for add, sub, mul, div and max.

Each operand has the output's shape, or is a gate: [N, C, 1, 1], [N, 1, H, W] or one value. When a
site of a gate over space moves, every site of that stream is a candidate. A constant operand that
differs by channel alone becomes an `affine`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from deltafx.ops.activation import activate
from deltafx.ops.affine import affine
from deltafx.ops.base import (
    Call,
    DeltaOp,
    Raised,
    Refusal,
    arguments,
    constant,
    is_map,
    per_channel,
    value,
)

aten = torch.ops.aten

_FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "max": torch.maximum,
}


def binary(
    a: Tensor,
    b: Tensor,
    op: str,
    act: str = "identity",
    act_params: Sequence[float] = (),
    act_weight: Tensor | None = None,
) -> Tensor:
    """The dense function.

    Args:
        a: Broadcasts to [N, C, H, W].
        b: Broadcasts to [N, C, H, W].
        op: `"add"`, `"sub"`, `"mul"`, `"div"` or `"max"`.
        act: The activation's name.
        act_params: Its numbers.
        act_weight: [C], for `prelu`.

    Returns:
        [N, C, H, W].
    """
    return activate(_FUNCTIONS[op](a, b), act, act_params, act_weight)


def raise_binary(node: fx.Node) -> Raised:
    """`aten.add(a, b)` -> `binary(a=, b=, op="add")`, or `affine` where one is a constant."""
    op = _OPS[node.target]
    given = arguments(node)
    a, b = given["self"], given["other"]
    if node.target == aten.rsub.Scalar:
        a, b = b, a
    if given.get("alpha", 1) != 1:
        return Refusal("an add with alpha is not a delta op")
    if not is_map(node):
        return Refusal(f"the result of this {op} is not a feature map [N, C, H, W]")
    operands = [_constant_of(v, value(node).device) for v in (a, b)]
    if operands[0] is not None or operands[1] is not None:
        return _raise_constant(node, op, a, b, operands)
    if not is_map(a) or not is_map(b):
        return Refusal(f"an operand of this {op} is not [N, C, H, W]")
    shape = value(node).shape
    if value(a).dtype != value(b).dtype:
        return Refusal(f"the operands of this {op} differ in dtype")
    for v in (a, b):
        if not _is_gate(tuple(value(v).shape), tuple(shape)):
            return Refusal(f"an operand of this {op} is {tuple(value(v).shape)}: not a gate")
    return Call(binary, {"a": a, "b": b, "op": op})


def _is_gate(operand: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    n, c, h, w = shape
    return operand in {shape, (n, c, 1, 1), (n, 1, h, w), (n, 1, 1, 1)}


def _constant_of(v: Any, device: torch.device) -> Tensor | None:
    if isinstance(v, (int, float)) and not isinstance(v, bool):
        return torch.tensor(float(v), dtype=torch.float64, device=device)
    return constant(v)


def _raise_constant(
    node: fx.Node, op: str, a: Any, b: Any, operands: list[Tensor | None]
) -> Raised:
    left, right = operands
    if (left is None) == (right is None):
        return Refusal("both operands are constants")
    x = b if left is not None else a
    if not is_map(x) or value(x).shape != value(node).shape:
        return Refusal(f"a constant widens the operand of this {op}")
    channels = int(value(node).shape[1])
    k = per_channel(left if left is not None else right, channels)
    if k is None:
        return Refusal(f"the constant of this {op} differs from site to site")
    if op == "max":
        return Refusal("the maximum of a feature map and a constant is not a delta op")
    ones = torch.ones_like(k)
    if op == "add":
        return Call(affine, {"x": x, "shift": k})
    if op == "mul":
        return Call(affine, {"x": x, "scale": k})
    if op == "sub":
        if left is None:
            return Call(affine, {"x": x, "shift": -k})
        return Call(affine, {"x": x, "scale": -ones, "shift": k})
    if left is None:
        return Call(affine, {"x": x, "scale": 1 / k})
    return Refusal("a constant divided by a feature map is not a delta op")


OP = DeltaOp(binary, inputs=("a", "b"))

_OPS = {
    aten.add.Tensor: "add",
    aten.sub.Tensor: "sub",
    aten.mul.Tensor: "mul",
    aten.div.Tensor: "div",
    aten.maximum.default: "max",
    aten.max.other: "max",
    aten.add.Scalar: "add",
    aten.sub.Scalar: "sub",
    aten.rsub.Scalar: "sub",
    aten.mul.Scalar: "mul",
    aten.div.Scalar: "div",
}

RAISE = dict.fromkeys(_OPS, raise_binary)
