"""Batch norm statistics for models without trained weights.

With random weights and the statistics of a fresh batch norm (mean 0, variance 1) activations blow
up or die within a few layers, and nothing measured on such a model means anything.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def calibrate_batch_norm(module: nn.Module, frames: Tensor, *more: Tensor) -> nn.Module:
    """Set the running statistics of every batch norm from real frames, in place.

    Args:
        module: A model in eval mode; it is in eval mode again on return. A model without batch norm
            is left as it is.
        frames: Preprocessed frames [N, 3, H, W] (or clips), N >= 2; fed as overlapping pairs.
        *more: The further arguments of a model of several.

    Returns:
        `module`.

    Raises:
        ValueError: If there are fewer than two frames.
    """
    if len(frames) < 2:
        raise ValueError("calibration needs at least two frames")
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return module
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all frames
        norm.train()
    try:
        # Two frames at a time: behind a global pooling one frame has one value a channel, which
        # has no variance.
        for first in range(len(frames) - 1):
            module(*(x[first : first + 2] for x in (frames, *more)))
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.eval()
    return module
