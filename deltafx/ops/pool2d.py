"""pool2d: maximum or average over windows.

The output's size comes from its accumulator, which covers `ceil_mode`: a window may overrun the
padded input, and an average's divisor is clipped there as torch clips it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from deltafx.ops.activation import activate
from deltafx.ops.base import Call, DeltaOp, Raised, Refusal, arguments, is_map, pair

aten = torch.ops.aten


def pool2d(
    x: Tensor,
    kind: str,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    act: str = "identity",
    act_params: Sequence[float] = (),
    act_weight: Tensor | None = None,
) -> Tensor:
    """The dense function.

    Args:
        x: [N, C, H, W], float.
        kind: `"max"` or `"avg"`.
        kernel: (y, x).
        stride: (y, x).
        padding: (y, x).
        dilation: (y, x); 1 for an average.
        ceil_mode: Whether windows may overrun the padded input.
        count_include_pad: Whether an average counts the padding.
        divisor_override: An average's divisor, where given.
        act: The activation's name.
        act_params: Its numbers.
        act_weight: [C], for `prelu`.

    Returns:
        [N, C, H', W'].
    """
    if kind == "max":
        y = F.max_pool2d(
            x, tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), ceil_mode
        )
    else:
        y = F.avg_pool2d(x, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override)
    return activate(y, act, act_params, act_weight)


def raise_pool2d(node: fx.Node) -> Raised:
    """`aten.max_pool2d(x, k, s, p, d, ceil)` -> `pool2d(x=, kind="max", kernel=, ...)`."""
    a = arguments(node)
    if not is_map(a["self"]):
        return Refusal("the input of this pool is not [N, C, H, W]")
    average = node.target == aten.avg_pool2d.default
    kernel = pair(a["kernel_size"])
    kwargs: dict[str, Any] = {
        "x": a["self"],
        "kind": "avg" if average else "max",
        "kernel": kernel,
        "stride": pair(a["stride"]) if a["stride"] else kernel,
        "padding": pair(a["padding"]),
        "ceil_mode": bool(a["ceil_mode"]),
    }
    if average:
        kwargs["count_include_pad"] = bool(a["count_include_pad"])
        if a["divisor_override"] is not None:
            kwargs["divisor_override"] = int(a["divisor_override"])
    else:
        kwargs["dilation"] = pair(a["dilation"])
    return Call(pool2d, kwargs)


def prepare(node: fx.Node, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The accumulator's size says what `ceil_mode` said."""
    return {k: v for k, v in kwargs.items() if k != "ceil_mode"}


OP = DeltaOp(pool2d, prepare=prepare)

RAISE = {aten.max_pool2d.default: raise_pool2d, aten.avg_pool2d.default: raise_pool2d}
