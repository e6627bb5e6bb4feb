"""The executor: frames as CUDA graph launches give what frames without give."""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import deltafx
from deltafx.cuda_graph import WARM_UP_FRAMES, FrameGraph
from deltafx.errors import CudaGraphWarning

pytestmark = pytest.mark.cuda


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 72, 3, 1, 1),
        nn.MaxPool2d(2), nn.Conv2d(72, 72, 3, 1, 1, groups=72), nn.SiLU(), nn.Conv2d(72, 40, 1),
    ).eval().cuda()  # fmt: skip


def frames(count: int, size: int = 48) -> list[torch.Tensor]:
    torch.manual_seed(1)
    clip = [torch.randn(2, 3, size, size, device="cuda")]
    for i in range(count - 1):
        frame = clip[-1].clone()
        frame[:, :, i : i + 9, 2 * i : 2 * i + 7] = torch.randn(2, 3, 9, 7, device="cuda")
        clip.append(frame)
    return clip


def captured(model: deltafx.DeltaModule) -> FrameGraph:
    run = model._require().run
    assert isinstance(run, FrameGraph)
    return run


def test_frames_agree_with_those_without_a_graph() -> None:
    net, clip = small_net(), frames(8)
    with_graph = deltafx.compile(net, threshold=0, dense_above=1)  # bit for bit
    without = deltafx.compile(net, threshold=0, cuda_graph=False)
    outputs = []
    for frame in clip:
        outputs.append((with_graph(frame), without(frame)))
        assert with_graph.stats().nodes == without.stats().nodes
    assert captured(with_graph).captured
    for a, b in outputs:  # and no later frame changed them
        assert torch.equal(a, b)


def test_shapes_and_weights_make_new_graphs() -> None:
    net = small_net()
    model = deltafx.compile(net, threshold=0)
    for size in (48, 32, 48):
        for frame in frames(WARM_UP_FRAMES + 2, size):
            torch.testing.assert_close(model(frame), net(frame), rtol=2e-3, atol=2e-3)
        assert captured(model).captured
    with torch.no_grad():
        net[0].weight.mul_(2)
    for frame in frames(WARM_UP_FRAMES + 2):
        torch.testing.assert_close(model(frame), net(frame), rtol=2e-3, atol=2e-3)


def test_thresholds_and_resets_reach_a_captured_frame() -> None:
    net, clip = small_net(), frames(6)
    model = deltafx.compile(net, threshold=0, refresh_every=0)
    for frame in clip:
        model(frame)
    model.thresholds.set_all(1e6)
    before = model(clip[-1])
    assert torch.equal(model(clip[0]), before)
    model.thresholds.set_all(0.0)
    model.reset()
    torch.testing.assert_close(model(clip[0]), net(clip[0]), rtol=2e-3, atol=2e-3)


class Synchronizing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)[:, 0, :8, :8]
        return torch.linalg.inv(y @ y.transpose(1, 2) + torch.eye(8, device=x.device))


def test_what_cannot_be_captured_runs_without() -> None:
    torch.manual_seed(0)
    net = Synchronizing().eval().cuda()
    model = deltafx.compile(net, threshold=0)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        outputs = [(model(frame), net(frame)) for frame in frames(5)]
    assert [w.category for w in seen].count(CudaGraphWarning) == 1
    assert captured(model).failure
    for a, b in outputs:
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_a_frame_neither_waits_nor_allocates() -> None:
    model, clip = deltafx.compile(small_net()), frames(8)
    for frame in clip:
        model(frame)
    torch.cuda.synchronize()
    segments = torch.cuda.memory_stats()["num_device_alloc"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for frame in clip:
            model(frame)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["num_device_alloc"] == segments


def frames_of(*layouts: str, size: int = 48, dtype: torch.dtype = torch.float32) -> list[Any]:
    """A clip whose frames lie in memory in different ways; one layout after another."""
    torch.manual_seed(2)
    clip = []
    for i, layout in enumerate(layouts * 3):
        x = torch.randn(2, 3, size, size, device="cuda", dtype=dtype)
        if i % 4 == 3:
            x = clip[-1].clone()
        if layout == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        elif layout == "not aligned":
            room = torch.empty(x.numel() + 1, device="cuda", dtype=dtype)
            x = room[1:].view(x.shape).copy_(x)
        elif layout == "a slice":
            room = torch.empty(2, 3, size, size + 8, device="cuda", dtype=dtype)
            x = room[..., :size].copy_(x)
        elif layout == "negated":
            x = torch._neg_view(-x)
        clip.append(x)
    return clip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("captured_as", ["contiguous", "channels_last"])
def test_frames_lie_anywhere(captured_as: str, dtype: torch.dtype) -> None:
    net = small_net().to(dtype)
    with_graph = deltafx.compile(net, threshold=0, dense_above=1)  # bit for bit
    without = deltafx.compile(net, threshold=0, cuda_graph=False)
    layouts = ("contiguous", "channels_last", "not aligned", "a slice", "negated")
    clip = frames_of(captured_as, dtype=dtype) + frames_of(*layouts, dtype=dtype)
    outputs = [(with_graph(frame), without(frame)) for frame in clip]
    assert captured(with_graph).captured
    for a, b in outputs:
        assert torch.equal(a, b)


def copies_in(run: Callable[[], Any]) -> int:
    """How many copies from memory of the device to memory of the device run in a call."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    return sum("Memcpy DtoD" in event.name for event in trace.events())


def test_only_frames_in_other_layouts_are_copied() -> None:
    model = deltafx.compile(small_net(), threshold=0, refresh_every=0)
    for frame in frames_of("contiguous"):
        model(frame)
    copies_in(lambda: model(frame))  # what the profiler itself does at first is not counted
    for frame in frames_of("contiguous"):
        assert copies_in(functools.partial(model, frame)) == 0
    assert copies_in(functools.partial(model, frames_of("not aligned")[0])) == 1


def test_no_frame_is_kept() -> None:
    """A graph that is told where frames are needs no memory for them; nor for those it converts."""
    net = nn.Conv2d(3, 8, 16, 16).cuda().eval()
    frame = torch.randn(1, 3, 2048, 2048, device="cuda")
    others = frame.contiguous(memory_format=torch.channels_last), frame.double(), frame
    gc.collect()
    before = torch.cuda.memory_allocated()
    model = deltafx.compile(net, threshold=0, dense_above=1)
    for _ in range(WARM_UP_FRAMES + 2):
        model(frame)
    assert model._require().run.captured
    held = torch.cuda.memory_allocated() - before
    assert frame.nbytes < model.state_bytes() < 1.2 * frame.nbytes
    assert held < model.state_bytes() + frame.nbytes / 2
    launch = model._require().run._launch
    for other in others:
        launch((other,))
    assert torch.cuda.memory_allocated() - before == held


def test_a_picture_on_its_own_is_a_frame_in_place() -> None:
    """Whatever the stride of a dimension of one element is."""
    net = small_net()
    model = deltafx.compile(net, threshold=0, refresh_every=0)
    like = torch.randn(1, 3, 48, 48, device="cuda").contiguous(memory_format=torch.channels_last)
    for _ in range(WARM_UP_FRAMES + 2):
        model(like)
    picture = torch.randn(48, 48, 3, device="cuda")
    frame = picture.permute(2, 0, 1)[None]
    assert frame.stride() != like.stride()
    copies_in(lambda: model(frame))
    picture.normal_()
    assert copies_in(lambda: model(frame)) == 0
    torch.testing.assert_close(model(frame), net(frame), rtol=2e-3, atol=2e-3)


def test_the_memory_of_a_frame_may_be_used_again() -> None:
    """As soon as the call returns, by whatever comes later on the stream."""
    net = small_net()
    model = deltafx.compile(net, threshold=0, dense_above=1)
    expected = deltafx.compile(net, threshold=0, cuda_graph=False)
    clip = frames(20)
    wanted = [expected(frame) for frame in clip]
    outputs = []
    buffers = [torch.empty_like(clip[0]) for _ in range(2)]
    for i, frame in enumerate(clip):
        shown = buffers[i % 2].copy_(frame)
        outputs.append(model(shown))
        shown.fill_(float("nan"))
    for frame in clip:  # and memory that the allocator hands out again
        outputs.append(model(frame.clone()))
    wanted += [expected(frame) for frame in clip]
    for a, b in zip(outputs, wanted, strict=True):
        assert torch.equal(a, b)


def test_frames_run_on_the_current_stream() -> None:
    net = small_net()
    model = deltafx.compile(net, threshold=0, dense_above=1)
    expected = deltafx.compile(net, threshold=0, cuda_graph=False)
    clip = frames(WARM_UP_FRAMES + 4)
    wanted = [expected(frame) for frame in clip]
    for frame in clip[: WARM_UP_FRAMES + 1]:
        model(frame)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        shown = [frame.clone() for frame in clip]
        for frame in shown:
            model(frame)
        end = side.record_event()
        assert not end.query(), "nothing waited"
        out = model(shown[-1])
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(out, wanted[-1])


class Reading(nn.Module):
    """Reads one of its inputs in a second place, and one in a dense function alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 1, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> Any:
        a = self.conv(x).relu() + self.conv(y)
        return {"sum": a + y.cumsum(-1)[:, :1], "none": None, "last": z.cumsum(-1), "map": a}


def test_what_reads_an_input_besides_still_reads_this_frames() -> None:
    torch.manual_seed(0)
    net = Reading().eval().cuda()
    model = deltafx.compile(net, threshold=0, dense_above=1)
    expected = deltafx.compile(net, threshold=0, cuda_graph=False)
    clips = [frames(8) for _ in range(3)]
    clips[1].reverse()
    outputs = [(model(*shown), expected(*shown)) for shown in zip(*clips, strict=True)]
    # One input after the other stands still.
    for i in range(3):
        shown = [clip[1].clone() if i == n else clip[0].clone() for n, clip in enumerate(clips)]
        outputs.append((model(*shown), expected(*shown)))
    assert captured(model).captured
    for a, b in outputs:
        assert a.keys() == b.keys()
        assert a["none"] is None
        assert torch.equal(a["map"], b["map"])
        for name in ("sum", "last"):
            torch.testing.assert_close(a[name], b[name])


class Drawing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) + torch.rand_like(x)[:, :1]


def test_random_numbers_are_others_in_each_frame() -> None:
    net = Drawing().eval().cuda()
    model = deltafx.compile(net, threshold=0)
    frame = frames(1)[0]
    outputs = [model(frame) for _ in range(WARM_UP_FRAMES + 5)]
    assert captured(model).captured
    assert "random numbers" in model.explain().frames
    plain = net.conv(frame)
    for i, out in enumerate(outputs):
        noise = out - plain
        assert noise.min() > -0.01
        assert noise.max() < 1.01
        assert all(not torch.equal(out, other) for other in outputs[:i])
