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
    way: str | None = None,
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
        residual: [N, O, H', W']; it may be `acc`.
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
        way: One of `ways`; by default the first.
    """
    if not (acc.is_cuda and torch.backends.cudnn.is_acceptable(x)):
        acc.copy_(
            conv2d(
                x, weight, bias, residual, pre_scale, pre_shift, pre_act, stride, padding,
                dilation, groups, residual_after_act, act, act_params, act_weight,
            )
        )  # fmt: skip
        return
    way = way or ways(
        acc, x, weight, residual, pre_scale, stride, padding, dilation, groups,
        residual_after_act, act,
    )[0]  # fmt: skip
    if way == "depthwise":
        torch.ops.deltafx.depthwise_everywhere(
            acc, x, packed, bias, stride, padding, act, act_params, act_weight
        )  # fmt: skip
        return
    if way == "gemm":
        torch.ops.deltafx.gemm_everywhere(
            acc, x, weight, bias, residual, stride, padding, residual_after_act, act, act_params,
            act_weight,
        )  # fmt: skip
        return
    # cuDNN would copy a slice of channels as well.
    x = _as_channels_last(prologue(x, pre_scale, pre_shift, pre_act))
    cudnn = torch.backends.cudnn
    if way == "fused":
        try:
            torch.ops.deltafx.conv2d_bias_act(
                acc, x, weight, rounded_bias, residual, stride, padding, dilation, groups,
                act == "relu",
            )  # fmt: skip
            return
        except RuntimeError:
            pass  # no such kernel in cuDNN; nothing was launched
    own = _is_whole(acc) and not _lies_over(acc, residual)
    y = acc if own else torch.empty_like(acc, memory_format=torch.channels_last)
    y = _as_channels_last(y)
    # It tries its algorithms at the first call of each shape, which is before any capture.
    torch.ops.aten.cudnn_convolution.out(
        x, _as_channels_last(weight), padding, stride, dilation, groups,
        True, cudnn.deterministic, cudnn.allow_tf32, out=y,
    )  # fmt: skip
    torch.ops.deltafx.finish_conv2d(
        acc, not_finite, y, bias, residual, residual_after_act, act, act_params, act_weight
    )


def ways(
    acc: Tensor,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    pre_scale: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual_after_act: bool,
    act: str,
) -> tuple[str, ...]:
    """The ways to compute a convolution on CUDA, those that are usually quick first.

    The arguments are those of `conv2d_everywhere`.

    Returns:
        Of `"depthwise"` and `"gemm"`, kernels of ours; `"fused"`, cuDNN with bias, residual and
        activation; and `"apart"`, cuDNN and a pass behind it.
    """
    if acc.dtype.itemsize != 2:
        return ("apart",)
    ours = pre_scale is None
    depthwise = _is_depthwise_3x3(acc, x, weight, residual, stride, dilation)
    fused = _is_fusable(acc, residual, groups, residual_after_act, act)
    gemm = groups == 1 and _is_gemm(acc, x, weight, residual, stride, padding, dilation)
    found = {"depthwise": ours and depthwise, "fused": fused, "gemm": ours and gemm, "apart": True}
    return tuple(way for way, there in found.items() if there)


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


def _is_fusable(
    acc: Tensor, residual: Tensor | None, groups: int, residual_after_act: bool, act: str
) -> bool:
    """Whether cuDNN may do all of a convolution in half precision."""
    last = act == "identity" or (act == "relu" and (residual is None or not residual_after_act))
    whole = _is_whole(acc) and (residual is None or _is_whole(residual))
    whole = whole and not _lies_over(acc, residual)
    return groups == 1 and last and whole


def _is_depthwise_3x3(
    acc: Tensor,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
) -> bool:
    """Whether a convolution in half precision is one that `depthwise_everywhere` takes."""
    return (
        weight.shape[1:] == (1, 3, 3)
        and x.shape[1] == acc.shape[1]
        and residual is None
        and _in_vectors(acc)
        and _in_vectors(x)
        and tuple(stride) in ((1, 1), (2, 2))
        and tuple(dilation) == (1, 1)
    )


def _is_gemm(
    acc: Tensor,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> bool:
    """Whether a convolution in half precision is one that `gemm_everywhere` takes."""
    if torch.cuda.get_device_capability(acc.device) < (8, 0):
        return False
    pointwise = weight.shape[2:] == (1, 1) and tuple(stride) == (1, 1) and tuple(padding) == (0, 0)
    image = x.shape[1] == 4 and _is_whole(x) and tuple(dilation) == (1, 1)
    vectors = _in_vectors(acc) and (residual is None or _in_vectors(residual))
    return vectors and ((pointwise and _in_vectors(x)) or (image and not pointwise))


def _in_vectors(t: Tensor) -> bool:
    """Whether the channels of a map can be moved in whole vectors of eight."""
    rows = (t.shape[1], *(t.stride(i) for i in (0, 2, 3)))
    return t.data_ptr() % 16 == 0 and all(n % 8 == 0 for n in rows)


def _as_channels_last(t: Tensor) -> Tensor:
    """The same in channels_last, and with the strides of that.

    Where there is one channel, strides do not matter, and may be those of another memory format;
    but torch goes by them when it chooses the format of a convolution's result, and takes a plan
    of cuDNN's that it made for tensors with others.
    """
    _, c, h, w = t.shape
    t = t.contiguous(memory_format=torch.channels_last)
    return t.as_strided(t.shape, (h * w * c, 1, w * c, c))


def _lies_over(acc: Tensor, residual: Tensor | None) -> bool:
    """Whether a result takes the place of the residual."""
    return residual is not None and acc.data_ptr() == residual.data_ptr()


def _is_whole(t: Tensor) -> bool:
    return t.is_contiguous(memory_format=torch.channels_last)
