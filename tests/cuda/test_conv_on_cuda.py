"""The convolutions on CUDA against the literal update rule, and what only CUDA has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from deltafx.state import list_room
from tests.ops import test_conv2d, test_conv_transpose2d
from tests.ops.conv_reference import Case, Problem, set_mask
from tests.ops.reference import check_counts

pytestmark = pytest.mark.cuda

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Shapes that the tensor-core tiles, splits and the chunked gather are cut for.
TILES = [
    Case(64, 128, size=(1, 11, 13)),
    Case(128, 64, (1, 1), padding=(0, 0), size=(1, 33, 31)),
    Case(512, 192, size=(1, 6, 7)),
    Case(2048, 65, (1, 1), padding=(0, 0), size=(1, 5, 5)),
    Case(24, 144, (1, 1), padding=(0, 0), size=(2, 15, 17)),
    Case(72, 256, padding=(2, 2), dilation=(2, 2), size=(1, 12, 9)),
]
# Depthwise ones in whole vectors of channels: teams of threads that do and do not fill their warps,
# candidates that a block lists by itself and others, windows over all borders, phases.
DEPTHWISE = [
    Case(8, 8, groups=8),
    Case(144, 144, groups=144),
    Case(200, 200, stride=(2, 2), groups=200),
    Case(72, 72, stride=(2, 1), groups=72, size=(1, 11, 16)),
    Case(64, 64, padding=(0, 0), groups=64),
    Case(40, 40, padding=(3, 3), groups=40, size=(1, 3, 4)),
    Case(16, 16, padding=(0, 2), dilation=(1, 3), groups=16),
    Case(72, 72, (3, 5), padding=(1, 2), groups=72),
    Case(24, 24, (7, 5), padding=(3, 2), groups=24),
    Case(96, 96, groups=96, size=(1, 40, 56)),
    Case(24, 24, (6, 6), (2, 2), (2, 2), groups=24, transposed=True),
    Case(64, 64, (9, 9), (3, 3), (3, 3), groups=64, size=(1, 5, 6), transposed=True),
]
POLICIES: list[dict[str, Any]] = [
    {"policy": None, "act": "relu6"},
    {"policy": None, "act": "silu", "margin": 8},
    {"threshold": 0.7, "bias": False},
    {"policy": "max", "threshold": 1.5, "margin": 8},
]

PRODUCTS = [
    case for case in test_conv2d.SHAPES + TILES + test_conv_transpose2d.SHAPES if case.groups == 1
]


def on_cuda(v: Any) -> Any:
    """A tensor on the device, in a wider buffer if it was in one; anything else as it is."""
    if not isinstance(v, Tensor):
        return v
    if v._base is None:
        return v.cuda()
    wide = v._base.cuda()
    return wide.as_strided(v.shape, v.stride(), v.storage_offset())


class CudaProblem(Problem):
    """Runs the op on the device and brings back what it wrote."""

    tf32 = False
    overload = "default"

    def call(self) -> None:
        args, _ = self.arguments()
        c = self.case
        pack = torch.ops.deltafx.pack_conv_weight
        weight = self.weight.to("cuda", c.dtype)
        packed = pack(weight, c.stride, c.padding, c.dilation, c.groups, c.transposed)
        moved = [on_cuda(a) for a in args]
        moved[5] = packed
        for written in (0, 1, 2):
            assert moved[written].data_ptr() != args[written].data_ptr()
        op = torch.ops.deltafx.conv_transpose2d if c.transposed else torch.ops.deltafx.conv2d
        with torch.backends.cudnn.flags(allow_tf32=self.tf32):
            getattr(op, self.overload)(*moved, *self.lists(moved))
        moved[2].sub_(self.listed)
        for written in (0, 1, 2):
            back = moved[written]
            whole, own = (
                (back, args[written]) if back._base is None else (back._base, args[written]._base)
            )
            (own if own is not None else args[written]).copy_(whole)
        assert self.counts[1] == 0, "active sites are left to the mask"
        self.counts[1] = self.mask.sum()

    def lists(self, moved: list[Any]) -> tuple[Any, ...]:
        """Lists the candidates beforehand; returns the arguments that say so."""
        self.listed = torch.zeros_like(moved[2])  # what the lists count besides the candidates
        return ()

    def tolerance(self, exact: Tensor) -> Tensor:
        if not self.tf32:
            return super().tolerance(exact)
        # Both operands are rounded to 10 bits: a relative error of 2^-10 a product, in the mean.
        return super().tolerance(exact) + 2**-10 * exact.abs().max()


class TensorFloatProblem(CudaProblem):
    tf32 = True


class PlainProblem(CudaProblem):
    """By the kernel of GPUs before Ampere."""

    overload = "plain"


class ListedProblem(CudaProblem):
    """Whose candidates are listed before, for it and for another with the same."""

    def more_sites(self, x_mask: Tensor) -> Tensor:
        return torch.zeros_like(x_mask)

    def lists(self, moved: list[Any]) -> tuple[Any, ...]:
        c, (n, h, w) = self.case, self.mask.shape
        counts, x_mask, residual_mask = moved[2], moved[4], moved[8]
        memory = torch.full((list_room(n * h * w, n),), -7, dtype=torch.int32, device="cuda")
        others = torch.zeros_like(counts)
        more = self.more_sites(x_mask)
        torch.ops.deltafx.find_candidates(
            memory, counts, x_mask | more, residual_mask, c.kernel, c.stride, c.padding,
            c.dilation, memory, others, None, 1,
        )  # fmt: skip
        assert torch.equal(counts, others)
        assert counts[1] > 0, "blocks that are done"
        self.listed = torch.stack([more.sum(), counts[1]])
        return memory, True, bool(more.any())


class FilteredProblem(ListedProblem):
    """With a list of more sites than the candidates."""

    def more_sites(self, x_mask: Tensor) -> Tensor:
        return (torch.rand(x_mask.shape, device="cuda") < 0.3) & ~x_mask


def run(case: Case, mask: str, kind: type[CudaProblem] = CudaProblem) -> None:
    problem = kind(case)
    set_mask(problem.x_mask, mask)
    if problem.residual_mask is not None:
        set_mask(problem.residual_mask, "random", seed=3)
    problem.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", test_conv2d.MASKS)
@pytest.mark.parametrize("case", test_conv2d.SHAPES + TILES, ids=str)
def test_conv2d_shapes(case: Case, mask: str, dtype: torch.dtype) -> None:
    run(replace(case, dtype=dtype), mask)


@pytest.mark.parametrize("mask", ["full", "random"])
@pytest.mark.parametrize("feature", test_conv2d.FEATURES)
@pytest.mark.parametrize("case", test_conv2d.FEW + TILES[:2], ids=str)
def test_conv2d_features(case: Case, feature: str, mask: str) -> None:
    run(replace(case, **test_conv2d.FEATURES[feature]), mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: "-".join(map(str, p.values())))
@pytest.mark.parametrize("mask", ["full", "random", "one"])
@pytest.mark.parametrize("case", DEPTHWISE, ids=str)
def test_depthwise(case: Case, mask: str, policy: dict[str, Any], dtype: torch.dtype) -> None:
    run(replace(case, dtype=dtype, **policy), mask)


LISTED = [c for c in test_conv2d.SHAPES + TILES + DEPTHWISE if not c.transposed]
LISTED += [replace(c, residual=True) for c in TILES]
POINTS = [
    c
    for c in PRODUCTS
    if c.kernel == (1, 1) == c.stride and c.padding == (0, 0) and not c.transposed
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["empty", "one", "random"])
@pytest.mark.parametrize("case", LISTED, ids=str)
def test_listed(case: Case, mask: str, dtype: torch.dtype) -> None:
    run(replace(case, dtype=dtype), mask, ListedProblem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["empty", "one", "random"])
@pytest.mark.parametrize("case", POINTS, ids=str)
def test_listed_and_filtered(case: Case, mask: str, dtype: torch.dtype) -> None:
    run(replace(case, dtype=dtype), mask, FilteredProblem)


@pytest.mark.parametrize("mask", ["full", "random"])
@pytest.mark.parametrize("case", test_conv2d.SHAPES + TILES, ids=str)
def test_conv2d_tf32(case: Case, mask: str) -> None:
    run(case, mask, TensorFloatProblem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", test_conv2d.MASKS)
@pytest.mark.parametrize("case", test_conv_transpose2d.SHAPES, ids=str)
def test_conv_transpose2d_shapes(case: Case, mask: str, dtype: torch.dtype) -> None:
    run(replace(case, dtype=dtype), mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["empty", "full", "random"])
@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_plain_shapes(case: Case, mask: str, dtype: torch.dtype) -> None:
    run(replace(case, dtype=dtype), mask, PlainProblem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", test_conv2d.FEATURES)
@pytest.mark.parametrize("case", [c for c in test_conv2d.FEW if c.groups == 1] + TILES[:2], ids=str)
def test_plain_features(case: Case, feature: str, dtype: torch.dtype) -> None:
    run(replace(case, **{**test_conv2d.FEATURES[feature], "dtype": dtype}), "random", PlainProblem)


def test_tall_tiles_agree_with_small_ones() -> None:
    """The tall tile is for maps that the literal rule is too slow for."""
    torch.manual_seed(0)
    n, c, h, w = 4, 128, 192, 448
    x = torch.randn(n, c, h, w, device="cuda", dtype=torch.float16)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(256, c, 1, 1, device="cuda", dtype=torch.float16) / c**0.5
    packed = torch.ops.deltafx.pack_conv_weight(weight, [1, 1], [0, 0], [1, 1], 1, False)
    whole = torch.full((n, h, w, 256), float("nan"), device="cuda", dtype=torch.float16)
    acc = whole.permute(0, 3, 1, 2)
    mask = torch.rand(n, h, w, device="cuda") < 0.3
    made = torch.zeros_like(mask)
    counts = torch.zeros(2, dtype=torch.int64, device="cuda")
    none = [None] * 5
    torch.ops.deltafx.conv2d(
        acc, made, counts, x, mask, packed, *none, "identity", [1, 1], [1, 1], [0, 0], [1, 1], 1,
        False, "relu", [], None, None, None, "rms",
    )  # fmt: skip
    want = torch.nn.functional.conv2d(x.double(), weight.double()).relu()
    dense = torch.nn.functional.conv2d(x, weight).relu()
    assert torch.equal(made, mask)
    check_counts(counts, int(mask.sum()), int(made.sum()))
    chosen = mask[:, None].expand_as(acc)
    error = (acc.double() - want).abs()[chosen].max()
    assert error <= 2 * (dense.double() - want).abs().max()
    assert acc[~chosen].isnan().all()


# More sites than a block lists by itself; input channels, output channels, kernel, stride, groups.
LONG_LISTS = [
    (64, 64, 3, 1, 1),
    (64, 256, 1, 1, 1),
    (24, 96, 1, 1, 1),
    (128, 128, 3, 2, 1),
    (512, 128, 3, 1, 1),
    (128, 256, 3, 1, 1),
    (3, 64, 7, 2, 1),
    (96, 96, 3, 1, 96),
    (32, 32, 3, 2, 32),
    (144, 144, 5, 1, 144),
]


@pytest.mark.parametrize("density", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("threshold", [None, 0.0, 0.5])
@pytest.mark.parametrize("shape", LONG_LISTS, ids=str)
def test_long_lists(shape: tuple[int, ...], threshold: float | None, density: float) -> None:
    """Maps that the literal rule is too slow for, against torch's own convolution."""
    check_long_list(shape, threshold, density, torch.ops.deltafx.conv2d.default)


@pytest.mark.parametrize("threshold", [None, 0.5])
@pytest.mark.parametrize("shape", [s for s in LONG_LISTS if s[-1] == 1], ids=str)
def test_plain_long_lists(shape: tuple[int, ...], threshold: float | None) -> None:
    """More tiles than blocks."""
    check_long_list(shape, threshold, 1.0, torch.ops.deltafx.conv2d.plain)


@pytest.mark.parametrize("density", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("threshold", [None, 0.5])
@pytest.mark.parametrize("shape", [s for s in LONG_LISTS if s[0] != 3], ids=str)
def test_lists_that_others_make(
    shape: tuple[int, ...], threshold: float | None, density: float
) -> None:
    check_long_list(shape, threshold, density, torch.ops.deltafx.conv2d.default, "its own")


@pytest.mark.parametrize("op", ["default", "plain"])
@pytest.mark.parametrize("threshold", [None, 0.5])
@pytest.mark.parametrize("shape", [s for s in LONG_LISTS if s[2:] == (1, 1, 1)], ids=str)
def test_lists_of_more_than_the_candidates(
    shape: tuple[int, ...], threshold: float | None, op: str
) -> None:
    check_long_list(shape, threshold, 0.01, getattr(torch.ops.deltafx.conv2d, op), "more")


def check_long_list(
    shape: tuple[int, ...],
    threshold: float | None,
    density: float,
    op: torch._ops.OpOverload,
    listed: str = "",
) -> None:
    """listed: whose candidates are listed before, for it and for another; "": nobody's."""
    torch.manual_seed(0)
    cin, cout, kernel, stride, groups = shape
    n, h, w, pad = 3, 97 * stride, 104 * stride, kernel // 2
    room = 4 if cin == 3 else cin
    half = {"device": "cuda", "dtype": torch.float16}
    whole = torch.full((n, h, w, room), float("nan"), **half)  # the fourth channel must not be read
    x = whole.permute(0, 3, 1, 2)[:, :cin]
    x.copy_(torch.randn(x.shape, **half))
    weight = torch.randn(cout, cin // groups, kernel, kernel, **half)
    weight /= (weight.numel() / cout) ** 0.5
    bias = torch.randn(cout, device="cuda")
    dense = torch.nn.functional.conv2d(x, weight, bias.half(), stride, pad, 1, groups).relu()
    exact = torch.nn.functional.conv2d(
        x.double(), weight.double(), bias.double(), stride, pad, 1, groups
    ).relu()
    mask = torch.rand(n, h, w, device="cuda") < density
    window = (kernel, stride, pad)
    candidates = torch.nn.functional.max_pool2d(mask.half()[:, None], *window)[:, 0] > 0
    old = (exact + torch.randn_like(exact) * torch.rand_like(exact[:, :1])).half()
    acc = old.clone(memory_format=torch.channels_last)
    made = torch.zeros_like(candidates)
    counts = torch.zeros(2, dtype=torch.int64, device="cuda")
    scale = torch.rand(cout, device="cuda") + 0.5
    limit = None if threshold is None else torch.tensor([threshold], device="cuda")
    sizes = [[kernel] * 2, [stride] * 2, [pad] * 2, [1, 1]]
    packed = torch.ops.deltafx.pack_conv_weight(weight, *sizes[1:], groups, False)
    more: tuple[Any, ...] = ()
    found = int(candidates.sum())
    if listed:
        memory = torch.full((list_room(made.numel(), n),), -7, dtype=torch.int32, device="cuda")
        source = mask | (torch.rand(mask.shape, device="cuda") < 0.1) if listed == "more" else mask
        others = torch.zeros_like(counts)
        torch.ops.deltafx.find_candidates(
            memory, counts, source, None, *sizes, memory, others, None, 1
        )
        assert torch.equal(counts, others)
        makers = int(counts[1])
        assert makers > 0
        found = int(source.sum()) if listed == "more" else found
        more = (memory, True, listed == "more")
    op(
        acc, made, counts, x, mask, packed, bias, None, None, None, None, "identity", *sizes,
        groups, False, "relu", [], None, None if limit is None else scale, limit, "rms", *more,
    )  # fmt: skip
    if listed:
        assert counts[1] == makers
        counts[1] = 0
    error = 2 * max((dense.double() - exact).abs().max(), 2**-10 * exact.abs().max())
    active = torch.zeros_like(made)
    for first in range(0, cout, 64):
        part = slice(first, first + 64)
        change = (exact - old.double())[:, part] * scale[part].double()[:, None, None]
        size = change.square().mean(1).sqrt()
        written = (acc != old)[:, part].any(1)
        assert not (written & ~candidates).any()
        right = ((acc.double() - exact).abs() <= error)[:, part].all(1)
        slack = 2 * error * scale.max() if threshold else 0.0
        least = -1.0 if threshold is None else threshold
        assert right[candidates & (size > least + slack)].all()
        assert not (written & (size < least - slack)).any()
        active |= candidates if threshold is None else written
    assert torch.equal(made, active)
    check_counts(counts, found, int(active.sum()))
