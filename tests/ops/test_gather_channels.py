import pytest
import torch

from deltafx.ops.gather_channels import OP
from tests.ops.harness import check, make_mask, opcheck, rotated, sweep

SIZES = ((1, 1), (7, 13), (4, 17))


@sweep
def test_shuffle(dtype, channels, pattern, device):
    for i, size in rotated(list(enumerate(SIZES)), 1, channels, pattern):
        mask = make_mask(pattern, 2, *size)
        index = torch.randint(0, channels, (channels + 2,)).tolist()
        kwargs = {"x": torch.randn(2, channels, *size), "index": index}
        check(OP, kwargs, {"x": mask}, mask, dtype, device, i)


@sweep
def test_copy(dtype, channels, pattern, device):
    mask = make_mask(pattern, 2, 5, 7)
    x = torch.randn(2, channels, 5, 7)
    x[0, :, 2, 3] = float("nan")
    check(OP, {"x": x, "act": "relu"}, {"x": mask}, mask, dtype, device)
    full = make_mask("full", 2, 5, 7)
    check(OP, {"x": x}, {"x": full}, full, dtype, device, lost=True)


def test_opcheck(device):
    opcheck(OP, {"x": torch.randn(2, 6, 3, 4), "index": [5, 0, 1]}, (3, 4), device)


def test_refuses_an_index_out_of_range(device):
    acc = torch.zeros(1, 3, 4, 4, device=device).contiguous(memory_format=torch.channels_last)
    mask = torch.zeros(1, 4, 4, dtype=torch.bool, device=device)
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    with pytest.raises(IndexError, match="index 3 is not a channel"):
        OP.operator(acc, mask, counts, acc, mask, [0, 1, 3], "identity", [], *[None] * 3, "rms")
    with pytest.raises(ValueError, match="2 channels are gathered"):
        OP.operator(acc, mask, counts, acc, mask, [0, 1], "identity", [], *[None] * 3, "rms")
