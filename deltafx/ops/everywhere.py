"""Ops at every site at once, for a frame that changed (nearly) everywhere.

Where most of the picture changed, gathering candidates costs more than it saves. Then a convolution
is left to cuDNN, which writes straight into the accumulator, and a gate to torch. They are other
evaluations of the same functions; masks and counts are the executor's, once for all ops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from deltafx.ops.conv2d import conv2d, prologue

_OUT: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "max": torch.maximum,
}


def conv2d_everywhere(
    acc: Tensor,
    not_finite: Tensor,
    x: Tensor,
    weight: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    rounded_bias: Tensor,
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
    """Computes the whole accumulator of a convolution.

    Args:
        acc: [N, O, H', W'], channels_last or a slice of its channels; written.
        not_finite: int32 [1]; set to 1 where an infinity or a NaN may have spread beyond the
            windows that held it.
        x: [N, I, H, W], an accumulator.
        weight: [O, I / groups, kh, kw], not packed, in the dtype of `x`, channels_last.
        packed: The same as `torch.ops.deltafx.pack_conv_weight` makes it.
        bias: [O], fp32; this and all below as in `deltafx.ops.conv2d.conv2d`.
        rounded_bias: [O], the same in the dtype of `x`; zeros for none.
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
    if not (acc.is_cuda and torch.backends.cudnn.is_acceptable(x)):
        acc.copy_(
            conv2d(
                x, weight, bias, residual, pre_scale, pre_shift, pre_act, stride, padding,
                dilation, groups, residual_after_act, act, act_params, act_weight,
            )
        )  # fmt: skip
        return
    half = acc.dtype.itemsize == 2
    if (
        half
        and residual is None
        and pre_scale is None
        and _is_depthwise_3x3(x, weight, acc, stride, dilation)
    ):
        torch.ops.deltafx.depthwise_everywhere(
            acc, x, packed, bias, stride, padding, act, act_params, act_weight
        )  # fmt: skip
        return
    # cuDNN would copy a slice of channels as well.
    x = prologue(x, pre_scale, pre_shift, pre_act).contiguous(memory_format=torch.channels_last)
    cudnn = torch.backends.cudnn
    plain = act == "identity" or (
        act == "relu" and not (residual_after_act and residual is not None)
    )
    if half and plain and groups == 1 and all(_is_whole(t) for t in (acc, residual)):
        try:
            torch.ops.deltafx.conv2d_bias_act(
                acc, x, weight, rounded_bias, residual, stride, padding, dilation, groups,
                act == "relu",
            )  # fmt: skip
            return
        except RuntimeError:
            pass  # no such kernel in cuDNN; nothing was launched
    y = acc if _is_whole(acc) else torch.empty_like(acc, memory_format=torch.channels_last)
    # It tries its algorithms at the first call of each shape, which is before any capture.
    torch.ops.aten.cudnn_convolution.out(
        x, weight, padding, stride, dilation, groups,
        True, cudnn.deterministic, cudnn.allow_tf32, out=y,
    )  # fmt: skip
    torch.ops.deltafx.finish_conv2d(
        acc, not_finite, y, bias, residual, residual_after_act, act, act_params, act_weight
    )


def binary_everywhere(acc: Tensor, a: Tensor, b: Tensor, op: str, act: str) -> None:
    """Computes the whole accumulator of `act(a op b)`, for `act` one of `"identity"` and `"relu"`.

    Args:
        acc: [N, C, H, W]; written.
        a: Broadcasts to it.
        b: Likewise.
        op: `"add"`, `"sub"`, `"mul"`, `"div"` or `"max"`.
        act: Name.
    """
    _OUT[op](a, b, out=acc)
    if act == "relu":
        F.relu_(acc)


def _is_depthwise_3x3(
    x: Tensor, weight: Tensor, acc: Tensor, stride: Sequence[int], dilation: Sequence[int]
) -> bool:
    """Whether a convolution is one that `depthwise_everywhere` takes."""
    aligned = all(t.data_ptr() % 16 == 0 and t.stride(3) % 8 == 0 for t in (x, acc))
    return (
        aligned
        and weight.shape[1:] == (1, 3, 3)
        and x.shape[1] == acc.shape[1]
        and x.shape[1] % 8 == 0
        and tuple(stride) in ((1, 1), (2, 2))
        and tuple(dilation) == (1, 1)
    )


def _is_whole(t: Tensor | None) -> bool:
    return t is None or t.is_contiguous(memory_format=torch.channels_last)
