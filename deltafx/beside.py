"""Calls that run beside others in a CUDA graph, arranged while the graph is captured.

Enters: a lowered graph in which `run_beside` and `list_ahead` have marked calls. Leaves: the
captured graph with a fork before each of them and a join before the first call that touches what it
writes, at the latest at the end:

    a -> d -> b -> c -> e           a -> b -> c -> e -> ...
    (d marked)                       `-> d ------'

One stream captures all of it; it is told what the next launch depends on. `d` is launched behind
`b` though it depends on `a` alone: what others wait for in turn begins first.
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
        self._waiting: list[tuple[fx.Node, Any, Point]] = []  # with arguments, and where it begins
        self._ends: dict[str, Point] = {}  # by the attributes that are written until then

    @override
    def run(self, *args: Any, **options: Any) -> Any:
        if self._after is not None and self._after[0] == 0:
            self._after[1]()
        returned = super().run(*args, **options)
        if self._after is not None and self._calls < self._after[0]:
            self._after[1]()
        self._run_waiting()
        self._join(set(self._ends))
        return returned

    @override
    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        touched = {str(a.target) for a in n.all_input_nodes if a.op == "get_attr"}
        if any(touched.intersection(_written(waiting)) for waiting, _, _ in self._waiting):
            self._run_waiting()
        self._join(touched)
        if BESIDE in n.meta:
            self._waiting.append((n, self.fetch_args_kwargs_from_env(n), self._here()))
            returned = None
        else:
            returned = self.launch(n, *self.fetch_args_kwargs_from_env(n))
            self._run_waiting()
        self._calls += 1
        if self._after is not None and self._calls == self._after[0]:
            self._after[1]()
        return returned

    def launch(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """Calls what a node calls, with these arguments."""
        return self.call_function(node.target, args, kwargs)

    def _run_waiting(self) -> None:
        """Runs what is to run beside others, each from where it begins; then goes on from here."""
        if not self._waiting:
            return
        here = self._here()
        for node, arguments, begin in self._waiting:
            begin.go_back()
            self.launch(node, *arguments)
            self._ends |= dict.fromkeys(_written(node), self._here())
            self.count += 1
        here.go_back()
        self._waiting = []

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
