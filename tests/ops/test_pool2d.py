import pytest
import torch

from deltafx.ops.pool2d import OP
from tests.ops.harness import DTYPES, check, make_mask, opcheck, rotated, sweep
from tests.ops.reference import check_counts, touching, windows

# kernel, stride, padding, dilation, ceil_mode
GEOMETRIES = (
    ((3, 3), (2, 2), (1, 1), (1, 1), False),
    ((2, 2), (2, 2), (0, 0), (1, 1), True),
    ((3, 2), (1, 3), (1, 0), (1, 1), True),
    ((1, 1), (3, 2), (0, 0), (1, 1), False),
    ((3, 3), (1, 1), (1, 1), (2, 1), False),
    ((5, 3), (1, 1), (2, 1), (1, 1), False),
)
SIZES = ((7, 13), (8, 9), (11, 5))


def candidates_of(x, mask, geometry):
    kernel, stride, padding, dilation, ceil_mode = geometry
    y = OP.dense(x, "max", kernel, stride, padding, dilation, ceil_mode)
    axes = [
        windows(y.shape[2 + i], kernel[i], stride[i], padding[i], dilation[i]) for i in range(2)
    ]
    return touching(mask, tuple(y.shape[2:]), *axes)


def arguments(kind, x, geometry, **more):
    kernel, stride, padding, dilation, ceil_mode = geometry
    return {
        "x": x,
        "kind": kind,
        "kernel": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "ceil_mode": ceil_mode,
        **more,
    }


@pytest.mark.parametrize("kind", ["max", "avg"])
@sweep
def test_pool(dtype, channels, pattern, kind, device):
    for i, geometry in rotated(list(enumerate(GEOMETRIES)), 2, channels, pattern):
        if kind == "avg" and geometry[3] != (1, 1):
            continue
        size = SIZES[i % len(SIZES)]
        x = torch.randn(2, channels, *size)
        mask = make_mask(pattern, 2, *size)
        found = candidates_of(x, mask, geometry)
        kwargs = arguments(kind, x, geometry, count_include_pad=i % 2 == 0)
        check(OP, kwargs, {"x": mask}, found, dtype, device, i)


@pytest.mark.parametrize("kind", ["max", "avg"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [64, 136, 520])
def test_windows_of_whole_vectors(channels, dtype, kind, device):
    """Rows of whole words and of others, strides of all kinds, sites of one and more pieces."""
    for i, (kernel, stride, padding) in enumerate(
        ((3, 2, 1), (3, 1, 1), (2, 2, 0), (2, 1, 1), (3, 2, 0), (3, 3, 1))
    ):
        geometry = ((kernel,) * 2, (stride,) * 2, (padding,) * 2, (1, 1), i % 2 == 1)
        for pattern, size in (("random", (9, 24)), ("one", (6, 40)), ("full", (5, 13))):
            x = torch.randn(2, channels, *size)
            mask = make_mask(pattern, 2, *size)
            found = candidates_of(x, mask, geometry)
            check(OP, arguments(kind, x, geometry), {"x": mask}, found, dtype, device)


def test_a_map_of_many_more_sites_than_threads(device):
    """Every block has more than it works on, or lists, at a time."""
    for streams, side in ((1, 1000), (8, 200)):
        x = torch.randn(streams, 8, side, side)
        full = make_mask("full", streams, side, side)
        out = side // 2
        acc = torch.zeros(streams, 8, out, out).contiguous(memory_format=torch.channels_last)
        acc, mask = acc.to(device), torch.zeros(streams, out, out, dtype=torch.bool, device=device)
        counts = torch.zeros(2, dtype=torch.int64, device=device)
        inputs = x.contiguous(memory_format=torch.channels_last).to(device), full.to(device)
        window = [3, 3], [2, 2], [1, 1], [1, 1], True, None
        OP.operator(
            acc, mask, counts, *inputs, "max", *window, "identity", [], None, None, None, "rms"
        )
        assert torch.equal(acc.cpu(), torch.nn.functional.max_pool2d(x, 3, 2, 1))
        assert bool(mask.all())
        check_counts(counts, streams * out * out, streams * out * out)


@pytest.mark.parametrize("size", range(3, 12))
@pytest.mark.parametrize("count_include_pad", [True, False])
def test_divisors_where_ceil_mode_overruns(size, count_include_pad, device):
    for kernel, stride in ((2, 3), (3, 2), (4, 3), (5, 5)):
        geometry = ((kernel, 3), (stride, 2), (kernel // 2, 1), (1, 1), True)
        x = torch.randn(1, 3, size, size + 1)
        mask = make_mask("full", 1, size, size + 1)
        y = OP.dense(x, "avg", *geometry, count_include_pad)
        full = make_mask("full", 1, *y.shape[2:])
        kwargs = arguments("avg", x, geometry, count_include_pad=count_include_pad)
        # Lost, every site must come back, those with windows in the padding alone included;
        # those are no candidates otherwise.
        check(OP, kwargs, {"x": mask}, full, torch.float32, device, lost=True)
        check(OP, kwargs, {"x": mask}, candidates_of(x, mask, geometry), torch.float32, device)


def test_divisor_override(device):
    x = torch.randn(2, 5, 6, 7)
    mask = make_mask("random", 2, 6, 7)
    kwargs = arguments("avg", x, GEOMETRIES[0], divisor_override=7)
    found = candidates_of(x, mask, GEOMETRIES[0])
    check(OP, kwargs, {"x": mask}, found, torch.float32, device)


@pytest.mark.parametrize("kind", ["max", "avg"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lost_state_and_nan(dtype, kind, device):
    for channels in (3, 17, 64):
        x = torch.randn(2, channels, 7, 9)
        x[0, 2, 1, 1] = float("nan")
        x[1, :, 3, 4] = float("nan")
        mask = make_mask("full", 2, 7, 9)
        found = candidates_of(x, mask, GEOMETRIES[0])
        kwargs = arguments(kind, x, GEOMETRIES[0])
        check(OP, kwargs, {"x": mask}, found, dtype, device, lost=True)


def test_opcheck(device):
    opcheck(OP, arguments("max", torch.randn(2, 6, 7, 5), GEOMETRIES[0]), (4, 3), device)


def test_refuses(device):
    acc = torch.zeros(2, 3, 4, 4, device=device).contiguous(memory_format=torch.channels_last)
    mask = torch.zeros(2, 4, 4, dtype=torch.bool, device=device)
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    one, tail = [1, 1], ("identity", [], None, None, None, "rms")
    head = (acc, mask, counts, acc, mask)
    with pytest.raises(ValueError, match="kind must be"):
        OP.operator(*head, "min", one, one, [0, 0], one, True, None, *tail)
    with pytest.raises(ValueError, match="no dilation"):
        OP.operator(*head, "avg", one, one, [0, 0], [2, 2], True, None, *tail)
    with pytest.raises(ValueError, match="must be positive"):
        OP.operator(*head, "avg", one, [0, 1], [0, 0], one, True, None, *tail)
