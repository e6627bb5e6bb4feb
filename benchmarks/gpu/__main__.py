"""Times deltafx against every good way to run the same network densely on this GPU.

Out: a JSON with, for each workload, the dense columns (a frame's content does not matter to them),
and for each clip ours with its FLOP fraction, its error against the fp32 dense model and the error
that a JPEG of quality 95 makes there: the means over the frames that are timed. Dense runs get
their input in place, in their dtype and layout; ours are handed frames in device memory and return
tensors that later frames keep.

For `vtest.avi` two options are searched, as a user would: of each `refresh_every` the highest
threshold within the JPEG's error, and of these the quickest.

With many streams, where a state is limited by default, also one that keeps all maps is timed
(`all_kept`), by the same thresholds.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean as mean
from typing import Any

import torch
from torch import Tensor, nn

import deltafx
from benchmarks.gpu import scenes
from benchmarks.gpu.floor import floor_of, table_of
from benchmarks.gpu.measure import (
    ceilings,
    error_of,
    graphed,
    host_work,
    peak_bytes,
    time_frames,
)
from benchmarks.gpu.workloads import WORKLOADS, Workload
from deltafx.config import MANY_STREAMS

COMPILED = {
    "compile": None,
    "compile_reduce_overhead": "reduce-overhead",  # the same in a CUDA graph
    "compile_max_autotune": "max-autotune",
}
DENSE = ("fp32_eager", "fp16_eager", "fp16_graph", *COMPILED)
THRESHOLDS = (
    0.3,
    0.25,
    0.2,
    0.175,
    0.15,
    0.14,
    0.13,
    0.12,
    0.11,
    0.1,
    0.09,
    0.08,
    0.07,
    0.06,
    0.05,
    0.0,
)
REFRESHES = (4, 5, 6, 8, 12)
JPEG_FRAMES = 4
ALL_KEPT = {"max_state_bytes": None}


def main() -> None:
    args = parse()
    torch.backends.cudnn.benchmark = True
    report = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "threshold": args.threshold,
        "ceilings": ceilings(),
        "workloads": {},
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    by_name = {workload.name: workload for workload in WORKLOADS}
    chosen = [by_name[name] for name in args.only or by_name]
    for workload in chosen:
        started = time.perf_counter()
        report["workloads"][workload.name] = run_workload(workload, args, report["ceilings"])
        args.output.write_text(json.dumps(report, indent=1) + "\n")
        print(f"{workload.name}: {time.perf_counter() - started:.0f} s", flush=True)
        release()
    # Behind all that is timed: a process in which the profiler ran launches more slowly.
    for workload in chosen:
        if workload.name in args.host and "fp16" in args.ours:
            add_traces(report["workloads"][workload.name]["clips"], workload, args)
            args.output.write_text(json.dumps(report, indent=1) + "\n")
            release()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="names of workloads, in the order to run them")
    parser.add_argument("--dense", nargs="*", default=list(DENSE), choices=DENSE)
    parser.add_argument("--ours", nargs="*", default=["fp16", "tf32"], choices=["fp16", "tf32"])
    parser.add_argument(
        "--autotune",
        nargs="*",
        default=["resnet50_1", "mobilenet_v2_1"],
        help="the workloads for compile_max_autotune, which takes minutes each",
    )
    parser.add_argument("--tf32", nargs="*", default=["resnet50_1"], help="the workloads for tf32")
    parser.add_argument(
        "--switch",
        nargs="*",
        default=["resnet50_16", "resnet50_1", "mobilenet_v2_16"],
        help="the workloads for which to find where a dense frame is the faster one",
    )
    parser.add_argument(
        "--host",
        nargs="*",
        default=["resnet50_16", "resnet50_1", "mobilenet_v2_1"],
        help="the workloads for which to trace what a frame asks of the host",
    )
    parser.add_argument("--boxes", nargs="*", type=float, default=[0.01, 0.05, 0.1, 0.25])
    parser.add_argument("--threshold", type=float, default=0.1, help="for all clips but vtest")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", default="resnet50_1", help="the workload to list by layer")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu_h100.json"))
    return parser.parse_args()


def release() -> None:
    torch._dynamo.reset()
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()


@torch.inference_mode()
def run_workload(workload: Workload, args: argparse.Namespace, limits: dict[str, float]) -> dict:
    clips = make_clips(workload, args.boxes)
    if workload.video:
        clips["vtest"] = scenes.vtest(workload.streams, 24)
    result: dict[str, Any] = {"dense": {}, "clips": {}, "memory": memory(workload, clips, args)}
    print(f"  {workload.name} memory: {result['memory']}", flush=True)
    if workload.streams >= MANY_STREAMS:
        result["all_kept"] = {"memory": memory(workload, clips, args, **ALL_KEPT)}
        print(f"  {workload.name} all kept: {result['all_kept']}", flush=True)
    exact = workload.build().cuda().to(memory_format=torch.channels_last)
    half = copy.deepcopy(exact).half()
    example = scenes.normalized(clips["box_0.05"][0], "cuda")
    for column in args.dense:
        if column == "compile_max_autotune" and workload.name not in args.autotune:
            continue
        found = time_dense(column, exact, half, example, args.rounds)
        result["dense"][column] = found
        print(f"  {workload.name} {column}: {found}", flush=True)
    best = min((d["mean"] for d in result["dense"].values() if "mean" in d), default=None)
    if workload.name in args.switch:
        result["switch"] = switch_point(workload, half, args)
        print(f"  {workload.name} switch: {result['switch']}", flush=True)
        release()
    for column in args.ours:
        if column == "tf32" and workload.name not in args.tf32:
            continue
        model = half if column == "fp16" else exact
        ours = Ours(model, torch.float16 if column == "fp16" else torch.float32, args, limits)
        for name, clip in clips.items():
            found = ours.run(clip, exact, search=name == "vtest")
            if best is not None:
                found["ratio_to_best_dense"] = best / found["mean"]
            if name == "box_0.05" and workload.name == args.layers and column == "fp16":
                found["layers"] = table_of(ours.compiled, limits, 2)
            result["clips"].setdefault(name, {})[column] = found
            shown = {k: v for k, v in found.items() if k != "layers"}
            print(f"  {workload.name} {column} {name}: {json.dumps(shown)}", flush=True)
        del ours
        release()
    if "all_kept" in result and "fp16" in args.ours:
        kept, limited = result["all_kept"], result["clips"]
        kept["clips"] = all_kept_clips(clips, half, exact, args, limits, limited)
        for name, clip in kept["clips"].items():
            if best is not None:
                clip["ratio_to_best_dense"] = best / clip["mean"]
            print(f"  {workload.name} all kept {name}: {json.dumps(clip)}", flush=True)
        release()
    return result


def all_kept_clips(
    clips: dict[str, list[Tensor]], half: nn.Module, exact: nn.Module,
    args: argparse.Namespace, limits: dict[str, float], limited: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Some clips with a state of all maps, by the thresholds that were found for them."""
    made: dict[str, Any] = {}
    for name in ("box_0.05", "nothing", "everything", "vtest"):
        if name not in clips:
            continue
        known = limited[name]["fp16"]
        more = {k: known[k] for k in ("refresh_every",) if k in known}
        ours = Ours(half, torch.float16, args, limits, **ALL_KEPT, **more)
        frames = [ours.frame(rgb) for rgb in clips[name]]
        wanted = [exact(scenes.normalized(rgb, "cuda")) for rgb in clips[name]]
        made[name] = ours.found(frames, wanted, known["threshold"])
        del ours
    return made


@torch.inference_mode()
def add_traces(found: dict[str, Any], workload: Workload, args: argparse.Namespace) -> None:
    """What frames of some clips ask of the host, in fp16."""
    model = workload.build().cuda().half().to(memory_format=torch.channels_last)
    ours = deltafx.compile(model, threshold=args.threshold)
    clips = make_clips(workload, [])
    for name in ("box_0.05", "nothing", "everything"):
        frames = [scenes.normalized(rgb, "cuda").half() for rgb in clips[name]]
        found[name]["fp16"]["host"] = host_work(ours, frames, 2)
        print(f"  {workload.name} {name} host: {found[name]['fp16']['host']}", flush=True)


def memory(
    workload: Workload, clips: dict[str, list[Tensor]], args: argparse.Namespace, **options: Any
) -> dict[str, Any]:
    """Peak bytes of a frame in fp16, with nothing else on the device: weights, state, the frame.

    `first_frames` is the peak of the frames before that, in which cuDNN tries its algorithms.
    """
    release()
    model = workload.build().cuda().half().to(memory_format=torch.channels_last)
    weights = torch.cuda.memory_allocated()
    moving = clips["box_0.05"]

    def frame(i: int) -> Tensor:
        x = scenes.normalized(moving[i], "cpu").half()
        return x.contiguous(memory_format=torch.channels_last).cuda()

    model(frame(0))
    dense = peak_bytes(lambda: model(frame(0)))
    release()
    ours = deltafx.compile(model, threshold=args.threshold, **options)

    def run(*frames: int) -> None:
        for i in frames:
            ours(frame(i))

    first = peak_bytes(lambda: run(0, 1, 2, 3))
    release()
    peak = peak_bytes(lambda: run(4, 5))
    return {
        "weights": weights,
        "dense_fp16_eager": dense,
        "ours": peak,
        "ours_over_dense": peak / dense,
        "first_frames": first,
        "state": ours.state_bytes(),
    }


def make_clips(workload: Workload, boxes: Sequence[float]) -> dict[str, list[Tensor]]:
    size = (workload.streams, workload.height, workload.width)
    clips = {f"box_{share}": scenes.moving_box(*size, share, 6) for share in {*boxes, 0.05}}
    clips["nothing"] = scenes.moving_box(*size, 0.0, 3)
    clips["everything"] = scenes.all_new(*size, 4)
    return clips


def time_dense(
    column: str, exact: nn.Module, half: nn.Module, example: Tensor, rounds: int
) -> dict[str, Any]:
    model, x = (exact, example) if column.startswith("fp32") else (half, example.half())
    run: Callable[[Tensor], Any] = model
    try:
        if column == "fp16_graph":
            run = graphed(model, x)
        elif column in COMPILED:
            run = torch.compile(model, mode=COMPILED[column])
        timing = time_frames(run, [x, x, x], 5 * rounds)
    except RuntimeError as error:  # a column that this torch cannot run is told, not hidden
        return {"error": str(error).splitlines()[0]}
    finally:
        if column in COMPILED:
            torch._dynamo.reset()
    return dataclasses.asdict(timing)


def switch_point(workload: Workload, half: nn.Module, args: argparse.Namespace) -> dict[str, float]:
    """Mean milliseconds of a frame by the share of a box, never dense; and of dense frames."""
    found = {}
    for dense_above, shares in ((1.0, (0.1, 0.2, 0.3, 0.4, 0.5)), (0.0, (0.3,))):
        ours = deltafx.compile(half, threshold=args.threshold, dense_above=dense_above)
        for share in shares:
            size = (workload.streams, workload.height, workload.width)
            clip = scenes.moving_box(*size, share, 4)
            frames = [scenes.normalized(rgb, "cuda").half() for rgb in clip]
            for frame in frames:
                ours(frame)
            name = "dense" if dense_above == 0 else f"box_{share}"
            found[name] = time_frames(ours, frames, 2).mean
    return found


class Ours:
    """One compiled model, run over the clips one after another."""

    def __init__(
        self, model: nn.Module, dtype: torch.dtype, args: argparse.Namespace, limits: dict,
        **options: Any,
    ) -> None:  # fmt: skip
        self.model, self.dtype, self.args, self.limits = model, dtype, args, limits
        self.compiled = deltafx.compile(model, threshold=args.threshold, **options)

    def run(self, clip: list[Tensor], exact: nn.Module, search: bool) -> dict[str, Any]:
        frames = [self.frame(rgb) for rgb in clip]
        wanted = [exact(scenes.normalized(rgb, "cuda")) for rgb in clip]
        some = range(0, len(clip), -(-len(clip) // JPEG_FRAMES))
        jpegs = [exact(scenes.normalized(scenes.jpeg(clip[i]), "cuda")) for i in some]
        jpeg_error = mean(error_of(j, wanted[i]) for i, j in zip(some, jpegs, strict=True))
        if search:
            return self.search(frames, wanted, jpeg_error)
        return self.found(frames, wanted, self.args.threshold) | {"jpeg95_error": jpeg_error}

    def search(self, frames: list[Tensor], wanted: list[Any], at_most: float) -> dict[str, Any]:
        tried = []
        for every in REFRESHES:
            self.compiled = deltafx.compile(self.model, refresh_every=every)
            threshold = next(
                t for t in THRESHOLDS if t == 0 or self.error(frames, wanted, t) <= at_most
            )
            found = self.found(frames, wanted, threshold)
            tried.append(found | {"refresh_every": every, "jpeg95_error": at_most})
            release()
        best = min(tried, key=lambda found: found["mean"])
        names = ("refresh_every", "threshold", "error", "mean")
        return best | {"searched": [{name: t[name] for name in names} for t in tried]}

    def found(self, frames: list[Tensor], wanted: list[Any], threshold: float) -> dict[str, Any]:
        error = self.error(frames, wanted, threshold)
        for frame in frames:
            self.compiled(frame)
        active = self.compiled.stats()
        timing = time_frames(self.compiled, frames, self.args.rounds)
        return dataclasses.asdict(timing) | {
            "threshold": threshold,
            "flop_fraction": active.flop_fraction,
            "branch": active.branch,
            "error": error,
            "floor_ms": floor_of(self.compiled, active, self.limits, self.dtype.itemsize),
        }

    def frame(self, rgb: Tensor) -> Tensor:
        return scenes.normalized(rgb, "cuda").to(self.dtype)

    def error(self, frames: list[Tensor], wanted: list[Any], threshold: float) -> float:
        """Of a frame, on average, once the clip has been seen."""
        self.compiled(frames[0])
        self.compiled.thresholds.set_all(threshold)
        self.compiled.reset()
        for frame in frames:
            self.compiled(frame)
        pairs = scenes.there_and_back(list(zip(frames, wanted, strict=True)))
        return mean(error_of(self.compiled(frame), want) for frame, want in pairs)


if __name__ == "__main__":
    main()
