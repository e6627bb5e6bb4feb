import pytest
import torch

from deltafx.ops.global_pool2d import OP, TILE
from tests.ops.harness import DTYPES, check, make_map, make_mask, rotated, run, sweep
from tests.ops.reference import State

# Sites below, at and above a tile, and several tiles.
SIZES = ((1, 1), (15, 17), (16, 16), (1, 257), (23, 47))


def partial_of(x):
    """The sums as the operator keeps them, and NaN where a tile is not known."""
    n, c, h, w = x.shape
    sites = torch.nn.functional.pad(x.reshape(n, c, -1), (0, -h * w % TILE))
    return sites.reshape(n, c, -1, TILE).sum(-1).transpose(1, 2).contiguous()


@sweep
def test_global_pool(dtype, channels, pattern, device):
    for i, size in rotated(list(enumerate(SIZES)), 2, channels, pattern):
        mask = make_mask(pattern, 2, *size)
        found = mask.flatten(1).any(1)[:, None, None]
        x = torch.randn(2, channels, *size) + 1
        partial = partial_of(x.to(dtype).float())
        # Tiles with an active site are summed anew whatever they held.
        tiles = torch.nn.functional.pad(mask.flatten(1), (0, -size[0] * size[1] % TILE))
        partial[tiles.reshape(2, -1, TILE).any(-1)] = float("nan")
        workspace = lambda partial=partial: {"partial": partial.clone().to(device)}  # noqa: E731
        check(OP, {"x": x}, {"x": mask}, found, dtype, device, i, workspace)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lost_state_and_nan(dtype, device):
    x = torch.randn(2, 17, 20, 31)
    x[0, 2, 1, 1] = float("nan")
    mask = make_mask("full", 2, 20, 31)
    workspace = lambda: {"partial": torch.full((2, 3, 17), float("nan"), device=device)}  # noqa: E731
    found = torch.ones(2, 1, 1, dtype=torch.bool)
    check(OP, {"x": x}, {"x": mask}, found, dtype, device, 0, workspace, lost=True)


def test_sums_do_not_drift(device):
    """A thousand frames of large and small values leave what one frame leaves, to the bit."""

    def state():
        return State(
            make_map(torch.zeros(1, 5, 1, 1), torch.float32, device, False),
            torch.zeros(1, 1, 1, dtype=torch.bool, device=device),
            torch.zeros(2, dtype=torch.int64, device=device),
        )

    def step(state, partial, x, mask):
        x = make_map(x, torch.float32, device, False)
        state.counts.zero_()
        run(OP, state, {"x": x}, {"x": mask.to(device)}, free, {"partial": partial})

    free = {"inv_scale": None, "threshold": None, "policy": "rms"}
    x = torch.randn(1, 5, 30, 30)
    full = make_mask("full", 1, 30, 30)
    long, partial = state(), torch.empty(1, 4, 5, device=device)
    step(long, partial, x, full)
    for frame in range(1000):
        changed = make_mask("random", 1, 30, 30)
        fresh = torch.randn(1, 5, 30, 30) * 10.0 ** (frame % 7)
        x = torch.where(changed[:, None], fresh, x)
        step(long, partial, x, changed)
    once = state()
    step(once, torch.empty(1, 4, 5, device=device), x, full)
    assert torch.equal(long.acc, once.acc)


def test_opcheck(device):
    x = make_map(torch.randn(2, 6, 7, 5), torch.float32, device, False)
    acc = make_map(torch.zeros(2, 6, 1, 1), torch.float32, device, False)
    arguments = (
        acc,
        torch.zeros(2, 1, 1, dtype=torch.bool, device=device),
        torch.zeros(2, dtype=torch.int64, device=device),
        torch.zeros(2, 1, 6, device=device),
        x,
        make_mask("full", 2, 7, 5).to(device),
        *("identity", [], None, None, None, "rms"),
    )
    torch.library.opcheck(OP.operator, arguments)
    with pytest.raises(ValueError, match="partial must be contiguous"):
        OP.operator(*arguments[:3], arguments[3][:, :, :5], *arguments[4:])
