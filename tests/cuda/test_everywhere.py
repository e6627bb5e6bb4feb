"""Convolutions and gates of a dense frame: what their dense functions give, in the accumulator."""

from __future__ import annotations

from inspect import signature
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deltafx.ops.conv2d import conv2d
from deltafx.ops.everywhere import binary_everywhere, conv2d_everywhere, ways

pytestmark = pytest.mark.cuda

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OUTSIDE = 77.0
SHAPES = [
    # in, out, kernel, stride, padding, dilation, groups
    (3, 64, 7, 2, 3, 1, 1), (64, 64, 1, 1, 0, 1, 1), (64, 130, 3, 1, 1, 1, 1),
    (17, 21, 3, 2, 2, 2, 1), (72, 72, 3, 1, 1, 1, 72), (64, 32, 3, 1, 1, 1, 4),
    (24, 24, 3, 2, 1, 1, 24), (8, 8, 3, 2, 0, 1, 8), (16, 16, 3, 1, 2, 1, 16),
    (4, 32, 3, 2, 1, 1, 1), (4, 24, 7, 2, 3, 1, 1), (24, 144, 1, 1, 0, 1, 1),
    (144, 24, 1, 1, 0, 1, 1), (40, 200, 1, 1, 0, 1, 1), (24, 72, 1, 1, 1, 1, 1),
    (16, 16, 3, 1, 2, 2, 16), (12, 12, 3, 1, 1, 1, 12), (16, 16, 5, 2, 2, 1, 16),
    (8, 1, 1, 1, 0, 1, 1), (1, 21, 3, 1, 1, 1, 1), (1, 2, 1, 1, 0, 1, 1), (1, 6, 3, 2, 1, 1, 1),
]  # fmt: skip
EPILOGUES: list[dict[str, Any]] = [
    {"act": "relu"}, {"act": "identity", "residual": True}, {"act": "relu", "residual": True},
    {"act": "silu"}, {"act": "relu6", "bias": False},
    {"act": "relu", "residual": True, "residual_after_act": True},
    {"act": "leaky_relu", "act_params": [0.1], "residual": True}, {"act": "relu", "pre": True},
]  # fmt: skip


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def made(
    shape: tuple[int, ...],
    epilogue: dict[str, Any],
    dtype: torch.dtype,
    size: tuple[int, int, int] = (2, 19, 14),
) -> dict[str, Any]:
    """Arguments of the dense function, on the device."""
    cin, cout, k, stride, pad, dilation, groups = shape

    def noise(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, device="cuda") * scale

    given = {k: v for k, v in epilogue.items() if k in ("act", "act_params", "residual_after_act")}
    n, h, w = size
    x = channels_last(noise(n, cin, h, w).to(dtype))
    weight = noise(cout, cin // groups, k, k, scale=(cin // groups * k * k) ** -0.5).to(dtype)
    given |= {"x": x, "weight": weight, "bias": None, "residual": None}
    given |= {"stride": [stride] * 2, "padding": [pad] * 2, "dilation": [dilation] * 2}
    given |= {"groups": groups}
    if epilogue.get("bias", True):
        given["bias"] = noise(cout)
    if epilogue.get("residual"):
        shown = F.conv2d(x, weight, None, stride, pad, dilation, groups)
        given["residual"] = channels_last(torch.randn_like(shown))
    if epilogue.get("pre"):
        given |= {"pre_scale": noise(cin), "pre_shift": noise(cin), "pre_act": "relu"}
    return given


def wide(given: dict[str, Any]) -> Tensor:
    """The dense function in fp64."""
    return conv2d(**{k: v.double() if isinstance(v, Tensor) else v for k, v in given.items()})


def check_all_ways(given: dict[str, Any], start: int) -> None:
    """Compares each with the dense function in fp64; `start`: channels beside the accumulator."""
    dtype = given["x"].dtype
    exact, rough = wide(given), conv2d(**given).double()
    n, c, h, w = exact.shape
    room = torch.full((n, c + 2 * start, h, w), OUTSIDE, dtype=dtype, device="cuda")
    room = channels_last(room)
    acc = room[:, start : start + c] if start else room
    bias = given["bias"]
    flag = torch.zeros(1, dtype=torch.int32, device="cuda")
    named = {"pre_scale": None, "pre_shift": None, "pre_act": "identity"}
    named |= {"residual_after_act": False, "act_params": [], "act_weight": None} | given
    named["weight"] = channels_last(given["weight"])
    zeros = torch.zeros(c, device="cuda")
    named["packed"] = torch.ops.deltafx.pack_conv_weight(
        given["weight"],
        given["stride"],
        given["padding"],
        given["dilation"],
        given["groups"],
        False,
    )
    named["rounded_bias"] = (zeros if bias is None else bias).to(dtype)
    telling = {name: named[name] for name in signature(ways).parameters if name != "acc"}
    for way in ways(acc, **telling):
        acc.fill_(OUTSIDE)
        conv2d_everywhere(acc, flag, **named, way=way)
        error = (acc.double() - exact).norm() / exact.norm()
        own = (rough - exact).norm() / exact.norm()
        assert error <= 2 * own + torch.finfo(dtype).eps, way
    assert flag.item() == 0
    assert (room[:, :start] == OUTSIDE).all()
    assert (room[:, start + c :] == OUTSIDE).all()


@pytest.mark.parametrize("start", [0, 5, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epilogue", EPILOGUES, ids=lambda e: "-".join(map(str, e)))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_conv2d(
    shape: tuple[int, ...], epilogue: dict[str, Any], dtype: torch.dtype, start: int
) -> None:
    check_all_ways(made(shape, epilogue, dtype), start)


# Maps of as many tiles as a device has multiprocessors, or more: tiles of more than 32 channels;
# depthwise layers in longer chunks of rows.
LARGE = [
    (24, 64, 1, 1, 0, 1, 1), (24, 144, 1, 1, 0, 1, 1), (96, 200, 1, 1, 0, 1, 1),
    (40, 128, 1, 1, 0, 1, 1), (4, 64, 7, 2, 3, 1, 1), (4, 96, 3, 1, 1, 1, 1),
    (96, 96, 3, 1, 1, 1, 96), (144, 144, 3, 2, 1, 1, 144),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("epilogue", [EPILOGUES[2], EPILOGUES[4]], ids=lambda e: e["act"])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large_maps(shape: tuple[int, ...], epilogue: dict[str, Any], dtype: torch.dtype) -> None:
    check_all_ways(made(shape, epilogue, dtype, (3, 163, 213)), 8)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_told(bad: float) -> None:
    y = channels_last(torch.randn(1, 24, 5, 6, device="cuda"))
    acc, flag = torch.empty_like(y), torch.zeros(1, dtype=torch.int32, device="cuda")
    torch.ops.deltafx.finish_conv2d(acc, flag, y, None, None, False, "relu6", [], None)
    assert flag.item() == 0
    y[0, 23, 4, 5] = bad
    torch.ops.deltafx.finish_conv2d(acc, flag, y, None, None, False, "relu6", [], None)
    assert flag.item() == 1
    torch.testing.assert_close(acc, F.relu6(y), equal_nan=True)


@pytest.mark.parametrize("op", ["add", "sub", "mul", "div", "maximum"])
def test_gates(op: str) -> None:
    a = channels_last(torch.randn(2, 24, 5, 6, device="cuda"))
    b = torch.rand(2, 24, 1, 1, device="cuda") + 1
    acc = torch.empty_like(a)
    binary_everywhere(acc, a, b, op.removesuffix("imum"), "relu")
    assert torch.equal(acc, getattr(torch, op)(a, b).relu())


def test_wrong_arguments_are_told() -> None:
    y = channels_last(torch.randn(1, 8, 5, 6, device="cuda"))
    flag = torch.zeros(1, dtype=torch.int32, device="cuda")
    with pytest.raises(ValueError, match="the accumulator is"):
        torch.ops.deltafx.finish_conv2d(
            y[:, :, :4], flag, y, None, None, False, "relu", [], None
        )  # fmt: skip
    state, mask = (
        torch.zeros(6, dtype=torch.int32, device="cuda"),
        torch.ones(1, 4, 4).bool().cuda(),
    )
    with pytest.raises(ValueError, match="one or two bodies"):
        torch.ops.deltafx.branch(state, [mask], True, 0.5, [])
    with pytest.raises(ValueError, match="1 to 32 inputs"):
        torch.ops.deltafx.branch(state, [], True, 0.5, [0])
    with pytest.raises(TypeError, match="one int32 in pinned memory"):
        torch.ops.deltafx.tell(state, state)
