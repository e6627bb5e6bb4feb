"""DeltaModule: the compiled model that a user calls with frames.

Enters: a traced model and options. It keeps one `Instance` with its state for each signature (the
shapes, dtypes and devices of the inputs); the current one's graph and buffers are this module's.
The state is a cache: dropping it, or any part of it, costs time and never correctness.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from typing_extensions import Self, override

from deltafx import calibration
from deltafx.compiled import Compiled, not_compiled
from deltafx.config import Config
from deltafx.cuda_graph import FrameGraph, check_capability
from deltafx.errors import (
    InvalidInputError,
    NotCompiledError,
    UnknownNodeError,
    UntraceableError,
)
from deltafx.frame_calls import FrameCalls, is_delta_only
from deltafx.frame_program import FrameProgram
from deltafx.passes.emit_instance import Instance, emit_instance
from deltafx.passes.insert_casts import autocast_state, no_autocast
from deltafx.passes.share_constants import ConstantPool
from deltafx.passes.trace_model import TracedModel, trace_model
from deltafx.state import (
    THRESHOLDS,
    StatePlan,
    acc_name,
    allocate,
    frame_counts,
    lose_state,
    mask_name,
)
from deltafx.stats import Explanation, Stats, make_stats
from deltafx.thresholds import Thresholds

Signature = tuple[Any, ...]

Fallback = Callable[[nn.Module, Config, str], Compiled]
"""Compiles a model that no one graph can stand for; the text says why."""

ANSWERS = (
    "thresholds", "forward", "calibrate", "reset", "stats", "explain", "state_bytes",
    "state_tensors", "update_mask", "accumulator", "frame_program", "_visited",
)  # fmt: skip
"""What a module that steps aside passes on; `prepare` and `regions` do so by themselves."""

_COMPILING = threading.RLock()
"""fx and make_fx patch torch for the whole process while they trace: one at a time."""


@dataclasses.dataclass
class _Compiled:
    """An instance with its tensors and its function."""

    instance: Instance
    signature: Signature
    buffers: dict[str, Tensor]
    graph: fx.Graph
    code: str
    run: Callable[..., Any]
    attributes: SimpleNamespace  # the buffers again, for `run`: lookups are ten times faster here
    autocast: bool  # whether it is on, for a device of any kind
    frames: int = 0
    whole: bool = True  # the last frame ran to its end
    age: int = 0  # frames since the last refresh
    refreshing: bool = False
    thresholds: Tensor | None = None  # those of a frame that is no refresh
    calibrated: bool = False


class DeltaModule(Compiled, fx.GraphModule):
    """A compiled model that is one graph.

    Its non-persistent buffers are the accumulators, update masks, counters, thresholds and packed
    weights of the current input signature; `graph` and `code` show what a frame runs.
    """

    thresholds: Thresholds
    _stand_in: Compiled | None

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        otherwise: Fallback | None = None,
        pool: ConstantPool | None = None,
    ) -> None:
        """Traces the model; the passes run at the first frame, or at `prepare`.

        Args:
            model: In eval mode.
            config: The options.
            otherwise: Compiles a model that turns out, at a frame, to be none that one graph can
                stand for; what it returns then answers for this module. Without it that is an
                `UntraceableError`.
            pool: Shares packed weights with other modules; by default only this one's signatures
                share theirs.

        Raises:
            InvalidInputError: `model` is no module.
            TrainModeError: It is in train mode.
        """
        with _COMPILING:
            traced = trace_model(model)
        graph = fx.Graph()
        graph.output(None)
        super().__init__(nn.Module(), graph, "DeltaModule")
        self.model = model
        self.config = config
        self.thresholds = Thresholds(config, self._write_thresholds)
        self._otherwise = otherwise
        self._pool = ConstantPool() if pool is None else pool
        self.__dict__["_stand_in"] = None  # no sub-module, as a plain assignment would make it
        self._traced: TracedModel = traced
        self._cache: OrderedDict[Signature, _Compiled] = OrderedDict()
        self._current: _Compiled | None = None
        self._numbers: dict[Signature, set[Signature]] = {}  # by the tensors they came with
        self._scales: dict[str, Tensor] = {}
        self._thresholds_hold = False
        self._groups: list[dict[str, Any]] = []  # of weights and modules
        self._held: list[Any] = []  # what the groups hold: as long as it lives, it can be told
        self._weights_hold: Callable[[], bool] | None = None  # of the watch over both
        self._hide()
        super().train(False)

    def recompile(self) -> Any:
        """Regenerates the code of the graph; calls still come in through `forward`.

        And as those of any module: fx's own call explains errors in generated code, at 10 us each.
        """
        code = super().recompile()
        cls = type(self)
        cls.run_graph = cls.forward  # type: ignore[attr-defined]
        del cls.forward, cls.__call__
        return code

    @property
    @override
    def regions(self) -> Mapping[str, DeltaModule]:
        return {"": self} if self._stand_in is None else self._stand_in.regions

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self._run_frame(args, kwargs)
        return self._run_frame(args, kwargs)

    def _run_frame(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = self._bind(args, kwargs)
        if found is None:
            return self(*args, **kwargs)
        bound, compiled = found
        tensors = bound if _is_flat(bound) else _tensors_in(bound)
        self._calibrate_if_due(compiled)
        self._refresh_if_due(compiled)
        if not compiled.whole:
            lose_state(compiled.instance.plan, compiled.buffers)
        compiled.whole = False
        if compiled.autocast:
            with no_autocast():  # its casts are in the graph
                out = compiled.run(compiled.attributes, *tensors)
        else:
            out = compiled.run(compiled.attributes, *tensors)
        compiled.whole = True
        compiled.frames += 1
        self._calibrate_if_due(compiled)
        return pytree.tree_unflatten(list(out), compiled.instance.out_spec)

    @property
    def traced_whole(self) -> bool:
        """Whether one graph stands for the model at all its inputs."""
        return self._traced.front_end != "python"

    @override
    def prepare(self, *args: Any, **kwargs: Any) -> Self:
        with torch.no_grad():
            if self._stand_in is None:
                self._bind(args, kwargs)
            if self._stand_in is not None:
                self._stand_in.prepare(*args, **kwargs)
        return self

    def admit(self, *args: Any, **kwargs: Any) -> Instance:
        """Compiles for the signature of arguments, as `prepare` does, and tells what came of it.

        Raises:
            InvalidInputError: The arguments are not those of the model's `forward`.
            UntraceableError: No graph can stand for the model on them, or it fails on them.
        """
        with torch.no_grad():
            return self._prepare(self._traced.bind(args, kwargs)).instance

    def observe(self, moments: dict[str, calibration.Moments]) -> None:
        """Adds the maps of the last frame to the moments of the nodes."""
        compiled = self._require()
        calibration.observe(moments, compiled.instance.plan, compiled.buffers)

    def rescale(self, moments: dict[str, calibration.Moments]) -> None:
        """Sets the channel scales that moments tell, and resets the state."""
        self._scales = calibration.scales(moments, self.config.scale_floor)
        for entry in self._cache.values():
            calibration.apply(self._scales, entry.instance.plan, entry.buffers)
            entry.calibrated = True
        self.reset()

    @override
    def reset(self, streams: int | Sequence[int] | None = None) -> None:
        if streams is None:
            for compiled in self._cache.values():
                compiled.age = 0
                lose_state(compiled.instance.plan, compiled.buffers)
            return
        if self._current is None:
            return
        chosen = [streams] if isinstance(streams, int) else list(streams)
        plan = self._current.instance.plan
        for slot in (s for s in plan.slots.values() if s.scratch is None):
            if any(not -slot.shape[0] <= s < slot.shape[0] for s in chosen):
                raise InvalidInputError(f"streams {chosen}: there are {slot.shape[0]} streams")
        lose_state(plan, self._current.buffers, chosen)

    @override
    def stats(self) -> Stats:
        compiled = self._require()
        plan, buffers, run = compiled.instance.plan, _settled(compiled), compiled.run
        counts = frame_counts(plan, buffers) if compiled.frames else None
        branch = run.branch() if isinstance(run, FrameGraph) else "delta"
        return make_stats(compiled.instance, counts, branch)

    @override
    def explain(self) -> Explanation:
        compiled = self._require()
        run = compiled.run
        frames = "one operator after another"
        if isinstance(run, (FrameCalls, FrameGraph)):
            frames = run.describe()
        return Explanation(
            compiled.instance.nodes, compiled.instance.counts, self._traced.front_end,
            self._traced.reason, frames,
        )  # fmt: skip

    @override
    def state_bytes(self, *args: Any, **kwargs: Any) -> int:
        if not args and not kwargs:
            return self._require().instance.plan.bytes()
        bound = self._traced.bind(args, kwargs)
        known = self._cache.get(_signature(bound))
        try:
            with _COMPILING, torch.no_grad():
                made = known.instance if known else self._emit(bound)
        except UntraceableError:
            return self.prepare(*args, **kwargs).state_bytes()
        return made.plan.bytes()

    @override
    def state_tensors(self) -> dict[str, Tensor]:
        compiled = self._require()
        constants = compiled.instance.constants
        return {name: t for name, t in _settled(compiled).items() if name not in constants}

    @override
    def update_mask(self, node: str | None = None) -> Tensor:
        plan = self._require().instance.plan
        name = node if node is not None else next(iter(plan.nodes), None)
        if name not in plan.places:
            raise UnknownNodeError(f"no delta node {name!r}; see explain() for the names")
        _check_kept(plan, name)
        return _settled(self._require())[mask_name(plan.places[name].slot)].clone()

    @override
    def accumulator(self, node: str) -> Tensor:
        compiled = self._require()
        place = compiled.instance.plan.places.get(node)
        if place is None:
            raise UnknownNodeError(f"no delta node {node!r}; see explain() for the names")
        _check_kept(compiled.instance.plan, node)
        whole = compiled.buffers[acc_name(place.slot)]
        return whole[:, place.start : place.start + place.channels].clone()

    @override
    def frame_program(self) -> FrameProgram:
        compiled = self._require()
        if self.thresholds.any_positive() and not compiled.calibrated:
            raise NotCompiledError(
                "the thresholds have no scales yet: call the model with a frame, or calibrate()"
            )
        return FrameProgram(
            compiled.instance, compiled.buffers, compiled.thresholds, self.config.refresh_every,
            compiled.age,
        )  # fmt: skip

    @override
    def _like(self, model: nn.Module) -> DeltaModule:
        return DeltaModule(model, self.config, self._otherwise)

    @override
    def _visited(self) -> Sequence[str]:
        return [""]

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # Moving or converting the model: the state is a cache, so it is dropped, not moved.
        self._forget()
        return super()._apply(fn, recurse)

    def _bind(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], _Compiled] | None:
        """The arguments in order, and what is compiled for them.

        Nothing, where no graph can stand for the model: then another compiled model answers for
        this one from now on.
        """
        bound = self._traced.bind(args, kwargs)
        try:
            return bound, self._prepare(bound)
        except UntraceableError as error:
            failure = error
        # Whatever is wrong with the model or its arguments shows here, with its own traceback.
        own = pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs))
        self.model(*own[0], **own[1])
        if self._otherwise is None:
            raise failure
        self._step_aside(self._otherwise(self.model, self.config, str(failure)))
        return None

    def _step_aside(self, stand_in: Compiled) -> None:
        """Lets another compiled model answer whatever this one is asked."""
        stand_in.thresholds.copied(self.thresholds)
        self._forget()
        self.__dict__["_stand_in"] = stand_in
        for name in ANSWERS:
            self.__dict__[name] = getattr(stand_in, name)

    def _require(self) -> _Compiled:
        if self._current is None:
            raise not_compiled()
        return self._current

    def _forget(self) -> None:
        self._cache.clear()
        self._current = None
        self._buffers.clear()
        self._scales = {}

    def _prepare(self, bound: tuple[Any, ...]) -> _Compiled:
        """The compiled entry for arguments, made the current one."""
        self._follow_weights()
        signature, current = _signature(bound), self._current
        if current is not None and self._thresholds_hold and signature == current.signature:
            return current
        compiled = self._cache.get(signature)
        if compiled is None:
            self._refuse_changing_numbers(signature)
            # Only in-place writes outside inference mode need this; a frame may come either way.
            with _COMPILING, torch.inference_mode(False):
                compiled = self._compile(bound, signature)
            while len(self._cache) >= self.config.max_states:
                self._cache.popitem(last=False)
            self._cache[signature] = compiled
        self._cache.move_to_end(signature)
        self._activate(compiled)
        return compiled

    def _refuse_changing_numbers(self, signature: Signature) -> None:
        """Raises `UntraceableError` where each frame would be compiled for numbers of its own."""
        frames, numbers = _told_apart(signature)
        seen = self._numbers.setdefault(frames, set())
        seen.add(numbers)
        if len(seen) > self.config.max_states:
            raise UntraceableError(
                "numbers among its arguments change from frame to frame, and a graph is for given "
                "ones (tensors may change)"
            )

    def _emit(self, bound: tuple[Any, ...]) -> Instance:
        return emit_instance(self._traced, self.config, bound, self._pool)

    def _compile(self, bound: tuple[Any, ...], signature: Signature) -> _Compiled:
        # Anew: parts of the model may have been replaced since, or the model put in train mode.
        self._traced = trace_model(self.model)
        instance = self._emit(bound)
        if instance.plan.device.type == "cuda":
            check_capability(instance.plan.device)
        buffers = {**instance.constants, **allocate(instance.plan)}
        self._buffers.clear()
        self._buffers.update(buffers)
        self.graph = instance.graph
        run = type(self).run_graph  # type: ignore[attr-defined]
        if self.config.cuda_graph and instance.plan.device.type == "cuda":
            run = FrameGraph(
                run, self.graph, instance.everywhere, buffers, instance.plan,
                self.config.dense_above,
            )  # fmt: skip
        elif instance.plan.device.type == "cpu" and is_delta_only(self.graph):
            run = FrameCalls(self.graph, buffers)
        compiled = _Compiled(
            instance, signature, buffers, self.graph, self.code, run, SimpleNamespace(**buffers),
            any(autocast_state()),
        )  # fmt: skip
        known = all(name in self._scales for name in instance.plan.truncating)
        if known and self._scales:
            calibration.apply(self._scales, instance.plan, buffers)
            compiled.calibrated = True
        return compiled

    def _activate(self, compiled: _Compiled) -> None:
        self._buffers.clear()
        self._buffers.update(compiled.buffers)
        self._non_persistent_buffers_set.update(compiled.buffers)
        self._graph = compiled.graph
        self._code = compiled.code
        self._current = compiled
        self._write_thresholds()

    def _write_thresholds(self) -> None:
        if self._current is None:
            return
        self._thresholds_hold = False  # until all names have been found
        plan = self._current.instance.plan
        values = self.thresholds.resolve(
            tuple(plan.truncating), self._current.instance.frame_inputs
        )
        held = self._current.buffers[THRESHOLDS]
        self._current.thresholds = torch.tensor(values, dtype=held.dtype, device=held.device)
        self._hold_thresholds(self._current)
        self._thresholds_hold = True

    def _hold_thresholds(self, compiled: _Compiled) -> None:
        # From tensors of the same device: a frame that switches must not wait for it.
        held = compiled.buffers[THRESHOLDS]
        if compiled.refreshing or compiled.thresholds is None:
            held.zero_()
        else:
            held.copy_(compiled.thresholds)

    def _refresh_if_due(self, compiled: _Compiled) -> None:
        """Every so many frames nothing is truncated, so that small changes come in too."""
        every = self.config.refresh_every
        refreshing = every > 0 and compiled.age == 0
        if refreshing != compiled.refreshing:
            compiled.refreshing = refreshing
            self._hold_thresholds(compiled)
        compiled.age = (compiled.age + 1) % every if every else 0

    def _calibrate_if_due(self, compiled: _Compiled) -> None:
        due = not compiled.calibrated and compiled.frames and self.thresholds.any_positive()
        if not due:
            return
        plan, buffers = compiled.instance.plan, compiled.buffers
        moments: dict[str, calibration.Moments] = {}
        calibration.observe(moments, plan, buffers)
        found = calibration.scales(moments, self.config.scale_floor)
        calibration.apply(found, plan, buffers)
        compiled.calibrated = all(name in found for name in plan.truncating)
        if compiled.calibrated:
            self._scales = found

    def _follow_weights(self) -> None:
        """Drops everything if weights have changed since, or modules were replaced."""
        if self._weights_hold is not None:
            if self._weights_hold():
                return
            self._forget()
        self._groups = _groups(self.model)
        self._held = [value for group in self._groups for value in group.values()]
        weights = [t for t in self._held if isinstance(t, Tensor)]
        watch = torch.classes.deltafx.WeightWatch(list(map(id, self._groups)), weights)
        self._weights_hold = watch.holds  # once: to look it up takes half as long as to call it


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """The dictionaries that hold the weights and the modules of a model."""
    groups = (g for m in model.modules() for g in (m._parameters, m._buffers, m._modules))
    return [group for group in groups if group and isinstance(group, dict)]  # TorchScript's: none


def _check_kept(plan: StatePlan, node: str) -> None:
    if not plan.kept(node):
        raise UnknownNodeError(
            f"the map of {node!r} is not kept, for the state to be no larger than max_state_bytes"
        )


def _settled(compiled: _Compiled) -> dict[str, Tensor]:
    """The tensors of a state, with what the last frame left to whoever asks."""
    if isinstance(compiled.run, FrameGraph):
        compiled.run.settle()
    return compiled.buffers


def _is_flat(bound: tuple[Any, ...]) -> bool:
    """Whether there are only tensors, as nearly always: that need not go through pytree."""
    for a in bound:  # noqa: SIM110, as all() takes twice as long
        if not isinstance(a, Tensor):
            return False
    return True


def _tensors_in(bound: tuple[Any, ...]) -> list[Tensor]:
    return [a for a in pytree.tree_leaves(bound) if isinstance(a, Tensor)]


def _signature(bound: tuple[Any, ...]) -> Signature:
    if _is_flat(bound):
        return (*[(a.shape, a.dtype, a.device) for a in bound], autocast_state())
    leaves, spec = pytree.tree_flatten(bound)
    kinds = tuple(
        (tuple(a.shape), a.dtype, a.device) if isinstance(a, Tensor) else repr(a) for a in leaves
    )
    return (spec, autocast_state(), *kinds)


def _told_apart(signature: Signature) -> tuple[Signature, Signature]:
    """What a signature says of tensors, and what of all else."""
    return (
        tuple(kind for kind in signature if not isinstance(kind, str)),
        tuple(kind for kind in signature if isinstance(kind, str)),
    )
