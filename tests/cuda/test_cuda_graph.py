"""The executor: frames as CUDA graph launches give what frames without give."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

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
