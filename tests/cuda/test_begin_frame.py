"""begin_frame: the begin of a frame in one kernel does what clearing, comparing and counting do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deltafx.cuda_graph import BRANCHES
from deltafx.state import mask_room
from tests.test_invariants import examples

pytestmark = pytest.mark.cuda


class State:
    """An image's accumulator, with its mask and counts somewhere in larger arenas."""

    def __init__(self, n: int, h: int, w: int, dtype: torch.dtype, before: int, threshold: float):
        sites = n * h * w
        room = mask_room(sites)
        self.masks = torch.ones(16 * before + room + 64, dtype=torch.bool, device="cuda")
        self.masks[16 * before + sites : 16 * before + room] = False  # there is never anything
        self.mask = self.masks[16 * before : 16 * before + sites].view(n, h, w)
        self.all_counts = torch.full((3, 2), 7, dtype=torch.int64, device="cuda")
        self.rows = torch.zeros(n, h, w, 4, dtype=dtype, device="cuda")
        self.acc = self.rows.permute(0, 3, 1, 2)[:, :3]
        self.inv_scale = torch.tensor([1.0, 0.5, 2.0], device="cuda")
        self.threshold = torch.tensor(threshold, device="cuda")
        self.branch = torch.zeros(6, dtype=torch.int32, device="cuda")

    def arguments(self, x: Tensor) -> tuple[object, ...]:
        return (
            self.acc, self.mask, self.all_counts[1], x, 16, self.inv_scale, self.threshold, "rms",
            self.masks, self.all_counts,
        )  # fmt: skip

    def begin(self, x: Tensor, dense_above: float, *, may_skip: bool) -> str:
        torch.ops.deltafx.begin_frame(*self.arguments(x), self.branch, may_skip, False, dense_above)
        return BRANCHES[int(self.branch[0])]

    def one_by_one(self, x: Tensor) -> None:
        torch.ops.deltafx.clear_masks(self.masks, self.all_counts)
        torch.ops.deltafx.encode(*self.arguments(x)[:8])


def picture(n: int, h: int, w: int, dtype: torch.dtype) -> Tensor:
    made = torch.randn(n, 3, h, w, device="cuda", dtype=dtype)
    return made.contiguous(memory_format=torch.channels_last)


@given(
    n=st.integers(1, 3), h=st.integers(1, 70), w=st.integers(1, 12).map(lambda v: 8 * v),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]), before=st.integers(0, 3),
    threshold=st.sampled_from([0.0, 0.2]), seed=st.integers(0, 1000),
)  # fmt: skip
@examples(60)
def test_one_kernel_does_what_three_do(
    n: int, h: int, w: int, dtype: torch.dtype, before: int, threshold: float, seed: int
) -> None:
    torch.manual_seed(seed)
    one, three = (State(n, h, w, dtype, before, threshold) for _ in range(2))
    frame = picture(n, h, w, dtype)
    assert torch.ops.deltafx.begins_frame(*one.arguments(frame))
    for i in range(5):
        if i == 2:
            frame = frame.clone(memory_format=torch.preserve_format)
            frame[:, :, h // 3 : h // 2 + 1, w // 4 : w // 3 + 1] += 1
        if i == 3:
            frame = frame + 0.01
        if i == 4:
            frame = picture(n, h, w, dtype)
            frame[0, 1, h - 1, w - 1] = float("nan")
        three.one_by_one(frame)
        branch = one.begin(frame, 0.5, may_skip=i % 2 == 1)
        assert torch.equal(one.rows.nan_to_num(1e4), three.rows.nan_to_num(1e4)), i
        assert torch.equal(one.masks, three.masks), i
        assert torch.equal(one.all_counts, three.all_counts), i
        assert branch == ("nothing" if i % 2 == 1 and not one.mask.any() else "delta"), i
        assert not one.branch[2:].any(), "counters are left as they were found"


def test_what_no_kernel_begins() -> None:
    state = State(1, 16, 16, torch.float16, 0, 0.1)
    like = torch.randn(1, 3, 16, 16, device="cuda", dtype=torch.float16)
    assert not torch.ops.deltafx.begins_frame(*state.arguments(like)), "contiguous"
    with pytest.raises(NotImplementedError, match="no kernel begins"):
        state.begin(like, 1.0, may_skip=True)
    frame = picture(1, 16, 16, torch.float16)
    assert torch.ops.deltafx.begins_frame(*state.arguments(frame))
    elsewhere = list(state.arguments(frame))
    elsewhere[1] = torch.zeros(1, 16, 16, dtype=torch.bool, device="cuda")
    assert not torch.ops.deltafx.begins_frame(*elsewhere), "a mask that is not in the arena"
