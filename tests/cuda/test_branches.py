"""The branches of a frame's graph: whichever the device takes, the state is what the rule says."""

from __future__ import annotations

import importlib
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import deltafx
from deltafx.cuda_graph import BRANCHES, WARM_UP_FRAMES, FrameGraph
from deltafx.ops.everywhere import ways
from tests.exactness import Oracle
from tests.nets import Net, nets
from tests.scenes import Scene, scenes
from tests.test_invariants import check_bounded, check_exact, examples

pytestmark = pytest.mark.cuda

Made = tuple[Net, tuple[int, int, int]]


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 72, 3, 1, 1),
        nn.MaxPool2d(2), nn.Conv2d(72, 72, 3, 1, 1, groups=72), nn.SiLU(), nn.Conv2d(72, 40, 1),
    ).eval().cuda()  # fmt: skip


def warm(net: nn.Module, size: int = 64, **options: object) -> tuple[deltafx.DeltaModule, Oracle]:
    """A model behind its capture, and what checks it; with a switch that no clock has a say in."""
    options = {"dense_above": 0.35, **options}
    model, oracle = deltafx.compile(net, **options), Oracle(net)  # type: ignore[arg-type]
    for _ in range(WARM_UP_FRAMES + 1):
        model(picture(net, size))
    run = model._require().run
    assert isinstance(run, FrameGraph)
    assert run.has_branches, run.describe()
    return model, oracle


def picture(net: nn.Module, size: int = 64) -> torch.Tensor:
    like = next(net.parameters())
    return torch.randn(2, 3, size, size, dtype=like.dtype, device=like.device)


def with_box(frame: torch.Tensor) -> torch.Tensor:
    other = frame.clone()
    other[1, :, 20:31, 33:40] = torch.randn_like(other[1, :, 20:31, 33:40])
    return other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_branch_follows_how_much_changed(dtype: torch.dtype) -> None:
    net = small_net().to(dtype)
    model, oracle = warm(net, threshold=0)
    frame = picture(net)
    for shown, branch in [
        (frame, "dense"), (frame, "nothing"), (box := with_box(frame), "delta"),
        (box, "nothing"), (with_box(box), "delta"), (other := picture(net), "dense"),
        (picture(net), "dense"), (other, "dense"), (with_box(other), "delta"),
    ]:  # fmt: skip
        oracle.compare(model(shown), shown)
        stats = model.stats()
        assert stats.branch == branch
        work = sum(n.candidates for name, n in stats.nodes.items() if "input" not in name)
        assert (work == 0) == (branch == "nothing")
        assert (stats.flop_fraction == 1) == (branch == "dense")
        for name, node in stats.nodes.items():
            assert node.active == int(model.update_mask(name).sum()), name
            assert node.active == node.sites or branch != "dense", name
    oracle.check()


def test_both_graphs_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one with a switch, and the one that the lowered graph follows in any case."""
    chooser = importlib.import_module("deltafx.choose_ways")
    # Else two models may find different ways the quickest, whose last bits differ.
    monkeypatch.setattr(chooser, "ways", lambda **given: ways(**given)[:1])
    net = small_net().half().to(memory_format=torch.channels_last)
    torch.manual_seed(0)
    clip = [picture(net).contiguous(memory_format=torch.channels_last)]
    for i in range(20):
        clip.append([with_box(clip[-1]), clip[-1], 2 * clip[-1] + 1, with_box(clip[-1])][i % 4])
    runs, models = [], [deltafx.compile(net, threshold=0.1, dense_above=0.35) for _ in range(2)]
    for model in models:
        for frame in clip[: WARM_UP_FRAMES + 1]:
            model(frame)
        run = model._require().run
        assert isinstance(run, FrameGraph)
        assert run.chooses_graph, "frames in this layout have two graphs"
        runs.append(run)
    branches = set()
    for i, frame in enumerate(clip):
        results, stats = [], []
        for model, run, told in zip(models, runs, ("delta", "nothing"), strict=True):
            torch.cuda.synchronize()
            run._told.fill_(BRANCHES.index(told))
            results.append(model(frame))
            torch.cuda.synchronize()
            assert BRANCHES[int(run._told)] == model.stats().branch
            stats.append(model.stats().nodes)
        assert torch.equal(*results), i
        assert stats[0] == stats[1], i
        branches.add(models[0].stats().branch)
    assert branches == set(BRANCHES)


def test_tf32() -> None:
    """To eleven bits, both operands of each of four convolutions; cuDNN may keep to fp32."""
    with torch.backends.cudnn.flags(allow_tf32=True):
        net = small_net()
        model, oracle = warm(net, threshold=0)
        frame = picture(net)
        for shown in (frame, with_box(frame), frame, picture(net)):
            oracle.compare(model(shown), shown)
        assert model.stats().branch == "dense"
        assert oracle.error <= max(oracle.bound, 4 * 2 * 2.0**-11)


@pytest.mark.parametrize(("share", "branch"), [(0.0, "dense"), (0.9, "delta"), (1.0, "delta")])
def test_the_option_sets_the_switch(share: float, branch: str) -> None:
    net = small_net()
    model, oracle = warm(net, threshold=0, dense_above=share)
    frame = picture(net)
    model(frame)
    assert model.stats().branch == ("delta" if share == 1 else "dense")
    frame = with_box(frame)
    oracle.compare(model(frame), frame)
    assert model.stats().branch == branch
    oracle.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_switch_is_measured(dtype: torch.dtype) -> None:
    """Which leaves the state as good as it was, and says what it found."""
    net = small_net().to(dtype)
    model, oracle = warm(net, threshold=0, dense_above=None)
    assert re.search(r"more than \d+% of the input changed", model.explain().frames)
    frame = picture(net)
    for shown in (frame, with_box(frame), frame, frame, picture(net)):
        oracle.compare(model(shown), shown)
    oracle.check()


def test_a_reset_is_computed_everywhere() -> None:
    net = small_net()
    model, oracle = warm(net, threshold=0)
    frame = picture(net)
    model(frame)
    model.reset()
    oracle.compare(model(frame), frame)
    assert model.stats().branch == "dense"
    model.reset(1)
    oracle.compare(model(frame), frame)
    oracle.check()


def test_a_frame_of_infinities_leaves_nothing_behind() -> None:
    """Also where a library spreads them farther than the windows that hold them."""
    net = small_net()
    model, oracle = warm(net, threshold=0)
    frame = picture(net)
    bad = picture(net)
    bad[0, :, 5, 7] = float("inf")
    model(bad)
    assert model.stats().branch == "dense"
    model(with_box(bad))
    assert model.stats().branch == "dense", "infinities were met: everything once more"
    for _ in range(2):
        oracle.compare(model(frame), frame)
    oracle.check()
    frame = with_box(frame)
    oracle.compare(model(frame), frame)
    assert model.stats().branch == "delta"
    oracle.check()


class ReadsTheFrame(nn.Module):
    """With a dense op on the frame itself, beside the delta ops."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 1, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.conv(x), x.cumsum(-1)


def test_what_reads_the_frame_itself_is_never_left_out() -> None:
    torch.manual_seed(0)
    net = ReadsTheFrame().eval().cuda()
    model, oracle = warm(net, threshold=0)
    frame = picture(net)
    for shown in (frame, frame, with_box(frame), frame):
        oracle.compare(model(shown), shown)
        assert model.stats().branch != "nothing"
    oracle.check()


class DenseHead(nn.Module):
    """Its results are no accumulators; numbers among its operands."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 1, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = 2 * self.conv(x) - 0.5
        return y.sin(), y.cumsum(-1)


def test_a_still_picture_from_the_first_frame_on() -> None:
    """Then no launch of the graph has computed what is handed out."""
    torch.manual_seed(0)
    net = DenseHead().eval().cuda()
    model, oracle = deltafx.compile(net, threshold=0), Oracle(net)
    frame = picture(net)
    for _ in range(WARM_UP_FRAMES + 3):
        oracle.compare(model(frame), frame)
    assert model.stats().branch == "nothing"
    for shown in (with_box(frame), frame, frame, picture(net)):
        oracle.compare(model(shown), shown)
    oracle.check()


def test_explain_tells_how_frames_run() -> None:
    net = small_net()
    model = deltafx.compile(net, example_inputs=(picture(net),))
    assert "after 2 frames" in model.explain().frames
    model, _ = warm(net)
    assert "one CUDA graph; nothing beyond the comparison" in model.explain().frames
    assert "more than 35% of the input" in str(model.explain())
    model, _ = warm(net, dense_above=1.0)
    assert "cuDNN" not in model.explain().frames


@given(
    made=nets(), scene=scenes(), streams=st.integers(1, 3),
    share=st.sampled_from([0.0, 0.3, 0.6]),
)  # fmt: skip
@examples(25)
def test_exact_at_zero(made: Made, scene: Scene, streams: int, share: float) -> None:
    """I1 and I3, where the dense branch is taken now and then."""
    check_exact(made, scene, streams, torch.float32, torch.device("cuda"), dense_above=share)


@given(
    made=nets(), scene=scenes(), threshold=st.sampled_from([0.01, 0.1]),
    policy=st.sampled_from(["rms", "max"]), share=st.sampled_from([0.0, 0.3, 0.6]),
)  # fmt: skip
@examples(15)
def test_bounded(made: Made, scene: Scene, threshold: float, policy: str, share: float) -> None:
    """I2, likewise."""
    check_bounded(
        made, scene, threshold, policy, 8, torch.float32, torch.device("cuda"), dense_above=share
    )
