"""DeltaRegions: a compiled model that runs its own Python code, delta regions within it.

    images -> transform -> [ backbone ] -> [ rpn.head ] -> proposals -> RoI heads -> boxes

Enters: a model that no one graph can stand for, because sizes in it depend on values, it keeps
something between calls, or it hands about objects of its own. Each frame its code runs on a copy of
its modules (`deltafx.parts`), in which the largest modules that graphs can stand for are
`DeltaModule`s, found when they are first called. A module that is called several times in a frame
has a `DeltaModule`, with its own state, for each of the calls.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from operator import is_
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from typing_extensions import Self, override

from deltafx.compiled import Compiled, not_compiled
from deltafx.config import Config
from deltafx.errors import InvalidInputError, UnknownNodeError, UntraceableError
from deltafx.frame_program import FrameProgram
from deltafx.macs import MacCounter
from deltafx.module import DeltaModule
from deltafx.parts import Part, make_parts, rows_of, streams_of
from deltafx.passes.emit_instance import NodeInfo
from deltafx.passes.share_constants import ConstantPool
from deltafx.passes.trace_model import check_eval
from deltafx.stats import Explanation, Stats, join_explanations, join_stats
from deltafx.thresholds import RegionThresholds, joined

MOST_CALLS = 64
"""Calls of a module in a frame that have a state; the ones after are dense."""

MOST_ROWS = 32
"""Rows of a map a stream; maps of more are cut-outs (proposals, patches), others in every frame."""


@dataclasses.dataclass
class _Frame:
    """A frame while it runs.

    Attributes:
        streams: How many.
        only_prepare: Compile, and compute without the regions.
        counter: Of the multiply-adds outside of the regions, in the first frame of a signature.
        calls: Calls so far, by path.
        at: The paths of the parts that are being run as they are, innermost last.
        inside: Whether in a part that is dense as a whole.
        visited: Names of the regions that were run.
    """

    streams: int
    only_prepare: bool
    counter: MacCounter | None = None
    calls: Counter[str] = dataclasses.field(default_factory=Counter)
    at: list[str] = dataclasses.field(default_factory=list)
    inside: bool = False
    visited: list[str] = dataclasses.field(default_factory=list)

    def uncounted(self) -> contextlib.AbstractContextManager[None]:
        """While a region is compiled or run: it counts for itself."""
        return contextlib.nullcontext() if self.counter is None else self.counter.paused()

    @contextlib.contextmanager
    def within(self, part: Part, dense: bool) -> Iterator[None]:
        """While a part runs as it is; all of it, or all but its own parts."""
        self.at.append(part.path)
        self.inside = dense
        try:
            yield
        finally:
            self.at.pop()
            self.inside = False


class DeltaRegions(Compiled):
    """A compiled model of several regions.

    Nodes are named after their region: `backbone.body_conv1`; in the second call of a module in a
    frame `head[1].conv`. What else the model offers (methods, attributes) is that of a copy
    of it that shares its tensors.
    """

    thresholds: RegionThresholds

    def __init__(self, model: nn.Module, config: Config, reason: str = "") -> None:
        """Copies the modules; regions are compiled when they are first called, or at `prepare`.

        Args:
            model: In eval mode.
            config: The options.
            reason: Why no one graph stands for the model, where that is known already.

        Raises:
            InvalidInputError: `model` is no module.
            TrainModeError: It is in train mode.
        """
        check_eval(model)
        super().__init__()
        self.model = model
        self.config = config
        self.thresholds = RegionThresholds(config, lambda: self.regions)
        self._pool = ConstantPool()
        self._frame: _Frame | None = None
        self._last: _Frame | None = None
        self._rest: OrderedDict[Any, Counter[str]] = OrderedDict()
        self._take_apart(reason)
        self._hide()
        super().train(False)

    def __getattr__(self, name: str) -> Any:
        """What the model has."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_shell" not in self.__dict__:
                raise
            return getattr(self.__dict__["_shell"], name)

    @property
    @override
    def regions(self) -> dict[str, DeltaModule]:
        return {
            name: region
            for part in self._parts.values()
            for name, region in zip(part.region_names(), part.regions, strict=True)
        }

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(args, kwargs, only_prepare=False)

    @override
    def prepare(self, *args: Any, **kwargs: Any) -> Self:
        self._run(args, kwargs, only_prepare=True)
        return self

    @override
    def reset(self, streams: int | Sequence[int] | None = None) -> None:
        if streams is not None and self._last is None:
            return
        known = self._require().streams if streams is not None else 0
        chosen = [streams] if isinstance(streams, int) else list(streams or [])
        if any(not -known <= s < known for s in chosen):
            raise InvalidInputError(f"streams {chosen}: there are {known} streams")
        for part in self._parts.values():
            for region in part.regions:
                region.reset(chosen if streams is not None and part.per_stream == 1 else None)

    @override
    def stats(self) -> Stats:
        last = self._require()
        regions = self.regions
        rest = sum(self._outside().values())
        return join_stats({name: regions[name].stats() for name in last.visited}, rest)

    @override
    def explain(self) -> Explanation:
        last = self._require()
        regions = self.regions
        if last.visited == [""]:
            return regions[""].explain()
        macs = self._outside()
        macs.update({path: 0 for path, part in self._parts.items() if part.kind == "dense"})
        outside = [
            NodeInfo(
                name=path or type(self.model).__name__, op=type(self._parts[path].module).__name__,
                kind="dense", reason=self._parts[path].reason or "it runs as it is", shape=(),
                truncates=False, region=None, sites=0, macs_per_site=0, dense_macs=count,
            )
            for path, count in macs.items()
        ]  # fmt: skip
        explained = {name: regions[name].explain() for name in last.visited}
        return join_explanations(explained, outside, self._parts[""].reason)

    @override
    def state_bytes(self, *args: Any, **kwargs: Any) -> int:
        if args or kwargs:
            self.prepare(*args, **kwargs)
        return sum(self.regions[name].state_bytes() for name in self._require().visited)

    @override
    def state_tensors(self) -> dict[str, Tensor]:
        self._require()
        return {
            joined(region, name): tensor
            for region, module in self.regions.items()
            for name, tensor in module.state_tensors().items()
        }

    @override
    def update_mask(self, node: str | None = None) -> Tensor:
        if node is not None:
            region, name = self._find(node)
            return region.update_mask(name)
        visited = self._require().visited
        if not visited:
            raise UnknownNodeError("no part of the model is a region; see explain()")
        return self.regions[visited[0]].update_mask()

    @override
    def accumulator(self, node: str) -> Tensor:
        region, name = self._find(node)
        return region.accumulator(name)

    @override
    def frame_program(self) -> FrameProgram:
        if self._require().visited == [""]:
            return self.regions[""].frame_program()
        raise UntraceableError(
            f"no one graph stands for the model ({self._parts[''].reason}); each of `regions` has "
            "a frame_program() of its own"
        )

    @override
    def _like(self, model: nn.Module) -> DeltaRegions:
        return DeltaRegions(model, self.config)

    @override
    def _visited(self) -> Sequence[str]:
        return self._require().visited

    def _take_apart(self, reason: str = "") -> None:
        shell, self._parts = make_parts(self.model, self._call)
        self.__dict__["_shell"] = shell  # no sub-module: its tensors are those of `model`
        self._groups = [m._modules for m in self.model.modules() if m._modules]
        self._children = self._held()
        self._last = None
        self._rest.clear()
        if reason:
            self._parts[""].settle("parts", reason)

    def _held(self) -> list[nn.Module | None]:
        """The modules of the model, for it to be seen where one was replaced."""
        return [child for group in self._groups for child in group.values()]

    def _require(self) -> _Frame:
        if self._last is None:
            raise not_compiled()
        return self._last

    def _find(self, node: str) -> tuple[DeltaModule, str]:
        self._require()
        return self.thresholds.find(node)

    def _outside(self) -> Counter[str]:
        """The multiply-adds outside of the regions in the last frame's signature, by path."""
        return Counter(next(reversed(self._rest.values()), {}))

    def _settled(self) -> int:
        return sum(part.kind in ("parts", "dense") for part in self._parts.values())

    @torch.no_grad()
    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any], only_prepare: bool) -> Any:
        held = self._held()
        if len(held) != len(self._children) or not all(map(is_, held, self._children)):
            check_eval(self.model)
            self._take_apart()
        frame = _Frame(streams_of(args, kwargs), only_prepare)
        signature = tuple(
            (tuple(t.shape), t.dtype) if isinstance(t, Tensor) else None
            for t in pytree.tree_leaves((args, kwargs))
        )
        if signature not in self._rest:
            frame.counter = MacCounter(lambda: frame.at[-1] if frame.at else "")
        settled = self._settled()
        self._frame = frame
        try:
            with frame.counter or contextlib.nullcontext():
                out = self.__dict__["_shell"](*args, **kwargs)
        finally:
            self._frame = None
        if frame.counter is None and self._settled() != settled:
            self._rest.clear()  # less is in regions than when this was counted
        elif frame.counter is None:
            self._rest.move_to_end(signature)
        else:
            while len(self._rest) >= self.config.max_states:
                self._rest.popitem(last=False)
            self._rest[signature] = frame.counter.macs
        self._last = frame
        self.thresholds.check()
        return out

    def _call(self, part: Part, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call of a part: a region's, or its own."""
        frame = self._frame
        if frame is None or frame.inside:
            return part.dense(*args, **kwargs)
        with frame.uncounted():
            region = self._region(part, args, kwargs, frame)
            if region is not None:
                if frame.only_prepare:
                    with frame.within(part, dense=True):
                        return part.dense(*args, **kwargs)
                try:
                    return region(*args, **kwargs)
                except UntraceableError as error:
                    part.settle("parts", str(error))
        with frame.within(part, dense=part.kind in ("dense", "delta")):
            return part.dense(*args, **kwargs)

    def _region(
        self, part: Part, args: tuple[Any, ...], kwargs: dict[str, Any], frame: _Frame
    ) -> DeltaModule | None:
        """The region that stands for a call of a part; `None` where it runs as it is."""
        if part.kind == "unknown" and part.path and not part.convolves:
            part.settle("dense", "there is no 2-D convolution in it")
        if part.kind in ("parts", "dense") or not _fits(part, args, kwargs, frame):
            return None
        number = frame.calls[part.path]
        frame.calls[part.path] += 1
        if number >= MOST_CALLS:
            return None
        if number < len(part.regions) and frame.counter is None and not frame.only_prepare:
            frame.visited.append(part.region_names()[number])
            return part.regions[number]
        region = part.regions[number] if number < len(part.regions) else self._new_region(part)
        try:
            instance = region.admit(*args, **kwargs)
        except UntraceableError as error:
            part.settle("parts", str(error))
            return None
        except InvalidInputError:
            return None  # arguments that are not those of its `forward`, as that will say itself
        if part.path and instance.writes_inputs:
            part.settle("parts", "it writes into its arguments")
            return None
        if part.path and not any(n.kind == "delta" and n.dense_macs for n in instance.nodes):
            part.settle("dense", "nothing in it can be computed where its inputs changed")
            return None
        part.kind = "delta"
        new = number == len(part.regions)
        part.regions += [region] * new
        name = part.region_names()[number]
        if new:
            self.thresholds.adopt(name, region)
        frame.visited.append(name)
        return region

    def _new_region(self, part: Part) -> DeltaModule:
        config = dataclasses.replace(self.config, thresholds={})
        return DeltaModule(part.module, config, pool=self._pool)


def _fits(part: Part, args: tuple[Any, ...], kwargs: dict[str, Any], frame: _Frame) -> bool:
    """Whether the maps of a call are those of the streams; the whole model's always are."""
    if not part.path:
        return True
    rows = rows_of(args, kwargs)
    if 0 in rows:
        return False
    per_stream, odd = divmod(rows[0] if rows else 0, frame.streams)
    if len(rows) != 1:
        part.settle("parts", "it takes maps of several batches" if rows else "it takes no map")
    elif part.kind == "delta" and (odd or per_stream != part.per_stream):
        part.settle("dense", "the batch of its maps is another one from frame to frame")
    elif odd or per_stream > MOST_ROWS:
        part.settle("dense", "its maps are cut-outs of the picture, others in every frame")
    else:
        part.per_stream = per_stream
        return True
    return False
