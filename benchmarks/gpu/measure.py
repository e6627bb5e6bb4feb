"""Timing on the device, errors, and the ceilings that a floor is counted with."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from benchmarks.gpu.scenes import there_and_back

REPEATS, IN_A_ROW = 3, 100
"""Of the frames in a row, of which the median counts; and how many they are, at least: where the
host takes longer than the device, the first ones take longer than those to come."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds a frame.

    Attributes:
        mean: Of all frames in a row, with nothing between them.
        median: Of single frames, each between two events, which take some of the host's time.
        low: The lower quartile of the same.
        high: The upper one.
        frames: How many single frames were timed.
    """

    mean: float
    median: float
    low: float
    high: float
    frames: int


def time_frames(run: Callable[[Tensor], Any], clip: Sequence[Tensor], rounds: int) -> Timing:
    """Times all frames in a row, and each; the clip goes back and forth, so no cut is in it."""
    frames = there_and_back(clip)
    for frame in frames:
        run(frame)
    torch.cuda.synchronize()
    row = frames * max(rounds, -(-IN_A_ROW // len(frames)))
    in_a_row = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for frame in row:
            run(frame)
        end.record()
        torch.cuda.synchronize()
        in_a_row.append(start.elapsed_time(end) / len(row))
    times: list[float] = []
    for _ in range(rounds):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(frames) + 1)]
        marks[0].record()
        for frame, mark in zip(frames, marks[1:], strict=True):
            run(frame)
            mark.record()
        torch.cuda.synchronize()
        times += [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
    low, _, high = statistics.quantiles(times, n=4)
    mean = statistics.median(in_a_row)
    return Timing(mean, statistics.median(times), low, high, len(times))


def error_of(output: Any, reference: Any) -> float:
    """The relative L2 distance over all tensors of an output."""
    pairs = zip(tensors_of(output), tensors_of(reference), strict=True)
    above = below = 0.0
    for a, b in pairs:
        above += float((a.float() - b.float()).square().sum())
        below += float(b.float().square().sum())
    return (above / below) ** 0.5


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors of an output, in order."""
    return [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]


def graphed(model: Callable[[Tensor], Any], example: Tensor) -> Callable[[Tensor], Any]:
    """A dense model as a CUDA graph over its own input, which is read where it is."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model(example)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = model(example)

    def run(_: Tensor) -> Any:
        graph.replay()
        return output

    return run


def peak_bytes(run: Callable[[], Any]) -> int:
    """Device memory at its highest while `run` runs, what is there already included.

    With it what CUDA graphs use at each launch, which counts as free between captures.
    """
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    of_graphs = [s for s in torch.cuda.memory_snapshot() if s["segment_pool_id"] != (0, 0)]
    idle = sum(s["total_size"] - s["allocated_size"] for s in of_graphs)
    return torch.cuda.max_memory_allocated() + idle


WAITS = ("Synchronize", "cudaMemcpy", "EventQuery", "StreamQuery")
ALLOCATIONS = ("Malloc", "cudaFree", "HostAlloc", "HostRegister", "MemPool", "MemCreate", "MemMap")


def host_work(run: Callable[[Tensor], Any], clip: Sequence[Tensor], rounds: int) -> dict[str, Any]:
    """What a frame asks of the host: CUDA calls by name, after warm-up, and its own time.

    Counted in the profiler's trace of the runtime's and the driver's calls. A `cudaMemcpyAsync`
    between places on the device does not wait; any other copy is listed as `waits`, as is every
    synchronization. Allocations are those of the driver: torch's caching allocator hands out
    memory that it has.

    Returns:
        `calls`: a frame's calls by name; `waits` and `allocations`: those among them that are that;
        `segments`: by how many the caching allocator's segments grew; `host_us`: the host's time
        for a frame while the device is not waited for.
    """
    from torch.profiler import ProfilerActivity, profile, record_function

    frames = there_and_back(clip) * rounds
    for frame in frames:
        run(frame)
    torch.cuda.synchronize()
    segments = torch.cuda.memory_stats()["num_device_alloc"]
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        with record_function("frames"):
            for frame in frames:
                run(frame)
        torch.cuda.synchronize()
    events = trace.events()
    whole = next(e.time_range for e in events if e.name == "frames")
    counts: dict[str, int] = {}
    for event in events:
        inside = whole.start <= event.time_range.start <= whole.end
        if inside and event.name.startswith(("cuda", "cu")) and "::" not in event.name:
            counts[event.name] = counts.get(event.name, 0) + 1
    calls = {name: count / len(frames) for name, count in sorted(counts.items())}
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for frame in frames[:10]:
            run(frame)
        times.append((time.perf_counter() - start) / len(frames[:10]))
    torch.cuda.synchronize()
    return {
        "calls": calls,
        "waits": {k: v for k, v in calls.items() if k != "cudaMemcpyAsync" and _is(k, WAITS)},
        "allocations": {k: v for k, v in calls.items() if _is(k, ALLOCATIONS)},
        "segments": torch.cuda.memory_stats()["num_device_alloc"] - segments,
        "host_us": statistics.median(times) * 1e6,
    }


def _is(name: str, kinds: Sequence[str]) -> bool:
    return any(kind in name for kind in kinds)


def ceilings() -> dict[str, float]:
    """Measured: bytes a second of a copy (read plus written), fp16 operations a second."""
    a = torch.empty(1 << 29, dtype=torch.float16, device="cuda")
    b = torch.empty_like(a)
    x, y = (torch.randn(8192, 8192, dtype=torch.float16, device="cuda") for _ in range(2))
    copy = _median_seconds(lambda: b.copy_(a))
    product = _median_seconds(lambda: x @ y)
    return {
        "bytes_per_second": 2 * a.numel() * 2 / copy,
        "operations_per_second": 2 * 8192**3 / product,
    }


def _median_seconds(run: Callable[[], Any]) -> float:
    for _ in range(3):
        run()
    times = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)
