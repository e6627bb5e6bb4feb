import pytest
import torch

from deltafx.ops.resize2d import OP
from tests.ops.harness import DTYPES, check, make_mask, opcheck, rotated, sweep
from tests.ops.reference import touching

KINDS = (("nearest", False), ("nearest-exact", False), ("bilinear", False), ("bilinear", True))
# input size, output size, given scales
RESIZES = (
    ((5, 7), (10, 14), (None, None)),
    ((5, 7), (10, 14), (2.0, 2.0)),
    ((7, 4), (13, 17), (1.9, 4.3)),
    ((8, 9), (3, 9), (None, None)),
    ((1, 6), (5, 1), (None, None)),
    ((6, 11), (9, 5), (1.6, 0.5)),
)


def reads(kind, align_corners, axis, size, out, scales):
    """The input coordinates with a weight, found by feeding torch one unit vector each."""
    shape = (size[axis], out[axis])
    units = torch.eye(shape[0]).reshape(shape[0], 1, shape[0], 1)
    got = OP.dense(units, kind, (shape[1], 1), align_corners, scales[axis], None)
    return tuple(tuple(got[:, 0, o, 0].nonzero().flatten().tolist()) for o in range(shape[1]))


@pytest.mark.parametrize(("kind", "align_corners"), KINDS)
@sweep
def test_resize(dtype, channels, pattern, kind, align_corners, device):
    for i, (size, out, scales) in rotated(list(enumerate(RESIZES)), 1, channels, pattern):
        mask = make_mask(pattern, 2, *size)
        kwargs = {
            "x": torch.randn(2, channels, *size),
            "kind": kind,
            "size": out,
            "align_corners": align_corners,
            "scale_h": scales[0],
            "scale_w": scales[1],
        }
        axes = [reads(kind, align_corners, axis, size, out, scales) for axis in range(2)]
        found = touching(mask, out, *axes)
        if kind == "bilinear":
            # A neighbour of weight 0 may make a candidate too.
            wide = [tuple((*r, r[-1] + 1) for r in axis) for axis in axes]
            most = touching(mask, out, *wide)
            check(OP, kwargs, {"x": mask}, found, dtype, device, i, at_most=most)
        else:
            check(OP, kwargs, {"x": mask}, found, dtype, device, i)


@pytest.mark.parametrize("scales", [(None, None), (2.3, 1.7)])
@pytest.mark.parametrize(("kind", "align_corners"), KINDS)
def test_coordinates_are_those_of_torch(kind, align_corners, scales, device):
    # Large sizes, where a coordinate that is rounded otherwise is off by many ulps.
    for size in (97, 255, 1009):
        x = torch.arange(size, dtype=torch.float32).reshape(1, 1, size, 1)
        out = (int(size * 2.3), 1)
        mask = make_mask("full", 1, size, 1)
        kwargs = {"x": x.square(), "kind": kind, "size": out, "align_corners": align_corners,
                  "scale_h": scales[0], "scale_w": scales[1]}  # fmt: skip
        full = make_mask("full", 1, *out)
        check(OP, kwargs, {"x": mask}, full, torch.float32, device, lost=True)


@pytest.mark.parametrize(("kind", "align_corners"), KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_lost_state_and_nan(dtype, kind, align_corners, device):
    x = torch.randn(2, 17, 5, 6)
    x[0, 2, 1, 1] = float("nan")
    mask = make_mask("full", 2, 5, 6)
    full = make_mask("full", 2, 9, 13)
    kwargs = {"x": x, "kind": kind, "size": (9, 13), "align_corners": align_corners}
    check(OP, kwargs, {"x": mask}, full, dtype, device, lost=True)


def test_opcheck(device):
    kwargs = {"x": torch.randn(2, 6, 7, 5), "kind": "bilinear", "size": (9, 11)}
    opcheck(OP, kwargs, (9, 11), device)


def test_refuses(device):
    acc = torch.zeros(2, 3, 4, 4, device=device).contiguous(memory_format=torch.channels_last)
    mask = torch.zeros(2, 4, 4, dtype=torch.bool, device=device)
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    head = (acc, mask, counts, acc, mask)
    tail = (None, None, "identity", [], None, None, None, "rms")
    with pytest.raises(ValueError, match="kind must be"):
        OP.operator(*head, "bicubic", False, *tail)
    with pytest.raises(ValueError, match="align_corners goes with"):
        OP.operator(*head, "nearest", True, *tail)
