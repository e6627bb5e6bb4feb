"""share_lists: one launch finds the candidates of several convolutions, where a list is used.

Enters: the planned graph. Leaves: the same calls; of some convolutions `meta` says that their
candidates are found together, and the plan has further lists for that.

    b = conv2d(x=a, weight=3x3)                 list 0: the windows that touch an active site of a
    c = conv2d(x=b, weight=1x1, residual=r)     list 1: list 0, and the active sites of r

No site of `b` is active that is no candidate of `b`, so list 1 holds all candidates of `c`. It may
hold more, where `b` was truncated: sites that are computed and found unchanged. So it is for
convolutions to which these cost less than the launch of a list. Two convolutions of the same
windows need no more than their own candidates. Convolutions that run beside others find theirs for
themselves. CUDA only.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from deltafx.ops.base import constant
from deltafx.ops.conv2d import conv2d
from deltafx.passes.context import Context
from deltafx.passes.run_beside import BESIDE
from deltafx.state import StatePlan, list_room

LIST, FURTHER = "list", "further_lists"
"""In `meta`: the number of the list that a node's candidates are in; the `FurtherList`s that are
made along with a node's own, which is number 0."""

MOST_FURTHER = 2  # lists made along with another, as in csrc/cuda/conv.h


@dataclasses.dataclass(frozen=True)
class FurtherList:
    """A list that is made along with that of a convolution before.

    Attributes:
        node: Whose it is.
        source: Whose active sites it holds besides; `None` for nobody's.
        stride: Which of them: each such site in y and x, 1 or 2.
    """

    node: fx.Node
    source: fx.Node | None
    stride: int


def share_lists(gm: fx.GraphModule, context: Context) -> int:
    """Finds them; returns for how many convolutions there is no launch any more."""
    plan: StatePlan = context.plan
    if not plan.lists:
        return 0
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    rooms = dict(enumerate(plan.lists))
    first = len(rooms)
    taken_until, count = -1, 0
    for node in gm.graph.nodes:
        if not is_ours(node) or LIST in node.meta or order[node] <= taken_until:
            continue
        found = _further(node, order, plan)
        if not found:
            continue
        node.meta |= {LIST: 0, FURTHER: found}
        for i, further in enumerate(found, first):
            further.node.meta[LIST] = i
            slot = plan.slots[plan.places[further.node.name].slot]
            rooms[i] = max(rooms.get(i, 0), list_room(slot.sites, slot.shape[0]))
        taken_until = max(order[further.node] for further in found)
        count += len(found)
    context.plan = dataclasses.replace(plan, lists=tuple(rooms.values()))
    return count


def bears_list(node: fx.Node, plan: StatePlan, wider: float, ahead: bool = False) -> bool:
    """Whether a convolution goes by a list, and rather by one with more candidates than its own.

    Args:
        node: The call of `conv2d`.
        plan: Where its maps lie.
        wider: On how many sites more on each side of what changed.
        ahead: Whether that list is there early, which is a reason for those to go by it that
            otherwise go by none.
    """
    if node.kwargs.get("pre_scale") is not None:
        return False  # no kernel for Hopper takes it, and others were not timed
    residual: Any = node.kwargs.get("residual")
    kernel, stride, padding, dilation = window_of(node)
    return torch.ops.deltafx.conv2d_bears_list(
        _map(node, plan),
        _map(node.kwargs["x"], plan),
        None if residual is None else _map(residual, plan),
        kernel, stride, padding, dilation, node.kwargs.get("groups", 1), wider, ahead, plan.device,
    )  # fmt: skip


def _further(node: fx.Node, order: dict[fx.Node, int], plan: StatePlan) -> tuple[FurtherList, ...]:
    """The lists that can be made along with that of a convolution, and should be."""
    if not _any_left(node, order) or not bears_list(node, plan, 0):
        return ()
    wider = kept_after(node)
    within = {node}  # nodes whose active sites are among the candidates of `node`
    found: list[FurtherList] = []
    left = _readers(node, order)
    while left and len(found) < MOST_FURTHER:
        reader = min(left, key=order.__getitem__)
        left.remove(reader)
        if LIST in reader.meta:
            continue  # it is active wherever its own list has sites
        if not plan.kept(reader.kwargs["x"].name):
            continue  # there is nothing to read but at its own candidates
        outside = _outside(reader, node, within)
        if outside is None or any(order[source] >= order[node] for source, _ in outside):
            continue
        if not outside:
            within.add(reader)
            left |= {n for n in reader.users if is_ours(n)}
        more = 0.0 if _is_sibling(reader, node) else wider
        # What is not truncated passes further candidates on to whoever reads it.
        if more > 0 and not reader.meta["truncates"]:
            continue
        if bears_list(reader, plan, more):
            found.append(FurtherList(reader, *(outside[0] if outside else (None, 1))))
    return tuple(found)


def kept_after(node: fx.Node) -> float:
    """How far, in sites on each side, the candidates of a convolution lie beyond what is active."""
    if not node.meta["truncates"]:
        return 0.0
    # So many of the sites that a window adds around what changed are truncated: ResNet-50 at 0.1.
    kernel, stride, _, dilation = window_of(node)
    reach = max((k - 1) * d / (2 * s) for k, s, d in zip(kernel, stride, dilation, strict=True))
    return max(0.25, 0.7 * reach)


def _any_left(node: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether any reader comes into question; asked first, as it is quickly answered."""
    return any(_outside(reader, node, {node}) is not None for reader in _readers(node, order))


def _readers(node: fx.Node, order: dict[fx.Node, int]) -> set[fx.Node]:
    """The convolutions behind a node that read it, or what it reads."""
    x: Any = node.kwargs["x"]
    return {n for n in (*node.users, *x.users) if is_ours(n) and order[n] > order[node]}


def _outside(
    reader: fx.Node, node: fx.Node, within: set[fx.Node]
) -> list[tuple[fx.Node, int]] | None:
    """The inputs of a convolution that may make further sites candidates, with their strides.

    `None`, if these are more than one, or not a matter of single sites.
    """
    outside: list[tuple[Any, int]] = []
    window = window_of(reader)
    x, residual = reader.kwargs["x"], reader.kwargs.get("residual")
    if not _is_sibling(reader, node):
        if not window.is_point or window.stride not in ([1, 1], [2, 2]):
            return None
        if x not in within or window.stride[0] != 1:
            outside.append((x, window.stride[0]))
    if residual is not None and residual not in within:
        outside.append((residual, 1))
    touches = _is_sibling(reader, node) or x in within or residual in within
    return outside if touches and len(outside) <= 1 else None


def _is_sibling(reader: fx.Node, node: fx.Node) -> bool:
    """Whether two convolutions have the same windows over the same map, and the first nothing else.

    Then their candidates are the same, but for the residual of the second.
    """
    same = reader.kwargs["x"] is node.kwargs["x"] and window_of(reader) == window_of(node)
    return same and node.kwargs.get("residual") is None


def is_ours(node: fx.Node) -> bool:
    """Whether a node is a convolution on the state that runs in its row."""
    return node.target is conv2d and bool(node.meta.get("delta")) and BESIDE not in node.meta


class Window(NamedTuple):
    """Of a convolution, in y and x."""

    kernel: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]

    @property
    def is_point(self) -> bool:
        """Whether it is one site, and all of them lie in the input."""
        return self.kernel == [1, 1] and self.padding == [0, 0]

    @property
    def is_own_site(self) -> bool:
        """Whether it is the very site that it is for."""
        return self.is_point and self.stride == [1, 1]

    @property
    def has_middle(self) -> bool:
        """Whether the site at `stride` times its own position is one of its taps."""
        axes = zip(self.kernel, self.padding, self.dilation, strict=True)
        return all(p % d == 0 and p // d < k for k, p, d in axes)


def window_of(node: fx.Node) -> Window:
    """The window of a convolution."""
    weight = constant(node.kwargs["weight"])
    assert weight is not None
    given: dict[str, Any] = node.kwargs
    return Window(
        list(weight.shape[2:]),
        list(given.get("stride", (1, 1))),
        list(given.get("padding", (0, 0))),
        list(given.get("dilation", (1, 1))),
    )


def _map(node: fx.Node, plan: StatePlan) -> Tensor:
    """A tensor without memory that lies as a node's feature map will."""
    place = plan.places[node.name]
    slot = plan.slots[place.slot]
    n, c, h, w = slot.shape
    whole = torch.empty((n, h, w, c), dtype=slot.dtype, device="meta").permute(0, 3, 1, 2)
    return whole[:, place.start : place.start + place.channels]


__all__ = [
    "FURTHER", "LIST", "MOST_FURTHER", "FurtherList", "Window", "bears_list", "is_ours",
    "kept_after", "share_lists", "window_of",
]  # fmt: skip
