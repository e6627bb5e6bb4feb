"""conv2d on the CPU against the literal update rule of `conv_reference`."""

from dataclasses import replace

import pytest
import torch

from tests.ops.conv_reference import Case, Problem, set_mask

MASKS = ["empty", "full", "one", "random"]
POINT = {"kernel": (1, 1), "padding": (0, 0)}

SHAPES = [
    Case(1, 1),
    Case(3, 16, (7, 7), (2, 2), (3, 3), size=(1, 17, 19)),
    Case(17, 33),
    Case(33, 97, **POINT),
    Case(64, 64),
    Case(97, 17, (5, 3), (2, 1), (2, 0)),
    Case(16, 130, (1, 7), padding=(0, 3)),
    Case(16, 24, (7, 1), padding=(3, 0)),
    Case(16, 40, stride=(2, 3), padding=(1, 0)),
    Case(8, 40, padding=(2, 2), dilation=(2, 2)),
    Case(8, 12, padding=(4, 4), dilation=(4, 4), size=(1, 5, 3)),
    Case(8, 12, padding=(5, 5)),  # wider than the kernel: some windows see no input
    Case(200, 64),  # deeper than one slice of k
    Case(128, 200, **POINT),
    Case(32, 32, groups=32),
    Case(70, 70, (5, 5), (2, 2), (2, 2), groups=70),
    Case(16, 16, padding=(2, 2), dilation=(2, 2), groups=16),
    Case(97, 97, groups=97),
    Case(64, 64, groups=16),
    Case(96, 48, groups=4),
    Case(66, 66, groups=3),
    Case(8, 16, groups=8),
]
FEW = [Case(17, 33), Case(64, 72, **POINT), Case(24, 24, groups=24), Case(48, 80, groups=4)]
FEATURES = {
    "bf16 slice": {"dtype": torch.bfloat16, "margin": 3},
    "slice": {"margin": 5},
    "always": {"policy": None},
    "rms": {"threshold": 0.9},
    "max": {"threshold": 2.5, "policy": "max"},
    "max residual": {"threshold": 2.0, "policy": "max", "residual": True},
    "residual": {"residual": True, "act": "relu6"},
    "residual silu": {"residual": True, "act": "silu", "dtype": torch.bfloat16},
    "after": {"residual": True, "residual_after_act": True},
    "after silu": {"residual": True, "residual_after_act": True, "act": "silu", "margin": 2},
    "prologue": {"prologue": "relu", "act": "leaky_relu", "act_params": (0.1,), "margin": 5},
    "prologue silu": {"prologue": "silu", "act": "identity", "dtype": torch.bfloat16},
    "no bias": {"bias": False},
}


def run(case: Case, mask: str) -> None:
    problem = Problem(case)
    set_mask(problem.x_mask, mask)
    if problem.residual_mask is not None:
        set_mask(problem.residual_mask, "random", seed=3)
    problem.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_shapes(case, mask, dtype):
    run(replace(case, dtype=dtype), mask)


@pytest.mark.parametrize("mask", ["full", "random"])
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_features(case, feature, mask):
    run(replace(case, **FEATURES[feature]), mask)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    "case",
    [
        Case(96, 200, size=(1, 23, 31)),
        Case(64, 96, size=(2, 23, 31), **POINT),
        Case(72, 72, size=(1, 23, 31), groups=72),
        Case(64, 64, size=(1, 23, 31), groups=8),
    ],
    ids=str,
)
def test_a_value_does_not_depend_on_the_other_candidates(case, threads):
    """A static picture stays static only if a site is computed to the bit as it was before."""
    dense = Problem(replace(case, policy=None))
    dense.x_mask.fill_(True)
    before = torch.get_num_threads()
    dense.call()
    torch.set_num_threads(threads)
    try:
        for seed, density in enumerate([0.002, 0.01, 0.05, 0.3, 1.0]):
            again = Problem(replace(case, threshold=0.0))
            again.acc.copy_(dense.acc)
            gen = torch.Generator().manual_seed(seed)
            again.x_mask.copy_(torch.rand(again.x_mask.shape, generator=gen) < density)
            again.call()
            assert again.counts[0] > 0
            assert again.counts[1] == 0
            assert not again.mask.any()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("policy", ["rms", "max"])
@pytest.mark.parametrize("threshold", [0.0, 0.5])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_a_nan_comes_in_and_leaves(case, threshold, policy):
    problem = Problem(replace(case, threshold=threshold, policy=policy))
    clean = problem.x.clone()
    problem.x[0, :, 4, 6] = float("nan")
    problem.x_mask[0, 4, 6] = True
    problem.call()
    window = problem.candidates()
    assert problem.acc.isnan().any(1).equal(window)
    problem.x.copy_(clean)
    problem.call()
    assert not problem.acc.isnan().any()
    assert problem.mask.equal(window)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_opcheck(case):
    for extra in ({}, {"residual": True, "dtype": torch.bfloat16}, {"prologue": "relu"}):
        problem = Problem(replace(case, **extra))
        set_mask(problem.x_mask, "random")
        args, kwargs = problem.arguments()
        torch.library.opcheck(torch.ops.deltafx.conv2d.default, args, kwargs)


@pytest.mark.parametrize("case", [*FEW, Case(6, 4, groups=2, transposed=True)], ids=str)
def test_pack_opcheck(case):
    problem = Problem(case)
    geometry = (case.stride, case.padding, case.dilation, case.groups, case.transposed)
    torch.library.opcheck(
        torch.ops.deltafx.pack_conv_weight.default, (problem.weight, *geometry), {}
    )


@pytest.mark.parametrize(
    ("index", "wrong", "message"),
    [
        (3, lambda x: x[:, :-1], "groups|weight"),
        (3, lambda x: x.contiguous(), "channels_last"),
        (3, lambda x: x.double(), "float32"),
        (3, lambda x: x.bfloat16(), "accumulator"),
        (3, lambda x: x[:1], "streams|x_mask"),
        (4, lambda m: m.byte(), "x_mask must be bool"),
        (5, lambda w: w[1:], "weight"),
        (6, lambda b: b[1:], "bias"),
        (11, lambda a: "swish", "unknown activation|pre_act"),
        (13, lambda s: [2, 2], "accumulator"),
        (14, lambda p: [-1, 1], "padding"),
        (16, lambda g: 5, "groups"),
        (18, lambda a: "swish", "unknown activation"),
        (21, lambda s: None, "together"),
        (23, lambda p: "mean", "policy"),
    ],
)
def test_wrong_arguments(index, wrong, message):
    args = list(Problem(Case(17, 33)).arguments()[0])
    args[index] = wrong(args[index])
    with pytest.raises((ValueError, TypeError), match=message):
        torch.ops.deltafx.conv2d(*args)


def test_listed_candidates_need_their_list():
    args, _ = Problem(Case(17, 33)).arguments()
    with pytest.raises(ValueError, match="needs the list as memory"):
        torch.ops.deltafx.conv2d(*args, listed=True)
    for case in (Case(17, 33), Case(17, 33, (1, 1), padding=(0, 0), residual=True)):
        args, _ = Problem(case).arguments()
        with pytest.raises(ValueError, match="a list is filtered for 1x1 convolutions"):
            torch.ops.deltafx.conv2d(*args, listed=True, filtered=True)
