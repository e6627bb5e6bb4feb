"""A frame as one CUDA graph launch.

Enters: the lowered graph with its tensors, on a CUDA device. Leaves: a callable in place of the
graph's own function, which costs a launch instead of hundreds. The first frames run without one,
so that everything that is set up once is; then one is captured. Frames are copied into memory that
the graph reads, results out of memory that it writes. Nothing waits for the device.

Where a frame cannot be captured (a dense op that synchronizes, or whose work depends on values),
the frames go on without a graph, and a `CudaGraphWarning` says so once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from deltafx.errors import CudaGraphWarning

WARM_UP_FRAMES = 2


class FrameGraph:
    """Runs frames of one input signature.

    Attributes:
        failure: Why there is no graph, once that is known to be impossible; else `None`.
    """

    def __init__(
        self, eager: Callable[..., Any], graph: fx.Graph, tensors: Mapping[str, Tensor]
    ) -> None:
        """Nothing is captured yet.

        Args:
            eager: `eager(module, *inputs)` runs a frame without a CUDA graph.
            graph: What it runs.
            tensors: The attributes of `graph`.
        """
        self.failure: str | None = None
        self._eager = eager
        self._frame = fx.GraphModule(dict(tensors), without_output_copies(graph))
        self._frames = 0
        self._captured: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._outputs: list[Any] = []

    @property
    def captured(self) -> bool:
        """Whether frames are launched as a graph."""
        return self._captured is not None

    def __call__(self, module: Any, *inputs: Tensor) -> Any:
        """Runs a frame; takes and returns what `eager` does."""
        self._frames += 1
        if self._captured is None:
            if self.failure is not None or self._frames <= WARM_UP_FRAMES:
                return self._eager(module, *inputs)
            self._capture(inputs)
            if self._captured is None:
                return self._eager(module, *inputs)
        for own, given in zip(self._inputs, inputs, strict=True):
            if own.data_ptr() != given.data_ptr():
                own.copy_(given, non_blocking=True)
        self._captured.replay()
        return [o.clone() if isinstance(o, Tensor) else o for o in self._outputs]

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        if not all(t.is_cuda for t in inputs):
            self._fail("an input is not on the CUDA device")
            return
        # A stream of its own, so that nothing else is captured; memory of its own, so that no other
        # model's frames lie in it.
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.inference_mode(False), torch.no_grad():
                own = [t.clone(memory_format=torch.preserve_format) for t in inputs]
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    outputs = list(self._frame(*own))
        except RuntimeError as error:
            torch.cuda.synchronize()
            self._fail(str(error).strip().splitlines()[0])
            return
        self._captured, self._inputs, self._outputs = graph, own, outputs

    def _fail(self, reason: str) -> None:
        self.failure = reason
        warnings.warn(
            f"frames run without a CUDA graph, which costs launches: {reason}",
            CudaGraphWarning,
            stacklevel=2,
        )


def without_output_copies(graph: fx.Graph) -> fx.Graph:
    """A copy of a lowered graph that hands out accumulators themselves, for its caller to copy."""
    made = fx.Graph()
    renamed: dict[fx.Node, fx.Node] = {}
    made.output(made.graph_copy(graph, renamed))
    output = next(iter(reversed(made.nodes)))

    def source(node: fx.Node) -> fx.Node:
        copies = node.op == "call_function" and node.target is torch.ops.aten.clone.default
        found = node.args[0] if copies else node
        return found if isinstance(found, fx.Node) else node

    output.args = fx.node.map_arg(output.args, source)
    # Operators on the state return nothing, so only the copies may go.
    for node in list(made.nodes):
        if node.target is torch.ops.aten.clone.default and not node.users:
            made.erase_node(node)
    return made
