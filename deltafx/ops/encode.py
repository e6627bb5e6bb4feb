"""encode: a dense tensor, the frame itself or a dense op's result, enters the delta world.

Every site is a candidate: the tensor is compared with its accumulator. The input node may be gated
in squares of `block` sites (a denoiser on a fixed camera).
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from deltafx.ops.base import DeltaOp


def encode(x: Tensor, block: int = 1) -> Tensor:
    """The dense function: `x` [N, C, H, W] itself."""
    return x


def is_frame(node: fx.Node) -> bool:
    """Whether a node is an input of the model, or a picture of one that is a clip."""
    if node.target == torch.ops.aten.select.int:
        node = node.args[0]  # type: ignore[assignment]
    return node.op == "placeholder"


OP = DeltaOp(encode, inputs=(), has_activation=False)
