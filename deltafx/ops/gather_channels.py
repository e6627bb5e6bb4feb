"""gather_channels: y[c] = x[index[c]], a channel shuffle; without an index, a copy.

A copy is needed only where one feature map lies in two concatenations, or is itself a slice.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from deltafx.ops.activation import activate
from deltafx.ops.base import DeltaOp


def gather_channels(
    x: Tensor,
    index: Sequence[int] | None = None,
    act: str = "identity",
    act_params: Sequence[float] = (),
    act_weight: Tensor | None = None,
) -> Tensor:
    """The dense function: `x` [N, C, H, W] to [N, len(index), H, W]."""
    y = x if index is None else x[:, list(index)]
    return activate(y, act, act_params, act_weight)


OP = DeltaOp(gather_channels)
