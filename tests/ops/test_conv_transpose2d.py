"""conv_transpose2d on the CPU against the literal update rule of `conv_reference`."""

from dataclasses import replace

import pytest
import torch

from tests.ops.conv_reference import Case, Problem, set_mask

SHAPES = [
    Case(8, 8, (2, 2), (2, 2), (0, 0)),
    Case(8, 40, (3, 3), (2, 2), (1, 1), output_padding=(1, 1)),
    Case(33, 97, (4, 4), (2, 2), (1, 1), size=(1, 7, 5)),
    Case(16, 16, (4, 4), (2, 2), (1, 1), groups=4),
    Case(20, 20, (4, 4), (2, 2), (1, 1), groups=20),
    Case(3, 70),
    Case(3, 5, (1, 1), (2, 2), (0, 0)),  # three of four phases see no input
    Case(5, 7, (5, 3), (3, 2), (2, 1), (2, 1)),
    Case(17, 33, (3, 3), (2, 2), (0, 0), (2, 2)),
]
SHAPES = [replace(case, transposed=True) for case in SHAPES]
FEATURES = {
    "bf16": {"dtype": torch.bfloat16},
    "slice": {"margin": 3},
    "always": {"policy": None},
    "rms": {"threshold": 0.9},
    "residual": {"residual": True, "residual_after_act": True, "act": "silu"},
}


@pytest.mark.parametrize("mask", ["empty", "full", "one", "random"])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_shapes(case, mask):
    problem = Problem(case)
    set_mask(problem.x_mask, mask)
    problem.check()


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_features(case, feature):
    problem = Problem(replace(case, **FEATURES[feature]))
    set_mask(problem.x_mask, "random")
    if problem.residual_mask is not None:
        set_mask(problem.residual_mask, "random", seed=3)
    problem.check()


@pytest.mark.parametrize("case", SHAPES[:5], ids=str)
def test_opcheck(case):
    problem = Problem(case)
    set_mask(problem.x_mask, "random")
    args, kwargs = problem.arguments()
    torch.library.opcheck(torch.ops.deltafx.conv_transpose2d.default, args, kwargs)


@pytest.mark.parametrize(
    ("index", "wrong", "message"),
    [
        (5, lambda w: w[1:], "weight"),
        (10, lambda s: [3, 3], "accumulator"),
        (12, lambda p: [-1, 0], "output_padding"),
        (14, lambda g: 3, "groups"),
    ],
)
def test_wrong_arguments(index, wrong, message):
    args = list(Problem(SHAPES[1]).arguments()[0])
    args[index] = wrong(args[index])
    with pytest.raises((ValueError, TypeError), match=message):
        torch.ops.deltafx.conv_transpose2d(*args)
