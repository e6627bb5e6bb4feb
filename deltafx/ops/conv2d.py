"""conv2d: convolution with its prologue, bias, residual and activation.

    y = act(conv(pre(x)) + bias + residual)           pre(x) = pre_act(x * pre_scale + pre_shift)

or `act(conv(pre(x)) + bias) + residual` with `residual_after_act`. A site's candidates are the
windows that touch an active site of `x`, and the active sites of `residual`. The padding is zero
after the prologue, as it is in a pre-activation network. A linear layer over channels is a 1x1
convolution.
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
)

aten = torch.ops.aten


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    pre_scale: Tensor | None = None,
    pre_shift: Tensor | None = None,
    pre_act: str = "identity",
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
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
        weight: [O, I / groups, kh, kw].
        bias: [O].
        residual: [N, O, H', W'], added before or after the activation.
        pre_scale: [I], the prologue's factor; with `pre_shift`.
        pre_shift: [I].
        pre_act: The prologue's activation, one without parameters.
        stride: (y, x).
        padding: (y, x).
        dilation: (y, x).
        groups: Groups of channels.
        residual_after_act: Where the residual is added.
        act: The activation's name; see `deltafx.ops.activation`.
        act_params: Its numbers.
        act_weight: [O], for `prelu`.

    Returns:
        [N, O, H', W'] in the dtype of `x`.
    """
    x = prologue(x, pre_scale, pre_shift, pre_act)
    y = F.conv2d(x, weight.to(x.dtype), like(bias, x), stride, padding, dilation, groups)
    if residual is None:
        return activate(y, act, act_params, act_weight)
    if residual_after_act:
        return activate(y, act, act_params, act_weight) + residual
    return activate(y + residual, act, act_params, act_weight)


def prologue(x: Tensor, pre_scale: Tensor | None, pre_shift: Tensor | None, pre_act: str) -> Tensor:
    """`pre_act(x * pre_scale + pre_shift)`; `x` itself without both."""
    if pre_scale is None or pre_shift is None:
        return x
    return activate(torch.addcmul(_rows(pre_shift, x), x, _rows(pre_scale, x)), pre_act)


def _rows(t: Tensor, x: Tensor) -> Tensor:
    return t.to(x.dtype).reshape(1, -1, 1, 1)


def raise_conv2d(node: fx.Node) -> Raised:
    """`aten.conv2d(x, w, b, ...)` -> `conv2d(x=, weight=, bias=, ...)`."""
    a = arguments(node)
    if not is_map(a["input"]) or not is_map(node):
        return Refusal("the input of this convolution is not [N, C, H, W]")
    weight = constant(a["weight"])
    bias = None if a.get("bias") is None else constant(a["bias"])
    if weight is None or (a.get("bias") is not None and bias is None):
        return Refusal("the weight of this convolution is computed by the model")
    stride, dilation = pair(a["stride"]), pair(a["dilation"])
    kernel = (int(weight.shape[2]), int(weight.shape[3]))
    padding = _padding(a["padding"], kernel, dilation)
    if isinstance(padding, Refusal):
        return padding
    if any(p > d * (k - 1) for p, d, k in zip(padding, dilation, kernel, strict=True)):
        return Refusal("the padding is wider than the kernel, so some outputs see no input")
    kwargs: dict[str, Any] = {"x": a["input"], "weight": weight.float()}
    if bias is not None:
        kwargs["bias"] = bias.float()
    kwargs |= {"stride": stride, "padding": padding, "dilation": dilation, "groups": a["groups"]}
    return Call(conv2d, kwargs)


def _padding(
    padding: Any, kernel: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int] | Refusal:
    if padding == "valid":
        return 0, 0
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if any(t % 2 for t in total):
            return Refusal("'same' padding of an even kernel is not symmetric")
        return total[0] // 2, total[1] // 2
    return pair(padding)


def macs_per_site(node: fx.Node) -> int:
    """Multiply-adds of one output site: kh * kw * I / groups * O."""
    weight = constant(node.kwargs["weight"])
    assert weight is not None
    return weight.numel()


OP = DeltaOp(
    conv2d,
    inputs=("x", "residual"),
    macs_per_site=macs_per_site,
    prepare=partial(pack_conv, transposed=False),
)

RAISE = {aten.conv2d.default: raise_conv2d, aten.conv2d.padding: raise_conv2d}
