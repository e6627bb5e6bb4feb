"""What a compiled model tells of itself: `Stats` of a frame, `Explanation` of its nodes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from deltafx.passes.emit_instance import Instance, NodeInfo
from deltafx.thresholds import joined


@dataclasses.dataclass(frozen=True)
class NodeStats:
    """A delta node in the last frame.

    Attributes:
        candidates: Sites that were computed.
        active: Sites that changed and were written. On CUDA, of a node that writes a part of a
            concatenation: those of the whole concatenation.
        sites: All its sites.
        macs: Multiply-adds done.
        dense_macs: Multiply-adds of computing it everywhere.
        state_bytes: Of its accumulator and mask; 0 where it writes into another node's.
    """

    candidates: int
    active: int
    sites: int
    macs: int
    dense_macs: int
    state_bytes: int

    @property
    def density(self) -> float:
        """Candidates over sites."""
        return self.candidates / self.sites if self.sites else 0.0

    @property
    def active_density(self) -> float:
        """Active sites over sites."""
        return self.active / self.sites if self.sites else 0.0

    @property
    def flop_fraction(self) -> float:
        """Multiply-adds done over those of the dense node; the density where it has none."""
        return self.macs / self.dense_macs if self.dense_macs else self.density


@dataclasses.dataclass(frozen=True)
class Stats:
    """The last frame.

    Attributes:
        nodes: The delta nodes, in order. The input's sites are compared, not computed: it counts
            nothing here.
        macs: Multiply-adds done, dense nodes included.
        dense_macs: Multiply-adds of the dense model.
        state_bytes: Of the whole state.
        branch: `"delta"`: computed at the candidates; `"dense"`: so much of the input changed that
            convolutions were computed everywhere; `"nothing"`: the input did not change. The last
            two are for CUDA graphs; without one it is always the first.
    """

    nodes: dict[str, NodeStats]
    macs: int
    dense_macs: int
    state_bytes: int
    branch: str = "delta"

    @property
    def density(self) -> float:
        """Candidates over sites, over all delta nodes but the encodes."""
        computed = [n for n in self.nodes.values() if n.dense_macs]
        sites = sum(n.sites for n in computed)
        return sum(n.candidates for n in computed) / sites if sites else 0.0

    @property
    def flop_fraction(self) -> float:
        """Multiply-adds done over those of the dense model."""
        return self.macs / self.dense_macs if self.dense_macs else 0.0


def make_stats(
    instance: Instance, counts: Sequence[Sequence[int]] | None, branch: str = "delta"
) -> Stats:
    """Stats of the rows of `frame_counts`; of no work at all, where there was no frame."""
    rows = dict(zip(instance.plan.nodes, counts or [], strict=False))
    slot_bytes = instance.plan.bytes_by_slot()
    nodes: dict[str, NodeStats] = {}
    dense = 0
    for info in instance.nodes:
        if info.kind != "delta":
            dense += info.dense_macs
            continue
        candidates, active = rows.get(info.name, (0, 0))
        nodes[info.name] = NodeStats(
            candidates=candidates,
            active=active,
            sites=info.sites,
            macs=candidates * info.macs_per_site,
            dense_macs=info.dense_macs,
            state_bytes=slot_bytes.get(info.name, 0),
        )
    return Stats(
        nodes=nodes,
        macs=sum(n.macs for n in nodes.values()) + dense,
        dense_macs=sum(n.dense_macs for n in nodes.values()) + dense,
        state_bytes=instance.plan.bytes(),
        branch=branch,
    )


def join_stats(regions: Mapping[str, Stats], outside: int) -> Stats:
    """The stats of a model of several regions, with the multiply-adds outside of them."""
    return Stats(
        nodes={
            joined(name, node): found
            for name, stats in regions.items()
            for node, found in stats.nodes.items()
        },
        macs=sum(stats.macs for stats in regions.values()) + outside,
        dense_macs=sum(stats.dense_macs for stats in regions.values()) + outside,
        state_bytes=sum(stats.state_bytes for stats in regions.values()),
        branch=", ".join(dict.fromkeys(stats.branch for stats in regions.values())) or "delta",
    )


@dataclasses.dataclass(frozen=True)
class Explanation(Sequence[NodeInfo]):
    """The nodes of a compiled model; `str()` of it is a table.

    Attributes:
        nodes: In order.
        rewrites: How many rewrites each pass did.
        front_end: `"fx"`; `"python"` where fx could not trace the model; `"parts"` where no one
            graph can stand for it, and its parts were traced.
        note: Why it could not.
        frames: How a frame is run.
    """

    nodes: tuple[NodeInfo, ...]
    rewrites: dict[str, int]
    front_end: str
    note: str
    frames: str

    def __getitem__(self, i: int) -> NodeInfo:  # type: ignore[override]
        """A node by its position."""
        return self.nodes[i]

    def __len__(self) -> int:
        """The number of nodes."""
        return len(self.nodes)

    def __iter__(self) -> Iterator[NodeInfo]:
        """The nodes in order."""
        return iter(self.nodes)

    @property
    def delta_share(self) -> float:
        """Multiply-adds in delta ops over all multiply-adds."""
        total = sum(n.dense_macs for n in self.nodes)
        return sum(n.dense_macs for n in self.nodes if n.kind == "delta") / total if total else 0.0

    def __str__(self) -> str:
        """A table: name, kind, op, shape, share of the multiply-adds, reason."""
        total = sum(n.dense_macs for n in self.nodes) or 1
        width = max([len(n.name) for n in self.nodes] + [4])
        lines = [f"{'node':{width}}  kind   {'op':24} {'shape':>20}  {'MACs':>6}  reason"]
        for n in self.nodes:
            shape = "x".join(map(str, n.shape))
            share = f"{100 * n.dense_macs / total:5.1f}%"
            lines.append(
                f"{n.name:{width}}  {n.kind:5}  {n.op[:24]:24} {shape:>20}  {share:>6}  {n.reason}"
            )
        rewrites = ", ".join(f"{name} {count}" for name, count in self.rewrites.items())
        lines.append(f"traced by {self.front_end}{': ' + self.note if self.note else ''}")
        lines.append(f"rewrites: {rewrites}")
        lines.append(f"a frame is {self.frames}")
        lines.append(f"{100 * self.delta_share:.1f}% of the multiply-adds are in delta ops")
        return "\n".join(lines)


def join_explanations(
    regions: Mapping[str, Explanation], outside: Sequence[NodeInfo], note: str
) -> Explanation:
    """What there is to say of a model of several regions, and of what runs outside of them."""
    nodes: list[NodeInfo] = []
    rewrites: Counter[str] = Counter()
    first = 0
    for name, explained in regions.items():
        rewrites.update(explained.rewrites)
        nodes += [
            dataclasses.replace(
                node,
                name=joined(name, node.name),
                region=None if node.region is None else first + node.region,
            )
            for node in explained
        ]
        first = 1 + max((n.region for n in nodes if n.region is not None), default=-1)
    ways = dict.fromkeys(explained.frames for explained in regions.values())
    frames = "; ".join(["run as the model runs it, its parts", *ways])
    return Explanation((*nodes, *outside), dict(rewrites), "parts", note, frames)
