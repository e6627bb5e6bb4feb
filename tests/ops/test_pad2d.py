import pytest
import torch

from deltafx.ops.pad2d import OP
from tests.ops.harness import DTYPES, check, make_mask, opcheck, rotated, sweep
from tests.ops.reference import touching

PADS = ((1, 1, 1, 1), (0, 1, 0, 2), (3, 0, 2, 0), (-1, 2, 1, -2), (-2, -1, 0, -1), (0, 0, 0, 0))


def candidates_of(mask, pad):
    out = (mask.shape[1] + pad[2] + pad[3], mask.shape[2] + pad[0] + pad[1])
    rows = tuple((y - pad[2],) for y in range(out[0]))
    columns = tuple((x - pad[0],) for x in range(out[1]))
    return touching(mask, out, rows, columns)


@sweep
def test_pad(dtype, channels, pattern, device):
    for i, pad in rotated(list(enumerate(PADS)), 2, channels, pattern):
        mask = make_mask(pattern, 2, 5, 7)
        kwargs = {"x": torch.randn(2, channels, 5, 7), "pad": pad, "value": 0.5 * i}
        check(OP, kwargs, {"x": mask}, candidates_of(mask, pad), dtype, device, i)


@pytest.mark.parametrize("pad", PADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_lost_state_writes_the_border(dtype, pad, device):
    mask = make_mask("full", 2, 5, 7)
    full = torch.ones_like(candidates_of(mask, pad))
    for channels in (17, 1032):
        x = torch.randn(2, channels, 5, 7)
        x[0, 2, 2, 3] = float("nan")
        kwargs = {"x": x, "pad": pad, "value": 1.5}
        check(OP, kwargs, {"x": mask}, full, dtype, device, lost=True)


def test_opcheck(device):
    opcheck(OP, {"x": torch.randn(2, 6, 7, 5), "pad": (1, 2, 0, -1)}, (6, 8), device)


def test_refuses_a_size_that_does_not_fit(device):
    acc = torch.zeros(2, 3, 4, 4, device=device).contiguous(memory_format=torch.channels_last)
    mask = torch.zeros(2, 4, 4, dtype=torch.bool, device=device)
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="padded by"):
        OP.operator(acc, mask, counts, acc, mask, [1, 0, 0, 0], 0.0, None, None, "rms")
