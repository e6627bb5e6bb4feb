import itertools

import pytest
import torch

from deltafx.ops.encode import OP
from tests.ops.harness import CHANNELS, DTYPES, OUTSIDE, TRUNCATIONS, around, disturbed, make_map
from tests.ops.reference import State, check_counts, check_update, same

# Rows below, at and above a piece of 64 sites, and sizes that no block divides.
SIZES = ((1, 1), (5, 63), (3, 64), (7, 65), (9, 131))
LAYOUTS = ("planar", "channels_last", "sliced", "strided")


def laid_out(x, layout):
    if layout == "planar":
        return x.contiguous()
    if layout == "strided":
        wide = torch.zeros(*x.shape[:3], x.shape[3] * 2, dtype=x.dtype, device=x.device)
        wide[..., ::2] = x
        return wide[..., ::2]
    return make_map(x, x.dtype, x.device, layout == "sliced")


def encode(x, acc, mask, block, inv_scale, threshold, policy):
    counts = torch.zeros(2, dtype=torch.int64, device=acc.device)
    limit = None if threshold is None else torch.tensor([threshold], device=acc.device)
    scale = None if threshold is None else inv_scale.to(acc.device)
    OP.operator(acc, mask, counts, x, block, scale, limit, policy)
    return State(acc.cpu(), mask.cpu(), counts)


@pytest.mark.parametrize("frame_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [*CHANNELS, 2, 4, 5])
def test_sites(channels, dtype, frame_dtype, device):
    cases = itertools.product(SIZES, LAYOUTS, TRUNCATIONS)
    for i, (size, layout, (policy, threshold)) in enumerate(cases):
        if (i + channels) % 5:
            continue
        x = torch.randn(2, channels, *size).to(frame_dtype)
        if i % 2:
            x[1, channels // 2, size[0] // 2, size[1] // 2] = float("nan")
        exact = x.to(dtype).double()
        inv_scale = torch.rand(channels) + 0.5
        start = disturbed(exact, inv_scale, threshold or 0.25)
        acc = make_map(start, dtype, device, i % 5 == 0)
        before = State(acc.clone().cpu(), torch.zeros(2, *size, dtype=torch.bool), torch.zeros(2))
        rest = around(acc)
        frame = laid_out(x.to(device), layout)
        after = encode(frame, acc, before.mask.to(device), 1, inv_scale, threshold, policy)
        every = torch.ones_like(before.mask)
        exact_bound = torch.zeros_like(exact)
        check_update(before, after, exact, exact_bound, every, policy, inv_scale, threshold)
        assert torch.equal(around(acc), rest)


def squares(value, block):
    """The sum over block x block squares of [N, H, W], at every site of the square."""
    h, w = value.shape[1:]
    padded = torch.nn.functional.pad(value, (0, -w % block, 0, -h % block))
    sums = padded.unfold(1, block, block).unfold(2, block, block).sum((-1, -2))
    return sums.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :h, :w]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 4, 17, 65])
def test_blocks(channels, dtype, layout, device):
    for size, block in itertools.product(((5, 63), (16, 131), (9, 24)), (2, 3, 8, 100)):
        x = torch.randn(2, channels, *size)
        inv_scale = torch.rand(channels) + 0.5
        quiet = torch.rand(2, 1, size[0], size[1] // 2 + 1) < 0.02
        start = x + torch.where(quiet, 3.0, 0.01).repeat_interleave(2, 3)[..., : size[1]]
        acc = make_map(start, dtype, device, channels == 17)
        old, new = acc.clone().cpu().double(), x.to(dtype).double()
        scaled = ((new - old) * inv_scale.double()[None, :, None, None]).square().sum(1)
        mean = squares(scaled, block) / squares(torch.full_like(scaled, channels), block)
        threshold = float(mean.flatten().sort().values[mean.numel() // 2].sqrt()) * 1.01
        mask = torch.zeros(2, *size, dtype=torch.bool, device=device)
        frame = laid_out(x.to(device), layout)
        after = encode(frame, acc, mask, block, inv_scale, threshold, "rms")
        active = mean.sqrt() > threshold
        clear = (mean.sqrt() / threshold - 1).abs() > 1e-4
        assert torch.equal(after.mask[clear], active[clear])
        expected = torch.where(after.mask[:, None], new, old)
        assert torch.equal(after.acc.double(), expected)
        check_counts(after.counts, mask.numel(), int(after.mask.sum()))


@pytest.mark.parametrize("block", [8, 16])
@pytest.mark.parametrize("size", [(8, 8), (24, 40), (17, 104)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_images(dtype, size, block, device):
    """An image as a network's input has it: in its accumulator's dtype, which lies four apart."""
    x = torch.randn(2, 3, *size).to(dtype)
    x[1, 1, 3, 5] = float("nan")
    quiet = torch.rand(2, 1, *size) < 0.03
    whole = torch.full((2, *size, 4), OUTSIDE, dtype=dtype, device=device)
    acc = whole.permute(0, 3, 1, 2)[:, :3]
    start = x + torch.where(quiet, 3.0, 0.02).to(dtype)
    inv_scale = torch.rand(3) + 0.5
    for threshold in (0.0, 0.3):
        acc.copy_(start)
        old, new = acc.clone().cpu().double(), x.double()
        scaled = ((new - old) * inv_scale.double()[None, :, None, None]).square().sum(1)
        mean = squares(scaled, block) / squares(torch.full_like(scaled, 3), block)
        active = ~(mean.sqrt() <= threshold) if threshold else ~(new == old).all(1)
        clear = ~((mean.sqrt() / threshold - 1).abs() <= 1e-3) if threshold else active == active
        mask = torch.zeros(2, *size, dtype=torch.bool, device=device)
        frame = x.to(device).contiguous(memory_format=torch.channels_last)
        after = encode(frame, acc, mask, block, inv_scale, threshold, "rms")
        assert torch.equal(after.mask[clear], active[clear])
        assert same(after.acc, torch.where(after.mask[:, None], new, old).to(dtype)).all()
        check_counts(after.counts, mask.numel(), int(after.mask.sum()))
        assert (whole[..., 3] == OUTSIDE).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 3, 17])
def test_a_nan_comes_in_and_leaves_again(channels, layout, device):
    clean = torch.randn(1, channels, 9, 24)
    broken = clean.clone()
    broken[0, channels - 1, 4, 11] = float("nan")
    inv_scale = torch.ones(channels)
    for block, policy in ((1, "rms"), (1, "max"), (8, "rms")):
        acc = make_map(clean, torch.float32, device, False)
        for frame, active in ((broken, True), (clean, True), (clean, False)):
            mask = torch.zeros(1, 9, 24, dtype=torch.bool, device=device)
            x = laid_out(frame.to(device), layout)
            after = encode(x, acc, mask, block, inv_scale, 0.1, policy)
            assert bool(after.mask.any()) == active
            assert bool(after.mask[0, 4, 11]) == active
            assert same(after.acc, frame).all()


def test_lost_state_is_written_whatever_the_threshold(device):
    x = torch.randn(2, 3, 9, 70)
    for block in (1, 8):
        acc = make_map(torch.full_like(x, float("nan")), torch.float32, device, False)
        mask = torch.zeros(2, 9, 70, dtype=torch.bool, device=device)
        after = encode(x.to(device), acc, mask, block, torch.ones(3), 1e9, "rms")
        assert after.mask.all()
        assert torch.equal(after.acc, x)


def test_opcheck(device):
    acc = make_map(torch.zeros(2, 3, 4, 5), torch.float32, device, False)
    mask = torch.zeros(2, 4, 5, dtype=torch.bool, device=device)
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    x = torch.randn(2, 3, 4, 5, device=device)
    ones = torch.ones(3, device=device)
    zero = torch.zeros(1, device=device)
    torch.library.opcheck(OP.operator, (acc, mask, counts, x, 1, ones, zero, "rms"))
    with pytest.raises(ValueError, match="block must be"):
        OP.operator(acc, mask, counts, x, 0, ones, zero, "rms")
    with pytest.raises(ValueError, match="go together"):
        OP.operator(acc, mask, counts, x, 1, None, zero, "rms")
    with pytest.raises(TypeError, match="must be float32, bfloat16 or float16"):
        OP.operator(acc, mask, counts, x.double(), 1, None, None, "rms")
