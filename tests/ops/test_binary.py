import itertools

import pytest
import torch

from deltafx.ops.binary import OP
from tests.ops.harness import DTYPES, check, make_mask, opcheck, rotated, sweep

SIZES = ((1, 1), (7, 13), (4, 17))
KINDS = {
    "map": lambda n, c, h, w: (n, c, h, w),
    "gate": lambda n, c, h, w: (n, c, 1, 1),
    "shared gate": lambda n, c, h, w: (1, c, 1, 1),
    "channel": lambda n, c, h, w: (n, 1, h, w),
    "one": lambda n, c, h, w: (1, 1, 1, 1),
}


def candidates_of(masks, n, h, w):
    return torch.stack([m.expand(n, h, w) for m in masks if m is not None]).any(0)


@sweep
def test_two_maps(dtype, channels, pattern, device):
    for i, size in rotated(list(enumerate(SIZES)), 2, channels, pattern):
        op = ("add", "sub", "max")[i]
        masks = {"a": make_mask(pattern, 2, *size), "b": make_mask("one", 2, *size)}
        kwargs = {
            "a": torch.randn(2, channels, *size),
            "b": torch.randn(2, channels, *size),
            "op": op,
            "act": "relu",
        }
        found = candidates_of(masks.values(), 2, *size)
        check(OP, kwargs, masks, found, dtype, device, i)


@pytest.mark.parametrize(("a", "b"), list(itertools.product(KINDS, KINDS)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_broadcast(a, b, dtype, device):
    n, h, w = 2, 5, 7
    for i, channels in enumerate((1, 17, 65)):
        shapes = [KINDS[kind](n, channels, h, w) for kind in (a, b)]
        if torch.broadcast_shapes(*shapes) != (n, channels, h, w):
            continue
        for pattern, op in zip(("empty", "one", "random"), ("max", "mul", "div"), strict=True):
            masks = [make_mask(pattern, shape[0], *shape[2:]) for shape in shapes]
            kwargs = {"a": torch.randn(shapes[0]), "b": torch.rand(shapes[1]) + 0.5, "op": op}
            found = candidates_of(masks, n, h, w)
            check(OP, kwargs, dict(zip("ab", masks, strict=True)), found, dtype, device, i)


@pytest.mark.parametrize("dtype", DTYPES)
def test_constants(dtype, device):
    for i, constant in enumerate(
        (torch.tensor(1.5), torch.rand(17, 1, 1) + 0.5, torch.rand(1, 17, 1, 1) + 0.5)
    ):
        mask = make_mask("random", 2, 5, 7)
        kwargs = {"a": torch.randn(2, 17, 5, 7), "b": constant, "op": "div"}
        check(OP, kwargs, {"a": mask, "b": None}, mask, dtype, device, i)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lost_state_and_nan(dtype, device):
    a, b = torch.randn(2, 17, 3, 5), torch.randn(2, 17, 3, 5)
    a[0, 3, 1, 1] = float("nan")
    b[1, :, 2, 2] = float("nan")
    full = make_mask("full", 2, 3, 5)
    masks = {"a": full, "b": full}
    check(OP, {"a": a, "b": b, "op": "add"}, masks, full, dtype, device, lost=True)
    check(OP, {"a": a, "b": b, "op": "mul"}, masks, full, dtype, device)
    check(OP, {"a": a, "b": b, "op": "max"}, masks, full, dtype, device)


def test_opcheck(device):
    kwargs = {"a": torch.randn(2, 6, 3, 4), "b": torch.randn(2, 6, 3, 4), "op": "add"}
    opcheck(OP, kwargs, (3, 4), device)


def test_refuses(device):
    acc = torch.zeros(2, 3, 4, 4, device=device).contiguous(memory_format=torch.channels_last)
    mask = torch.zeros(2, 4, 4, dtype=torch.bool, device=device)
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    tail = ("identity", [], None, None, None, "rms")
    with pytest.raises(ValueError, match="does not broadcast"):
        OP.operator(acc, mask, counts, acc, mask, acc[:, :2], mask, "add", *tail)
    with pytest.raises(ValueError, match="neither"):
        OP.operator(acc, mask, counts, acc, mask, acc[:, :, :1], None, "add", *tail)
    with pytest.raises(ValueError, match="op must be"):
        OP.operator(acc, mask, counts, acc, mask, acc, mask, "pow", *tail)
    with pytest.raises(ValueError, match="channels_last"):
        OP.operator(acc, mask, counts, acc, mask, acc.contiguous(), mask, "add", *tail)
