"""encode: a dense tensor, the frame itself or a dense op's result, enters the delta world.

Every site is a candidate: the tensor is compared with its accumulator. The input node may be gated
in squares of `block` sites (a denoiser on a fixed camera).
"""

from __future__ import annotations

from torch import Tensor

from deltafx.ops.base import DeltaOp


def encode(x: Tensor, block: int = 1) -> Tensor:
    """The dense function: `x` [N, C, H, W] itself."""
    return x


OP = DeltaOp(encode, inputs=(), has_activation=False)
