import pytest
import torch

from deltafx.ops.adaptive_pool2d import OP
from tests.ops.harness import DTYPES, check, make_mask, opcheck, rotated, sweep
from tests.ops.reference import touching

# input size, output size
SIZES = (((7, 13), (3, 5)), ((6, 8), (7, 7)), ((17, 4), (1, 2)), ((5, 5), (5, 5)))


def ranges(size, out):
    return tuple(tuple(range(o * size // out, -(-(o + 1) * size // out))) for o in range(out))


def candidates_of(mask, size, out):
    return touching(mask, out, ranges(size[0], out[0]), ranges(size[1], out[1]))


@pytest.mark.parametrize("kind", ["max", "avg"])
@sweep
def test_adaptive_pool(dtype, channels, pattern, kind, device):
    for i, (size, out) in rotated(list(enumerate(SIZES)), 1, channels, pattern):
        mask = make_mask(pattern, 2, *size)
        kwargs = {"x": torch.randn(2, channels, *size), "kind": kind, "size": out}
        check(OP, kwargs, {"x": mask}, candidates_of(mask, size, out), dtype, device, i)


@pytest.mark.parametrize("kind", ["max", "avg"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lost_state_and_nan(dtype, kind, device):
    x = torch.randn(2, 17, 7, 9)
    x[0, 2, 1, 1] = float("nan")
    mask = make_mask("full", 2, 7, 9)
    found = candidates_of(mask, (7, 9), (3, 4))
    kwargs = {"x": x, "kind": kind, "size": (3, 4)}
    check(OP, kwargs, {"x": mask}, found, dtype, device, lost=True)


def test_opcheck(device):
    kwargs = {"x": torch.randn(2, 6, 7, 5), "kind": "avg", "size": (3, 2)}
    opcheck(OP, kwargs, (3, 2), device)
