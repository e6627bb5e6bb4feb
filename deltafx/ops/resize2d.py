"""resize2d: nearest and bilinear interpolation, with torch's coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from deltafx.ops.activation import activate
from deltafx.ops.base import Call, DeltaOp, Raised, Refusal, arguments, is_map, value

aten = torch.ops.aten


def resize2d(
    x: Tensor,
    kind: str,
    size: Sequence[int],
    align_corners: bool = False,
    scale_h: float | None = None,
    scale_w: float | None = None,
    act: str = "identity",
    act_params: Sequence[float] = (),
    act_weight: Tensor | None = None,
) -> Tensor:
    """The dense function.

    Args:
        x: [N, C, H, W], float.
        kind: `"nearest"`, `"nearest-exact"` or `"bilinear"`.
        size: (H', W').
        align_corners: For `"bilinear"`.
        scale_h: The scale factor that the caller gave, where torch uses it for coordinates.
        scale_w: Likewise.
        act: The activation's name.
        act_params: Its numbers.
        act_weight: [C], for `prelu`.

    Returns:
        [N, C, H', W'].
    """
    size = list(size)
    if kind == "bilinear":
        y = aten.upsample_bilinear2d.default(x, size, align_corners, scale_h, scale_w)
    elif kind == "nearest":
        y = aten.upsample_nearest2d.default(x, size, scale_h, scale_w)
    else:
        y = aten._upsample_nearest_exact2d.default(x, size, scale_h, scale_w)
    return activate(y, act, act_params, act_weight)


_KINDS = {
    aten.upsample_bilinear2d.vec: "bilinear",
    aten.upsample_bilinear2d.default: "bilinear",
    aten.upsample_nearest2d.vec: "nearest",
    aten.upsample_nearest2d.default: "nearest",
    aten._upsample_nearest_exact2d.vec: "nearest-exact",
    aten._upsample_nearest_exact2d.default: "nearest-exact",
}


def raise_resize2d(node: fx.Node) -> Raised:
    """`aten.upsample_bilinear2d(x, size, ...)` -> `resize2d(x=, kind="bilinear", size=, ...)`."""
    a = arguments(node)
    x = a.get("input", a.get("self"))
    if not is_map(x):
        return Refusal("the input of this resize is not [N, C, H, W]")
    factors = a.get("scale_factors")
    scale_h, scale_w = factors if factors else (a.get("scales_h"), a.get("scales_w"))
    kwargs: dict[str, Any] = {
        "x": x,
        "kind": _KINDS[node.target],
        "size": tuple(int(s) for s in value(node).shape[2:]),
        "align_corners": bool(a.get("align_corners", False)),
        "scale_h": scale_h,
        "scale_w": scale_w,
    }
    return Call(resize2d, kwargs)


def prepare(node: fx.Node, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The accumulator tells the size."""
    return {k: v for k, v in kwargs.items() if k != "size"}


OP = DeltaOp(resize2d, prepare=prepare)

RAISE = dict.fromkeys(_KINDS, raise_resize2d)
