"""pad2d: a constant border; negative widths crop."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from deltafx.ops.base import Call, DeltaOp, Raised, Refusal, arguments, is_map

aten = torch.ops.aten


def pad2d(x: Tensor, pad: Sequence[int], value: float = 0.0) -> Tensor:
    """The dense function.

    Args:
        x: [N, C, H, W], float.
        pad: (left, right, top, bottom).
        value: Of the border.

    Returns:
        [N, C, H + top + bottom, W + left + right].
    """
    return F.pad(x, list(pad), value=value)


def raise_pad(node: fx.Node) -> Raised:
    """`aten.pad(x, [l, r, t, b], "constant", v)` -> `pad2d(x=, pad=, value=)`."""
    a = arguments(node)
    pad = [int(p) for p in a["pad"]]
    if not is_map(a["self"]) or len(pad) > 4:
        return Refusal("this padding is not over the sites of [N, C, H, W]")
    if a.get("mode", "constant") != "constant":
        return Refusal(f"padding by {a['mode']} is not a delta op")
    kwargs = {"x": a["self"], "pad": tuple(pad + [0] * (4 - len(pad)))}
    return Call(pad2d, {**kwargs, "value": float(a.get("value") or 0.0)})


OP = DeltaOp(pad2d, has_activation=False)

RAISE = {aten.pad.default: raise_pad, aten.constant_pad_nd.default: raise_pad}
