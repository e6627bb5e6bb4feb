"""match_shuffles: view, transpose, reshape is one gather of channels."""

import pytest
import torch

from deltafx.passes.match_shuffles import match_shuffles
from tests.passes.graphs import Tiny, node, rewritten, whole

pytestmark = pytest.mark.usefixtures("on_device")


def shuffle(x, groups, swap=(1, 2)):
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(*swap).reshape(n, c, h, w)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_a_shuffle_is_a_gather(groups):
    gm, count = rewritten(match_shuffles, Tiny(lambda m, x: shuffle(x, groups)), whole(2, 6, 3, 4))
    assert count == 1
    index = list(node(gm, "gather_channels").kwargs["index"])
    assert index == torch.arange(6).reshape(groups, -1).t().flatten().tolist()


def test_other_spellings():
    def f(m, x):
        n, c, h, w = x.shape
        y = x.reshape(n, 2, c // 2, h, w).permute(0, 2, 1, 3, 4).flatten(1, 2)
        return shuffle(y, 3, (-4, -3))

    _, count = rewritten(match_shuffles, Tiny(f), whole(1, 6, 3, 4))
    assert count == 2


def pixels(m, x):
    n, c, h, w = x.shape
    return x.view(n, c, h, 2, w // 2).transpose(3, 4).reshape(n, c, h, w)


def other_shape(m, x):
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c // 2, 2 * h, w)


def with_batch(m, x):
    n, c, h, w = x.shape
    return x.view(2, n // 2, c, h, w).transpose(0, 1).reshape(n, c, h, w)


def middle_read_twice(m, x):
    n, c, h, w = x.shape
    y = x.view(n, 2, c // 2, h, w).transpose(1, 2)
    return y.reshape(n, c, h, w), y + 1


def rows(m, x):
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, w, h).transpose(1, 2).reshape(n, c, h, w)


@pytest.mark.parametrize("f", [pixels, other_shape, with_batch, middle_read_twice, rows])
def test_other_rearrangements_stay(f):
    _, count = rewritten(match_shuffles, Tiny(f), whole(2, 4, 3, 4))
    assert count == 0


def test_dtypes_that_have_no_operator_stay():
    _, count = rewritten(
        match_shuffles, Tiny(lambda m, x: shuffle(x, 2)), whole(1, 4, 2, 2).double()
    )
    assert count == 0
