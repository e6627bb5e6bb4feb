"""finish_conv2d: a convolution at every site, for a frame that changed (nearly) everywhere.

Where most of the picture changed, gathering candidates costs more than it saves. Then a convolution
is left to cuDNN, which writes straight into the accumulator; bias, residual and activation follow
in one pass over it. It is another evaluation of the same function: accumulator, mask and counts end
up as `deltafx::conv2d` leaves them with every site a candidate and nothing truncated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from deltafx.ops.conv2d import conv2d, prologue


def conv2d_everywhere(
    acc: Tensor,
    mask: Tensor,
    counts: Tensor,
    not_finite: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    pre_scale: Tensor | None,
    pre_shift: Tensor | None,
    pre_act: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual_after_act: bool,
    act: str,
    act_params: Sequence[float],
    act_weight: Tensor | None,
) -> None:
    """Computes the whole accumulator.

    Args:
        acc: [N, O, H', W'], channels_last or a slice of its channels; written.
        mask: bool [N, H', W']; set.
        counts: int64 [2]; set to the number of sites, twice.
        not_finite: int32 [1]; set to 1 if the convolution gave an infinity or a NaN (CUDA only).
        x: [N, I, H, W], an accumulator.
        weight: [O, I / groups, kh, kw], not packed, in the dtype of `x`, channels_last.
        bias: [O], fp32; this and all below as in `deltafx.ops.conv2d.conv2d`.
        residual: [N, O, H', W'].
        pre_scale: [I].
        pre_shift: [I].
        pre_act: Name.
        stride: (y, x).
        padding: (y, x).
        dilation: (y, x).
        groups: Groups of channels.
        residual_after_act: Where the residual is added.
        act: Name.
        act_params: Its numbers.
        act_weight: [O].
    """
    if not acc.is_cuda:
        acc.copy_(
            conv2d(
                x, weight, bias, residual, pre_scale, pre_shift, pre_act, stride, padding,
                dilation, groups, residual_after_act, act, act_params, act_weight,
            )
        )  # fmt: skip
        mask.fill_(True)
        counts.fill_(mask.numel())
        return
    x = prologue(x, pre_scale, pre_shift, pre_act)
    y = _convolution(acc, x, weight, stride, padding, dilation, groups)
    torch.ops.deltafx.finish_conv2d(
        acc, mask, counts, not_finite, y, bias, residual, residual_after_act, act, act_params,
        act_weight,
    )  # fmt: skip


def _convolution(
    acc: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The convolution alone: in `acc` where cuDNN can write there, else in memory of its own."""
    cudnn = torch.backends.cudnn
    if not cudnn.is_acceptable(x):
        y = F.conv2d(x, weight, None, stride, padding, dilation, groups)
        return y.contiguous(memory_format=torch.channels_last)
    whole = acc.is_contiguous(memory_format=torch.channels_last)
    y = acc if whole else torch.empty_like(acc, memory_format=torch.channels_last)
    # It tries its algorithms at the first call of each shape, which is before any capture.
    return torch.ops.aten.cudnn_convolution.out(
        x, weight, padding, stride, dilation, groups,
        True, cudnn.deterministic, cudnn.allow_tf32, out=y,
    )  # fmt: skip
