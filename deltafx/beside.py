"""Calls that run beside others in a CUDA graph, arranged while the graph is captured.

Enters: a lowered graph in which `run_beside` has marked calls. Leaves: the captured graph with a
fork before each of them and a join before the first call that touches what it writes, at the latest
at the end:

    a -> b -> c -> e                a -> b -> c -> e -> ...
    (d behind c, in a row)           `-> d ------'

One stream captures all of it; it is told what the next launch depends on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import fx
from typing_extensions import override

from deltafx.passes.run_beside import BESIDE


class Point(Protocol):
    """How far a capture has come: what the next launch depends on.

    `torch.classes.deltafx.CapturePoint` is one, and says how.
    """

    def go_back(self) -> None:
        """Lets the next launch depend on just that."""

    def join(self) -> None:
        """Lets the next launch depend on that as well."""


class BesideInterpreter(fx.Interpreter):
    """Runs a lowered graph that is being captured.

    Attributes:
        count: How many calls ran beside others.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        here: Callable[[], Point],
        after: tuple[int, Callable[[], None]] | None = None,
    ) -> None:
        """Nothing has run yet.

        Args:
            module: Of the graph.
            here: `here()` is the point that the capture has come to.
            after: What is called once in between: behind so many calls, or at the end.
        """
        super().__init__(module)
        self.count = 0
        self._here = here
        self._calls = 0
        self._after = after
        self._ends: dict[str, Point] = {}  # by the attributes that are written until then

    @override
    def run(self, *args: Any, **options: Any) -> Any:
        if self._after is not None and self._after[0] == 0:
            self._after[1]()
        returned = super().run(*args, **options)
        if self._after is not None and self._calls < self._after[0]:
            self._after[1]()
        self._join(set(self._ends))
        return returned

    @override
    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_function":
            self._join({str(a.target) for a in n.all_input_nodes if a.op == "get_attr"})
        if BESIDE not in n.meta:
            if n.op == "call_function":
                self._before = self._here()
            returned = super().run_node(n)
        else:
            begin = self._here()
            if "behind" in n.meta:
                self._before.go_back()
            returned = super().run_node(n)
            self._ends |= dict.fromkeys(_written(n), self._here())
            begin.go_back()
            self.count += 1
        self._calls += n.op == "call_function"
        if n.op == "call_function" and self._after is not None and self._calls == self._after[0]:
            self._after[1]()
        return returned

    def _join(self, names: set[str]) -> None:
        """Waits for whatever writes into one of these attributes."""
        ends = {id(end): end for name, end in self._ends.items() if name in names}
        for end in ends.values():
            end.join()
        self._ends = {name: end for name, end in self._ends.items() if id(end) not in ends}


def _written(node: fx.Node) -> list[str]:
    """The attributes that a call of an operator writes into."""
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    return [
        str(arg.target)
        for arg, argument in zip(node.args, arguments, strict=False)  # the last may be left out
        if isinstance(arg, fx.Node) and argument.is_write
    ]
