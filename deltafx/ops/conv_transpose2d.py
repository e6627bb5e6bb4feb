"""conv_transpose2d: transposed convolution with bias, residual and activation.

An output site is a candidate where one of the inputs that it gathers from is active: tap k of
output o reads input (o + padding - k * dilation) / stride where that is whole and in bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from deltafx.ops.activation import activate
from deltafx.ops.base import (
    Call,
    DeltaOp,
    Raised,
    Refusal,
    arguments,
    constant,
    is_map,
    like,
    pack_conv,
    pair,
    value,
)

aten = torch.ops.aten


def conv_transpose2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    output_padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    residual_after_act: bool = False,
    act: str = "identity",
    act_params: Sequence[float] = (),
    act_weight: Tensor | None = None,
) -> Tensor:
    """The dense function.

    Args:
        x: [N, I, H, W], float.
        weight: [I, O / groups, kh, kw].
        bias: [O].
        residual: [N, O, H', W'].
        stride: (y, x).
        padding: (y, x).
        output_padding: (y, x).
        dilation: (y, x).
        groups: Groups of channels.
        residual_after_act: Where the residual is added.
        act: The activation's name.
        act_params: Its numbers.
        act_weight: [O], for `prelu`.

    Returns:
        [N, O, H', W'] in the dtype of `x`.
    """
    y = F.conv_transpose2d(
        x, weight.to(x.dtype), like(bias, x), stride, padding, output_padding, groups, dilation
    )
    if residual is None:
        return activate(y, act, act_params, act_weight)
    if residual_after_act:
        return activate(y, act, act_params, act_weight) + residual
    return activate(y + residual, act, act_params, act_weight)


def raise_conv_transpose2d(node: fx.Node) -> Raised:
    """`aten.conv_transpose2d(x, w, b, ...)` -> `conv_transpose2d(x=, weight=, ...)`."""
    a = arguments(node)
    if not is_map(a["input"]) or not is_map(node):
        return Refusal("the input of this convolution is not [N, C, H, W]")
    weight = constant(a["weight"])
    bias = None if a.get("bias") is None else constant(a["bias"])
    if weight is None or (a.get("bias") is not None and bias is None):
        return Refusal("the weight of this convolution is computed by the model")
    stride, dilation = pair(a["stride"]), pair(a["dilation"])
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True)]
    outside = any(p > 0 for p in pair(a["output_padding"]))
    gaps = outside or max(dilation) > 1 or any(r < s for r, s in zip(reach, stride, strict=True))
    if gaps and not _every_output_sees_input(node, weight, a):
        return Refusal("some outputs of this transposed convolution see no input")
    kwargs: dict[str, Any] = {"x": a["input"], "weight": weight.float()}
    if bias is not None:
        kwargs["bias"] = bias.float()
    kwargs |= {
        "stride": stride,
        "padding": pair(a["padding"]),
        "output_padding": pair(a["output_padding"]),
        "dilation": dilation,
        "groups": a["groups"],
    }
    return Call(conv_transpose2d, kwargs)


def _every_output_sees_input(node: fx.Node, weight: Tensor, a: dict[str, Any]) -> bool:
    stride, padding, dilation = pair(a["stride"]), pair(a["padding"]), pair(a["dilation"])
    for axis in (0, 1):
        size_in, size_out = a["input"].meta["val"].shape[2 + axis], value(node).shape[2 + axis]
        seen = {
            i * stride[axis] - padding[axis] + k * dilation[axis]
            for i in range(size_in)
            for k in range(weight.shape[2 + axis])
        }
        if not seen.issuperset(range(size_out)):
            return False
    return True


def macs_per_site(node: fx.Node) -> int:
    """Multiply-adds of one output site, on average over the phases of the stride."""
    weight = constant(node.kwargs["weight"])
    assert weight is not None
    stride = pair(node.kwargs.get("stride", (1, 1)))
    return weight.numel() // (stride[0] * stride[1])


OP = DeltaOp(
    conv_transpose2d,
    inputs=("x", "residual"),
    macs_per_site=macs_per_site,
    prepare=partial(pack_conv, transposed=True),
)

RAISE = {aten.conv_transpose2d.input: raise_conv_transpose2d}
