"""CapturedGraph: a graph that Dynamo or `torch.export` made, as a model.

Enters: a graph over flat tensors. Leaves: a module that `trace_model` takes as it is. Its weights
are attributes, not inputs: so they are constants to the passes, and followed when they change.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from deltafx.errors import InvalidInputError


class CapturedGraph(nn.Module):
    """A captured graph; in eval mode, for a capture is of one mode.

    Attributes:
        front_end: Who made it: `"dynamo"` or `"export"`.
        body: The graph, flat in and flat out.
    """

    def __init__(
        self,
        front_end: str,
        body: fx.GraphModule,
        in_spec: pytree.TreeSpec | None = None,
        out_spec: pytree.TreeSpec | None = None,
    ) -> None:
        """Takes a graph over.

        Args:
            front_end: Who made it.
            body: Flat in and flat out.
            in_spec: Of `(args, kwargs)`; without it `body` takes the positional arguments.
            out_spec: Of the result; without it the result is that of `body`.
        """
        super().__init__()
        self.front_end = front_end
        self.body = body
        self.in_spec = in_spec
        self.out_spec = out_spec
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the graph node by node, so that a tracer sees where each call comes from.

        Raises:
            InvalidInputError: The arguments are not of the form of those it was captured with.
        """
        flat: tuple[Any, ...] = args
        if self.in_spec is not None:
            leaves, spec = pytree.tree_flatten((args, kwargs))
            if spec != self.in_spec:
                raise InvalidInputError(
                    f"the program was exported for arguments {self.in_spec}, these are {spec}"
                )
            flat = tuple(leaves)
        out = fx.Interpreter(self.body).run(*flat)
        return out if self.out_spec is None else pytree.tree_unflatten(list(out), self.out_spec)

    def replace(self, name: str, tensor: Tensor) -> None:
        """Puts another tensor in the place of a weight of `body`."""
        held: Mapping[str, Any] = self.body._parameters
        (self.body._parameters if name in held else self.body._buffers)[name] = tensor  # type: ignore[assignment]


def capture_exported(program: ExportedProgram) -> CapturedGraph:
    """The graph of an exported program, over the program's own weights."""
    module = program.module(check_guards=False)
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return CapturedGraph(
        "export",
        fx.GraphModule(module, graph),
        program.call_spec.in_spec,
        program.call_spec.out_spec,
    )


def own_path(path: str) -> str:
    """A module's path as Dynamo tells it, without the variable that holds the model.

    `L['self'].layer1[0].conv` -> `layer1[0].conv`; a global `G['net'].conv` keeps its name.
    """
    path = re.sub(r"^L\['(self|fn|mod|model)'\]\.?", "", path)
    return re.sub(r"^[LG]\['(\w+)'\]", r"\1", path)


__all__ = ["CapturedGraph", "capture_exported", "own_path"]
