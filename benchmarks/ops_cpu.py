"""The memory-bound CPU operators against torch's dense ones, at densities 0, 0.05 and 1.

Each operator and its dense function take turns, round by round, so that a busy machine slows both
alike; the minimum and the median over the rounds are kept. The dense function gets channels_last
inputs and makes a new result, as it does in a model. The candidates are a rectangle; every one is
written ("write"), or compared with a threshold that all are within ("keep").

    python benchmarks/ops_cpu.py [--ops pool] [--rounds 30] [--threads 2] [--json FILE]
"""

from __future__ import annotations

import argparse
import inspect
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltafx.ops import (
    adaptive_pool2d,
    affine,
    binary,
    encode,
    gather_channels,
    global_pool2d,
    layer_norm,
    pad2d,
    pool2d,
    resize2d,
)
from deltafx.ops.base import DeltaOp

DENSITIES = (0.0, 0.05, 1.0)


def feature_map(*shape: int) -> Tensor:
    return torch.randn(*shape).contiguous(memory_format=torch.channels_last)


def cases() -> dict[str, tuple[DeltaOp, dict[str, Any]]]:
    """name: the op and its dense function's arguments, as of 576 x 768 frames."""
    big, middle, small = (64, 288, 384), (256, 144, 192), (1024, 36, 48)
    pool3 = {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1)}
    pool2 = {"kernel": (2, 2), "stride": (2, 2)}
    same = {"kernel": (3, 3), "stride": (1, 1), "padding": (1, 1)}
    gate = torch.rand(1, 256, 1, 1)
    shuffle = [g * 29 + i for i in range(29) for g in range(4)]
    return {
        "affine 64": (affine.OP, {"x": feature_map(1, *big), "scale": torch.rand(64),
                                  "shift": torch.rand(64), "act": "relu"}),
        "relu 256": (affine.OP, {"x": feature_map(1, *middle), "act": "relu"}),
        "relu 24": (affine.OP, {"x": feature_map(1, 24, 144, 192), "act": "relu"}),
        "silu 256": (affine.OP, {"x": feature_map(1, *middle), "act": "silu"}),
        "gelu 256": (affine.OP, {"x": feature_map(1, *middle), "act": "gelu"}),
        "hardswish 256": (affine.OP, {"x": feature_map(1, *middle), "act": "hardswish"}),
        "add relu 256": (binary.OP, {"a": feature_map(1, *middle), "b": feature_map(1, *middle),
                                     "op": "add", "act": "relu"}),
        "add 1024": (binary.OP, {"a": feature_map(1, *small), "b": feature_map(1, *small),
                                 "op": "add"}),
        "gate 256": (binary.OP, {"a": feature_map(1, *middle), "b": gate, "op": "mul"}),
        "max pool 3x3/2 64": (pool2d.OP, {"x": feature_map(1, *big), "kind": "max", **pool3}),
        "max pool 2x2 64": (pool2d.OP, {"x": feature_map(1, *big), "kind": "max", **pool2}),
        "avg pool 2x2 256": (pool2d.OP, {"x": feature_map(1, *middle), "kind": "avg", **pool2}),
        "avg pool 3x3 256": (pool2d.OP, {"x": feature_map(1, *middle), "kind": "avg", **same}),
        "adaptive avg 7x7 1024": (adaptive_pool2d.OP, {"x": feature_map(1, *small), "kind": "avg",
                                                       "size": (7, 7)}),
        "global 1024": (global_pool2d.OP, {"x": feature_map(1, *small)}),
        "global 256": (global_pool2d.OP, {"x": feature_map(1, *middle)}),
        "nearest x2 256": (resize2d.OP, {"x": feature_map(1, 256, 72, 96), "kind": "nearest",
                                         "size": (144, 192)}),
        "bilinear x8 21": (resize2d.OP, {"x": feature_map(1, 21, 72, 96), "kind": "bilinear",
                                         "size": (576, 768)}),
        "bilinear x2 256": (resize2d.OP, {"x": feature_map(1, 256, 72, 96), "kind": "bilinear",
                                          "size": (144, 192)}),
        "layer norm 96": (layer_norm.OP, {"x": feature_map(1, 96, 144, 192),
                                          "weight": torch.rand(96), "bias": torch.rand(96)}),
        "layer norm 768": (layer_norm.OP, {"x": feature_map(1, 768, 18, 24),
                                           "weight": torch.rand(768), "bias": torch.rand(768)}),
        "shuffle 116": (gather_channels.OP, {"x": feature_map(1, 116, 72, 96), "index": shuffle}),
        "pad 64": (pad2d.OP, {"x": feature_map(1, *big), "pad": (0, 1, 0, 1)}),
    }  # fmt: skip


def rectangle(n: int, h: int, w: int, density: float) -> Tensor:
    mask = torch.zeros(n, h, w, dtype=torch.bool)
    mask[:, : round(h * density**0.5), : round(w * density**0.5)] = True
    return mask


def delta_call(
    op: DeltaOp, kwargs: dict[str, Any], density: float, keep: bool
) -> Callable[[], None]:
    """A call of the operator with the rectangle active in its inputs."""
    result = op.dense(**kwargs)
    n, c, h, w = result.shape
    defaults = {
        k: p.default for k, p in inspect.signature(op.dense).parameters.items()
        if p.default is not inspect.Parameter.empty
    }  # fmt: skip
    given = {**defaults, **kwargs}
    given = op.prepare(None, given) if op.prepare else given  # type: ignore[arg-type]
    for name in op.inputs:
        shape = kwargs[name].shape
        moves = shape[2] * shape[3] > 1
        given[f"{name}_mask"] = rectangle(shape[0], shape[2], shape[3], density if moves else 0.0)
    if op is global_pool2d.OP:
        tiles = -(-kwargs["x"].shape[2] * kwargs["x"].shape[3] // global_pool2d.TILE)
        given["partial"] = torch.zeros(n, tiles, c)
    acc = result.clone(memory_format=torch.channels_last)
    given |= {
        "acc": acc,
        "mask": torch.zeros(n, h, w, dtype=torch.bool),
        "counts": torch.zeros(2, dtype=torch.int64),
        "inv_scale": torch.ones(c) if keep else None,
        "threshold": torch.full((1,), 0.1) if keep else None,
        "policy": "rms",
    }
    return lambda: op.operator(**given)


def encode_calls() -> dict[str, dict[str, Callable[[], Any]]]:
    """encode of a static and of a wholly changed frame, beside torch's copy of it."""
    calls: dict[str, dict[str, Callable[[], Any]]] = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        for c, h, w in ((3, 576, 768), (64, 144, 192)):
            frames = [torch.rand(1, c, h, w).contiguous(memory_format=layout) for _ in range(2)]
            name = (
                f"encode {c} {'planar' if layout == torch.contiguous_format else 'channels_last'}"
            )
            for block in (1, 8):
                static, moving = (_encoder(frames, block, n) for n in (1, 2))
                copied = torch.empty(1, c, h, w).contiguous(memory_format=torch.channels_last)
                calls[f"{name} block {block}"] = {
                    "torch": lambda copied=copied, frames=frames: copied.copy_(frames[0]),
                    "static": static,
                    "all changed": moving,
                }
    return calls


def _encoder(frames: list[Tensor], block: int, used: int) -> Callable[[], None]:
    acc = torch.zeros_like(frames[0], memory_format=torch.channels_last)
    n, c, h, w = acc.shape
    mask = torch.zeros(n, h, w, dtype=torch.bool)
    counts = torch.zeros(2, dtype=torch.int64)
    ones, limit = torch.ones(c), torch.full((1,), 0.1)
    turn = 0

    def call() -> None:
        nonlocal turn
        turn += 1
        encode.OP.operator(acc, mask, counts, frames[turn % used], block, ones, limit, "rms")

    return call


def timed(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds by contestant: the minimum and the median of `rounds` alternating calls."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            taken[name].append(1e3 * (time.perf_counter() - start))
    return {
        name: {"min": min(times), "median": statistics.median(times)}
        for name, times in taken.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ops", default="", help="only cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    results: dict[str, dict[str, dict[str, float]]] = {}
    with torch.inference_mode():
        contests = {}
        for name, (op, kwargs) in cases().items():
            if options.ops not in name:
                continue
            contests[name] = {"torch": lambda op=op, kwargs=kwargs: op.dense(**kwargs)}
            for density in DENSITIES:
                for keep in (False, True):
                    label = f"{'keep' if keep else 'write'} {density:g}"
                    contests[name][label] = delta_call(op, kwargs, density, keep)
        contests |= {k: v for k, v in encode_calls().items() if options.ops in k}
        for name, calls in contests.items():
            results[name] = timed(calls, options.rounds)
            dense = results[name]["torch"]["min"]
            row = "  ".join(
                f"{k} {v['min']:7.3f} ({v['min'] / dense:5.2f})" for k, v in results[name].items()
            )
            print(f"{name:32} {row}", flush=True)
    if options.json:
        report = {
            "machine": platform.processor() or platform.machine(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__,
            "threads": options.threads,
            "unit": "ms",
            "results": results,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
