"""recompute_maps: a state that is to be small keeps fewer accumulators.

Enters: the planned graph. Leaves: the same calls, and where the state would be larger than the user
wants, inner maps of blocks that are not kept: what a block gives is computed from what it reads,
and its inner maps with it, wherever that needs them, in scratch memory that all blocks share.

    m = conv2d(x=s, weight=1x1)                at 5x5 around what s changed, not kept
    n = conv2d(x=m, weight=3x3)                at 3x3 around it, not kept
    o = conv2d(x=n, weight=1x1, residual=s)    at 3x3 around it, compared and kept

A block is everything between two maps: all convolutions and pools that lead from `source` to
`output` and are read by nobody else. It may hold others. A site of `output` is a candidate where
what it depends on of `source` changed; a site of a map within the block is computed where one of
these candidates depends on it. Both are windows over the source's active sites, so their lists are
found from its mask at once. Nothing is truncated within. Where the maps within are large, the
streams take turns in the scratch memory.

    y = binary(a=n, b=gate, op="mul")          where it changed, not kept
    o = conv2d(x=y, weight=1x1, residual=s)    there, compared and kept

What a gate scales need not be kept either where its only reader is a 1x1 convolution: that reads it
where it was just written. Where that adds a residual, whatever changed of this has to be among what
was written: then `n` is not truncated, and its windows have what changed of `s` in their middle.
CUDA only, where operators go by lists.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import fx

from deltafx.config import MANY_STREAMS, STATE_SHARE
from deltafx.ops import delta_op, is_view
from deltafx.ops.base import value
from deltafx.ops.binary import binary
from deltafx.ops.conv2d import conv2d
from deltafx.ops.encode import encode
from deltafx.ops.pool2d import pool2d
from deltafx.passes.context import Context, only_user
from deltafx.passes.share_lists import LIST, MOST_FURTHER, Window, window_of
from deltafx.state import Slot, StatePlan, list_room

BLOCK = "block"
"""In `meta` of the first call of a block: what is to be called there, a `BlockCalls`."""

MOST_INNER = 24  # maps within a block; where it is larger, it is computed around much that is still

SHARE = 0.22
"""Of a side of the picture: the square that is taken to change when blocks are chosen."""

ALIGNED = 256  # bytes, of a map in the scratch memory

PARTS = (1, 2, 4)

DEAREST = 1e9  # multiply-adds for a byte: whatever it costs

LAUNCH, ROW = 5e8, 1e3
"""What a launch, and eight sites' row of a mask, cost in multiply-adds (H100: 2.5 us, 5 ps)."""


@dataclasses.dataclass(frozen=True)
class BlockList:
    """Sites at which some maps of a block are computed.

    Attributes:
        source: Whose active sites the windows touch.
        window: Of a site, over the source.
        readers: Who is computed there, in order.
    """

    source: fx.Node
    window: Window
    readers: tuple[fx.Node, ...]


@dataclasses.dataclass(frozen=True)
class BlockCalls:
    """A block as it is to be called: its lists and then its operators, for each part in turn.

    Attributes:
        lists: The last is read first.
        calls: Its operators in order.
        parts: In how many parts the streams take turns.
    """

    lists: tuple[BlockList, ...]
    calls: tuple[fx.Node, ...]
    parts: int


@dataclasses.dataclass(frozen=True)
class Reach:
    """In y or x: a site `i` of one map depends on `step * i + first` to `step * i + last`."""

    step: int
    first: int
    last: int

    def through(self, kernel: int, stride: int, padding: int, dilation: int) -> Reach:
        """The same over what a convolution reads of whose result this is."""
        last = self.last * stride - padding + (kernel - 1) * dilation
        return Reach(self.step * stride, self.first * stride - padding, last)


Reaches = tuple[Reach, Reach]


@dataclasses.dataclass(frozen=True)
class Block:
    """A part of the graph of which only the last map may be kept.

    Attributes:
        source: Which map it reads.
        inner: The operators whose maps are not kept, in order.
        output: The one whose map is.
        lists: By which it goes, if it does; the last is read first.
        parts: In how many parts the streams take turns.
        whole: What must not be truncated besides.
        offsets: Of the inner maps in the scratch memory, in their order.
        scratch: Bytes of these together.
        saved: Bytes of the accumulators that need not be kept.
        extra: What it costs, where `SHARE` of the picture changed: multiply-adds.
    """

    source: fx.Node
    inner: tuple[fx.Node, ...]
    output: fx.Node
    lists: tuple[BlockList, ...]
    parts: int
    whole: tuple[fx.Node, ...]
    offsets: tuple[int, ...]
    scratch: int
    saved: int
    extra: float

    @property
    def calls(self) -> tuple[fx.Node, ...]:
        """All of its operators, in order."""
        return (*self.inner, self.output)

    @property
    def list_bytes(self) -> int:
        """Bytes of its lists, but for the one that is every operator's."""
        return sum(4 * _room(found, self.parts) for found in self.lists[:-1])


def recompute_maps(gm: fx.GraphModule, context: Context) -> int:
    """Chooses blocks; returns how many maps are not kept."""
    plan, limit = context.plan, _limit(context)
    if not plan.lists or plan.bytes() <= limit:
        return 0
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    given = context.config.thresholds
    blocks = (*_blocks(gm.graph, order, plan, given), *_gated(gm.graph, plan, given))
    chosen = _choose(blocks, order, plan.bytes() - limit)
    for block in chosen:
        context.plan = _apply(block, context.plan, len(plan.lists))
    return sum(len(block.inner) for block in chosen)


def _limit(context: Context) -> float:
    """How many bytes the state is to have at most."""
    limit = context.config.max_state_bytes
    if limit == "auto":
        streams = max((slot.shape[0] for slot in context.plan.slots.values()), default=0)
        limit = int(STATE_SHARE * context.dense_bytes) if streams >= MANY_STREAMS else None
    return math.inf if limit is None else limit


def _blocks(
    graph: fx.Graph, order: Mapping[fx.Node, int], plan: StatePlan, given: Iterable[str]
) -> Iterator[Block]:
    """All blocks of a graph but for the largest; nodes with a threshold of their own are kept."""
    alone = plan.alone()
    inner = {
        n for n in graph.nodes
        if n.target in (conv2d, pool2d) and n.meta.get("delta") and n.name in alone
    }  # fmt: skip
    never, nodes = set(given), list(graph.nodes)
    for source in nodes:
        if not source.meta.get("delta") or is_view(source) or source.name not in alone:
            continue
        before: dict[fx.Node, frozenset[fx.Node]] = {source: frozenset()}
        # All that is computed of the source alone, as far as a block may go.
        for node in nodes[order[source] + 1 :]:
            if node not in inner or not all(n in before for n in _maps_of(node)):
                continue
            within = frozenset().union(*(before[n] | {n} for n in _maps_of(node))) - {source}
            if len(within) > MOST_INNER:
                break
            before[node] = within
            closed = all(user in within or user is node for n in within for user in n.users)
            if within and closed and not any(n.name in never for n in within):
                inside = tuple(sorted(within, key=order.__getitem__))
                yield from _in_parts(source, inside, node, plan)


def _gated(graph: fx.Graph, plan: StatePlan, given: Iterable[str]) -> Iterator[Block]:
    """Maps that a gate scales, each with the convolution that alone reads it."""
    alone, never = plan.alone(), set(given)
    for node in graph.nodes:
        if node.target is not binary or not node.meta.get("delta") or node.name not in alone:
            continue
        output = only_user(node)
        maps = [n for n in (node.kwargs["a"], node.kwargs["b"]) if isinstance(n, fx.Node)]
        same = [n for n in maps if n.meta.get("delta") and value(n).shape == value(node).shape]
        if output is None or len(same) != 1 or node.name in never or output.name not in alone:
            continue
        if output.target is not conv2d or output.kwargs["x"] is not node:
            continue
        residual: Any = output.kwargs.get("residual")
        if not window_of(output).is_own_site:
            continue
        whole: tuple[fx.Node, ...] = ()
        if residual is not None:
            if residual.name not in alone or same[0].name in never:
                continue
            if not _writes_all_of(same[0], residual):
                continue
            whole = (same[0],)
        size = plan.slots[node.name].map_bytes
        n, _, h, w = value(output).shape
        extra = LAUNCH + n * h * w * SHARE**2 * _macs(output) * len(whole)
        yield Block(same[0], (node,), output, (), 1, whole, (0,), size, size, extra)


def _writes_all_of(node: fx.Node, source: fx.Node) -> bool:
    """Whether a convolution that is not truncated is active wherever a map is that it is made of.

    So it is where it reads just that, or what a 1x1 convolution makes of it without truncation, by
    windows with the site in their middle.
    """
    if node.target is not conv2d or not node.meta.get("delta"):
        return False
    window = window_of(node)
    if window.stride != [1, 1] or not window.has_middle:
        return False
    x: Any = node.kwargs["x"]
    if x is source:
        return True
    if x.target is not conv2d or not x.meta.get("delta") or x.meta["truncates"]:
        return False
    return x.kwargs["x"] is source and window_of(x).is_own_site


def _window_over(node: fx.Node) -> Window:
    """The window of a convolution or a pool."""
    if node.target is conv2d:
        return window_of(node)
    given: dict[str, Any] = {"padding": (0, 0), "dilation": (1, 1), **node.kwargs}
    return Window(*(list(given[name]) for name in ("kernel", "stride", "padding", "dilation")))


def _macs(node: fx.Node) -> int:
    """Multiply-adds of a site."""
    op = delta_op(node)
    return 0 if op is None else op.macs_per_site(node)


def _maps_of(node: fx.Node) -> list[fx.Node]:
    """The maps that a convolution or a pool reads."""
    found = (node.kwargs["x"], node.kwargs.get("residual"))
    return [n for n in found if isinstance(n, fx.Node)]


def _in_parts(
    source: fx.Node, inner: tuple[fx.Node, ...], output: fx.Node, plan: StatePlan
) -> Iterator[Block]:
    """The block of these nodes, if one step leads from each of its maps to the next; and in parts.

    A frame's own comparison is not seen in parts: convolutions may read its slot as a whole.
    """
    reaches = _reaches(source, inner, output)
    if reaches is None:
        return
    calls = (*inner, output)
    windows = _windows(source, calls, reaches)
    lists = _lists(source, windows)
    streams = value(output).shape[0]
    more = sum(_macs(n) * (_sites(n, windows[n]) - _sites(n, _window_over(n))) for n in calls)
    saved = sum(plan.slots[n.name].map_bytes for n in inner)
    read_until = [_last_reader(n, calls) for n in inner]
    over = [_written_over(n, inner, read_until) for n in inner]
    for parts in PARTS:
        if parts > 1 and (streams % parts > 0 or source.target is encode):
            continue
        slots = [_in_turns(plan.slots[n.name], parts) for n in inner]
        offsets = _offsets(slots, read_until, over)
        scratch = max(o + slot.map_bytes for o, slot in zip(offsets, slots, strict=True))
        launches = parts * (len(calls) + len(lists)) - len(calls)
        extra = streams * more + _found(lists) + LAUNCH * launches
        yield Block(source, inner, output, lists, parts, (), offsets, scratch, saved, extra)


def _in_turns(slot: Slot, parts: int) -> Slot:
    """A slot for a part of the streams at a time."""
    return dataclasses.replace(slot, shape=(slot.shape[0] // parts, *slot.shape[1:]))


def _found(lists: Iterable[BlockList]) -> float:
    """What it costs to look for the sites of lists, eight at a time."""
    cost = 0.0
    for found in lists:
        n, _, h, w = value(found.readers[0]).shape
        cost += n * h * w / 8 * found.window.kernel[0] * ROW
    return cost


def _reaches(
    source: fx.Node, inner: tuple[fx.Node, ...], output: fx.Node
) -> dict[fx.Node, Reaches] | None:
    """What a site of the output depends on of each map; none, where that is no one step."""
    one = Reach(1, 0, 0)
    found: dict[fx.Node, Reaches] = {output: (one, one)}
    for user in (output, *reversed(inner)):
        window = _window_over(user)
        y, x = (
            reach.through(*numbers)
            for reach, numbers in zip(found[user], zip(*window, strict=True), strict=True)
        )
        reads = [(user.kwargs["x"], (y, x))]
        if user.kwargs.get("residual") is not None:
            reads.append((user.kwargs["residual"], found[user]))
        for node, more in reads:
            known = found.get(node, more)
            if any(a.step != b.step for a, b in zip(known, more, strict=True)):
                return None
            found[node] = tuple(  # type: ignore[assignment]
                Reach(a.step, min(a.first, b.first), max(a.last, b.last))
                for a, b in zip(known, more, strict=True)
            )
    whole = all(
        s.step % n.step == 0
        for node in inner
        for s, n in zip(found[source], found[node], strict=True)
    )
    return found if whole else None


def _windows(
    source: fx.Node, calls: Sequence[fx.Node], reaches: Mapping[fx.Node, Reaches]
) -> dict[fx.Node, Window]:
    """Of a site of each node: whatever the candidates depend on that depend on the site."""
    output = calls[-1]
    axes: dict[fx.Node, list[tuple[int, int, int, int]]] = {node: [] for node in calls}
    for i in (0, 1):
        size, of_source = value(source).shape[2 + i], reaches[source][i]
        kernel, step, padding, _ = _axis(of_source, size, value(output).shape[2 + i])
        # The windows of the output may be wider than it takes: these are its candidates.
        first, last = -padding, kernel - 1 - padding
        for node in calls:
            own = reaches[node][i]
            stride = step // own.step
            wider = Reach(stride, first - stride * own.last, last - stride * own.first)
            axes[node].append(_axis(wider, size, value(node).shape[2 + i]))
    return {
        node: Window(*(list(pair) for pair in zip(y, x, strict=True)))
        for node, (y, x) in axes.items()
    }


def _axis(reach: Reach, size: int, result: int) -> tuple[int, int, int, int]:
    """Kernel, stride, padding and dilation of the least window with a result of that size."""
    padding = max(0, -reach.first)
    kernel = max(1, padding + reach.last + 1)
    while (size + 2 * padding - kernel) // reach.step + 1 < result:
        padding, kernel = padding + 1, kernel + 1
    while (size + 2 * padding - kernel) // reach.step + 1 > result:
        kernel += 1
    return kernel, reach.step, padding, 1


def _sites(node: fx.Node, window: Window) -> float:
    """At how many sites of a stream a node is computed, where `SHARE` of its source changed."""
    found = 1.0
    axes = zip(value(node).shape[2:], *window[:2], window.dilation, strict=True)
    for size, kernel, stride, dilation in axes:
        found *= min(size, SHARE * size + (kernel - 1) * dilation / stride)
    return found


def _last_reader(node: fx.Node, calls: Sequence[fx.Node]) -> int:
    """Where the last call stands that reads a node."""
    return max(i for i, call in enumerate(calls) if call in node.users)


def _written_over(node: fx.Node, inner: Sequence[fx.Node], read_until: Sequence[int]) -> int | None:
    """Which of the inner maps a convolution may be written over: its residual, read last by it.

    Each value of that is read by the thread that writes this one there. For a dense frame a kernel
    of ours does so, which takes pointwise convolutions in half precision.
    """
    residual: Any = node.kwargs.get("residual")
    if residual not in inner or node.kwargs["x"] is residual or not _is_pointwise(node):
        return None
    at = inner.index(residual)
    alike = value(residual).shape == value(node).shape and value(node).dtype.itemsize == 2
    return at if alike and read_until[at] == inner.index(node) else None


def _is_pointwise(node: fx.Node) -> bool:
    """Whether each site of a convolution reads just that site."""
    return node.target is conv2d and window_of(node).is_own_site


def _offsets(
    slots: Sequence[Slot], read_until: Sequence[int], over: Sequence[int | None]
) -> tuple[int, ...]:
    """Where maps lie of which each is there from its own call to its last reader's.

    `over`: for each the one in whose place it is to be, if any.
    """
    offsets: list[int] = []
    for i, slot in enumerate(slots):
        if (same := over[i]) is not None:
            offsets.append(offsets[same])
            continue
        taken = sorted(
            (offsets[j], offsets[j] + slots[j].map_bytes) for j in range(i) if read_until[j] >= i
        )
        offset = 0
        for first, end in taken:
            if offset + slot.map_bytes <= first:
                break
            offset = max(offset, -(-end // ALIGNED) * ALIGNED)
        offsets.append(offset)
    return tuple(offsets)


def _choose(
    blocks: Sequence[Block], order: Mapping[fx.Node, int], wanted: int
) -> tuple[Block, ...]:
    """Blocks that do not overlap and take `wanted` bytes off the state, at little cost.

    Where none do, those that take off the most.
    """
    by_end = sorted(blocks, key=lambda b: order[b.output])
    best: tuple[Block, ...] = ()
    for scratch in sorted({block.scratch for block in blocks}):
        fitting = _Row([b for b in by_end if b.scratch <= scratch], order)
        found = fitting.dearest(DEAREST)
        if _off(found) < wanted:
            best = max(best, found, key=_off)
            continue
        low, high = 1e-6, DEAREST
        for _ in range(30):
            price = math.sqrt(low * high)
            tried = fitting.dearest(price)
            if _off(tried) >= wanted:
                found, high = tried, price
            else:
                low = price
        if _off(best) < wanted or _cost(found) < _cost(best):
            best = found
    return best


def _cost(blocks: Sequence[Block]) -> float:
    return sum(block.extra for block in blocks)


def _off(blocks: Sequence[Block]) -> int:
    """How many bytes blocks take off the state."""
    saved = sum(block.saved for block in blocks)
    return saved - max((b.scratch + b.list_bytes for b in blocks), default=0)


class _Row:
    """Blocks by their ends, of which some may be chosen that do not overlap."""

    def __init__(self, by_end: Sequence[Block], order: Mapping[fx.Node, int]) -> None:
        ends = [order[b.output] for b in by_end]
        self._blocks = by_end
        # How many end before each begins.
        self._before = [bisect_left(ends, order[b.inner[0]]) for b in by_end]

    def dearest(self, price: float) -> tuple[Block, ...]:
        """Those that are worth the most, at a price in multiply-adds for a byte."""
        worth, taken = [0.0], []
        for i, (block, before) in enumerate(zip(self._blocks, self._before, strict=True)):
            gain = worth[before] + block.saved * price - block.extra
            taken.append(gain > worth[i])
            worth.append(max(gain, worth[i]))
        chosen: list[Block] = []
        i = len(self._blocks)
        while i > 0:
            i -= 1
            if taken[i]:
                chosen.append(self._blocks[i])
                i = self._before[i]
        return tuple(reversed(chosen))


def _apply(block: Block, plan: StatePlan, first: int) -> StatePlan:
    """The plan in which the inner maps of a block are not kept; `first`: its first own list."""
    slots, truncating = dict(plan.slots), dict(plan.truncating)
    turns, seen = dict(plan.turns), set(plan.seen_in_parts)
    if block.parts > 1:
        turns |= dict.fromkeys((n.name for n in block.calls), block.parts)
        seen |= {(n.name, block.parts) for n in (block.source, block.output)}
    for node, offset in zip(block.inner, block.offsets, strict=True):
        slot = _in_turns(slots[node.name], block.parts)
        slots[node.name] = dataclasses.replace(slot, scratch=offset)
    for node in (*block.inner, *block.whole):
        node.meta["truncates"] = False
        truncating.pop(node.name, None)
    lists = list(plan.lists)
    # What is read first is found in the row, as what operators find themselves: in the same list.
    numbers = [*range(first, first + len(block.lists) - 1), 0]
    for i, found in zip(numbers, block.lists, strict=False):
        for reader in found.readers:
            reader.meta[LIST] = i
        if i == len(lists):
            lists.append(0)
        lists[i] = max(lists[i], _room(found, block.parts))
    if block.lists:
        block.inner[0].meta[BLOCK] = BlockCalls(block.lists, block.calls, block.parts)
    return dataclasses.replace(
        plan, slots=slots, truncating=truncating, lists=tuple(lists), turns=turns,
        seen_in_parts=frozenset(seen),
    )  # fmt: skip


def _lists(source: fx.Node, windows: Mapping[fx.Node, Window]) -> tuple[BlockList, ...]:
    """One for each window of calls in order; the list that is read first comes last."""
    readers: dict[str, list[fx.Node]] = {}
    for node, window in windows.items():
        readers.setdefault(str(window), []).append(node)
    most = 1 + MOST_FURTHER
    parts = [of[i : i + most] for of in readers.values() for i in range(0, len(of), most)]
    made = [BlockList(source, windows[of[0]], tuple(of)) for of in parts]
    return (*made[1:], *made[:1])


def _room(found: BlockList, parts: int) -> int:
    """How many ints a list takes up, of a part of the streams."""
    n, _, h, w = value(found.readers[0]).shape
    return list_room(n // parts * h * w, n // parts)


__all__ = ["BLOCK", "BlockCalls", "BlockList", "recompute_maps"]
