"""What of each model deltafx takes: measures, and writes docs/coverage.md.

python -m benchmarks.coverage                 # the models that have no result yet, then the table
python -m benchmarks.coverage --only resnet50 # these again
python -m benchmarks.coverage --speed resnet50 mobilenet_v2
python -m benchmarks.coverage --table         # the table alone

The models are those of tests/models/catalogue.py; so is what "exact" means (tests/exactness.py).
Results lie in benchmarks/results/coverage.json, one entry a model, so that a run can be cut short.
A test checks that the table is that of the results, and that every model has one.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import deltafx
from tests.exactness import Oracle
from tests.models.catalogue import Case, all_cases
from tests.models.frames import clip, scene

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/coverage.json"
TABLE = ROOT / "docs/coverage.md"

FRAMES = 6
SPEED_SIZE = (288, 384)
FAMILIES = {
    "torchvision": "torchvision",
    "timm": "timm",
    "smp": "segmentation_models_pytorch",
    "onnx": "ONNX, by onnx2torch",
}

HEAD = """# Coverage

Written by `python -m benchmarks.coverage` from `benchmarks/results/coverage.json`; a test keeps
the two alike. Every model has random weights from a seed and batch norm statistics of real frames,
and is fed {frames} frames of two streams at threshold 0: a static frame, a frame with NaNs and a
cut to another clip are among them.

- **front end**: `fx`, or `python` where fx cannot trace the model (see `explain()` for why).
- **delta / dense**: nodes with a delta op (or a view of one), and nodes that run as they are.
- **MACs**: the share of the model's multiply-adds that is in delta ops.
- **error**: relative L2 error against float64, over that of the dense model itself (the larger one
  of its two memory formats); up to 2 counts as exact.
- **compile**: seconds until the first frame can run, on one thread of a shared machine.
- **torch.compile**: delta regions and error, likewise, through `torch.compile(backend="deltafx")`.
- **5 %**: dense time over ours, where a box over 5 % of a still {height}x{width} picture changes in
  every frame, default threshold, one thread; where measured.
"""
COLUMNS = "| model | front end | delta / dense | MACs | error | compile | torch.compile | 5 % |"


@torch.inference_mode()
def measure(case: Case) -> dict[str, Any]:
    """Both ways to compile a model, checked against the dense one."""
    model = case.load()
    frames = scene(case.size)[:FRAMES]
    started = time.perf_counter()
    compiled = deltafx.compile(model, threshold=0, example_inputs=(frames[0],))
    seconds = time.perf_counter() - started
    torch.compiler.reset()
    by_dynamo = torch.compile(model, backend="deltafx", options={"threshold": 0})
    ours = Oracle(model)
    dynamos = copy.copy(ours)
    for frame in frames:
        reference = ours.reference(frame)
        ours.take(compiled(frame), reference)
        dynamos.take(by_dynamo(frame), reference)
    explanation = compiled.explain()
    kinds = [node.kind for node in explanation]
    result = {
        "family": case.family,
        "convolutional": case.convolutional,
        "size": list(case.size),
        "front_end": explanation.front_end,
        "delta": len(kinds) - kinds.count("dense"),
        "dense": kinds.count("dense"),
        "share": round(explanation.delta_share, 4),
        **errors(ours),
        "compile_s": round(seconds, 1),
        "dynamo": {**errors(dynamos), "regions": len(deltafx.modules(by_dynamo))},
    }
    torch.compiler.reset()
    return result


def errors(oracle: Oracle) -> dict[str, Any]:
    """Ours, the dense model's, and whether ours is at most twice that."""
    own = max(oracle.bound / 2, 1e-30)  # of results that are zeros, no error is 0
    return {"exact": oracle.error <= oracle.bound, "error": round(oracle.error / own, 2)}


@torch.inference_mode()
def speed(case: Case) -> float:
    """Dense time over ours, with a box over 5 % of the picture changing."""
    model = case.load()
    height, width = SPEED_SIZE
    still = clip("vtest", SPEED_SIZE, 1)
    tall, wide = round(height * 0.05**0.5), round(width * 0.05**0.5)
    compiled = deltafx.compile(model)
    ours, dense = [], []
    channels_last = model.to(memory_format=torch.channels_last)
    for i in range(12):
        frame = still.clone()
        top, left = 8 * i, 16 * i
        frame[:, :, top : top + tall, left : left + wide] = torch.randn(1, 3, tall, wide)
        ours.append(seconds(compiled, frame))
        if i % 4 == 3:
            dense.append(min(seconds(model, frame), seconds(channels_last, frame)))
    return round(min(dense) / statistics.median(ours[2:]), 2)


def seconds(f: Callable[[Tensor], Any], frame: Tensor) -> float:
    """Of one call."""
    started = time.perf_counter()
    f(frame)
    return time.perf_counter() - started


def load() -> dict[str, Any]:
    """The results so far."""
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}


def store(results: dict[str, Any]) -> None:
    """Writes them in the order of the catalogue."""
    order = list(all_cases())
    names = sorted(results, key=lambda n: order.index(n) if n in order else len(order))
    lines = [f"{json.dumps(name)}: {json.dumps(results[name])}" for name in names]
    RESULTS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def row(name: str, r: dict[str, Any]) -> str:
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
    ]
    return "| " + " | ".join(cells) + " |"


def render(results: dict[str, Any]) -> str:
    """The text of docs/coverage.md."""
    text = [HEAD.format(frames=FRAMES, height=SPEED_SIZE[0], width=SPEED_SIZE[1])]
    cases = all_cases()
    for family, title in FAMILIES.items():
        rows = {name: r for name, r in results.items() if r["family"] == family}
        missing = [c.name for c in cases.values() if c.family == family and c.name not in results]
        text.append(f"## {title}\n")
        if rows:
            text += [
                summary(list(rows.values())),
                COLUMNS,
                "|" + " --- |" * (COLUMNS.count("|") - 1),
                *(row(name, r) for name, r in rows.items()),
                "",
            ]
        if missing:
            text.append(f"Not measured yet: {', '.join(missing)}.\n")
    return "\n".join(text)


def summary(rows: list[dict[str, Any]]) -> str:
    """A family in a sentence."""
    shares = [r["share"] for r in rows if r["convolutional"]]
    exact = sum(r["exact"] and r["dynamo"]["exact"] for r in rows)
    return (
        f"{len(rows)} models, {exact} of them exact both ways; of the {len(shares)} convolutional "
        f"ones {sum(s >= 0.995 for s in shares)} have 99.5 % of their multiply-adds in delta ops, "
        f"the least is {100 * min(shares):.1f} %.\n"
    )


def main() -> None:
    """Measures what is asked for and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], help="measure these again")
    parser.add_argument("--speed", nargs="+", default=[], help="time these")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    given = parser.parse_args()
    torch.set_num_threads(1)
    results, cases = load(), all_cases()
    if not (given.table or given.speed):
        for name in given.only or [n for n in cases if n not in results]:
            results[name] = {**results.get(name, {}), **measure(cases[name])}
            print(row(name, results[name]), flush=True)
            store(results)
            gc.collect()
    for name in given.speed:
        results[name]["speedup"] = speed(cases[name])
        print(name, results[name]["speedup"], flush=True)
        store(results)
    TABLE.write_text(render(results))


if __name__ == "__main__":
    main()
