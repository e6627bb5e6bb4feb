import torch

from deltafx.ops.layer_norm import OP
from tests.ops.harness import CHANNELS, check, make_mask, opcheck, rotated, sweep

SIZES = ((1, 1), (7, 13), (4, 17))


@sweep
def test_layer_norm(dtype, channels, pattern, device):
    for i, size in rotated(list(enumerate(SIZES)), 1, channels, pattern):
        mask = make_mask(pattern, 2, *size)
        kwargs = {
            "x": torch.randn(2, channels, *size) + 1,
            "weight": torch.randn(channels) if i else None,
            "bias": torch.randn(channels) if i else None,
            "eps": 1e-6,
        }
        check(OP, kwargs, {"x": mask}, mask, dtype, device, i)


def test_lost_state_and_nan(device):
    x = torch.randn(2, 65, 3, 5)
    x[0, 64, 1, 1] = float("nan")
    mask = make_mask("full", 2, 3, 5)
    check(OP, {"x": x, "act": "gelu"}, {"x": mask}, mask, torch.float32, device, lost=True)


def test_variance_survives_a_large_mean(device):
    # The mean of squares minus the squared mean would have no correct digit here.
    for channels in CHANNELS[2:]:
        x = torch.randn(1, channels, 4, 4) + 3000
        mask = make_mask("full", 1, 4, 4)
        check(OP, {"x": x}, {"x": mask}, mask, torch.float32, device)


def test_opcheck(device):
    kwargs = {"x": torch.randn(2, 6, 3, 4), "weight": torch.rand(6), "bias": torch.rand(6)}
    opcheck(OP, kwargs, (3, 4), device)
