"""What the operators do under fake tensors: check the shapes, and nothing else.

Every operator writes its accumulator, mask and counts in place and returns nothing, so one fake
serves them all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

OPERATORS = (
    "encode",
    "pool2d",
    "adaptive_pool2d",
    "global_pool2d",
    "resize2d",
    "binary",
    "affine",
    "layer_norm",
    "gather_channels",
    "pad2d",
)


def check_head(acc: Tensor, mask: Tensor, counts: Tensor, *rest: Any) -> None:
    """The fake: `acc` [N, C, H, W], `mask` bool [N, H, W], `counts` int64 [2]."""
    torch._check(acc.dim() == 4, lambda: f"acc must be [N, C, H, W], not {tuple(acc.shape)}")
    torch._check(mask.dtype == torch.bool, lambda: f"mask must be bool, not {mask.dtype}")
    torch._check(mask.dim() == 3, lambda: f"mask must be [N, H, W], not {tuple(mask.shape)}")
    for axis, of_acc in enumerate((0, 2, 3)):
        torch._check(
            mask.shape[axis] == acc.shape[of_acc],
            lambda: f"mask is {tuple(mask.shape)} but acc {tuple(acc.shape)}",
        )
    torch._check(counts.dtype == torch.int64, lambda: f"counts must be int64, not {counts.dtype}")
    torch._check(counts.numel() == 2, lambda: f"counts must have 2 elements, not {counts.numel()}")


def register(library: torch.library.Library | None = None) -> None:
    """Registers the fake of every operator, once the operators are loaded."""
    for name in OPERATORS:
        torch.library.register_fake(f"deltafx::{name}", check_head, lib=library)
