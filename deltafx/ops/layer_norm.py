"""layer_norm: normalisation over the channels of each site (ConvNeXt)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from deltafx.ops.activation import activate
from deltafx.ops.base import DeltaOp, like


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    act: str = "identity",
    act_params: Sequence[float] = (),
    act_weight: Tensor | None = None,
) -> Tensor:
    """The dense function.

    Args:
        x: [N, C, H, W], float.
        weight: [C].
        bias: [C].
        eps: Added to the variance.
        act: The activation's name.
        act_params: Its numbers.
        act_weight: [C], for `prelu`.

    Returns:
        [N, C, H, W].
    """
    rows = x.permute(0, 2, 3, 1)
    y = F.layer_norm(rows, rows.shape[-1:], like(weight, x), like(bias, x), eps)
    return activate(y.permute(0, 3, 1, 2), act, act_params, act_weight)


OP = DeltaOp(layer_norm)
