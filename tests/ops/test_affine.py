import pytest
import torch

from deltafx.ops.activation import ACTIVATIONS
from deltafx.ops.affine import OP
from tests.ops.harness import CHANNELS, DTYPES, MASKS, check, make_mask, opcheck, rotated, sweep
from tests.ops.reference import check_counts

SIZES = ((1, 1), (7, 13), (4, 16), (5, 17))
PARAMS = {
    "hardtanh": (-0.5, 1.25),
    "leaky_relu": (0.1,),
    "elu": (1.3, 1.1, 0.9),
    "softplus": (1.5, 2.0),
}


def act_arguments(act, channels):
    weight = torch.rand(channels) if act == "prelu" else None
    return {"act": act, "act_params": PARAMS.get(act, ()), "act_weight": weight}


@sweep
def test_scale_and_shift(dtype, channels, pattern, device):
    for i, size in rotated(list(enumerate(SIZES)), 2, channels, pattern):
        kwargs = {
            "x": torch.randn(2, channels, *size),
            "scale": torch.randn(channels) if i != 1 else None,
            "shift": torch.randn(channels) if i != 2 else None,
            "act": "relu" if i == 3 else "identity",
        }
        mask = make_mask(pattern, 2, *size)
        check(OP, kwargs, {"x": mask}, mask, dtype, device, i)


@pytest.mark.parametrize("pattern", MASKS)
@pytest.mark.parametrize("channels", [256, 300, 1032])
def test_many_channels(channels, pattern, device):
    """Sites of several pieces, each found active by its own, are counted once."""
    for size in SIZES:
        mask = make_mask(pattern, 2, *size)
        kwargs = {"x": torch.randn(2, channels, *size), "scale": torch.randn(channels)}
        check(OP, kwargs, {"x": mask}, mask, torch.float32, device)


def test_wide_map(device):
    """Few sites, and all of one row."""
    mask = make_mask("random", 1, 1, 17001)
    kwargs = {"x": torch.randn(1, 8, 1, 17001), "scale": torch.randn(8)}
    check(OP, kwargs, {"x": mask}, mask, torch.float32, device)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activation(act, dtype, device):
    for i, channels in enumerate(CHANNELS):
        x = torch.randn(2, channels, 5, 17) * 4
        mask = make_mask("random", 2, 5, 17)
        kwargs = {"x": x, **act_arguments(act, channels)}
        check(OP, kwargs, {"x": mask}, mask, dtype, device, i)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_lost_state_and_nan(act, dtype, device):
    x = torch.randn(2, 17, 3, 5)
    x[0, 3, 1, 1] = float("nan")
    x[1, :, 2, 2] = float("nan")
    mask = make_mask("full", 2, 3, 5)
    kwargs = {"x": x, **act_arguments(act, 17)}
    check(OP, kwargs, {"x": mask}, mask, dtype, device, lost=True)
    check(OP, kwargs, {"x": mask}, mask, dtype, device)


def test_opcheck(device):
    kwargs = {"x": torch.randn(2, 5, 3, 4), "scale": torch.rand(5), "shift": torch.rand(5)}
    opcheck(OP, kwargs, (3, 4), device)


def test_refuses(device):
    call = OP.operator
    acc = torch.zeros(1, 3, 4, 4, device=device).contiguous(memory_format=torch.channels_last)
    mask = torch.zeros(1, 4, 4, dtype=torch.bool, device=device)
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    tail = (None, None, None, "rms")
    with pytest.raises(ValueError, match="the accumulator is"):
        call(acc, mask, counts, acc[:, :2], mask, None, None, "relu", [], *tail)
    with pytest.raises(ValueError, match="unknown activation"):
        call(acc, mask, counts, acc, mask, None, None, "softmax", [], *tail)
    with pytest.raises(ValueError, match="3 elements"):
        call(acc, mask, counts, acc, mask, torch.zeros(2, device=device), None, "relu", [], *tail)
    with pytest.raises(TypeError, match="x_mask must be bool"):
        call(acc, mask, counts, acc, mask.float(), None, None, "relu", [], *tail)
    with pytest.raises(ValueError, match="channels_last"):
        call(acc, mask, counts, acc.contiguous(), mask, None, None, "relu", [], *tail)


@pytest.mark.parametrize("policy", ["rms", "max"])
@pytest.mark.parametrize("channels", CHANNELS)
def test_a_change_of_exactly_the_threshold_is_within_it(policy, channels, device):
    # All numbers are powers of two, so the change is exact in every evaluation.
    x = torch.zeros(1, channels, 2, 3).contiguous(memory_format=torch.channels_last)
    x[..., 0], x[..., 1], x[..., 2] = 0.25, 0.25 + 2**-20, -0.25
    acc = torch.zeros_like(x).to(device)
    mask = torch.ones(1, 2, 3, dtype=torch.bool, device=device)
    active = torch.zeros_like(mask)
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    inv_scale = torch.full((channels,), 2.0, device=device)
    threshold = torch.tensor([0.5], device=device)
    act = ("identity", [], None)
    OP.operator(
        acc, active, counts, x.to(device), mask, None, None, *act, inv_scale, threshold, policy
    )
    assert active.tolist() == [[[False, True, False]] * 2]
    check_counts(counts, 6, 2)
    assert torch.equal(acc.cpu(), torch.where(active.cpu()[:, None], x, 0.0))
