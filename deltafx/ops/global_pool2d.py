"""global_pool2d: the mean over all sites of a stream.

The operator keeps a sum for each tile of 256 consecutive sites. A tile with an active site is
summed anew, and then the sums are: there is no running sum that could drift.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from deltafx.ops.activation import activate
from deltafx.ops.base import Call, DeltaOp, Raised, Refusal, arguments, is_map, value

aten = torch.ops.aten

TILE = 256
"""Sites a partial sum, as in the C++ operator."""


def global_pool2d(
    x: Tensor,
    act: str = "identity",
    act_params: Sequence[float] = (),
    act_weight: Tensor | None = None,
) -> Tensor:
    """The dense function: `x` [N, C, H, W] to [N, C, 1, 1]."""
    return activate(x.mean((2, 3), keepdim=True), act, act_params, act_weight)


def raise_mean(node: fx.Node) -> Raised:
    """`aten.mean.dim(x, [2, 3], keepdim=True)` -> `global_pool2d(x=)`."""
    a = arguments(node)
    if not is_map(a["self"]):
        return Refusal("the input of this mean is not [N, C, H, W]")
    dims = {d % 4 for d in (a["dim"] or [])}
    if dims != {2, 3}:
        return Refusal("this mean is not over the sites of a feature map")
    if not a["keepdim"] or a.get("dtype") is not None:
        return Refusal("this mean drops its dimensions or changes dtype")
    return Call(global_pool2d, {"x": a["self"]})


def workspace(node: fx.Node) -> dict[str, tuple[int, ...]]:
    """The partial sums: [N, tiles, C]."""
    n, c, h, w = value(node.kwargs["x"]).shape
    return {"partial": (n, -(-h * w // TILE), c)}


OP = DeltaOp(global_pool2d, workspace=workspace)

RAISE = {aten.mean.dim: raise_mean}
