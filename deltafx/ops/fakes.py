"""What the operators do under fake tensors: check the shapes, and nothing else.

Every operator of a frame writes its accumulator, mask and counts in place and returns nothing, so
one fake serves them all. Packing a convolution's weights is no such operator and has its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

OPERATORS = (
    "encode",
    "conv2d",
    "conv2d.plain",
    "separable_conv2d",
    "conv_transpose2d",
    "conv_transpose2d.plain",
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


def packed_weight(
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
) -> Tensor:
    """The fake of `pack_conv_weight`: as many floats as csrc/cpu/conv_layout.cpp says."""
    first, second, kh, kw = weight.shape
    cin, cout = (first // groups, second) if transposed else (second, first // groups)
    if cin == cout and (cin == 1 or (groups > 1 and cin in (2, 4, 8))):
        return weight.new_empty(weight.numel(), dtype=torch.float32)
    rest = cout % 32
    columns = cout - rest + (0 if rest == 0 else 16 if rest <= 16 else 32)
    return weight.new_empty(groups * cin * columns * kh * kw, dtype=torch.float32)


def check_arena(masks: Tensor, counts: Tensor) -> None:
    """The fake of `clear_masks`: `masks` bool, `counts` int64 [nodes, 2]."""
    torch._check(masks.dtype == torch.bool, lambda: f"masks must be bool, not {masks.dtype}")
    torch._check(counts.dtype == torch.int64, lambda: f"counts must be int64, not {counts.dtype}")


def check_list(memory: Tensor, counts: Tensor, *rest: Any) -> None:
    """The fake of `find_candidates`: `memory` int32, `counts` int64 [2]."""
    torch._check(memory.dtype == torch.int32, lambda: f"memory must be int32, not {memory.dtype}")
    torch._check(counts.dtype == torch.int64, lambda: f"counts must be int64, not {counts.dtype}")


def nothing(*args: Any) -> None:
    """The fake of what is for CUDA graphs alone: no passes and no exports see it."""


FOR_CUDA_GRAPHS = (
    "branch", "conv2d_bias_act", "depthwise_everywhere", "finish_conv2d", "gemm_everywhere"
)  # fmt: skip


def register(library: torch.library.Library | None = None) -> None:
    """Registers the fake of every operator, once the operators are loaded."""
    for name in OPERATORS:
        torch.library.register_fake(f"deltafx::{name}", check_head, lib=library)
    for name in FOR_CUDA_GRAPHS:
        torch.library.register_fake(f"deltafx::{name}", nothing, lib=library)
    torch.library.register_fake("deltafx::clear_masks", check_arena, lib=library)
    torch.library.register_fake("deltafx::find_candidates", check_list, lib=library)
    torch.library.register_fake("deltafx::pack_conv_weight", packed_weight, lib=library)
