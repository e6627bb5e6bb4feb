"""Calls that run beside each other in a captured frame give what they give in a row."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltafx
from deltafx.cuda_graph import WARM_UP_FRAMES, FrameGraph
from deltafx.passes.run_beside import BESIDE
from tests.bottleneck import Bottleneck
from tests.exactness import exact_over
from tests.tangled_net import TangledNet

pytestmark = pytest.mark.cuda

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


class Branching(nn.Module):
    """Blocks, and heads on two levels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.fine = nn.Sequential(Bottleneck(64, 64), Bottleneck(256, 64))
        self.coarse = nn.Sequential(
            Bottleneck(256, 128, 2), Bottleneck(512, 128), Bottleneck(512, 72, 2)
        )
        self.heads = nn.ModuleList(nn.Conv2d(256, 8, 3, padding=1) for _ in range(3))
        self.last = nn.Conv2d(288, 24, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        fine = self.fine(self.stem(x))
        return [self.last(self.coarse(fine)), *[head(fine) for head in self.heads]]


def branching() -> nn.Module:
    torch.manual_seed(0)
    return Branching().eval().cuda()


def clip(dtype: torch.dtype, count: int, seed: int = 0, size: int = 96) -> list[Tensor]:
    """Frames of two streams: boxes in one or both, static ones, cuts."""
    torch.manual_seed(seed)
    chance = random.Random(seed)
    frames = [torch.randn(2, 3, size, size + 32, device="cuda", dtype=dtype)]
    for i in range(count - 1):
        frame = frames[-1].clone()
        y, x = chance.randrange(size - 8), chance.randrange(size - 8)
        if i % 7 == 6:
            frame = torch.randn_like(frame)
        elif i % 5 != 3:
            frame[i % 2 :, :, y : y + 30, x : x + 20] += 0.5
        frames.append(frame)
    return frames


def captured(model: deltafx.DeltaModule) -> FrameGraph:
    run = model._require().run
    assert isinstance(run, FrameGraph)
    assert run.captured, run.describe()
    return run


def marked(model: deltafx.DeltaModule) -> list[str]:
    return [n.name for n in model.graph.nodes if BESIDE in n.meta]


def counts(model: deltafx.DeltaModule, candidates: bool) -> dict[str, tuple[int, int]]:
    nodes = model.stats().nodes
    return {name: (s.candidates if candidates else 0, s.active) for name, s in nodes.items()}


def check_same(net: nn.Module, frames: list[Tensor], threshold: float) -> FrameGraph:
    """Bit for bit what the lowered graph gives in a row, in results and counts; then a reset."""
    options: dict[str, Any] = {"threshold": threshold, "dense_above": 1}
    beside = deltafx.compile(net, **options)
    in_a_row = deltafx.compile(net, cuda_graph=False, **options)
    for model in (beside, in_a_row):
        model.calibrate(frames[:1])
    for i, frame in enumerate(frames):
        if i == len(frames) - 3:
            beside.reset(1)
            in_a_row.reset(1)
        for a, b in zip(beside(frame), in_a_row(frame), strict=True):
            assert torch.equal(a, b), i
        # In a frame without a change the graph takes the branch that looks at no site.
        changed = i == 0 or not torch.equal(frame, frames[i - 1])
        assert counts(beside, changed) == counts(in_a_row, changed), i
    run = captured(beside)
    assert run.beside == len(marked(beside))
    return run


@pytest.mark.parametrize("threshold", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_and_heads(dtype: torch.dtype, threshold: float) -> None:
    run = check_same(branching().to(dtype), clip(dtype, 40), threshold)
    assert run.beside >= 5, "three shortcuts and all but one of the heads"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_they_are_exact(dtype: torch.dtype) -> None:
    net = branching().to(dtype)
    for options in ({"dense_above": 1}, {"cuda_graph": False}, {"dense_above": 0.4}):
        model = deltafx.compile(net, threshold=0, **options)  # type: ignore[arg-type]
        exact_over(net, model, clip(dtype, 9))
        assert len(marked(model)) >= 5


def test_in_a_graph_without_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FrameGraph, "_against_branches", lambda self: "this test wants none")
    run = check_same(branching().half(), clip(torch.float16, 20), 0.1)
    assert not run.has_branches
    assert run.beside >= 5


@pytest.mark.parametrize("seed", range(10))
def test_any_net(seed: int) -> None:
    dtype = DTYPES[seed % 3]
    net = TangledNet(seed, channels=(4, 64)[seed % 2]).cuda().to(dtype)
    check_same(net, clip(dtype, 24, seed, 40), (0.0, 0.05)[seed // 2 % 2])


def test_such_nets_have_much_that_runs_beside_other_things() -> None:
    count = 0
    for seed in range(4):
        model = deltafx.compile(TangledNet(seed).cuda(), threshold=0)
        for frame in clip(torch.float32, WARM_UP_FRAMES + 2, seed, 40):
            model(frame)
        count += captured(model).beside
    assert count >= 6


@pytest.mark.parametrize("slow_beside", [True, False])
def test_a_join_waits_for_the_slower_of_two(slow_beside: bool) -> None:
    """One of the two takes half a millisecond, from whose begin on what joins them may begin."""
    if not torch.classes.deltafx.CapturePoint.supported(torch.device("cuda")):
        pytest.skip("CUDA before 13")
    sites, channels = 8 * 1024, 64
    large, small = (
        torch.ones(n, dtype=torch.bool, device="cuda") for n in (1 << 29, 2 * sites * channels)
    )
    counts = torch.zeros(1, 2, dtype=torch.int64, device="cuda")
    acc = torch.zeros(1, 8, 1024, channels, dtype=torch.float16, device="cuda")
    mask = torch.zeros(1, 8, 1024, dtype=torch.bool, device="cuda")
    last = large[-small.numel() :].view(torch.float16).view_as(acc)  # what is cleared last
    here = torch.classes.deltafx.CapturePoint.here
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.deltafx.clear_masks(small, counts)
        begin = here(acc)
        torch.ops.deltafx.clear_masks(large if slow_beside else small, counts)
        end = here(acc)
        begin.go_back()
        torch.ops.deltafx.clear_masks(small if slow_beside else large, counts)
        end.join()
        torch.ops.deltafx.encode(
            acc.permute(0, 3, 1, 2), mask, counts[0], last.permute(0, 3, 1, 2), 1, None, None,
            "none",
        )  # fmt: skip
    for _ in range(20):
        large.fill_(True)
        acc.fill_(1)
        graph.replay()
        assert not acc.any()


def test_a_point_is_one_of_a_capture() -> None:
    point = torch.classes.deltafx.CapturePoint
    if not point.supported(torch.device("cuda")):
        pytest.skip("CUDA before 13")
    with pytest.raises(RuntimeError, match="is not being captured as a CUDA graph"):
        point.here(torch.zeros(1, device="cuda"))
