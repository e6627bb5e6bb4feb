"""A frame of delta ops alone, as a list of calls.

Enters: the lowered graph with its tensors, on the CPU. Leaves: a callable in place of the graph's
own function, with all arguments found beforehand. The inputs are encoded first; where that finds no
active site, no other op has a candidate, and none is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

_ENCODE = torch.ops.deltafx.encode.default
_CLONE = torch.ops.aten.clone.default


class FrameCalls:
    """Runs frames of one input signature."""

    def __init__(self, graph: fx.Graph, tensors: Mapping[str, Tensor]) -> None:
        """Of a graph that `is_delta_only`.

        Args:
            graph: What a frame runs.
            tensors: Its attributes.
        """
        nodes: list[Any] = list(graph.nodes)
        inputs = [n for n in nodes if n.op == "placeholder"]
        self._encodes: list[tuple[int, Callable[[Tensor], None]]] = []
        self._active: list[Tensor] = []  # sites that each of the encodes found
        self._calls: list[Callable[[], None]] = []

        def found(arg: Any) -> Any:
            return fx.node.map_arg(arg, lambda n: tensors[str(n.target)])

        calls = [n for n in nodes if n.op == "call_function" and n.target is not _CLONE]
        self._clear = partial(calls[0].target, *found(calls[0].args))
        for node in calls[1:]:
            if node.target is _ENCODE and node.args[3] in inputs:
                acc, mask, counts, _, *rest = (
                    found(a) if a not in inputs else a for a in node.args
                )
                encode = partial(_encode, (acc, mask, counts), tuple(rest))
                self._encodes.append((inputs.index(node.args[3]), encode))
                self._active.append(counts[1])
            else:
                self._calls.append(partial(node.target, *found(node.args)))
        (outputs,) = (n.args[0] for n in nodes if n.op == "output")
        copies = [n for n in nodes if n.target is _CLONE]
        self._outputs = [
            (tensors[n.args[0].target], True) if n in copies else (n, False) for n in outputs
        ]

    def describe(self) -> str:
        """How a frame is run, in words."""
        return "one operator after another; none where no input changed"

    def __call__(self, module: Any, *inputs: Tensor) -> list[Any]:
        """Runs a frame; takes and returns what the graph's function does."""
        self._clear()
        for i, encode in self._encodes:
            encode(inputs[i])
        if any(active.item() for active in self._active):
            for call in self._calls:
                call()
        return [out.clone() if is_map else out for out, is_map in self._outputs]


def _encode(own: tuple[Any, ...], rest: tuple[Any, ...], frame: Tensor) -> None:
    _ENCODE(*own, frame, *rest)


def is_delta_only(graph: fx.Graph) -> bool:
    """Whether a lowered graph consists of delta ops, and copies of accumulators as its outputs."""
    reads_frames = 0
    node: Any
    for node in graph.nodes:
        if node.op == "call_function" and node.target is _CLONE:
            if node.args[0].op != "get_attr":
                return False
        elif node.op == "call_function":
            if getattr(node.target, "namespace", None) != "deltafx":
                return False
            reads_frames += node.target is _ENCODE and node.args[3].op == "placeholder"
        elif node.op == "placeholder":
            if any(user.target is not _ENCODE for user in node.users):
                return False
        elif node.op == "output":
            flat = isinstance(node.args[0], (list, tuple))
            if not flat or any(
                isinstance(a, fx.Node) and a.target is not _CLONE for a in node.args[0]
            ):
                return False
    return reads_frames > 0
