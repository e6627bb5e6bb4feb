"""separable_conv2d against the literal update rule of `conv_reference`."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.conv_reference import Case, Problem, activation, set_mask


class Separable(Problem):
    """A case whose window is the depthwise half's, with a pointwise product behind it."""

    def __init__(self, case: Case, between: str = "relu", seed: int = 0) -> None:
        gen = torch.Generator().manual_seed(seed + 1)
        self.between = between
        kernel = case.kernel
        self.depthwise = torch.randn(case.cin, 1, *kernel, generator=gen) / sum(kernel) ** 0.5
        self.depthwise_bias = torch.randn(case.cin, generator=gen) if case.bias else None
        super().__init__(case, seed)
        if case.prologue or case.transposed or case.groups != 1:
            raise ValueError("no case of this op")

    @property
    def pointwise(self) -> Tensor:
        """[O, I, 1, 1]: one tap of the weight that the case made."""
        return self.weight[:, :, :1, :1] * (self.weight.shape[2] * self.weight.shape[3]) ** 0.5

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The node's value from its inputs, by torch, in `dtype`."""
        c = self.case

        def to(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(dtype)

        x = F.conv2d(
            self.x.to(dtype), self.depthwise.to(dtype), to(self.depthwise_bias), c.stride,
            c.padding, c.dilation, c.cin,
        )  # fmt: skip
        y = F.conv2d(activation(x, self.between), self.pointwise.to(dtype), to(self.bias))
        residual = to(getattr(self, "residual", None))
        if residual is not None and not c.residual_after_act:
            y = y + residual
        y = activation(y, c.act, c.act_params)
        return y + residual if residual is not None and c.residual_after_act else y

    def call(self) -> None:
        """Runs the op under test, in place."""
        torch.ops.deltafx.separable_conv2d(*self.arguments()[0])

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the op, in the order of its schema."""
        c, pack, point = self.case, torch.ops.deltafx.pack_conv_weight, (1, 1)
        return (
            self.acc, self.mask, self.counts, self.x, self.x_mask,
            pack(self.depthwise, point, (0, 0), point, c.cin, False), self.depthwise_bias,
            self.between, pack(self.pointwise, point, (0, 0), point, 1, False), self.bias,
            self.residual, self.residual_mask, c.kernel, c.stride, c.padding, c.dilation,
            c.residual_after_act, c.act, list(c.act_params), None, self.inv_scale, self.threshold,
            c.policy or "rms",
        ), {}  # fmt: skip


SHAPES = [
    Case(2, 1),
    Case(16, 24),
    Case(33, 97, stride=(2, 2)),
    Case(64, 64, (5, 5), padding=(2, 2)),
    Case(97, 17, (5, 3), (2, 1), (2, 0)),
    Case(24, 130, (1, 7), padding=(0, 3)),
    Case(40, 16, (3, 3), (1, 1), (2, 2), (2, 2)),
    Case(8, 12, padding=(4, 4), dilation=(4, 4), size=(1, 5, 3)),
    Case(8, 12, padding=(5, 5)),  # wider than the kernel: some windows see no input
    Case(600, 72, size=(1, 9, 13)),  # deeper than one slice of k
    Case(32, 32, (1, 1), padding=(0, 0)),
]
FEW = [Case(17, 33), Case(96, 72, stride=(2, 2)), Case(32, 128, size=(1, 23, 31))]
FEATURES: dict[str, dict[str, Any]] = {
    "bf16 slice": {"dtype": torch.bfloat16, "margin": 3},
    "slice": {"margin": 5},
    "always": {"policy": None},
    "rms": {"threshold": 0.9},
    "max residual": {"threshold": 2.0, "policy": "max", "residual": True},
    "residual": {"residual": True, "act": "identity"},
    "after silu": {"residual": True, "residual_after_act": True, "act": "silu", "margin": 2},
    "no bias": {"bias": False},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", ["empty", "full", "one", "random"])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_shapes(case, mask, dtype):
    problem = Separable(replace(case, dtype=dtype))
    set_mask(problem.x_mask, mask)
    problem.check()


@pytest.mark.parametrize("between", ["relu6", "silu", "identity"])
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_features(case, feature, between):
    problem = Separable(replace(case, **FEATURES[feature]), between)
    set_mask(problem.x_mask, "random")
    if problem.residual_mask is not None:
        set_mask(problem.residual_mask, "random", seed=3)
    problem.check()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("between", ["relu", "silu"])
def test_a_value_does_not_depend_on_the_other_candidates(threads, between):
    """A static picture stays static only if a site is computed to the bit as it was before."""
    case = Case(96, 200, size=(1, 23, 31))
    dense = Separable(replace(case, policy=None), between)
    dense.x_mask.fill_(True)
    before = torch.get_num_threads()
    dense.call()
    torch.set_num_threads(threads)
    try:
        for seed, density in enumerate([0.002, 0.01, 0.05, 0.3, 1.0]):
            again = Separable(replace(case, threshold=0.0), between)
            again.acc.copy_(dense.acc)
            gen = torch.Generator().manual_seed(seed)
            again.x_mask.copy_(torch.rand(again.x_mask.shape, generator=gen) < density)
            again.call()
            assert again.counts[0] > 0
            assert again.counts[1] == 0
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("size", [(1, 300, 310), (2, 150, 310)], ids=str)
def test_large_results_are_written_whole(size):
    """Above some size, and without truncation, results are written past the caches."""
    for problem in (
        Separable(Case(16, 32, size=size, policy=None)),
        Problem(Case(16, 32, (1, 1), padding=(0, 0), size=size, policy=None)),
    ):
        problem.x_mask.fill_(True)
        problem.call()
        exact = problem.dense(torch.float64)
        assert ((problem.acc.double() - exact).abs() <= problem.tolerance(exact)).all()
        assert problem.mask.all()


def test_opcheck():
    for extra in ({}, {"residual": True, "dtype": torch.bfloat16}):
        problem = Separable(replace(FEW[0], **extra))
        set_mask(problem.x_mask, "random")
        args, kwargs = problem.arguments()
        torch.library.opcheck(torch.ops.deltafx.separable_conv2d.default, args, kwargs)


def test_one_channel_is_refused():
    with pytest.raises(ValueError, match="two channels"):
        Separable(Case(1, 1)).call()


@pytest.mark.parametrize(
    ("index", "wrong", "message"),
    [
        (3, lambda x: x[:, :-1], "weight"),
        (5, lambda w: w[1:], "depthwise_weight"),
        (6, lambda b: b[1:], "depthwise_bias"),
        (7, lambda a: "swish", "unknown activation"),
        (8, lambda w: w[1:], "weight"),
        (13, lambda s: [2, 2], "accumulator"),
    ],
)
def test_wrong_arguments(index, wrong, message):
    args = list(Separable(FEW[0]).arguments()[0])
    args[index] = wrong(args[index])
    with pytest.raises((ValueError, TypeError), match=message):
        torch.ops.deltafx.separable_conv2d(*args)
