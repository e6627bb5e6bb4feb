"""The state: a cache, bounded, predicted, and never in the way of a right answer."""

import copy
import dataclasses
import gc
import threading
import weakref

import pytest
import torch
from torch import nn

import deltafx
from deltafx.errors import InvalidInputError, InvalidOptionError, UnknownNodeError
from deltafx.frame_program import _parts
from deltafx.state import (
    COUNTS,
    MASKS,
    Part,
    Place,
    Slot,
    StatePlan,
    acc_name,
    allocate,
    allocated_bytes,
    counts_name,
    frame_counts,
    lose_state,
    mask_name,
)
from tests.branching_net import BranchingNet, clip
from tests.exactness import exact_over

pytestmark = pytest.mark.usefixtures("on_device")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 3, 8, 9), (3, 3, 17, 33), (2, 3, 1, 1)])
def test_the_bytes_are_told_before_and_right(shape, dtype):
    compiled = deltafx.compile(BranchingNet().to(dtype))
    frame = torch.randn(shape).to(dtype)
    told = compiled.state_bytes(frame)
    assert dict(compiled.named_buffers(recurse=False)) == {}, "nothing may be allocated for it"
    compiled(frame)
    assert told == compiled.state_bytes() == compiled.stats().state_bytes
    assert told == allocated_bytes(compiled.state_tensors().values())
    assert compiled.state_bytes(frame) == told


def test_active_sites_are_counted_by_the_operators_or_in_the_masks():
    plan = StatePlan(
        slots={
            name: Slot(name, (2, 4, 3, width), torch.float32)
            for name, width in (("one", 3), ("both", 5), ("none", 3))
        },
        places={
            "one": Place("one", 0, 4),
            "left": Place("both", 0, 1),
            "right": Place("both", 1, 3),
            "none": Place("none", 0, 4),
        },
        nodes=("left", "one", "none", "right"),
        truncating={},
        workspaces={},
        device=torch.device("cpu"),
    )
    tensors = allocate(plan)
    tensors[COUNTS][:] = torch.tensor([[9, 2], [8, 7], [6, 0], [5, 4]])
    tensors[mask_name("both")][1, :2, 3] = True
    tensors[mask_name("one")][0, 0, :] = True
    on_cuda = dataclasses.replace(plan, device=torch.device("cuda"))
    assert frame_counts(plan, tensors) == [[9, 2], [8, 7], [6, 0], [5, 4]]
    assert frame_counts(on_cuda, tensors) == [[9, 2], [8, 3], [6, 0], [5, 2]]
    tensors[MASKS].fill_(True)  # and the bytes between the masks, as in a dense frame
    assert frame_counts(on_cuda, tensors) == [[9, 30], [8, 18], [6, 18], [5, 30]]


def test_the_state_is_not_saved():
    model = BranchingNet()
    compiled = deltafx.compile(model)
    compiled(torch.randn(1, 3, 8, 8))
    assert set(compiled.state_dict()) == {f"model.{name}" for name in model.state_dict()}


def test_a_static_frame_costs_the_comparison_only():
    compiled = deltafx.compile(BranchingNet(), threshold=0.1)
    frame = torch.randn(2, 3, 12, 12)
    for _ in range(3):
        compiled(frame)
    stats = compiled.stats()
    assert stats.flop_fraction == 0
    assert all(n.candidates == 0 for name, n in stats.nodes.items() if name != "input_0_encoded")


def test_a_copy_has_its_own_state():
    compiled = deltafx.compile(BranchingNet(), threshold=0)
    frames = clip(1, 3, 12, 12)
    exact_over(compiled.model, compiled, frames)
    compiled.thresholds["a"] = 0.5
    other = copy.deepcopy(compiled)
    assert other.thresholds["a"] == 0.5
    del other.thresholds["a"], compiled.thresholds["a"]
    with torch.no_grad():
        other.model.a.weight.mul_(2)
    exact_over(other.model, other, frames)
    exact_over(compiled.model, compiled, frames)


@pytest.mark.parametrize("threshold", [0, 0.2])
def test_reset_forgets_everything(threshold):
    model = BranchingNet()
    compiled = deltafx.compile(model, threshold=threshold)
    frames = clip(2, 3, 12, 12)
    for frame in frames:
        compiled(frame)
    compiled.reset()
    exact_over(model, compiled, frames[:1])
    assert compiled.stats().density == 1


def test_one_stream_is_reset_alone():
    model = BranchingNet()
    compiled = deltafx.compile(model, threshold=0)
    frame = torch.randn(3, 3, 10, 11)
    compiled(frame)
    compiled.reset(1)
    compiled(frame)
    for node, mask in ((n, compiled.update_mask(n)) for n in compiled.stats().nodes):
        assert mask[1].all(), node
        assert not mask[[0, 2]].any(), node
    compiled.reset([0, -1])
    exact_over(model, compiled, [frame])
    assert compiled.update_mask()[[0, 2]].all()
    for wrong in (3, [-4], [0, 7]):
        with pytest.raises(InvalidInputError, match="there are 3 streams"):
            compiled.reset(wrong)
    compiled(frame)
    assert compiled.stats().macs == 0, "a reset that fails resets nothing"


def test_streams_are_reset_where_a_node_has_another_batch():
    class Folded(nn.Module):
        """Takes pairs of rows for streams of their own in between."""

        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(2, 4, 3, padding=1)

        def forward(self, x):
            n, _, h, w = x.shape
            return self.b(self.a(x).reshape(2 * n, 2, h, w)).mean((2, 3)).reshape(n, -1)

    model = Folded().eval()
    compiled = deltafx.compile(model, threshold=0)
    frames = clip(3, 3, 8, 8)
    for frame in frames:
        exact_over(model, compiled, [frame])
        compiled.reset(2)
        exact_over(model, compiled, [frame])


def test_reset_before_the_first_frame():
    compiled = deltafx.compile(BranchingNet())
    compiled.reset()
    compiled.reset(0)
    assert len(compiled(torch.randn(1, 3, 8, 8))) == 2


def test_signatures_have_states_of_their_own():
    model = BranchingNet()
    compiled = deltafx.compile(model, threshold=0)
    clips = [clip(1, 3, 8, 9), clip(2, 3, 8, 9, seed=1), clip(1, 3, 16, 5, seed=2)]
    for together in zip(*clips, strict=True):
        for frame in together:
            exact_over(model, compiled, [frame])
    compiled(clips[0][-1])
    assert compiled.stats().macs == 0, "the state of the first signature is still there"


def test_the_least_recently_used_state_is_dropped():
    model = BranchingNet()
    compiled = deltafx.compile(model, threshold=0, max_states=2)
    frames = {size: torch.randn(1, 3, size, size) for size in (6, 7, 8)}

    def work(size):
        exact_over(model, compiled, [frames[size]])
        return compiled.stats().macs > 0

    assert [work(s) for s in (6, 7, 6, 7)] == [True, True, False, False]
    assert work(8)  # 6 is dropped
    assert [work(s) for s in (7, 8, 6)] == [False, False, True]  # now 7 is
    assert work(7)
    held = [weakref.ref(t) for t in compiled.state_tensors().values()]
    work(9 - 1)
    work(6)
    gc.collect()
    assert any(ref() is None for ref in held), "a dropped state is freed"


def test_thresholds_change_between_frames():
    model = BranchingNet()
    compiled = deltafx.compile(model, threshold=0)
    frames = clip(1, 3, 16, 16)
    code = None
    for frame in frames:
        compiled(frame)
        code = code or compiled.code
    noisy = frames[-1] + 0.05 * torch.randn_like(frames[-1])
    compiled.thresholds.set_all(0.3)
    compiled(noisy)
    assert compiled.stats().flop_fraction == 0
    compiled.thresholds["input_0_encoded"] = 0
    compiled(noisy)
    assert compiled.stats().nodes["input_0_encoded"].active == 256
    assert compiled.thresholds["a"] == 0.3
    compiled.thresholds.set_all(0)
    exact_over(model, compiled, [frames[0]])
    assert compiled.code == code, "nothing was compiled again"


def test_nothing_is_truncated_in_a_refresh():
    model = BranchingNet()
    compiled = deltafx.compile(model, threshold=0.5, refresh_every=3)
    torch.manual_seed(0)
    frame, noise = torch.randn(1, 3, 16, 16), 0.01 * torch.randn(10, 1, 3, 16, 16)
    fractions = []
    for i in range(7):
        if i % 3 == 0:  # every site changes a little, so that every site is computed
            exact_over(model, compiled, [frame + noise[i]])
        else:
            compiled(frame + noise[i])
        fractions.append(compiled.stats().flop_fraction)
    assert [f > 0.99 for f in fractions] == [i % 3 == 0 for i in range(7)]
    compiled(frame + noise[7])
    compiled.reset()
    exact_over(model, compiled, [frame])
    still = [compiled(frame) and compiled.stats().flop_fraction for _ in range(6)]
    assert still == [0] * 6, "a still picture stays free"


def test_thresholds_are_a_mapping():
    compiled = deltafx.compile(BranchingNet(), threshold=0.2, thresholds={"a": 0.5})
    assert dict(compiled.thresholds) == {"a": 0.5}
    compiled(torch.randn(1, 3, 8, 8))
    names = list(compiled.thresholds)
    assert names[:2] == ["input_0_encoded", "a"]
    assert len(compiled.thresholds) == len(names)
    assert (compiled.thresholds["a"], compiled.thresholds["c"]) == (0.5, 0.2)
    del compiled.thresholds["a"]
    assert compiled.thresholds["a"] == 0.2
    truncating = [n.name for n in compiled.explain() if n.truncates]
    assert truncating == names
    with pytest.raises(InvalidOptionError, match=r"thresholds\['c'\] must be finite and >= 0"):
        compiled.thresholds["c"] = -1
    for wrong in ("nobody", "cat"):
        with pytest.raises(UnknownNodeError, match=rf"'{wrong}' .*input_0_encoded, a, .*explain"):
            compiled.thresholds[wrong] = 1
        with pytest.raises(UnknownNodeError):
            compiled.thresholds[wrong]


def test_a_name_that_turns_out_to_be_unknown_stays_an_error_until_it_is_removed():
    model = BranchingNet()
    compiled = deltafx.compile(model, threshold=0, thresholds={"conv_a": 0.5})
    frame = torch.randn(1, 3, 8, 8)
    for _ in range(2):
        with pytest.raises(UnknownNodeError, match="'conv_a'"):
            compiled(frame)
    assert "a" in [n.name for n in compiled.explain()]
    del compiled.thresholds["conv_a"]
    exact_over(model, compiled, [frame, frame + 1])


def test_two_models_share_nothing():
    one, two = BranchingNet(1), BranchingNet(2)
    frames, others = clip(1, 3, 12, 12), clip(1, 3, 12, 12, seed=9)
    alone = [[c(f) for f in fs] for c, fs in (
        (deltafx.compile(one), frames), (deltafx.compile(two), others)
    )]  # fmt: skip
    a, b = deltafx.compile(one), deltafx.compile(two)
    for i, (f, g) in enumerate(zip(frames, others, strict=True)):
        for got, expected in ((a(f), alone[0][i]), (b(g), alone[1][i])):
            assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def test_one_model_compiled_twice_has_two_states():
    model, frames = BranchingNet(), clip(1, 3, 12, 12)
    a, b = deltafx.compile(model, threshold=0), deltafx.compile(model, threshold=0)
    a(frames[0])
    b(frames[-1])
    a(frames[0])
    assert a.stats().macs == 0
    exact_over(model, b, frames)


def test_instances_in_threads_equal_their_solo_runs():
    """To the last bit, unless the device chooses, as it timed them, between two evaluations."""
    model = BranchingNet()
    clips = [clip(1, 3, 20, 21, count=20, seed=s) for s in range(2)]
    solo, compiled = ([deltafx.compile(model, dense_above=1) for _ in clips] for _ in range(2))
    alone = [[deltafx_frame(c, f) for f in frames] for c, frames in zip(solo, clips, strict=True)]
    results: list[list] = [[], []]
    barrier = threading.Barrier(2)

    def feed(i):
        barrier.wait()
        for frame in clips[i]:
            results[i].append(deltafx_frame(compiled[i], frame))

    threads = [threading.Thread(target=feed, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for got, expected in zip(results, alone, strict=True):
        assert len(got) == len(expected)
        for x, y in zip(got, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(x, y, strict=True))


def deltafx_frame(compiled, frame):
    return [*compiled(frame), compiled.update_mask("a")]


def small_plan() -> StatePlan:
    """Two maps in the scratch memory, for two of four streams at a time."""
    return StatePlan(
        slots={
            "kept": Slot("kept", (4, 3, 2, 5), torch.float32),
            "first": Slot("first", (2, 8, 2, 5), torch.float32, scratch=0),
            "second": Slot("second", (2, 8, 2, 5), torch.bfloat16, scratch=256),
        },
        places={name: Place(name, 0, 3 if name == "kept" else 8) for name in
                ("kept", "first", "second")},
        nodes=("first", "second", "kept"),
        truncating={"kept": 3},
        workspaces={},
        device=torch.device("cpu"),
        turns={"first": 2, "second": 2, "kept": 2},
        seen_in_parts=frozenset({("kept", 2)}),
    )  # fmt: skip


def test_a_program_sees_the_parts_of_a_state_where_they_are():
    plan = small_plan()
    tensors = allocate(plan)
    found = _parts(plan)
    expected = {acc_name(n) for n in ("first", "second")} | {
        name("kept", Part(i, 2)) for i in range(2) for name in (acc_name, mask_name)
    }
    assert expected <= set(found)
    for name, (base, views) in found.items():
        view = tensors.get(base)
        if view is None:  # itself a view
            inner, first = found[base]
            view = tensors[inner]
            views = [*first, *views]
        for target, *args in views:
            view = target(view, *args)
        own = tensors[name]
        assert view.data_ptr() == own.data_ptr(), name
        assert (view.shape, view.stride(), view.dtype) == (own.shape, own.stride(), own.dtype)


def test_maps_that_are_not_kept_share_memory_in_which_streams_take_turns():
    plan = small_plan()
    tensors = allocate(plan)
    assert plan.scratch_bytes() == max(2 * 8 * 10 * 4, 256 + 2 * 8 * 10 * 2)
    assert allocated_bytes(tensors.values()) == plan.bytes()
    assert [plan.kept(name) for name in plan.nodes] == [False, False, True]
    for name in ("first", "second"):
        assert tensors[acc_name(name)].isnan().all(), "there is nothing to be read"
        assert tensors[acc_name(name)].is_contiguous(memory_format=torch.channels_last)
    second = Part(1, 2)
    for i in range(4):
        tensors[acc_name("kept")][i] = i
    assert tensors[acc_name("kept", second)][:, 0, 0, 0].tolist() == [2, 3]
    tensors[mask_name("kept", second)].fill_(True)
    assert tensors[mask_name("kept")].sum((1, 2)).tolist() == [0, 0, 10, 10]
    for row, name in enumerate(plan.nodes):
        tensors[counts_name(name)][0] = row + 1
        tensors[counts_name(name, second)][0] = 10
        assert counts_name(name, Part(0, 2)) == counts_name(name)
    on_cuda = dataclasses.replace(plan, device=torch.device("cuda"))
    assert frame_counts(on_cuda, tensors) == [[11, 11], [12, 12], [13, 20]]
    tensors[COUNTS][:, 0] = torch.tensor(plan.row_sites(), device="cpu")
    tensors[MASKS].fill_(True)
    assert frame_counts(on_cuda, tensors) == [[40, 40]] * 3, "as after a dense frame"
    tensors[acc_name("first")].zero_()
    lose_state(plan, tensors, [3])
    assert tensors[acc_name("kept")].isnan().sum((1, 2, 3)).tolist() == [0, 0, 0, 30]
    assert not tensors[acc_name("first")].isnan().any()
