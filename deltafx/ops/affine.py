"""affine: y = act(x * scale[c] + shift[c]).

A batch norm that folds into no convolution, a factor or offset per channel, or, with neither scale
nor shift, an activation by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from deltafx.ops.activation import activate, match_activation
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


def affine(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: str = "identity",
    act_params: Sequence[float] = (),
    act_weight: Tensor | None = None,
) -> Tensor:
    """The dense function.

    Args:
        x: [N, C, H, W], float.
        scale: [C]; 1 where missing.
        shift: [C]; 0 where missing.
        act: The activation's name.
        act_params: Its numbers.
        act_weight: [C], for `prelu`.

    Returns:
        [N, C, H, W] in the dtype of `x`.
    """
    if scale is not None:
        x = x * scale.to(x.dtype).reshape(1, -1, 1, 1)
    if shift is not None:
        x = x + shift.to(x.dtype).reshape(1, -1, 1, 1)
    return activate(x, act, act_params, act_weight)


def raise_batch_norm(node: fx.Node) -> Raised:
    """`aten.batch_norm(x, w, b, mean, var)` in eval mode -> `affine(x=, scale=, shift=)`."""
    a = arguments(node)
    if not is_map(a["input"]):
        return Refusal("the input of this batch norm is not [N, C, H, W]")
    mean, var = constant(a["running_mean"]), constant(a["running_var"])
    if a["training"] or mean is None or var is None:
        return Refusal("this batch norm uses the statistics of the batch")
    inverse = (var.double() + a["eps"]).rsqrt()
    weight, bias = constant(a["weight"]), constant(a["bias"])
    scale = inverse if weight is None else weight.double() * inverse
    shift = -mean.double() * scale
    if bias is not None:
        shift = shift + bias.double()
    return Call(affine, {"x": a["input"], "scale": scale, "shift": shift})


def raise_addcmul(node: fx.Node) -> Raised:
    """`aten.addcmul(shift, scale, x)` of constants per channel -> `affine(x=, scale=, shift=)`."""
    a = arguments(node)
    if not is_map(node):
        return Refusal("the result of this addcmul is not a feature map [N, C, H, W]")
    channels = int(value(node).shape[1])
    for x, factor in ((a["tensor1"], a["tensor2"]), (a["tensor2"], a["tensor1"])):
        rows = [constant(factor), constant(a["self"])]
        scale, shift = (None if t is None else per_channel(t, channels) for t in rows)
        whole = is_map(x) and value(x).shape == value(node).shape
        if whole and scale is not None and shift is not None:
            return Call(affine, {"x": x, "scale": scale * a["value"], "shift": shift})
    return Refusal("this addcmul is not of one feature map and constants per channel")


def raise_activation(node: fx.Node) -> Raised:
    """`aten.relu(x)` -> `affine(x=, act="relu")`, and so for every known activation."""
    matched = match_activation(node)
    if matched is None or isinstance(matched, Refusal):
        return matched
    if not is_map(node.args[0]):
        return Refusal("the input of this activation is not [N, C, H, W]")
    return Call(affine, {"x": node.args[0], **matched})


OP = DeltaOp(affine)

_ACTIVATIONS = (
    aten.relu.default,
    aten.relu6.default,
    aten.silu.default,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.sigmoid.default,
    aten.tanh.default,
    aten.mish.default,
    aten.selu.default,
    aten.hardtanh.default,
    aten.clamp.default,
    aten.clamp_min.default,
    aten.leaky_relu.default,
    aten.prelu.default,
    aten.gelu.default,
    aten.elu.default,
    aten.softplus.default,
)

RAISE = {
    aten.batch_norm.default: raise_batch_norm,
    aten.addcmul.default: raise_addcmul,
    **dict.fromkeys(_ACTIVATIONS, raise_activation),
}
