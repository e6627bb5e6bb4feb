"""A state of fewer accumulators, on CUDA: blocks whose inner maps are computed anew."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

import deltafx
from deltafx.errors import StateLimitWarning, UnknownNodeError
from tests.bottleneck import Bottleneck
from tests.cuda.test_lists import HALVES, a_list, blocks, clip, random_mask
from tests.exactness import exact_over
from tests.nets import Net, nets
from tests.scenes import Scene, scenes
from tests.test_invariants import check_bounded, check_exact, examples

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("ignore::deltafx.errors.StateLimitWarning"),
]

LEAST = {"max_state_bytes": 1}
"""As few accumulators as can be."""


class Inverted(nn.Module):
    """A block of MobileNetV2."""

    def __init__(self, cin: int, cout: int, stride: int = 1) -> None:
        super().__init__()
        self.one, self.three = nn.Conv2d(cin, 6 * cin, 1), nn.Conv2d(6 * cin, cout, 1)
        self.two = nn.Conv2d(6 * cin, 6 * cin, 3, stride, 1, groups=6 * cin)
        self.adds = cin == cout and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.three(self.two(self.one(x).clamp(0, 6)).clamp(0, 6))
        return y + x if self.adds else y


def pooled() -> nn.Module:
    """The beginning of a ResNet, and a pool in the middle of a block."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), Bottleneck(64, 16),
        nn.Conv2d(64, 72, 3), nn.AvgPool2d(3, 2, 1, ceil_mode=True), nn.Conv2d(72, 64, 1),
    ).eval().cuda()  # fmt: skip


class Gated(nn.Module):
    """A block of EfficientNet."""

    def __init__(self, cin: int, cout: int, stride: int = 1) -> None:
        super().__init__()
        self.one, self.three = nn.Conv2d(cin, 4 * cin, 1), nn.Conv2d(4 * cin, cout, 1)
        self.two = nn.Conv2d(4 * cin, 4 * cin, 3, stride, 1, groups=4 * cin)
        self.gate = SqueezeExcitation(4 * cin, cin)
        self.adds = cin == cout and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.three(self.gate(F.silu(self.two(F.silu(self.one(x))))))
        return y + x if self.adds else y


def gated() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, 2, 1), nn.SiLU(), Gated(24, 24), Gated(24, 40, 2), Gated(40, 40),
        nn.Conv2d(40, 130, 1),
    ).eval().cuda()  # fmt: skip


def inverted() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, 2, 1), nn.ReLU(), Inverted(24, 24), Inverted(24, 40, 2),
        Inverted(40, 40), nn.Conv2d(40, 130, 1),
    ).eval().cuda()  # fmt: skip


MODELS = [blocks, inverted, pooled, gated]


def not_kept(compiled: deltafx.DeltaModule) -> list[str]:
    return [node.name for node in compiled.explain() if node.reason.startswith("not kept")]


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("make", MODELS, ids=lambda f: f.__name__)
def test_a_small_state_is_exact(make: Any, dtype: torch.dtype) -> None:
    net = make().to(dtype)
    for options in ({"dense_above": 1}, {"cuda_graph": False}, {}, {"dense_above": 0}):
        compiled = deltafx.compile(net, threshold=0, **LEAST, **options)  # type: ignore[arg-type]
        exact_over(net, compiled, clip(dtype))
        assert len(not_kept(compiled)) >= 3
        compiled.reset()
        exact_over(net, compiled, clip(dtype)[:3])
        compiled.reset(1)
        exact_over(net, compiled, clip(dtype)[2:5])


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("make", MODELS, ids=lambda f: f.__name__)
def test_a_small_state_changes_nothing(make: Any, dtype: torch.dtype) -> None:
    """Bit for bit, where nothing is truncated."""
    net = make().to(dtype)
    kept, least = (
        deltafx.compile(net, threshold=0, dense_above=1, **options) for options in ({}, LEAST)
    )
    frames = clip(dtype, 10)
    for i, frame in enumerate([*frames, frames[-1]]):
        assert torch.equal(kept(frame), least(frame)), i
        if i == 7:
            for compiled in (kept, least):
                compiled.reset(0)
    assert least.state_bytes() < kept.state_bytes()
    assert not any(n.candidates for n in list(least.stats().nodes.values())[1:]), "a static frame"
    some = not_kept(least)
    with pytest.raises(UnknownNodeError, match="is not kept"):
        least.accumulator(some[0])
    assert not set(some) & set(least.thresholds)
    assert len(some) + len(least.thresholds) >= len(kept.thresholds)


def conv_1x1(acc: Tensor, residual: Tensor, mask: Tensor, packed: Tensor, x: Tensor) -> None:
    """A pointwise convolution of `x` and its sum with a residual, at the sites of a mask."""
    n, _, h, w = acc.shape
    memory, counts = a_list(n, h, w)
    memory[:4] = 0
    own, one, none = random_mask(n, h, w, 0), [1, 1], [0, 0]
    torch.ops.deltafx.conv2d(
        acc, own, counts, x, mask, packed, None, residual, mask, None, None,
        "identity", one, one, none, one, 1, False, "relu", [], None, None, None, "rms", memory,
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(64, 256, 40, 48), (512, 128, 9, 7), (24, 72, 30, 50)], ids=str)
@pytest.mark.parametrize("density", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_in_place_sums(dtype: torch.dtype, density: float, shape: tuple[int, ...]) -> None:
    """A sum that is written over its residual is that which is written elsewhere."""
    torch.manual_seed(0)
    i, o, h, w = shape
    with torch.device("cuda"):
        like = {"dtype": dtype, "memory_format": torch.channels_last}
        x, residual = (torch.randn(2, c, h, w).to(**like) for c in (i, o))
        weight = torch.randn(o, i, 1, 1).to(dtype)
        mask, apart, over = random_mask(2, h, w, density), residual.clone(), residual.clone()
    packed = torch.ops.deltafx.pack_conv_weight(weight, [1, 1], [0, 0], [1, 1], 1, False)
    conv_1x1(apart, residual, mask, packed, x)
    conv_1x1(over, over, mask, packed, x)
    torch.cuda.synchronize()
    assert torch.equal(over, apart)
    changed = (over != residual).any(1)
    assert changed.sum() > 0.9 * mask.sum()
    assert not (changed & ~mask).any()


def test_a_dense_frame_counts_every_site_once() -> None:
    compiled = deltafx.compile(blocks().half(), threshold=0, dense_above=0, **LEAST)  # type: ignore[arg-type]
    for frame in clip(torch.float16):
        compiled(frame)
    compiled(clip(torch.float16)[0])
    stats = compiled.stats()
    assert stats.branch == "dense"
    assert all(n.candidates == n.active == n.sites for n in list(stats.nodes.values())[1:])
    assert any("not kept" in n.reason for n in compiled.explain())


def test_a_limit_is_held() -> None:
    net = blocks().half()
    frames = clip(torch.float16)
    everything = deltafx.compile(net).state_bytes(frames[0])
    with pytest.warns(StateLimitWarning, match="max_state_bytes is 1"):
        least = deltafx.compile(net, **LEAST).state_bytes(frames[0])
    limit = (everything + least) // 2
    compiled = deltafx.compile(net, max_state_bytes=limit, dense_above=1)
    compiled(frames[0])
    assert least <= compiled.state_bytes() <= limit
    tensors = compiled.state_tensors().values()
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert sum(sizes.values()) == compiled.state_bytes()


@pytest.mark.parametrize("seed", range(12))
def test_a_small_state_is_bounded(seed: int, device: torch.device) -> None:
    """What is kept is never farther than its threshold from the function of what is kept."""
    events = ("box", "noise", "box", "box", "static", "box", "noise", "box", "reset stream", "box")
    scene = Scene(events, seed)
    net = MODELS[seed % 4]()
    dtype = HALVES[seed // 4 % 2]
    check_bounded((net, (3, 70, 90)), scene, 0.5, "rms", 1, dtype, device, dense_above=1, **LEAST)


@given(made=nets(), scene=scenes(), streams=st.integers(1, 3), half=st.booleans())
@examples(25)
def test_a_small_state_of_any_net_is_exact(
    made: tuple[Net, tuple[int, int, int]], scene: Scene, streams: int, half: bool,
    device: torch.device,
) -> None:  # fmt: skip
    dtype = torch.bfloat16 if half else torch.float32
    check_exact(made, scene, streams, dtype, device, **LEAST)


def test_streams_in_a_small_state_do_not_touch_each_other() -> None:
    net = blocks().half()
    frames = clip(torch.float16)
    together, *alone = (deltafx.compile(net, dense_above=1, **LEAST) for _ in range(3))
    together.calibrate(frames[:1])
    for compiled in alone:
        compiled.calibrate([frames[0][:1], frames[0][1:]])
    for frame in frames:
        both = together(frame)
        for i, compiled in enumerate(alone):
            assert torch.equal(both[i : i + 1], compiled(frame[i : i + 1]))


def test_a_small_state_takes_less_memory() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 64, 3, 2, 1), nn.ReLU(), Bottleneck(64, 64), Bottleneck(256, 64),
        Bottleneck(256, 64), Bottleneck(256, 64),
    ).eval().cuda().half()  # fmt: skip
    frame = torch.randn(4, 3, 256, 256, device="cuda", dtype=torch.float16)
    peaks = []
    for options in ({}, LEAST):
        compiled = deltafx.compile(net, **options)  # type: ignore[arg-type]
        for _ in range(3):
            compiled(frame)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        compiled(frame)
        peaks.append(torch.cuda.max_memory_allocated())
        del compiled
        gc.collect()
    assert peaks[1] < 0.8 * peaks[0]
