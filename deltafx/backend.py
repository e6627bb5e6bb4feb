"""`torch.compile(model, backend="deltafx")`: Dynamo's graphs as delta regions.

Enters: a graph that Dynamo captured, its parameters lifted to inputs. Leaves: a `Region`, which is
called with those inputs and keeps a `DeltaModule` for each model that runs through it. A graph
break makes several regions. Dynamo owns them, and frees them at `torch.compiler.reset()`.

Dynamo keeps what it compiled with the code of a class's `forward`, for all of its instances, and
takes it for every call of `torch.compile` whose backend and options are equal. `Backend` is
therefore equal to nothing: each call of `torch.compile` has graphs, and so states, of its own.
Through one compiled function several models may still come, each with its weights. Those are told
apart by identity: tensors of which none is known are another model's, and get a state of their own;
where some are known the others were replaced.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from operator import is_
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)

from deltafx.compiled import Compiled
from deltafx.config import Config
from deltafx.delta_regions import DeltaRegions
from deltafx.errors import InvalidInputError, NotCompiledError
from deltafx.module import DeltaModule
from deltafx.passes.captured_graph import CapturedGraph, own_path
from deltafx.stats import Stats

NAME = "deltafx"
GROUP = "torch_dynamo_backends"

_REGIONS: weakref.WeakValueDictionary[int, Region] = weakref.WeakValueDictionary()
"""The regions that Dynamo holds, in the order of their making, to be found from outside."""

_COUNTER = itertools.count()
"""Tells what came before what."""


class Backend:
    """What Dynamo calls for each graph.

    Dynamo asks whether the backend that it compiled with equals the one of the call at hand. It
    never does, not even itself: two calls of `torch.compile` on one model share no state. Both
    count towards `torch._dynamo.config.recompile_limit` (8), as do recompilations for other shapes;
    beyond it Dynamo warns and runs the model as it is. `deltafx.compile` knows no such limit.
    """

    __name__ = NAME

    def __call__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        *,
        options: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> Region:
        """Makes the region of a graph.

        Args:
            gm: The graph; static inputs (parameters, buffers) are marked in `meta["tensor_dict"]`.
            example_inputs: Not looked at: the region compiles at its first frame.
            options: Fields of `deltafx.Config`; `thresholds` of nodes that another region has are
                ignored in this one.
            **others: Nothing, such as a `mode`, is known beside `options`: taken for an unknown
                option.

        Returns:
            The region. It raises `InvalidOptionError` at its first frame if an option is unknown
            or out of its range, for Dynamo would wrap what is raised here.
        """
        region = Region(gm, {**(options or {}), **others})
        _REGIONS[next(_COUNTER)] = region
        return region

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = object.__hash__

    def reset(self) -> None:
        """Frees all states; Dynamo calls it at `torch.compiler.reset()`.

        Dynamo drops its regions then, but of a model with graph breaks it may keep one.
        """
        for region in list(_REGIONS.values()):
            region.free()


backend = Backend()


def register_backend() -> None:
    """Makes the name known to Dynamo, where no entry point of an installed package does."""
    if NAME in entry_points(group=GROUP).names:
        return
    from torch._dynamo.backends import registry

    if NAME not in registry._COMPILER_FNS:
        registry.register_backend(compiler_fn=backend, name=NAME)


@dataclasses.dataclass
class _Entry:
    """A model that runs through a region."""

    weights: list[Tensor]
    graph: CapturedGraph
    module: DeltaModule
    named: dict[str, float]  # thresholds of the options that have found no node yet
    last_run: int = 0


class Region:
    """A graph of Dynamo's, called as Dynamo calls it.

    Attributes:
        frame: The piece of Python code it was captured from; a recompilation has the same.
        call: What Dynamo knows the call of `torch.compile` by that it was captured for.
    """

    def __init__(self, gm: fx.GraphModule, options: Mapping[str, Any]) -> None:
        """Sorts the inputs; nothing is compiled yet."""
        compile_id = torch._guards.CompileContext.current_compile_id()
        self.frame = compile_id.frame_id if compile_id is not None else None
        self.call = _current_call()
        self._gm = gm
        self._options = dict(options)
        self._inputs: list[int] = []
        self._weights: list[int] = []
        self._numbers: set[int] = set()
        self._written: list[int] | None = None
        self._entries: list[_Entry] = []  # the one in use first
        for i, node in enumerate(gm.graph.find_nodes(op="placeholder")):
            given = node.meta.get("grapharg")
            if node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type"):
                self._weights.append(i)
                continue
            self._inputs.append(i)
            if given is not None and given.pass_arg_as_tensor:
                self._numbers.add(i)

    @property
    def entries(self) -> list[_Entry]:
        """The models that ran through it, the last one first."""
        return list(self._entries)

    def free(self) -> None:
        """Forgets its models; one that runs through it again is compiled anew."""
        self._entries.clear()

    def __call__(self, *args: Any) -> Any:
        """Runs a frame.

        Raises:
            InvalidOptionError: An option is unknown or out of its range.
            InvalidInputError: Gradients are asked for.
            TrainModeError: The model is in train mode.
        """
        if torch.is_grad_enabled():
            _refuse_gradients(args[i] for i in self._inputs)
        args = tuple(a.item() if i in self._numbers else a for i, a in enumerate(args))
        if self._written is None:
            self._written = _written_inputs(self._body({}, ()), args)
            self._weights = [i for i in self._weights if i not in self._written]
            self._inputs = [i for i in range(len(args)) if i not in self._weights]
        entry = self._entry([args[i] for i in self._weights])
        inputs = [args[i] for i in self._inputs]
        if entry.named:
            self._name_thresholds(entry, inputs)
        entry.last_run = next(_COUNTER)
        out = entry.module(*inputs)
        if not self._written:
            return out
        with torch.no_grad():
            for i, new in zip(self._written, out[-len(self._written) :], strict=True):
                args[i].copy_(new)
        return out[: -len(self._written)]

    def _entry(self, weights: list[Tensor]) -> _Entry:
        for place, entry in enumerate(self._entries):
            if all(map(is_, weights, entry.weights)):
                if place:
                    self._entries.insert(0, self._entries.pop(place))
                return entry
        for entry in self._entries:
            if any(map(is_, weights, entry.weights)):
                for i, old, new in zip(self._weights, entry.weights, weights, strict=True):
                    if old is not new:
                        entry.graph.replace(_weight_name(i), new)
                entry.weights = weights
                return entry
        entry = self._make(weights)
        self._entries.insert(0, entry)
        del self._entries[entry.module.config.max_states :]
        return entry

    def _make(self, weights: list[Tensor]) -> _Entry:
        config = Config.from_options(self._options)
        named = dict(config.thresholds)
        held = dict(zip(self._weights, weights, strict=True))
        graph = CapturedGraph("dynamo", self._body(held, self._written or ()))
        module = DeltaModule(graph, dataclasses.replace(config, thresholds={}), DeltaRegions)
        return _Entry(weights, graph, module, named)

    def _body(self, weights: Mapping[int, Tensor], written: Sequence[int]) -> fx.GraphModule:
        """The graph with its weights as attributes, and what it writes into as further results."""
        graph = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        placeholders = self._gm.graph.find_nodes(op="placeholder")
        for i, node in enumerate(placeholders):
            if i in weights:
                copied[node] = graph.get_attr(_weight_name(i))
            else:
                copied[node] = graph.placeholder(node.name)
            if i in self._numbers:
                _read_numbers(graph, node, copied)
        own = [graph.call_function(torch.clone, (copied[placeholders[i]],)) for i in written]
        copied |= {placeholders[i]: clone for i, clone in zip(written, own, strict=True)}
        out: Any = graph.graph_copy(self._gm.graph, copied)
        graph.output((*out, *own))
        for old, new in copied.items():
            new.meta = {**old.meta, **new.meta}
            stack = old.meta.get("nn_module_stack")
            if stack:
                new.meta["nn_module_stack"] = {
                    key: (own_path(path), kind) for key, (path, kind) in stack.items()
                }
        root = dict(self._attributes(graph))
        root |= {_weight_name(i): tensor for i, tensor in weights.items()}
        return fx.GraphModule(root, graph)

    def _attributes(self, graph: fx.Graph) -> Iterator[tuple[str, Any]]:
        """What the graph reads of Dynamo's own module: constants, subgraphs."""
        for node in graph.nodes:
            if node.op in ("get_attr", "call_module"):
                found: Any = self._gm
                for part in str(node.target).split("."):
                    found = getattr(found, part, None)
                if found is not None:
                    yield str(node.target), found

    def _name_thresholds(self, entry: _Entry, inputs: list[Any]) -> None:
        entry.module.prepare(*inputs)
        for name, value in entry.named.items():
            if name in entry.module.thresholds:
                entry.module.thresholds[name] = value
        entry.named = {}


def _weight_name(i: int) -> str:
    return f"weight_{i}"


def _read_numbers(graph: fx.Graph, node: fx.Node, copied: dict[fx.Node, fx.Node]) -> None:
    """A float that Dynamo hands over as a tensor is a number here, and `item()` of it itself."""
    number = copied[node]
    for user in node.users:
        if user.op == "call_method" and user.target == "item":
            copied[user] = number
    if any(user not in copied for user in node.users):
        copied[node] = graph.call_function(torch.scalar_tensor, (number,), {"dtype": torch.float64})


def _refuse_gradients(inputs: Iterable[Any]) -> None:
    if any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
        raise InvalidInputError(
            "an input requires a gradient, and a compiled model is for inference: call it under "
            "torch.no_grad() or torch.inference_mode(), or detach the input"
        )


def _written_inputs(body: fx.GraphModule, args: Sequence[Any]) -> list[int]:
    """Which arguments a graph writes into, found by running it: on fakes, or else on copies."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.inference_mode(False), torch.no_grad():
        try:
            with mode:
                return _written(body, args, lambda t: mode.from_tensor(t, static_shapes=True))
        except (DataDependentOutputException, DynamicOutputShapeException):
            with torch.random.fork_rng():
                return _written(body, args, Tensor.detach)


def _written(
    body: fx.GraphModule, args: Sequence[Any], stand_in: Callable[[Tensor], Tensor]
) -> list[int]:
    given = [stand_in(a.detach()).clone() if isinstance(a, Tensor) else a for a in args]
    before = [a._version if isinstance(a, Tensor) else 0 for a in given]
    fx.Interpreter(body).run(*given)
    return [i for i, a in enumerate(given) if isinstance(a, Tensor) and a._version != before[i]]


def modules(compiled: Any) -> tuple[DeltaModule, ...]:
    """The delta regions of a model that `torch.compile` compiled with this backend.

    Args:
        compiled: What `torch.compile` returned, a module compiled in place (`model.compile()`), or
            one with such modules in it. What `deltafx.compile` returned is taken too.

    Returns:
        A `DeltaModule` a region, recompilations included, for its `explain()`, `thresholds` and all
        else.

    Raises:
        InvalidInputError: It is neither a module nor a function.
        NotCompiledError: No frame has run yet, or `torch.compiler.reset()` has freed everything.
    """
    if isinstance(compiled, Compiled):
        return tuple(compiled.regions.values())
    return tuple(entry.module for _, entry in _entries_of(compiled))


def reset(compiled: Any) -> None:
    """Forgets what a compiled model saw; its next frame is computed in full.

    Args:
        compiled: As `modules` takes it.

    Raises:
        InvalidInputError: As `modules` does.
        NotCompiledError: Likewise.
    """
    found = (compiled,) if isinstance(compiled, Compiled) else modules(compiled)
    for module in found:
        module.reset()


def stats(compiled: Any) -> Stats:
    """What the last frame of a compiled model cost, over all its regions.

    Args:
        compiled: As `modules` takes it.

    Returns:
        The sums; of several regions, the nodes of the second are named `1.conv1` and so on. Of the
        recompilations of a region the one that ran last counts.

    Raises:
        InvalidInputError: As `modules` does.
        NotCompiledError: Likewise.
    """
    if isinstance(compiled, Compiled):
        return compiled.stats()
    latest: dict[Any, _Entry] = {}
    for region, entry in _entries_of(compiled):
        frame = id(region) if region.frame is None else region.frame
        if frame not in latest or latest[frame].last_run < entry.last_run:
            latest[frame] = entry
    found = [entry.module.stats() for entry in latest.values()]
    if len(found) == 1:
        return found[0]
    return Stats(
        nodes={f"{i}.{name}": node for i, s in enumerate(found) for name, node in s.nodes.items()},
        macs=sum(s.macs for s in found),
        dense_macs=sum(s.dense_macs for s in found),
        state_bytes=sum(s.state_bytes for s in found),
    )


def _entries_of(compiled: Any) -> list[tuple[Region, _Entry]]:
    calls = list(_calls(compiled))
    found = [
        (region, entry)
        for _, region in sorted(_REGIONS.items())
        for entry in region.entries
        if any(region.call is call for call in calls)
    ]
    if not found:
        raise NotCompiledError(
            "no delta region is of this model: call it with a frame first (and see that it was "
            'compiled with backend="deltafx")'
        )
    return found


def _current_call() -> Any:
    """What Dynamo knows the call of `torch.compile` by that it captures a graph for."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    return _innermost(InstructionTranslator.current_tx().output.compiler_fn)


def _calls(compiled: Any) -> Iterator[Any]:
    """The same of a compiled function, or of all that is compiled in a module."""
    if not callable(compiled):
        raise InvalidInputError(
            f"expected a compiled module or function, not {type(compiled).__name__}"
        )
    functions = [compiled]
    if isinstance(compiled, nn.Module):
        inside = list(compiled.modules())
        functions = [f for m in inside for f in (m._compiled_call_impl, m.forward)]
    for function in functions:
        function = getattr(function, "__func__", function)
        if hasattr(function, "_torchdynamo_orig_callable"):  # Dynamo's own, around another one
            yield _innermost(inspect.getclosurevars(function).nonlocals.get("callback"))


def _innermost(callback: Any) -> Any:
    """What is within Dynamo's wrappers of a backend: an object that each `torch.compile` makes."""
    while hasattr(callback, "_torchdynamo_orig_backend"):
        callback = callback._torchdynamo_orig_backend
    return callback


__all__ = ["Region", "backend", "modules", "register_backend", "reset", "stats"]
