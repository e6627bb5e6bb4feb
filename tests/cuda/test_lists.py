"""Candidates of several convolutions that one launch finds, on CUDA."""

from __future__ import annotations

import importlib
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deltafx
from deltafx.state import list_room, mask_room
from tests.bottleneck import Bottleneck
from tests.exactness import exact_over
from tests.scenes import Scene
from tests.test_invariants import check_bounded

pytestmark = pytest.mark.cuda

module: Any = importlib.import_module("deltafx.passes.share_lists")
ahead: Any = importlib.import_module("deltafx.passes.list_ahead")
ops = torch.ops.deltafx
HALVES = [torch.float16, torch.bfloat16]


def random_mask(n: int, h: int, w: int, density: float = 0.03) -> Tensor:
    arena = torch.zeros(mask_room(n * h * w), dtype=torch.bool, device="cuda")
    mask = arena[: n * h * w].view(n, h, w)
    mask[:] = torch.rand(n, h, w, device="cuda") < density
    return mask


def a_list(n: int, h: int, w: int) -> tuple[Tensor, Tensor]:
    """The memory of a list, full of what it must not read, and counts."""
    memory = torch.full((list_room(n * h * w, n),), -7, dtype=torch.int32, device="cuda")
    return memory, torch.zeros(2, dtype=torch.int64, device="cuda")


def check_list(memory: Tensor, counts: Tensor, expected: Tensor) -> None:
    """A list holds the sites of a mask, each once, and nothing else was written."""
    n, h, w = expected.shape
    sites = expected.flatten().nonzero().flatten().tolist()
    number, makers = counts.tolist()
    assert number == len(sites)
    assert makers == -(-n * h * -(-w // 8) // 256), "a block for 256 runs of 8 sites"
    assert sorted(memory[4 : 4 + len(sites)].tolist()) == sites
    assert (memory[4 + len(sites) : 4 + expected.numel()] == -7).all()


@pytest.mark.parametrize("seed", range(36))
def test_lists_hold_the_windows_and_more(seed: int) -> None:
    rng = random.Random(seed)
    k, stride = rng.choice((1, 3, 3, 5, 7, 13, 17)), rng.choice((1, 2, 4))
    dilation = rng.choice((1, 1, 2)) if k < 9 else 1
    padding = k // 2 * dilation
    n, h = rng.randint(1, 3), rng.randint(9, 90)
    w = rng.choice((16, 96, 100, rng.randint(9, 200)))
    x = random_mask(n, h, w, rng.choice((0, 0.03, 1)))
    ones = torch.ones(1, 1, k, k, device="cuda")
    windows = F.conv2d(x[:, None].float(), ones, None, stride, padding, dilation)[:, 0] > 0.5
    oh, ow = windows.shape[1:]
    residual = random_mask(n, oh, ow) if rng.random() < 0.5 else None
    own = windows if residual is None else windows | residual
    lists, further, expected = [a_list(n, oh, ow) for _ in range(3)], [], [own]
    readers = torch.zeros(2, dtype=torch.int64, device="cuda")
    if rng.random() < 0.3:
        further += [lists[0][0], readers, None, 1]
        lists = lists[:2]
    for memory, counts in lists[1 : rng.randint(2, 3)]:
        step = rng.choice((1, 2))
        larger = (oh, ow) if step == 1 else (2 * oh - rng.randint(0, 1), 2 * ow - rng.randint(0, 1))
        mask = random_mask(n, *larger) if rng.random() < 0.7 else None
        further += [memory, counts, mask, step]
        expected.append(own if mask is None else own | mask[:, ::step, ::step])
    window = ([k, k], [stride, stride], [padding, padding], [dilation, dilation])
    ops.find_candidates(*lists[0], x, residual, *window, *further)
    for (memory, counts), sites in zip(lists, expected, strict=False):
        check_list(memory, counts, sites)
    if further[0] is lists[0][0]:
        assert torch.equal(readers, lists[0][1]), "of the other reader of the same list"
    alone = a_list(n, oh, ow)
    ops.find_candidates(*alone, x, residual, *window)
    check_list(*alone, own)


def test_what_does_not_fit_is_refused() -> None:
    x = random_mask(1, 8, 8)
    window = ([3, 3], [1, 1], [1, 1], [1, 1])
    one, two = a_list(1, 8, 8), a_list(1, 8, 8)
    with pytest.raises(ValueError, match="the memory of a further list"):
        ops.find_candidates(*one, x, None, *window, two[0][:60], two[1], None, 1)
    with pytest.raises(ValueError, match="in the memory of the first has no mask"):
        ops.find_candidates(*one, x, None, *window, one[0], two[1], x, 1)
    with pytest.raises(ValueError, match="the mask of a further list"):
        ops.find_candidates(*one, x, None, *window, *two, random_mask(1, 8, 8), 2)
    with pytest.raises(ValueError, match="residual_mask"):
        ops.find_candidates(*one, x, random_mask(1, 8, 9), *window, *two, None, 1)


def blocks() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, 2, 1), nn.ReLU(), Bottleneck(64, 64), Bottleneck(256, 64),
        Bottleneck(256, 72, 2), Bottleneck(288, 72),
    ).eval().cuda()  # fmt: skip


def clip(dtype: torch.dtype, count: int = 8) -> list[Tensor]:
    """Frames of two streams: boxes that move in one or both, a static frame, a cut."""
    torch.manual_seed(1)
    frames = [torch.randn(2, 3, 70, 90, device="cuda", dtype=dtype)]
    for i in range(count - 1):
        frame = frames[-1].clone()
        if i == 5:
            frame = torch.randn_like(frame)
        elif i != 3:
            frame[i % 2 :, :, 3 * i : 3 * i + 20, 5 * i : 5 * i + 16] += 0.5
        frames.append(frame)
    return frames


def shared(monkeypatch: pytest.MonkeyPatch, answer: bool) -> None:
    """All lists are shared that can be, or none."""
    for each in (module, ahead):
        monkeypatch.setattr(each, "bears_list", lambda *_, **__: answer)


def finds(compiled: deltafx.DeltaModule) -> int:
    return sum(n.target is ops.find_candidates.default for n in compiled.graph.nodes)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_shared_lists_are_exact(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    shared(monkeypatch, True)
    net = blocks().to(dtype)
    for options in ({"dense_above": 1}, {"cuda_graph": False}, {}):
        compiled = deltafx.compile(net, threshold=0, **options)  # type: ignore[arg-type]
        exact_over(net, compiled, clip(dtype))
        assert finds(compiled) >= 4
        compiled.reset()
        exact_over(net, compiled, clip(dtype)[:3])
        compiled.reset(1)
        exact_over(net, compiled, clip(dtype)[2:5])


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_shared_lists_change_nothing(
    dtype: torch.dtype, graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, frame by frame, but for how many sites are looked at."""
    net = blocks().to(dtype)
    options: dict[str, Any] = {"threshold": 0.1, "cuda_graph": graph, "dense_above": 1}
    made: list[deltafx.DeltaModule] = []
    frames = clip(dtype, 10)
    for answer in (False, True):
        shared(monkeypatch, answer)
        made.append(deltafx.compile(net, **options))
        made[-1].calibrate(frames[:1])
    further = 0
    for i, frame in enumerate([*frames, frames[-1], frames[-1]]):
        if i == 8:
            for compiled in made:
                compiled.reset(0)
        own, common = (compiled(frame) for compiled in made)
        assert torch.equal(own, common)
        before, after = (compiled.stats().nodes for compiled in made)
        for name, node in before.items():
            assert torch.equal(*(compiled.update_mask(name) for compiled in made)), name
            assert node.active == after[name].active, name
            assert node.candidates <= after[name].candidates, name
            further += after[name].candidates - node.candidates
        if i >= len(frames):
            assert not any(n.candidates for n in list(after.values())[1:]), "a static frame"
    assert further > 0, "nothing was truncated"
    assert (finds(made[0]), finds(made[1]) >= 4) == (0, True)


@pytest.mark.parametrize("seed", range(12))
def test_shared_lists_bound_what_is_kept(
    seed: int, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """Also where a frame with lower thresholds finds more than candidates to compute."""
    shared(monkeypatch, True)
    dtype = HALVES[seed // 4 % 2]
    events = ("box", "noise", "box", "box", "static", "box", "noise", "box", "reset stream", "box")
    scene = Scene(events, seed)
    check_bounded((blocks(), (3, 70, 90)), scene, 0.5, "rms", 1, dtype, device, dense_above=1)


def test_convolutions_of_one_map_share_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Conv2d(3, 64, 3, 2, 1)
            self.heads = nn.ModuleList(nn.Conv2d(64, c, 3, padding=1) for c in (64, 130, 8))

        def forward(self, x: Tensor) -> Tensor:
            y = self.trunk(x).relu()
            return torch.cat([head(y) for head in self.heads], 1)

    shared(monkeypatch, True)
    net = Heads().eval().cuda().half()
    compiled = deltafx.compile(net, threshold=0, dense_above=1)
    exact_over(net, compiled, clip(torch.float16))
    assert finds(compiled) == 1
    own = [n.candidates for name, n in compiled.stats().nodes.items() if "heads" in name]
    assert len(own) == 3
    assert len(set(own)) == 1


def bears(
    n: int, h: int, w: int, cin: int, cout: int, kernel: int, residual: bool, wider: float,
    ahead: bool = False,
) -> bool:  # fmt: skip
    def map_of(channels: int) -> Tensor:
        rows = torch.empty((n, h, w, channels), dtype=torch.float16, device="meta")
        return rows.permute(0, 3, 1, 2)

    padding = [kernel // 2] * 2
    acc = map_of(cout)
    return ops.conv2d_bears_list(
        acc, map_of(cin), acc if residual else None, [kernel, kernel], [1, 1], padding, [1, 1], 1,
        wider, ahead, torch.device("cuda"),
    )  # fmt: skip


def test_the_rule_is_that_of_the_kernels() -> None:
    """ResNet-50's maps on an H100, as timed: where lists are used, and where sharing one pays."""
    properties = torch.cuda.get_device_properties(0)
    if (properties.major, properties.multi_processor_count) != (9, 132):
        pytest.skip("for 132 multiprocessors of Hopper's")
    rule = bears
    assert rule(16, 144, 192, 64, 64, 3, False, 0)
    assert rule(16, 144, 192, 64, 256, 1, True, 0.7)
    assert rule(16, 72, 96, 128, 512, 1, True, 0.7)
    assert rule(16, 36, 48, 256, 1024, 1, True, 0.7)
    assert rule(16, 18, 24, 512, 2048, 1, True, 0)
    assert not rule(16, 18, 24, 512, 2048, 1, True, 0.7)
    assert rule(1, 272, 480, 64, 256, 1, True, 0.7)
    assert not rule(1, 144, 192, 64, 256, 1, True, 0), "its blocks find their candidates"
    assert rule(1, 144, 192, 64, 256, 1, True, 0.7, ahead=True)
    assert rule(1, 36, 48, 1024, 256, 1, False, 0.7, ahead=True)
    assert not rule(16, 18, 24, 512, 2048, 1, True, 0.7, ahead=True)


@pytest.mark.parametrize(("h", "w"), [(1, 1), (1, 2), (2, 2), (1, 7), (3, 3)])
def test_a_map_of_a_few_sites_needs_no_list(h: int, w: int) -> None:
    """Fewer than the sites that a thread looks at together, or no multiple of them."""
    for kernel in (1, 3):
        assert not bears(1, h, w, 64, 64, kernel, False, 0)


def test_a_model_by_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule itself is asked, of a map that is large enough for it, and the results are right."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 64, 3, 1, 1), nn.ReLU(), Bottleneck(64, 64), Bottleneck(256, 64)
    )
    net = net.eval().cuda().half()
    asked: list[bool] = []
    rule = module.bears_list

    def remembered(*args: Any, **options: Any) -> bool:
        asked.append(rule(*args, **options))
        return asked[-1]

    for each in (module, ahead):
        monkeypatch.setattr(each, "bears_list", remembered)
    compiled = deltafx.compile(net, threshold=0, dense_above=1)
    frames = [torch.randn(2, 3, 272, 480, device="cuda", dtype=torch.float16)]
    for i in range(4):
        frames.append(frames[-1].clone())
        frames[-1][:, :, 20 * i : 20 * i + 60, 30 * i : 30 * i + 90] += 1
    exact_over(net, compiled, frames)
    if torch.cuda.get_device_capability() == (9, 0):
        assert any(asked)
        assert finds(compiled) >= 2
    else:
        assert finds(compiled) == 0
