"""What of each model deltafx takes: measures, and writes docs/coverage.md.

python -m benchmarks.coverage                 # the models that have no result yet, then the table
python -m benchmarks.coverage --only resnet50 # these again
python -m benchmarks.coverage --speed resnet50 mobilenet_v2
python -m benchmarks.coverage --compile resnet50 # times that alone again
python -m benchmarks.coverage --table         # the table alone

The models are those of tests/models/catalogue.py; so is what "exact" means (tests/exactness.py).
Results lie in benchmarks/results/coverage.json, one entry a model, so that a run can be cut short.
A test checks that the table is that of the results, and that every model has one.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import deltafx
from benchmarks.gpu.workloads import WORKLOADS
from benchmarks.workloads import moving_box
from tests.exactness import Oracle
from tests.models.case import Case
from tests.models.catalogue import all_cases
from tests.models.frames import clip

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/coverage.json"
TABLE = ROOT / "docs/coverage.md"
GPU_RESULTS = ROOT / "benchmarks/results/gpu_h100.json"

FRAMES = 6
SPEED_SIZE, SPEED_SHARE, SPEED_FRAMES, SPEED_WARMUP = (288, 384), 0.05, 14, 3
FAMILIES = {
    "torchvision": "torchvision",
    "timm": "timm",
    "smp": "segmentation_models_pytorch",
    "onnx": "ONNX, by onnx2torch",
}
ON_GPU = {
    "deeplabv3_resnet50": "deeplabv3",
    "efficientnet_b0": "efficientnet_b0",
    "mobilenet_v2": "mobilenet_v2",
    "resnet50": "resnet50",
    "retinanet_resnet50_fpn": "retinanet_fpn",
}
"""Models of which the GPU benchmark has workloads, and how the names of those begin."""

HEAD = """# Coverage

Written by `python -m benchmarks.coverage` from `benchmarks/results/coverage.json`; a test keeps
the two alike. Every model (but CenterFace, which has its own weights) has random weights from a
seed and batch norm statistics of real frames, and is fed {frames} frames at threshold 0: models of
pictures those of two streams, with a static frame, a frame with NaNs and a cut to another clip
among them; detectors, video models (clips that move on by a picture) and flow models (pairs) those
of one stream, with a static frame and, but for flow, a cut.

- **front end**: `fx`; `python` where fx cannot trace the model; `parts` where no one graph can
  stand for it, and its largest traceable parts are delta regions. `explain()` tells why.
- **delta / dense**: nodes with a delta op (or a view of one), and nodes (of `parts`: modules) that
  run as they are.
- **MACs**: the share of the model's multiply-adds that is in delta ops; of detectors, of those
  before the RoI heads, whose cut-outs are others in every frame. What has no delta op, such as
  attention, is dense, which `explain()` tells.
- **error**: relative L2 error against float64, over that of the dense model itself (the larger one
  of its two memory formats); up to 2 counts as exact. Of detectors it is the distance of boxes,
  scores, masks and key points, and no more of them may be missed than the dense model misses. RAFT
  cannot compute in float64: what its two memory formats differ by is its own error.
- **compile**: seconds of one core until the first frame can run.
- **torch.compile**: delta regions and error, likewise, through `torch.compile(backend="deltafx")`.
- **5 %**: dense time (PyTorch's eager, in the better one of the two memory formats) over ours,
  where a box of noise over 5 % of a still {height}x{width} picture moves in every frame, default
  threshold, one thread; where measured. Detectors scale that picture by 4/3, SSD to its own size.
- **5 %, GPU**: likewise on {gpu}, fp16, against the best dense fp16 run, for the
  streams and size of picture told; where measured. ResNet-50 and EfficientNet without their heads,
  MobileNetV2's trunk, of RetinaNet the backbone with its pyramid.
"""
COLUMNS = (
    "| model | front end | delta / dense | MACs | error | compile | torch.compile | 5 % "
    "| 5 %, GPU |"
)  # fmt: skip


@torch.inference_mode()
def measure(case: Case) -> dict[str, Any]:
    """Compiles a model in both ways, and checks both against the dense one."""
    model = case.load()
    frames = case.frames()[:FRAMES]
    compiled, taken = compile_timed(model, frames[0])
    torch.compiler.reset()
    by_dynamo = torch.compile(model, backend="deltafx", options={"threshold": 0})
    ours = case.oracle(model)
    dynamos = copy.copy(ours)
    for frame in frames:
        reference = ours.reference(*frame)
        ours.take(compiled(*frame), reference)
        dynamos.take(by_dynamo(*frame), reference)
    explanation = compiled.explain()
    kinds = [node.kind for node in explanation]
    result = {
        "family": case.family,
        "convolutional": case.convolutional,
        "size": list(case.size),
        "front_end": explanation.front_end,
        "delta": len(kinds) - kinds.count("dense"),
        "dense": kinds.count("dense"),
        "share": round(case.share(explanation), 4),
        **errors(ours),
        "compile_s": taken,
        "dynamo": {**errors(dynamos), "regions": len(deltafx.modules(by_dynamo))},
    }
    torch.compiler.reset()
    return result


def compile_timed(model: nn.Module, args: tuple[Any, ...]) -> tuple[Any, float]:
    """The model compiled for exactness, and the seconds of one core that it took."""
    started = time.process_time()
    compiled = deltafx.compile(model, threshold=0, example_inputs=args)
    return compiled, round(time.process_time() - started, 1)


def errors(oracle: Oracle) -> dict[str, Any]:
    """Whether ours is at most twice the dense model's, and how many times it is."""
    own = max(oracle.bound / 2, 1e-30)  # of results that are zeros, no error is 0
    return {"exact": oracle.holds, "error": round(oracle.error / own, 2)}


@torch.inference_mode()
def speed(case: Case) -> float:
    """Dense time over ours, with a box over 5 % of the picture changing in every frame.

    Both are medians of the same frames, each given to us and to the dense model in both memory
    formats, of which the better one counts.
    """
    case = case.at(SPEED_SIZE)
    model = case.load()
    compiled = deltafx.compile(model)
    runs = (compiled, model, copy.deepcopy(model).to(memory_format=torch.channels_last))
    times: list[list[float]] = [[], [], []]
    still = clip("vtest", SPEED_SIZE, 1, case.preprocessing)
    for frame in moving_box(still, SPEED_SHARE, SPEED_FRAMES):
        formats = (frame, frame, frame.contiguous(memory_format=torch.channels_last))
        for run, given, taken in zip(runs, formats, times, strict=True):
            taken.append(seconds(run, case.arguments(given)))
    ours, *dense = (statistics.median(t[SPEED_WARMUP:]) for t in times)
    return round(min(dense) / ours, 2)


def seconds(f: Callable[..., Any], args: tuple[Any, ...]) -> float:
    """Of the one thread that computes; what else the machine does is not counted."""
    started = time.process_time()
    f(*args)
    return time.process_time() - started


def load() -> dict[str, Any]:
    """The results so far."""
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}


def store(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """Adds to a model's result, and returns all of it; other processes may do likewise."""
    order = list(all_cases())
    with RESULTS.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        results = load()
        results[name] = {**results.get(name, {}), **found}
        names = sorted(results, key=lambda n: order.index(n) if n in order else len(order))
        lines = [f"{json.dumps(name)}: {json.dumps(results[name])}" for name in names]
        RESULTS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return results[name]


def row(name: str, r: dict[str, Any], on_gpu: str = "-") -> str:
    """One line of the table."""
    mark = "" if r["exact"] else " **not exact**"
    dynamo = r["dynamo"]
    regions = f"{dynamo['regions']} region{'s' if dynamo['regions'] > 1 else ''}"
    cells = [
        name.removeprefix(r["family"] + " "),
        r["front_end"],
        f"{r['delta']} / {r['dense']}",
        f"{100 * r['share']:.1f}%",
        f"{r['error']:.2f}{mark}",
        f"{r['compile_s']:.1f}",
        f"{regions}, {dynamo['error']:.2f}{'' if dynamo['exact'] else ' **not exact**'}",
        f"{r['speedup']:.2f}x" if "speedup" in r else "-",
        on_gpu,
    ]
    return "| " + " | ".join(cells) + " |"


def gpu_ratios(found: dict[str, Any], name: str) -> str:
    """What the GPU benchmark found for a model, over 5 %, in all its workloads."""
    cells = []
    for w in WORKLOADS:
        if name in ON_GPU and w.name.startswith(f"{ON_GPU[name]}_"):
            box = found["workloads"].get(w.name, {}).get("clips", {}).get("box_0.05", {})
            if "fp16" in box:
                ratio = box["fp16"]["ratio_to_best_dense"]
                cells.append(f"{ratio:.2f}x ({w.streams} x {w.height}x{w.width})")
    return ", ".join(cells) or "-"


def render(results: dict[str, Any]) -> str:
    """The text of docs/coverage.md."""
    height, width = SPEED_SIZE
    gpu = json.loads(GPU_RESULTS.read_text())
    text = [HEAD.format(frames=FRAMES, height=height, width=width, gpu=gpu["device"])]
    cases = all_cases()
    for family, title in FAMILIES.items():
        rows = {name: r for name, r in results.items() if r["family"] == family}
        missing = [c.name for c in cases.values() if c.family == family and c.name not in results]
        text.append(f"## {title}\n")
        if rows:
            text += [
                summary(rows),
                COLUMNS,
                "|" + " --- |" * (COLUMNS.count("|") - 1),
                *(row(name, r, gpu_ratios(gpu, name)) for name, r in rows.items()),
                "",
            ]
        if missing:
            text.append(f"Not measured yet: {', '.join(missing)}.\n")
    return "\n".join(text)


def summary(rows: dict[str, dict[str, Any]]) -> str:
    """A family in two sentences."""
    convolutional = {name: r for name, r in rows.items() if r["convolutional"]}
    shares = [r["share"] for r in convolutional.values()]
    exact = sum(r["exact"] and r["dynamo"]["exact"] for r in rows.values())
    slow, slowest = (max(of, key=lambda n: of[n]["compile_s"]) for of in (convolutional, rows))
    text = (
        f"{len(rows)} models, {exact} of them exact both ways; of the {len(shares)} convolutional "
        f"ones {sum(s >= 0.995 for s in shares)} have 99.5 % of their multiply-adds in delta ops, "
        f"the least is {100 * min(shares):.1f} %. The slowest to compile of these is "
        f"{slow} ({rows[slow]['compile_s']:.1f} s)"
    )
    if slowest != slow:
        text += f", of all {slowest} ({rows[slowest]['compile_s']:.1f} s)"
    return f"{text}.\n"


def main() -> None:
    """Measures what is asked for and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], help="measure these again")
    parser.add_argument("--speed", nargs="+", default=[], help="time these")
    parser.add_argument("--compile", nargs="+", default=[], help="time compiling these again")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    given = parser.parse_args()
    torch.set_num_threads(1)
    results, cases = load(), all_cases()
    if not (given.table or given.speed or given.compile):
        for name in given.only or [n for n in cases if n not in results]:
            print(row(name, store(name, measure(cases[name]))), flush=True)
            gc.collect()
    for name in given.speed:
        store(name, found := {"speedup": speed(cases[name])})
        print(name, found, flush=True)
    for name in given.compile:
        case = cases[name]
        with torch.inference_mode():
            _, taken = compile_timed(case.seeded(), case.frames()[0])
        store(name, found := {"compile_s": taken})
        print(name, found, flush=True)
    TABLE.write_text(render(load()))


if __name__ == "__main__":
    main()
