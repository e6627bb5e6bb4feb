"""Feature volumes [N, C, T, H, W] as lists of planes: what the rules of `split_volumes` share.

A *plane* is the feature map [N, C, H, W] of a picture. Planes are nodes of the graph; here they are
made, and found again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from deltafx.ops.base import value
from deltafx.passes.assign_regions import insert_encode
from deltafx.passes.context import Context

aten = torch.ops.aten


class Volumes:
    """The volumes of a graph that were split so far."""

    def __init__(self, gm: fx.GraphModule, context: Context) -> None:
        """Knows of none; `planes` has those of the results of calls that were split."""
        self.gm = gm
        self.context = context
        self.planes: dict[fx.Node, list[fx.Node]] = {}
        self._taken: dict[fx.Node, list[fx.Node]] = {}
        self._joined: dict[tuple[fx.Node, int], fx.Node] = {}

    def call(
        self,
        before: fx.Node,
        target: Any,
        args: tuple[Any, ...],
        name: str,
        shape: Sequence[int],
        like: fx.Node | None = None,
    ) -> fx.Node:
        """Inserts an ATen call with a result of a shape, in the dtype of `like`'s or `before`'s."""
        with self.gm.graph.inserting_before(before):
            node = self.gm.graph.create_node("call_function", target, args, name=name)
        node.meta["val"] = value(like or before).new_empty(tuple(shape))
        return node

    def planes_of(self, x: fx.Node, before: fx.Node) -> list[fx.Node]:
        """The planes of a volume; one that comes from elsewhere is taken apart and encoded."""
        if x in self.planes:
            return self.planes[x]
        if x not in self._taken:
            shape = plane_shape(x)
            made = [
                self.call(before, aten.select.int, (x, 2, t), f"{x.name}_t{t}", shape, x)
                for t in range(length(x))
            ]
            self.context.refusals |= dict.fromkeys(made, "a view of a picture of a volume")
            self._taken[x] = [insert_encode(self.gm, self.context, p, before) for p in made]
        return self._taken[x]

    def window(self, x: fx.Node, times: list[int], step: int, before: fx.Node) -> fx.Node:
        """The planes at `times`, `step` apart, side by side: a slice of all of them."""
        planes = self.planes_of(x, before)
        if len(times) == 1:
            return planes[times[0]]
        # So that planes a step apart are neighbours.
        order = sorted(range(len(planes)), key=lambda t: (t % step, t))
        n, channels, h, w = plane_shape(x)
        if (x, step) not in self._joined:
            parts = [planes[t] for t in order]
            shape = (n, len(parts) * channels, h, w)
            name = f"{x.name}_planes" if step == 1 else f"{x.name}_planes_by_{step}"
            self._joined[x, step] = self.call(before, aten.cat.default, (parts, 1), name, shape)
        joined = self._joined[x, step]
        if len(times) == len(planes):
            return joined
        first = order.index(times[0])
        name = f"{joined.name}_{times[0]}_{times[-1]}"
        length = len(times) * channels
        args = (joined, 1, first * channels, first * channels + length)
        return self.call(before, aten.slice.Tensor, args, name, (n, length, h, w))

    def each(
        self, before: fx.Node, target: Any, planes: list[fx.Node], args: tuple[Any, ...],
        shape: Sequence[int],
    ) -> list[fx.Node]:  # fmt: skip
        """`target(plane, *args)` for each plane."""
        name = f"{before.name}_of_t"
        return [
            self.call(before, target, (plane, *args), f"{name}{t}", shape)
            for t, plane in enumerate(planes)
        ]

    def fold(self, target: Any, parts: list[fx.Node], before: fx.Node, name: str) -> fx.Node:
        """`target` of the first two parts, of that and the third, and so on."""
        total = parts[0]
        for i, part in enumerate(parts[1:], 1):
            shape = value(total).shape
            total = self.call(before, target, (total, part), f"{name}_{i}", shape)
        return total

    def mean(self, parts: list[fx.Node], divisor: int, before: fx.Node, name: str) -> fx.Node:
        """The sum of the parts over a divisor."""
        total = self.fold(aten.add.Tensor, parts, before, name)
        if divisor == 1:
            return total
        shape = value(total).shape
        return self.call(before, aten.div.Scalar, (total, divisor), f"{name}_mean", shape)

    def stack(self, volume: fx.Node) -> fx.Node:
        """A volume of its planes."""
        shape, args = value(volume).shape, (self.planes[volume], 2)
        made = self.call(volume, aten.stack.default, args, f"{volume.name}_stack", shape)
        self.context.refusals[made] = "puts planes together for what has no delta op on volumes"
        return made


def length(x: fx.Node) -> int:
    """The pictures of a volume [N, C, T, H, W]: T."""
    return int(value(x).shape[2])


def plane_shape(x: fx.Node) -> tuple[int, int, int, int]:
    """The shape of a volume's planes: [N, C, H, W]."""
    n, c, _, h, w = (int(s) for s in value(x).shape)
    return n, c, h, w


__all__ = ["Volumes", "length", "plane_shape"]
