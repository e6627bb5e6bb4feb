"""Views: what costs nothing, because planning gives it a place in somebody's accumulator.

`concat` is written by its producers, each into its slice of the channels; `slice_channels` reads a
slice. Neither has an operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from deltafx.ops.base import Call, Raised, Refusal, arguments, is_map, value

aten = torch.ops.aten


def concat(maps: Sequence[Tensor]) -> Tensor:
    """The dense function: [N, Ci, H, W] each to [N, sum of Ci, H, W]."""
    return torch.cat(list(maps), 1)


def slice_channels(x: Tensor, start: int, length: int) -> Tensor:
    """The dense function: channels [start, start + length) of `x` [N, C, H, W]."""
    return x[:, start : start + length]


VIEWS = (concat, slice_channels)


def raise_cat(node: fx.Node) -> Raised:
    """`aten.cat([a, b], 1)` -> `concat(maps=[a, b])`."""
    a = arguments(node)
    maps: Any = a["tensors"]
    if a["dim"] % 4 != 1 or not all(is_map(m) for m in maps):
        return Refusal("this concatenation is not over the channels of feature maps")
    if len({value(m).dtype for m in maps}) != 1:
        return Refusal("the parts of this concatenation differ in dtype")
    return Call(concat, {"maps": list(maps)})


def raise_slice(node: fx.Node) -> Raised:
    """`aten.slice(x, 1, a, b)` -> `slice_channels(x=, start=a, length=b - a)`."""
    a = arguments(node)
    if not is_map(node) or not is_map(a["self"]) or a["dim"] % 4 != 1 or a["step"] != 1:
        return Refusal("this slice is not of the channels of a feature map")
    channels = int(value(a["self"]).shape[1])
    start = int(a["start"] or 0)
    start = max(0, min(channels, start + channels if start < 0 else start))
    length = int(value(node).shape[1])
    return Call(slice_channels, {"x": a["self"], "start": start, "length": length})


RAISE = {aten.cat.default: raise_cat, aten.slice.Tensor: raise_slice}
