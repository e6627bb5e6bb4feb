"""separable_conv2d: a depthwise convolution with the pointwise one behind it, in one op.

    y = act(conv1x1(depthwise_act(depthwise(x) + depthwise_bias)) + bias + residual)

or `act(conv1x1(...) + bias) + residual` with `residual_after_act`. What lies between the two has no
accumulator: it is computed at the candidates on the way to the product, in cache, and it is not
truncated. For the CPU, where passing it through memory costs more than a truncation saves there;
`fuse_separables` makes it of two `conv2d`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from deltafx.ops.activation import activate
from deltafx.ops.base import DeltaOp, constant, like, packable
from deltafx.ops.conv2d import conv2d


def separable_conv2d(
    x: Tensor,
    depthwise_weight: Tensor,
    weight: Tensor,
    depthwise_bias: Tensor | None = None,
    depthwise_act: str = "identity",
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    residual_after_act: bool = False,
    act: str = "identity",
    act_params: Sequence[float] = (),
    act_weight: Tensor | None = None,
) -> Tensor:
    """The dense function.

    Args:
        x: [N, I, H, W], float.
        depthwise_weight: [I, 1, kh, kw].
        weight: [O, I, 1, 1].
        depthwise_bias: [I].
        depthwise_act: The activation between the two, one without parameters.
        bias: [O].
        residual: [N, O, H', W'], added before or after the activation.
        stride: (y, x), of the depthwise convolution, as the next two.
        padding: (y, x).
        dilation: (y, x).
        residual_after_act: Where the residual is added.
        act: The activation's name; see `deltafx.ops.activation`.
        act_params: Its numbers.
        act_weight: [O], for `prelu`.

    Returns:
        [N, O, H', W'] in the dtype of `x`.
    """
    between = F.conv2d(
        x, depthwise_weight.to(x.dtype), like(depthwise_bias, x), stride, padding, dilation,
        x.shape[1],
    )  # fmt: skip
    return conv2d(
        activate(between, depthwise_act),
        weight,
        bias,
        residual,
        residual_after_act=residual_after_act,
        act=act,
        act_params=act_params,
        act_weight=act_weight,
    )


def macs_per_site(node: fx.Node) -> int:
    """Multiply-adds of one output site: (kh * kw + O) * I."""
    depthwise, pointwise = (
        constant(node.kwargs["depthwise_weight"]),
        constant(node.kwargs["weight"]),
    )
    assert depthwise is not None
    assert pointwise is not None
    return depthwise.numel() + pointwise.numel()


def prepare(node: fx.Node, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Packs both weights for the kernels and says what the window's shape was."""
    depthwise, pointwise = kwargs["depthwise_weight"], kwargs["weight"]
    pack, point = torch.ops.deltafx.pack_conv_weight, [1, 1]
    return {
        **kwargs,
        "depthwise_weight": pack(
            packable(depthwise, node), point, [0, 0], point, depthwise.shape[0], False
        ),
        "weight": pack(packable(pointwise, node), point, [0, 0], point, 1, False),
        "kernel": list(depthwise.shape[2:]),
    }


OP = DeltaOp(
    separable_conv2d, inputs=("x", "residual"), macs_per_site=macs_per_site, prepare=prepare
)
