"""A frame as one CUDA graph launch, with branches that the device chooses.

    clear masks -> encode the frame -> how much of it changed?
        nothing   -> done
        something -> the lowered graph
        the most  -> the graph that computes every convolution everywhere

Enters: the lowered graphs with their tensors, on a CUDA device. Leaves: a callable in place of the
graph's own function, which costs a launch instead of hundreds. The first frames run without one,
so that everything that is set up once is; then one is captured. Frames are compared where they are,
by a graph that is told their address (in another layout, as a copy in this one); those that are
read by more than one comparison are copied into memory of the graph's own, and results out of it.
Nothing waits for the device. In the lowered graph, calls that need not wait for one another run
beside each other.

All branches are evaluations of the same function on the same state, which each leaves valid: so a
frame may take any branch, whatever the frames before it took, and the choice is one of cost alone.

The switch between branches costs 15 to 20 us. So for an image there is a second graph for the usual
frame, in which one kernel clears, compares and decides, and the lowered graph just follows: where
nothing changed it finds nothing to do, and where the most did the input's mask is left empty, and
the other branch runs beside it. The host takes it while the last frame that the device has told of
ran the lowered graph. As they may run beside each other, the branches share nothing that both would
write: the one that computes everywhere has a mask of its own, all set, and counts and a list.

Where a frame cannot be captured (a dense op that synchronizes, or whose work depends on values),
the frames go on without a graph, and a `CudaGraphWarning` says so once. Where only the branches
cannot (a runtime without conditional nodes), the graph is the lowered graph for every frame, and
`describe` says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from typing_extensions import override

from deltafx.beside import BesideInterpreter, Point
from deltafx.choose_ways import choose_ways
from deltafx.errors import CudaGraphWarning, UnsupportedDeviceError
from deltafx.ops.encode import is_frame
from deltafx.state import (
    COUNTS,
    MASKS,
    NOT_FINITE,
    StatePlan,
    allocate_everywhere,
    lose_state,
    place_name,
)

WARM_UP_FRAMES = 2

_CAPTURING = threading.Lock()
"""One capture at a time: torch's generator of random numbers takes part in it."""

BRANCHES = ("delta", "dense", "nothing")
"""By their number in csrc/cuda/branch.h."""

OTHERWISE_AFTER = 12
"""So many calls into the lowered graph, the other branch of a frame stands beside it: next to the
first ones it was measured to hold those up by some microseconds."""

MOST_INPUTS = 32
"""kMostInputs there."""

SQUARE = 16
"""kSquare there."""

MEASURED_FRAMES = 4
"""Of which the quickest counts."""

HANDS_OUT_GRAPHS = hasattr(torch.cuda.CUDAGraph, "raw_cuda_graph")
"""Whether this torch does; graphs are built of graphs with it, and launched without torch."""

LEAST_CAPABILITY = (7, 0)
"""Of a GPU that the kernels can be compiled for; their quick convolutions need 8.0."""


def check_capability(device: torch.device) -> None:
    """Refuses a GPU that is too old.

    Raises:
        UnsupportedDeviceError: It is.
    """
    found = torch.cuda.get_device_capability(device)
    if found < LEAST_CAPABILITY:
        raise UnsupportedDeviceError(
            f"{device} has compute capability {found[0]}.{found[1]}, and the CUDA operators need "
            f"{LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} (Volta) or newer; run the model on the "
            "CPU, or with plain torch"
        )


class FrameGraph:
    """Runs frames of one input signature.

    Attributes:
        failure: Why there is no graph, once that is known to be impossible; else `None`.
        no_branches: Why the graph has no branches, where it has none; else `None`.
        beside: How many calls of the captured lowered graph run beside others.
    """

    def __init__(
        self,
        eager: Callable[..., Any],
        graph: fx.Graph,
        everywhere: fx.Graph | None,
        tensors: Mapping[str, Tensor],
        plan: StatePlan,
        dense_above: float | None,
    ) -> None:
        """Nothing is captured yet.

        Args:
            eager: `eager(module, *inputs)` runs a frame without a CUDA graph.
            graph: What it runs.
            everywhere: The same frame with all convolutions computed everywhere; or `None`.
            tensors: The attributes of both.
            plan: Of the state among them.
            dense_above: The share of the input's squares that must have changed for that; `None`:
                as measured when the graph is captured.
        """
        # The choice, the flag below, and what the device counts with; see csrc/cuda/branch.h.
        self._state = torch.zeros(6, dtype=torch.int32, device=plan.device)
        self.failure: str | None = None
        self.no_branches: str | None = None
        self.beside = 0
        self._eager = eager
        self._parts = split_frame(without_output_copies(graph))
        dense = split_frame(without_output_copies(everywhere)) if everywhere else self._parts
        self._everywhere = everywhere and dense.body
        self._in_place = [
            a and b for a, b in zip(self._parts.in_place, dense.in_place, strict=True)
        ]
        self._tensors = {**tensors, NOT_FINITE: self._state[1:2]}
        self._dense_above = dense_above
        self._plan = plan
        self._of_everywhere: list[Any] = []  # what its graph reads and writes of its own
        # The choice of a recent frame, in host memory that the device writes into.
        self._told = _mailbox()
        self._frames = 0
        self._captured: torch.cuda.CUDAGraph | None = None
        self._bodies: list[torch.cuda.CUDAGraph] = []  # whose memory the captured graph uses
        self._switching: torch.cuda.CUDAGraph | None = None  # the one for all branches, if of two
        self._inputs: list[Tensor] = []
        self._outputs: list[Any] = []
        self._random = False  # whether a frame draws random numbers
        self._readers: dict[int, int] = {}  # nodes of the graph by the id of the input they compare
        self._writers: list[int] = []  # those that hand out the outputs
        self._launch: Callable[[tuple[Tensor, ...]], list[Any]]

    @property
    def captured(self) -> bool:
        """Whether frames are launched as a graph."""
        return self._captured is not None

    @property
    def has_branches(self) -> bool:
        """Whether the device chooses what a frame runs."""
        return self.captured and self.no_branches is None

    @property
    def chooses_graph(self) -> bool:
        """Whether there is a graph for the usual frame besides that for all branches."""
        return self._switching is not None

    def branch(self) -> str:
        """What the last frame ran, one of `BRANCHES`; waits for the device."""
        return BRANCHES[int(self._state[0])] if self.has_branches else "delta"

    def settle(self) -> None:
        """Writes the masks and counts of the last frame, if it was computed everywhere.

        Such a frame leaves them alone, for whoever asks. Waits for the device.
        """
        if self.branch() == "dense":
            plan = self._plan
            rows = [[sites, 0] for sites in plan.row_sites()]
            self._tensors[MASKS].fill_(True)
            self._tensors[COUNTS].copy_(torch.tensor(rows, device=plan.device))

    def describe(self) -> str:
        """How frames run, in words for the user."""
        if self.failure is not None:
            return f"one operator after another: {self.failure}"
        if not self.captured:
            return f"one operator after another; a CUDA graph after {WARM_UP_FRAMES} frames"
        if self.no_branches is not None:
            return f"one CUDA graph, the same for every frame: {self.no_branches}"
        text = "one CUDA graph"
        if self._parts.may_skip:
            text += "; nothing beyond the comparison where the input did not change"
        if self._everywhere is not None and self._dense_above is not None:
            share = f"{100 * self._dense_above:.0f}%"
            text += f"; convolutions by cuDNN where more than {share} of the input changed"
        return text

    def __call__(self, module: Any, *inputs: Tensor) -> Any:
        """Runs a frame; takes and returns what `eager` does."""
        if self._captured is None:
            self._frames += 1
            if self.failure is None and self._frames > WARM_UP_FRAMES:
                self._capture(inputs)
            generator = torch.cuda.default_generators[self._state.device.index]
            drawn = generator.get_offset()
            result = self._eager(module, *inputs)
            self._random |= generator.get_offset() != drawn
            self._fill_outputs(result)
            return result
        return self._launch(inputs)

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        if not all(t.is_cuda for t in inputs):
            self._fail("an input is not on the CUDA device")
            return
        # A capture that fails leaves its stream the current one.
        current = torch.cuda.stream(torch.cuda.current_stream())
        with _CAPTURING, current, torch.inference_mode(False), torch.no_grad():
            self._inputs = [t.clone(memory_format=torch.preserve_format) for t in inputs]
            try:
                self.no_branches = self._against_branches()
                if self.no_branches is None:
                    self._capture_branches()
                else:
                    self._capture_whole()
            except RuntimeError as error:
                self._fail(_reason(error))
            self._inputs = []  # those that are read are held by who launches the graph

    def _against_branches(self) -> str | None:
        compared = len(self._parts.masks)
        if not 1 <= compared <= MOST_INPUTS:
            return (
                f"{compared} of the model's inputs are compared with the last frame; 1 to "
                f"{MOST_INPUTS} could be"
            )
        if self._random:
            return "the model draws random numbers, which torch provides for whole graphs"
        if not HANDS_OUT_GRAPHS:
            return f"torch {torch.__version__} does not hand out its graphs; 2.8 does"
        return None

    def _fill_outputs(self, result: Any) -> None:
        """Writes an eager frame's results where later ones will be, should nothing change then."""
        for own, found in zip(self._outputs, result, strict=self.captured):
            if isinstance(own, Tensor):
                own.copy_(found)

    def _capture_whole(self) -> None:
        self._bodies = []
        self._switching = None

        direct = HANDS_OUT_GRAPHS and not self._random

        def frame() -> Any:
            self._run_head()
            outputs = self._run_body()
            return self._hand_out(outputs) if direct else outputs

        self._hold(*_record(frame, keep_graph=direct), direct=direct)

    def _capture_branches(self) -> None:
        """Captures the branches, then what comes before them; see csrc/cuda/branch.h."""
        delta, outputs = _record(self._run_body, keep_graph=True)
        self._bodies = [delta]
        try:
            if self._everywhere is not None:
                self._bodies.append(self._record_everywhere(outputs))
                if self._dense_above is None:
                    self._dense_above = self._measure_switch()
                # What ran so far followed no masks: the state of the last frame once more.
                self._fill(float("nan"))
                self._bodies[1].replay()
            dense_above = 1.0 if self._dense_above is None else self._dense_above
            masks = [self._tensors[name] for name in self._parts.masks]
            bodies = [body.raw_cuda_graph() for body in self._bodies]

            def frame() -> list[Any]:
                self._run_head()
                torch.ops.deltafx.branch(
                    self._state, masks, self._parts.may_skip, dense_above, bodies
                )
                self._hand_out(outputs)
                torch.ops.deltafx.tell(self._state, self._told)
                return outputs

            self._hold(*_record(frame, keep_graph=True, pool=delta.pool()), direct=True)
            self._add_straight(dense_above)
        except RuntimeError as error:
            self.no_branches = _reason(error)
            lose_state(self._plan, self._tensors)  # half measured, it would be wrong
            self._capture_whole()

    def _add_straight(self, dense_above: float) -> None:
        """Captures the graph for the usual frame, if this is one that it can be for."""
        begin, switching, switched = self._begin(), self._captured, self._launch
        if begin is None or not self._parts.keeps_all:
            return
        straight = functools.partial(self._run_straight, begin, dense_above, self._outputs)
        try:
            # In memory of its own: the other branch may run beside it.
            self._hold(*_record(straight, keep_graph=True), direct=True)
        except RuntimeError:
            return  # the graph for all branches does as well
        self._switching = switching
        self._launch = functools.partial(_either, self._told, self._launch, switched)

    def _hold(self, graph: torch.cuda.CUDAGraph, outputs: list[Any], *, direct: bool) -> None:
        """Takes a graph for the frames to come; `direct`: launched past torch, in one call."""
        pairs = zip(self._inputs, self._in_place, strict=True)
        readers = [self._readers.get(id(t), 0) if alone else 0 for t, alone in pairs]
        results = [o for o in outputs if isinstance(o, Tensor)]
        raw = graph.raw_cuda_graph() if direct else 0
        writers = self._writers if direct else [0] * len(results)
        frame = torch.classes.deltafx.FrameLaunch(raw, self._inputs, readers, results, writers)

        def replay(inputs: tuple[Tensor, ...]) -> list[Tensor]:
            frame.read(inputs)
            graph.replay()
            return frame.results()

        launch = frame.run if direct else replay

        def among_others(inputs: tuple[Tensor, ...]) -> list[Any]:
            copies = iter(launch(inputs))
            return [next(copies) if isinstance(o, Tensor) else o for o in outputs]

        self._launch = launch if len(results) == len(outputs) else among_others
        self._captured, self._outputs = graph, outputs

    def _run_head(self) -> None:
        head = _Head(fx.GraphModule(self._tensors, self._parts.head))
        head.run(*self._inputs)
        self._readers = head.readers

    def _begin(self) -> tuple[Any, ...] | None:
        """What `begin_frame` takes of the head, if that can begin a frame."""
        if not torch.classes.deltafx.CapturePoint.supported(self._state.device):
            return None
        head = _Arguments(fx.GraphModule(self._tensors, self._parts.head))
        head.run(*self._inputs)
        if len(head.compared) != 1:
            return None
        arguments = (*head.compared[0], *head.cleared)
        return arguments if torch.ops.deltafx.begins_frame(*arguments) else None

    def _point(self) -> Point:
        return torch.classes.deltafx.CapturePoint.here(self._state)

    def _hand_out(self, outputs: list[Any]) -> list[Any]:
        """Copies outputs to where each launch is told to, in a graph that is being captured."""
        hand_out = torch.classes.deltafx.FrameLaunch.hand_out
        self._writers = [hand_out(o) for o in outputs if isinstance(o, Tensor)]
        return outputs

    def _run_straight(
        self, begin: tuple[Any, ...], dense_above: float, outputs: list[Any]
    ) -> list[Any]:
        """Runs what is captured as the graph for the usual frame; `begin`: as `_begin` tells."""
        everywhere = self._bodies[1:]
        handle, reader = torch.ops.deltafx.begin_frame(
            *begin, self._state, self._parts.may_skip, bool(everywhere), dense_above
        )
        self._readers = {id(begin[_X]): reader}
        ends = []

        def beside() -> None:
            here = self._point()
            torch.ops.deltafx.tell(self._state, self._told)
            for body in everywhere:
                torch.ops.deltafx.otherwise(self._state, handle, body.raw_cuda_graph())
            ends.append(self._point())
            here.go_back()

        self._run_body(after=(OTHERWISE_AFTER, beside))
        for end in ends:
            end.join()
        return self._hand_out(outputs)

    def _run_body(self, after: tuple[int, Callable[[], None]] | None = None) -> Any:
        """Runs what is captured as the lowered graph's body.

        Args:
            after: How many calls in, and what is called then; at the end, if there are fewer.
        """
        if not torch.classes.deltafx.CapturePoint.supported(self._state.device):
            return self._runner(self._parts.body)()
        module = fx.GraphModule(self._tensors, self._parts.body)
        body = BesideInterpreter(module, self._point, after)
        outputs = body.run(*self._inputs)
        self.beside = body.count
        return outputs

    def _record_everywhere(self, outputs: list[Any]) -> torch.cuda.CUDAGraph:
        assert self._everywhere is not None
        # Outside of a frame: no other op has a candidate.
        torch.ops.deltafx.clear_masks(self._tensors[MASKS], self._tensors[COUNTS])
        gm = fx.GraphModule(self._tensors, self._everywhere)
        frugal = self._plan.scratch_bytes() > 0
        choose_ways(gm, tuple(self._inputs), _measure_in_graph, frugal=frugal)
        of_frame = allocate_everywhere(self._plan)
        counts = of_frame[COUNTS]
        # What the graph does not use is not kept.
        run = fx.GraphModule({**self._tensors, **of_frame}, self._everywhere)
        self._of_everywhere = [run, counts]

        def body() -> None:
            counts.zero_()
            for own, other in zip(outputs, run(*self._inputs), strict=True):
                if isinstance(own, Tensor) and own.data_ptr() != other.data_ptr():
                    own.copy_(other)

        return _record(body, keep_graph=True, pool=self._bodies[0].pool())[0]

    def _measure_switch(self) -> float:
        """The share of the input's squares from which on the dense body is the faster one.

        The delta body takes about the same more for every square that changed: a line through its
        times for none and for a box of a quarter of the picture. Maps of ones stand for the last
        frame's, so that all candidates change: the state is lost.
        """
        delta, everywhere = self._bodies
        masks = [self._tensors[name] for name in self._parts.masks]

        def nothing() -> None:
            self._fill(1.0)

        def box() -> None:
            nothing()
            for mask in masks:
                _, h, w = mask.shape
                mask[:, h // 4 : h // 4 + h // 2, w // 4 : w // 4 + w // 2] = True

        still, moving = _milliseconds(nothing, delta), _milliseconds(box, delta)
        squares = [F.max_pool2d(m[:1].float(), SQUARE, ceil_mode=True).mean() for m in masks]
        share = float(sum(squares)) / len(squares)
        dense = _milliseconds(nothing, everywhere)
        if dense <= still:
            return 0.0
        return min(1.0, share * (dense - still) / max(moving - still, 1e-6))

    def _fill(self, value: float) -> None:
        """Fills all accumulators but the inputs', as before a frame in which nothing changed."""
        places = {place_name(self._plan, place) for place in self._plan.places.values()}
        for name in places.difference(self._parts.inputs):
            self._tensors[name].fill_(value)
        torch.ops.deltafx.clear_masks(self._tensors[MASKS], self._tensors[COUNTS])

    def _runner(self, graph: fx.Graph) -> Callable[[], Any]:
        """What runs a graph on the inputs' own memory."""
        return functools.partial(fx.GraphModule(self._tensors, graph), *self._inputs)

    def _fail(self, reason: str) -> None:
        self.failure = reason
        warnings.warn(
            f"frames run without a CUDA graph, which costs launches: {reason}",
            CudaGraphWarning,
            stacklevel=2,
        )


_MAILBOXES = 1024
_NUMBERS = itertools.count()


@functools.cache
def _mailboxes() -> Tensor:
    """Pinned, and never given back: a frame may be under way when its graph is dropped."""
    return torch.zeros(_MAILBOXES, dtype=torch.int32, device="cpu", pin_memory=True)


def _mailbox() -> Tensor:
    """One of them; graphs may share one, for a wrong value there costs time and nothing else."""
    i = next(_NUMBERS) % _MAILBOXES
    return _mailboxes()[i : i + 1]


def _either(
    told: Tensor,
    straight: Callable[[tuple[Tensor, ...]], list[Any]],
    switched: Callable[[tuple[Tensor, ...]], list[Any]],
    inputs: tuple[Tensor, ...],
) -> list[Any]:
    """Launches the graph that is likely the quicker one."""
    return (straight if BRANCHES[int(told)] == "delta" else switched)(inputs)


def _record(
    run: Callable[[], Any], *, keep_graph: bool = False, pool: Any = None
) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Captures what `run` enqueues; returns the graph, and what `run` returned."""
    # A stream of its own, so that nothing else is captured; memory of its own, so that no other
    # model's frames lie in it.
    graph = torch.cuda.CUDAGraph(keep_graph=True) if keep_graph else torch.cuda.CUDAGraph()
    pool = pool or torch.cuda.graph_pool_handle()
    failure = None
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            try:
                returned = run()
            except RuntimeError as error:
                failure = error
                raise
    except RuntimeError as error:
        # torch ends a capture that failed with another error, and leaves its allocator and its
        # generator of random numbers capturing.
        device = torch.cuda.current_device()
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(device, pool)
        generator = torch.cuda.default_generators[device]
        generator.graphsafe_set_state(generator.clone_state())
        torch.cuda.synchronize()
        raise failure or error from None
    return graph, returned


def _measure_in_graph(run: Callable[[], None]) -> tuple[float, int]:
    """The time of a call without that of its launches, and the bytes that it works in."""
    run()  # once before, so that cuDNN chooses its algorithms
    graph, _ = _record(run)
    pool = graph.pool()
    segments = (s for s in torch.cuda.memory_snapshot() if s["segment_pool_id"] == pool)
    return _milliseconds(lambda: None, graph), sum(s["total_size"] for s in segments)


def _milliseconds(prepare: Callable[[], None], body: torch.cuda.CUDAGraph) -> float:
    """The time of a body behind what prepares it; the best of some."""
    times = []
    for _ in range(MEASURED_FRAMES):
        prepare()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        body.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return min(times)


def _reason(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[0]


@dataclasses.dataclass(frozen=True)
class FrameParts:
    """A frame in two graphs over the same inputs and attributes.

    Attributes:
        head: Clears the masks, and compares the model's inputs with their accumulators.
        body: All else.
        inputs: The attributes that hold the accumulators of the inputs.
        masks: Those that hold their update masks, each once.
        in_place: For each input whether one comparison reads it, and nothing else.
        may_skip: Whether the body has nothing to do where they are empty: it reads no input itself.
        keeps_all: Whether the body's results are all in the state: it is operators on that alone.
    """

    head: fx.Graph
    body: fx.Graph
    inputs: tuple[str, ...]
    masks: tuple[str, ...]
    in_place: tuple[bool, ...]
    may_skip: bool
    keeps_all: bool


def split_frame(graph: fx.Graph) -> FrameParts:
    """Splits a lowered graph behind the comparisons of its inputs."""
    encodes = [n for n in graph.nodes if _encodes_input(n)]
    inputs = [n for n in graph.nodes if is_frame(n)]
    calls = [n for n in graph.nodes if n.op in ("call_function", "call_module", "call_method")]
    results = next(iter(reversed(graph.nodes))).all_input_nodes
    return FrameParts(
        head=_part(graph, in_head=True),
        body=_part(graph, in_head=False),
        inputs=tuple(str(n.args[_ACC].target) for n in encodes),
        masks=tuple(dict.fromkeys(str(n.args[_MASK].target) for n in encodes)),
        in_place=tuple(
            [_encodes_input(u) for u in n.users] == [True] for n in inputs if n.op == "placeholder"
        ),
        may_skip=all(_encodes_input(u) or is_frame(u) for n in inputs for u in n.users),
        keeps_all=all(getattr(n.target, "namespace", "") == "deltafx" for n in calls)
        and all(n.op == "get_attr" for n in results),
    )


_ACC, _MASK, _X = (
    [a.name for a in torch.ops.deltafx.encode.default._schema.arguments].index(name)
    for name in ("acc", "mask", "x")
)


class _Arguments(fx.Interpreter):
    """Runs nothing of a head but views.

    Attributes:
        cleared: What the operator takes that clears the masks.
        compared: What each comparison takes.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.cleared: tuple[Any, ...] = ()
        self.compared: list[tuple[Any, ...]] = []

    @override
    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.deltafx.clear_masks.default:
            self.cleared = args
        elif target is torch.ops.deltafx.encode.default:
            self.compared.append(args)
        else:
            return super().call_function(target, args, kwargs)
        return None


class _Head(fx.Interpreter):
    """Runs a head that is being captured.

    Attributes:
        readers: The nodes of the CUDA graph that its comparisons are, by the id of what they read.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.readers: dict[int, int] = {}

    @override
    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        returned = super().call_function(target, args, kwargs)
        if target is torch.ops.deltafx.encode.default:
            last_node = torch.classes.deltafx.FrameLaunch.last_node
            self.readers[id(args[_X])] = last_node(args[_ACC])
        return returned


def _encodes_input(node: fx.Node) -> bool:
    return node.target is torch.ops.deltafx.encode.default and is_frame(node.args[_X])  # type: ignore[arg-type]


def _part(graph: fx.Graph, *, in_head: bool) -> fx.Graph:
    made = fx.Graph()
    made.output(made.graph_copy(graph, {}))
    if in_head:
        next(iter(reversed(made.nodes))).args = ((),)
    for node in reversed(made.nodes):
        first = node.target is torch.ops.deltafx.clear_masks.default or _encodes_input(node)
        # A picture of a clip is a view: it goes where it is read.
        elsewhere = not node.users if is_frame(node) else first != in_head
        if node.op == "call_function" and elsewhere:
            made.erase_node(node)
    for node in list(made.nodes):
        if node.op == "get_attr" and not node.users:
            made.erase_node(node)
    return made


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
