"""recompute_maps: blocks, their windows over what they read, and what is left of the state."""

from __future__ import annotations

import importlib
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from deltafx.config import MANY_STREAMS, STATE_SHARE, Config
from deltafx.ops.base import constant
from deltafx.passes.compute_everywhere import compute_everywhere
from deltafx.passes.list_ahead import AHEAD, list_ahead
from deltafx.passes.live_bytes import live_bytes
from deltafx.passes.lower_ops import lower_ops
from deltafx.passes.run_beside import BESIDE, run_beside
from deltafx.passes.share_lists import LIST, share_lists
from deltafx.state import (
    acc_name,
    allocate,
    allocated_bytes,
    counts_name,
    list_name,
    mask_name,
)
from deltafx.verify import verify
from tests.passes.graphs import Tiny, before, give_lists, normalized, whole

module: Any = importlib.import_module("deltafx.passes.recompute_maps")
BLOCK, recompute_maps = module.BLOCK, module.recompute_maps
find_candidates = torch.ops.deltafx.find_candidates.default


def with_limit(
    model: nn.Module, *xs: Tensor, limit: Any = 1, **options: Any
) -> tuple[fx.GraphModule, Any, int]:
    """The planned graph after the pass, as for a device with lists; and the pass's count."""
    gm, context = before(recompute_maps, model, *xs)
    context.config = Config(max_state_bytes=limit, **options)
    context.dense_bytes = live_bytes(normalized(model, *xs).graph)
    give_lists(context)
    count = recompute_maps(gm, context)
    verify(gm.graph, "planned", context.plan)
    return gm, context, count


def not_kept(context: Any) -> set[str]:
    return {n for n in context.plan.nodes if not context.plan.kept(n)}


def blocks_of(gm: fx.GraphModule) -> dict[str, list[tuple[list[list[int]], list[str]]]]:
    """By the first call of a block: the windows of its lists, and who reads them."""
    return {
        n.name: [
            (list(made.window), [r.name for r in made.readers]) for made in n.meta[BLOCK].lists
        ]
        for n in gm.graph.nodes
        if BLOCK in n.meta
    }


def bottlenecks(*strides: int, wide: int = 2) -> Tiny:
    """Blocks of 1x1, 3x3 and 1x1 behind a stem; where they have a stride, with a shortcut."""
    c = wide
    made: dict[str, nn.Module] = {"stem": nn.Conv2d(2, c, 3, padding=1)}
    for i, stride in enumerate(strides):
        made[f"one{i}"] = nn.Conv2d(c, c, 1)
        made[f"two{i}"] = nn.Conv2d(c, c, 3, stride, 1)
        made[f"three{i}"] = nn.Conv2d(c, c, 1)
        if stride > 1:
            made[f"down{i}"] = nn.Conv2d(c, c, 1, stride)

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x).relu()
        for i, stride in enumerate(strides):
            get = m.get_submodule
            y = get(f"three{i}")(get(f"two{i}")(get(f"one{i}")(x).relu()).relu())
            x = (y + (get(f"down{i}")(x) if stride > 1 else x)).relu()
        return x.sign()

    return Tiny(forward, **made)


def points(window: int, stride: int = 1) -> list[list[int]]:
    """A window with the site in its middle."""
    return [[window] * 2, [stride] * 2, [window // 2] * 2, [1, 1]]


def fix_blocks(monkeypatch: pytest.MonkeyPatch, **outputs: str) -> None:
    """Chooses the blocks by their outputs, by the names of their sources."""

    def choose(blocks: tuple[Any, ...], *_: Any) -> tuple[Any, ...]:
        return tuple(
            b for b in blocks if outputs.get(b.source.name) == b.output.name and b.parts == 1
        )

    monkeypatch.setattr(module, "_choose", choose)


def test_a_block_and_its_windows(monkeypatch):
    fix_blocks(monkeypatch, stem="three0")
    gm, context, count = with_limit(bottlenecks(1), whole(1, 2, 9, 10))
    assert count == 2
    assert not_kept(context) == {"one0", "two0"}
    assert blocks_of(gm) == {
        "one0": [(points(3), ["two0", "three0"]), (points(5), ["one0"])],
    }
    truncates = {n.name: n.meta["truncates"] for n in gm.graph.nodes if "truncates" in n.meta}
    assert [truncates[name] for name in ("one0", "two0", "three0")] == [False, False, True]
    assert set(context.plan.truncating) == {k for k, v in truncates.items() if v}


def test_a_block_with_a_stride(monkeypatch):
    fix_blocks(monkeypatch, stem="three0")
    gm, context, _ = with_limit(bottlenecks(2), whole(1, 2, 9, 10))
    assert not_kept(context) == {"one0", "two0", "down0"}
    ((first, lists),) = blocks_of(gm).items()
    readers = {name: window for window, names in lists for name in names}
    # The windows of the 3x3 layer touch a site; they are three sites wide, two apart.
    assert readers["two0"] == readers["three0"] == readers["down0"] == points(3, 2)
    assert readers["one0"][0] >= [5, 5]
    assert readers["one0"][1] == [1, 1]
    assert lists[-1][1][0] == first


def test_a_block_of_several(monkeypatch):
    fix_blocks(monkeypatch, stem="three1")
    gm, context, _ = with_limit(bottlenecks(1, 1), whole(1, 2, 20, 20))
    assert not_kept(context) >= {"one0", "two0", "three0", "one1", "two1"}
    ((_, lists),) = blocks_of(gm).items()
    readers = {name: window for window, names in lists for name in names}
    first = readers["one0"][0][0]
    sizes = [readers[name][0][0] for name in ("two0", "three0", "one1", "two1", "three1")]
    assert sizes == [first - 2, first - 2, first - 2, first - 4, first - 4]


def test_no_more_than_it_takes():
    net, x = bottlenecks(1, 2, 1, wide=16), whole(2, 2, 24, 24)
    _, context, count = with_limit(net, x, limit=None)
    assert (count, not_kept(context)) == (0, set())
    everything = context.plan.bytes()
    assert with_limit(net, x, limit=everything)[2] == 0
    sizes, kept = [], []
    for share in (0.95, 0.85, 0.75):
        limit = int(everything * share)
        _, context, count = with_limit(net, x, limit=limit)
        assert context.plan.bytes() <= limit
        assert count == len(not_kept(context)) > 0
        kept.append(len(context.plan.nodes) - count)
        sizes.append(context.plan.bytes())
        with torch.device("cpu"):
            assert allocated_bytes(allocate(context.plan).values()) == context.plan.bytes()
    assert kept == sorted(kept, reverse=True)
    assert sizes == sorted(sizes, reverse=True)
    least = with_limit(net, x, limit=1)[1].plan.bytes()
    assert least <= sizes[-1]


def test_a_threshold_of_its_own_keeps_a_map():
    net, x = bottlenecks(1), whole(1, 2, 9, 10)
    gm, context, _ = with_limit(net, x, thresholds={"two0": 0.3})
    assert "two0" not in not_kept(context)
    assert gm.graph.owning_module is gm
    assert "two0" in context.plan.truncating


def gated(m: Any, x: Tensor) -> Tensor:
    """A block whose 3x3 layer is scaled by a gate."""
    x = m.stem(x).relu()
    n = m.two(m.one(x)).relu()
    return (m.three(n * m.gate(n.mean((2, 3), keepdim=True)).sigmoid()) + m.other(x)).sign()


@pytest.mark.parametrize(
    ("other", "kernel", "y_kept"),
    [(nn.Identity(), 3, False), (nn.Conv2d(4, 4, 1), 3, True), (nn.Identity(), 2, True)],
    ids=["its input", "another map", "windows without the site in their middle"],
)
def test_what_a_gate_scales(other: nn.Module, kernel: int, y_kept: bool) -> None:
    net = Tiny(
        gated, stem=nn.Conv2d(2, 4, 1), one=nn.Conv2d(4, 4, 1),
        two=nn.Conv2d(4, 4, kernel, padding=1, dilation=4 - kernel),
        three=nn.Conv2d(4, 4, 1), gate=nn.Conv2d(4, 4, 1), other=other,
    )  # fmt: skip
    gm, context = before(recompute_maps, net, whole(1, 2, 8, 8))
    for node in gm.graph.nodes:
        if node.name == "one":
            node.meta["truncates"] = False  # as before a depthwise convolution
    found = list(module._gated(gm.graph, context.plan, ()))
    assert len(found) == (0 if y_kept else 1)
    if y_kept:
        return
    (block,) = found
    assert [n.name for n in (block.source, *block.inner, block.output)] == ["two", "mul", "three"]
    assert [n.name for n in block.whole] == ["two"]
    plan = module._apply(block, context.plan, 1)
    assert not plan.kept("mul")
    assert "mul" not in plan.truncating
    assert "two" not in plan.truncating
    assert not any(BLOCK in n.meta or LIST in n.meta for n in gm.graph.nodes)
    assert not list(module._gated(gm.graph, context.plan, ["two"])), "it has a threshold"


@pytest.mark.parametrize(
    ("f", "kept"),
    [
        (lambda m, x: (lambda y: (m.b(y), y))(m.a(x)), {"a"}),
        (lambda m, x: m.b(m.a(x).sign()).sign(), {"a", "b"}),
        (lambda m, x: (lambda y: torch.cat([m.b(y), y], 1))(m.a(x)).sign(), {"a", "b"}),
        (lambda m, x: F.interpolate(m.a(x), scale_factor=2).sign(), {"a"}),
        (lambda m, x: m.b(m.a(x) + m.c(m.a(x.flip(2)))).sign(), None),
    ],
    ids=["the caller", "a dense call", "a concatenation", "another operator", "another source"],
)
def test_what_others_read_is_kept(f: Callable[..., Any], kept: set[str] | None):
    net = Tiny(
        f, a=nn.Conv2d(2, 2, 3, padding=1), b=nn.Conv2d(2, 2, 1), c=nn.Conv2d(2, 2, 3, padding=1)
    )
    gm, context, _ = with_limit(net, whole(1, 2, 8, 8))
    for node in gm.graph.nodes:
        if node.name in not_kept(context):
            assert all(u.meta.get("delta") and u.target is node.target for u in node.users)
    assert kept is None or not kept & not_kept(context)


def test_maps_in_the_scratch_memory_do_not_overlap_while_they_are_read():
    rng = random.Random(0)
    for _ in range(200):
        slots = [module.Slot(str(i), (1, rng.randint(1, 9), 8, 8), torch.float32) for i in range(8)]
        until = [rng.randint(i + 1, 9) for i in range(8)]
        over: list[int | None] = [None] * 8
        i = rng.randrange(7)
        j = rng.randrange(i + 1, 8)
        slots[j], until[i], over[j] = slots[i], j, i
        offsets = module._offsets(slots, until, over)
        assert offsets[j] == offsets[i]
        ends = [offset + slot.map_bytes for offset, slot in zip(offsets, slots, strict=True)]
        for i, j in itertools.combinations(range(8), 2):
            apart = ends[i] <= offsets[j] or ends[j] <= offsets[i] or over[j] == i
            assert apart or until[i] < j, "the second is written while the first may be read"
        rooms = sum(slot.map_bytes + module.ALIGNED for slot in slots)
        assert max(ends) <= rooms


def chain(seed: int) -> tuple[Tiny, Tensor]:
    """Convolutions of any window and pools in a row, with shortcuts where the sizes allow it."""
    rng = random.Random(seed)
    made: dict[str, nn.Module] = {"stem": nn.Conv2d(2, 2, 1)}
    depth = rng.randint(2, 5)
    for i in range(depth):
        k, dilation = rng.choice((1, 1, 2, 3, 3, 5)), rng.choice((1, 1, 2))
        stride = rng.choice((1, 1, 1, 2, 3)) if i < 2 else 1
        padding = rng.randint(0, (k - 1) * dilation)
        groups = rng.choice((1, 2))
        made[f"c{i}"] = nn.Conv2d(2, 2, k, stride, padding, dilation, groups)
        if rng.random() < 0.2:
            made[f"c{i}"] = nn.MaxPool2d(k, stride, k // 2, 1, False, stride > 1)

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        for i in range(depth):
            y = m.get_submodule(f"c{i}")(x)
            adds = y.shape == x.shape and isinstance(m.get_submodule(f"c{i}"), nn.Conv2d)
            x = (y + x if adds else y).relu()
        return x.sign()

    torch.manual_seed(seed)
    return Tiny(forward, **made), whole(2, 2, rng.randint(40, 60), rng.randint(40, 60))


class Frames:
    """Runs a planned graph by the update rule with thresholds 0, maps that are not kept as NaNs.

    Of these only what was computed in this frame is there, at the sites that its list has.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm, self.kept, self.lists = gm, {}, {}
        for node in gm.graph.nodes:
            if BLOCK in node.meta:
                for made in node.meta[BLOCK].lists:
                    self.lists |= dict.fromkeys(made.readers, made)

    def __call__(self, x: Tensor, plan: Any) -> list[Tensor]:
        known: dict[fx.Node, Any] = {}
        masks: dict[fx.Node, Tensor] = {}
        for node in self.gm.graph.nodes:
            if node.op == "placeholder":
                known[node] = x
            elif node.op == "get_attr":
                known[node] = constant(node)
            elif node.op == "output":
                return fx.node.map_arg(node.args[0], known.__getitem__)
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
                new = node.target(*args, **kwargs)
                if node.meta.get("delta"):
                    sites = torch.ones(new.shape[0], *new.shape[2:], dtype=torch.bool)
                    if node in self.lists:
                        sites = listed(self.lists[node], masks, sites.shape)
                    old = self.kept.get(node, torch.full_like(new, float("nan")))
                    if not plan.kept(node.name):
                        old = torch.full_like(new, float("nan"))
                    new = torch.where(sites[:, None], new, old)
                    masks[node] = (new != old).any(1)
                    self.kept[node] = new
                known[node] = new
        raise AssertionError


def listed(made: Any, masks: dict[fx.Node, Tensor], shape: torch.Size) -> Tensor:
    """The sites of a list."""
    kernel, stride, padding, dilation = made.window
    ones = torch.ones(1, 1, *kernel)
    source = masks[made.source][:, None].float()
    found = F.conv2d(source, ones, None, stride, padding, dilation)[:, 0] > 0
    assert found.shape == shape
    return found


@pytest.mark.parametrize("seed", range(60))
def test_what_a_block_gives_is_exact(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is computed of a source depends on nothing that was not computed in the frame."""
    monkeypatch.setattr(
        module, "_choose", lambda blocks, *_: (max(blocks, key=lambda b: len(b.inner)),)
    )
    with torch.device("cpu"):
        net, x = chain(seed)
        gm, context, count = with_limit(net, x)
        frames = Frames(gm)
        rng = random.Random(seed)
        for _ in range(5):
            with torch.no_grad():
                (got,), want = frames(x, context.plan), net(x)
            assert torch.equal(got, want)
            x = x.clone()
            y, z = rng.randrange(x.shape[2]), rng.randrange(x.shape[3])
            x[rng.randrange(2), :, y : y + rng.randint(1, 3), z : z + rng.randint(1, 6)] += 1
        assert count > 0


def test_in_the_lowered_graph(monkeypatch):
    fix_blocks(monkeypatch, stem="three0", three0="three1")
    gm, context, _ = with_limit(bottlenecks(1, 2), whole(2, 2, 12, 12))
    for each in (share_lists, list_ahead):
        bears = importlib.import_module(f"deltafx.passes.{each.__name__}")
        monkeypatch.setattr(bears, "bears_list", lambda *_, **__: True)
    for rewrite in (run_beside, list_ahead, share_lists):
        rewrite(gm, context)
        verify(gm.graph, "planned", context.plan)
    assert not any(AHEAD in n.meta for n in gm.graph.nodes if LIST in n.meta)
    graph, _ = lower_ops(gm, context)
    verify(graph, "lowered", context.plan)
    calls = [n for n in graph.nodes if n.op == "call_function"]
    names = [n.meta.get("lowered_from", n.target) for n in calls]
    for i, name in enumerate(names):
        if name in ("one0", "one1") or (name == "down1" and names[i - 1] is find_candidates):
            own, other = calls[i - 1], calls[i - 2]
            assert own.target is other.target is find_candidates
            assert BESIDE not in own.meta
            assert BESIDE in other.meta
            assert own.args[0] is calls[i].args[_argument("memory")]
            break
    else:
        raise AssertionError(names)
    plan = context.plan
    for call in calls:
        name = call.meta.get("lowered_from")
        if name in not_kept(context):
            assert call.args[0].target == acc_name(name)
            assert call.args[1].target == mask_name(name)
            assert call.args[2].target == counts_name(name)
            assert call.args[_argument("listed")] is True
            assert call.args[_argument("threshold")] is None
            assert BESIDE not in call.meta, "its memory is not its own"
    numbers = {n.meta[LIST] for n in gm.graph.nodes if LIST in n.meta}
    assert {list_name(i) for i in numbers} <= {a.target for a in graph.nodes if a.op == "get_attr"}
    assert all(i < len(plan.lists) for i in numbers)
    everywhere, _ = compute_everywhere(gm, graph, plan)
    assert not [n for n in everywhere.nodes if n.target is find_candidates]


def test_a_pool_of_a_block_has_no_list_in_a_dense_frame(monkeypatch):
    net = Tiny(lambda m, x: m.pool(m.a(x)).sign(), a=nn.Conv2d(2, 2, 3), pool=nn.MaxPool2d(2))
    fix_blocks(monkeypatch, input_0_encoded="pool")
    gm, context, _ = with_limit(net, whole(2, 2, 12, 12))
    assert not_kept(context) == {"a"}
    graph, _ = lower_ops(gm, context)
    everywhere, _ = compute_everywhere(gm, graph, context.plan)
    pool = torch.ops.deltafx.pool2d.default
    for each, listed in ((graph, True), (everywhere, False)):
        (call,) = (n for n in each.nodes if n.target is pool)
        assert call.args[-1] is listed


def _argument(name: str) -> int:
    schema = torch.ops.deltafx.conv2d.default._schema
    return [a.name for a in schema.arguments].index(name)


def test_a_sum_is_written_over_its_residual(monkeypatch):
    """In half precision, where a 1x1 convolution adds what nobody reads behind it."""
    net = bottlenecks(1, 1, 1, 1)
    fix_blocks(monkeypatch, stem="three3")
    for dtype in (torch.float32, torch.bfloat16):
        gm, context, _ = with_limit(net.to(dtype), whole(1, 2, 24, 24).to(dtype))
        slots = {name: context.plan.slots[name] for name in not_kept(context)}
        over = 0
        for node in gm.graph.nodes:
            residual = node.kwargs.get("residual")
            if node.name in slots and residual is not None and residual.name in slots:
                same = slots[node.name].scratch == slots[residual.name].scratch
                assert same == (dtype.itemsize == 2)
                over += same
        assert over == (2 if dtype.itemsize == 2 else 0)


@pytest.mark.parametrize("streams", [MANY_STREAMS - 1, MANY_STREAMS])
def test_many_streams_have_a_limit(streams):
    _, context, count = with_limit(bottlenecks(1, 1, 1), whole(streams, 2, 20, 20), limit="auto")
    assert (count > 0) == (streams == MANY_STREAMS)
    if count:
        assert context.plan.bytes() <= STATE_SHARE * context.dense_bytes


def test_no_lists_on_the_cpu():
    with torch.device("cpu"):
        gm, context = before(recompute_maps, bottlenecks(1), whole(1, 2, 6, 7))
    context.config = Config(max_state_bytes=1)
    assert recompute_maps(gm, context) == 0
