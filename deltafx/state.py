"""The state of a compiled model, planned before any tensor exists.

A *slot* is one buffer: an accumulator with an update mask. A *place* is where a node's feature map
lies: a slot, or a slice of its channels. The plan is frozen; `allocate` makes the tensors, and
their bytes are the plan's to the last.

Masks of all slots lie in one arena, cleared once a frame. Nodes that share a slot share its mask:
a reader that runs before another producer of the slot sees only what was written by then, and one
that runs after sees a superset of the active sites, which costs work and never correctness.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Slot:
    """One accumulator with its update mask.

    Attributes:
        name: Of both.
        shape: [N, C, H, W].
        dtype: Of the accumulator.
        scratch: Where the accumulator begins in the scratch memory, in bytes; slots may overlap
            there, so nothing of it is left to the next frame, and streams may take turns in it:
            then N is how many there are at a time. `None`: it has memory of its own.
    """

    name: str
    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    scratch: int | None = None

    @property
    def sites(self) -> int:
        """Sites over all streams."""
        return self.shape[0] * self.shape[2] * self.shape[3]

    @property
    def map_bytes(self) -> int:
        """Bytes of the accumulator."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Place:
    """A slot, from channel `start` on, `channels` wide."""

    slot: str
    start: int
    channels: int


@dataclasses.dataclass(frozen=True)
class Part:
    """Some of the streams: part `index` of `count` of equal size."""

    index: int
    count: int

    def of(self, t: Tensor) -> Tensor:
        """These streams of a tensor whose first dimension they are."""
        return t[self.first(t.shape[0]) : self.first(t.shape[0]) + t.shape[0] // self.count]

    def first(self, streams: int) -> int:
        """The first of them."""
        return streams // self.count * self.index


@dataclasses.dataclass(frozen=True)
class StatePlan:
    """Everything a state consists of.

    Attributes:
        slots: By name.
        places: Where each node's feature map lies, by node name.
        nodes: Names of the nodes with an operator, in the order of their rows in `counts`, which
            are of two int64: candidates and, on the CPU, active sites.
        truncating: Names of those that truncate, with their channels, in the order of `thresholds`.
        workspaces: Shapes of fp32 buffers, by the name of their attribute.
        device: Of all tensors.
        lists: On CUDA, int32s of each list of candidates. The first is every operator's in turn;
            of the others `run_beside`, `list_ahead` and `share_lists` say whose they are. None on
            the CPU.
        turns: In how many parts, where that is more than one, the streams are computed one after
            another, by the names of nodes; each part has a row of `counts`, behind all others.
        seen_in_parts: Slots that such nodes read or write without being theirs alone, with the
            number of parts.
    """

    slots: dict[str, Slot]
    places: dict[str, Place]
    nodes: tuple[str, ...]
    truncating: dict[str, int]
    workspaces: dict[str, tuple[int, ...]]
    device: torch.device
    lists: tuple[int, ...] = ()
    turns: Mapping[str, int] = dataclasses.field(default_factory=dict)
    seen_in_parts: frozenset[tuple[str, int]] = frozenset()

    def rows(self) -> tuple[tuple[str, Part | None], ...]:
        """Whose the rows of `counts` are: those of the nodes, then those of further parts."""
        more = ((n, Part(i, count)) for n, count in self.turns.items() for i in range(1, count))
        return (*((n, None) for n in self.nodes), *more)

    def row_sites(self) -> tuple[int, ...]:
        """All sites that each row of `counts` stands for."""
        slots = {node: self.slots[self.places[node].slot] for node in self.nodes}
        return tuple(
            slots[n].sites // (self.turns.get(n, 1) if self.kept(n) else 1) for n, _ in self.rows()
        )

    def parts(self) -> tuple[tuple[str, Part], ...]:
        """The parts of slots that are seen in parts."""
        split = sorted(self.seen_in_parts)
        return tuple((slot, Part(i, count)) for slot, count in split for i in range(count))

    def first_sites(self) -> dict[str, int]:
        """Where each slot's mask begins in the arena of masks, by its name."""
        rooms = [mask_room(s.sites) for s in self.slots.values()]
        return dict(zip(self.slots, itertools.accumulate(rooms, initial=0), strict=False))

    def alone(self) -> set[str]:
        """The nodes whose update mask nobody else writes into: the only ones of their slots."""
        owners = Counter(place.slot for place in self.places.values())
        return {n for n, place in self.places.items() if place.slot == n and owners[n] == 1}

    def kept(self, node: str) -> bool:
        """Whether a node's map is left to the next frame."""
        return self.slots[self.places[node].slot].scratch is None

    def scratch_bytes(self) -> int:
        """Bytes of the memory that the slots share whose accumulators are not kept."""
        shared = (s for s in self.slots.values() if s.scratch is not None)
        return max((s.scratch + s.map_bytes for s in shared), default=0)  # type: ignore[operator]

    def bytes_by_slot(self) -> dict[str, int]:
        """Bytes of each slot: its mask and, if it is kept, its accumulator."""
        return {
            s.name: (s.map_bytes if s.scratch is None else 0) + mask_room(s.sites)
            for s in self.slots.values()
        }

    def bytes(self) -> int:
        """Bytes of all tensors that `allocate` makes."""
        rows = 16 * len(self.rows()) + 4 * len(self.truncating)
        scales = 4 * sum(map(scale_room, self.truncating.values()))
        work = 4 * sum(math.prod(shape) for shape in self.workspaces.values())
        lists = 4 * sum(self.lists)
        maps = sum(self.bytes_by_slot().values()) + self.scratch_bytes()
        return maps + rows + scales + work + lists


MASKS, COUNTS, THRESHOLDS, SCALES = "masks", "counts", "thresholds_", "inv_scales"
SCRATCH = "scratch"
NOT_FINITE = "not_finite"
"""By which a frame that is computed everywhere tells of infinities and NaNs; not in the plan."""


def allocate(plan: StatePlan) -> dict[str, Tensor]:
    """Makes the tensors of a state, by the names of their attributes.

    Nothing is known of any frame, as `lose_state` leaves it. Channels of a slot that are in no
    place, which only fill it up, are zero and stay so. The scales are 1 until they are calibrated.
    Views (`mask_*`, `counts_*`, ...) share the memory of the arenas.
    """
    device = plan.device
    made: dict[str, Tensor] = {
        **allocate_frame(plan),
        THRESHOLDS: torch.zeros(len(plan.truncating), device=device),
        SCALES: torch.ones(sum(map(scale_room, plan.truncating.values())), device=device),
    }
    if shared := plan.scratch_bytes():
        made[SCRATCH] = torch.full((shared,), 255, dtype=torch.uint8, device=device)  # NaNs
    for slot in plan.slots.values():
        n, c, h, w = slot.shape
        if slot.scratch is None:
            rows = torch.zeros((n, h, w, c), dtype=slot.dtype, device=device)
        else:
            part = made[SCRATCH][slot.scratch : slot.scratch + slot.map_bytes]
            rows = part.view(slot.dtype).view(n, h, w, c)
        made[acc_name(slot.name)] = rows.permute(0, 3, 1, 2)
    for place in plan.places.values():
        whole = made[acc_name(place.slot)]
        made[place_name(plan, place)] = (
            whole
            if place.channels == whole.shape[1]
            else whole[:, place.start : place.start + place.channels]
        )
    for name, some in plan.parts():
        made[acc_name(name, some)] = some.of(made[acc_name(name)])
    first = 0
    for i, (node, channels) in enumerate(plan.truncating.items()):
        made[threshold_name(node)] = made[THRESHOLDS][i]
        made[scale_name(node)] = made[SCALES][first : first + channels]
        first += scale_room(channels)
    for name, shape in plan.workspaces.items():
        made[name] = torch.zeros(shape, device=device)
    lose_state(plan, made)
    return made


def allocate_frame(plan: StatePlan) -> dict[str, Tensor]:
    """Makes those of the tensors of a state that no frame leaves to the next: masks, counts, lists.

    All are empty.
    """
    starts = plan.first_sites()
    rooms = [mask_room(slot.sites) for slot in plan.slots.values()]
    masks = torch.zeros(sum(rooms), dtype=torch.bool, device=plan.device)
    lists = [torch.zeros(n, dtype=torch.int32, device=plan.device) for n in plan.lists]
    return _frame_of(plan, masks, starts, lists)


def allocate_everywhere(plan: StatePlan) -> dict[str, Tensor]:
    """Makes the same tensors for a frame that is computed everywhere, one operator after another.

    All masks are set; they lie in the same memory, and so do all lists.
    """
    room = max((mask_room(slot.sites) for slot in plan.slots.values()), default=0)
    masks = torch.ones(room, dtype=torch.bool, device=plan.device)
    longest = torch.zeros(max(plan.lists, default=0), dtype=torch.int32, device=plan.device)
    lists = [longest[:n] for n in plan.lists]
    return _frame_of(plan, masks, dict.fromkeys(plan.slots, 0), lists)


def _frame_of(
    plan: StatePlan, masks: Tensor, starts: Mapping[str, int], lists: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Those tensors, with masks that begin at `starts` in one."""
    counts = torch.zeros((len(plan.rows()), 2), dtype=torch.int64, device=plan.device)
    made: dict[str, Tensor] = {MASKS: masks, COUNTS: counts}
    for slot in plan.slots.values():
        n, _, h, w = slot.shape
        first = starts[slot.name]
        made[mask_name(slot.name)] = masks[first : first + slot.sites].view(n, h, w)
    for name, some in plan.parts():
        made[mask_name(name, some)] = some.of(made[mask_name(name)])
    for i, (node, part) in enumerate(plan.rows()):
        made[counts_name(node, part)] = counts[i]
    return made | {list_name(i): t for i, t in enumerate(lists)}


def lose_state(
    plan: StatePlan, tensors: Mapping[str, Tensor], streams: Sequence[int] | None = None
) -> None:
    """Fills accumulators with NaN, which differs from every value: the next frame rewrites them.

    Args:
        plan: Of the state.
        tensors: Its tensors, as `allocate` makes them.
        streams: Indices into the batch dimension; `None` for all.
    """
    kept = (p for p in plan.places.values() if plan.slots[p.slot].scratch is None)
    for name in {place_name(plan, place) for place in kept}:
        if streams is None:
            tensors[name].fill_(float("nan"))
        else:
            tensors[name][streams] = float("nan")


def frame_counts(plan: StatePlan, tensors: Mapping[str, Tensor]) -> list[list[int]]:
    """Candidates and active sites of the last frame, in the order of `plan.nodes`.

    CUDA operators leave active sites to the masks, where they are counted now: those of a slice
    are its slot's, and of a map that is not kept all that were computed. Waits for the device.
    """
    counts = tensors[COUNTS]
    if plan.device.type != "cuda" or not plan.nodes:
        return counts.tolist()
    found: dict[str, int] = {}
    for (node, _), number in zip(plan.rows(), counts[:, 0].tolist(), strict=True):
        found[node] = found.get(node, 0) + number
    slots = {node: plan.places[node].slot for node in plan.nodes if plan.kept(node)}
    masks = list(dict.fromkeys(slots.values()))
    sums = torch.stack([tensors[mask_name(slot)].sum() for slot in masks]).tolist()
    active = dict(zip(masks, sums, strict=True))
    return [[n, active[slots[node]] if node in slots else n] for node, n in found.items()]


def mask_room(sites: int) -> int:
    """How many bytes a mask takes up: vectors of 16, so that each mask is aligned."""
    return -(-sites // 16) * 16


def list_room(sites: int, streams: int) -> int:
    """How many ints a list of up to so many candidates takes up, as the CUDA kernels lay it out.

    Four begin it, and behind it there is one for each stream.
    """
    return 4 + sites + streams


def scale_room(channels: int) -> int:
    """How many scales a node takes up: vectors of four, so that each node's are aligned."""
    return -(-channels // 4) * 4


def allocated_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind tensors, shared memory counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def acc_name(slot: str, part: Part | None = None) -> str:
    """The attribute that holds a slot's accumulator, or a part of its streams."""
    return f"acc_{_part_name(part)}{slot}"


def mask_name(slot: str, part: Part | None = None) -> str:
    """The attribute that holds a slot's update mask, or a part of its streams."""
    return f"mask_{_part_name(part)}{slot}"


def _part_name(part: Part | None) -> str:
    # No name of a node begins with a digit.
    return "" if part is None else f"{part.index}_{part.count}_"


def place_name(plan: StatePlan, place: Place) -> str:
    """The attribute that holds a place's channels."""
    whole = plan.slots[place.slot].shape[1] == place.channels
    name = acc_name(place.slot)
    return name if whole else f"{name}__{place.start}_{place.start + place.channels}"


def counts_name(node: str, part: Part | None = None) -> str:
    """The attribute that holds a node's row of `counts`, of the last frame, or that of a part."""
    first = part is None or part.index == 0
    return f"counts_{'' if first else _part_name(part)}{node}"


def threshold_name(node: str) -> str:
    """The attribute that holds a node's threshold."""
    return f"threshold_{node}"


def scale_name(node: str) -> str:
    """The attribute that holds the inverses of a node's channel scales."""
    return f"inv_scale_{node}"


def list_name(i: int) -> str:
    """The attribute that holds a list of candidates."""
    return f"list_{i}"
