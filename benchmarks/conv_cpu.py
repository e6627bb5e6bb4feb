"""The CPU convolution against torch's dense one, layer by layer.

For each layer the same run times torch (oneDNN, channels_last, weights as torch keeps them and
prepacked as inductor freezing does, whichever is faster) and `deltafx::conv2d` with all sites, a
share of random sites, and a blob of the same share as candidates. Rounds of all contestants
alternate, so that a busy machine slows each alike; the minimum and the median over the rounds are
kept. With one thread the clock is the thread's own, which other processes slow least.

    python benchmarks/conv_cpu.py [--layers 3x3] [--rounds 20] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import deltafx.ops  # noqa: F401  (registers the operators)

# name: channels in, out, height and width in, kernel, stride, groups; of 576 x 768 frames
LAYERS = {
    "resnet50 stem 7x7/2 3-64": (3, 64, 576, 768, 7, 2, 1),
    "resnet50 3x3 64-64": (64, 64, 144, 192, 3, 1, 1),
    "resnet50 1x1 64-256": (64, 256, 144, 192, 1, 1, 1),
    "resnet50 1x1 256-64": (256, 64, 144, 192, 1, 1, 1),
    "resnet50 3x3 128-128": (128, 128, 72, 96, 3, 1, 1),
    "resnet50 3x3/2 128-128": (128, 128, 144, 192, 3, 2, 1),
    "resnet50 3x3 256-256": (256, 256, 36, 48, 3, 1, 1),
    "resnet50 1x1 256-1024": (256, 1024, 36, 48, 1, 1, 1),
    "resnet50 1x1 1024-256": (1024, 256, 36, 48, 1, 1, 1),
    "resnet50 3x3 512-512": (512, 512, 18, 24, 3, 1, 1),
    "resnet50 1x1 512-2048": (512, 2048, 18, 24, 1, 1, 1),
    "resnet50 1x1/2 1024-2048": (1024, 2048, 36, 48, 1, 2, 1),
    "mobilenetv2 stem 3x3/2 3-32": (3, 32, 576, 768, 3, 2, 1),
    "mobilenetv2 dw 32": (32, 32, 288, 384, 3, 1, 32),
    "mobilenetv2 1x1 32-16": (32, 16, 288, 384, 1, 1, 1),
    "mobilenetv2 1x1 16-96": (16, 96, 288, 384, 1, 1, 1),
    "mobilenetv2 dw/2 96": (96, 96, 288, 384, 3, 2, 96),
    "mobilenetv2 1x1 144-24": (144, 24, 144, 192, 1, 1, 1),
    "mobilenetv2 1x1 24-144": (24, 144, 144, 192, 1, 1, 1),
    "mobilenetv2 dw 144": (144, 144, 144, 192, 3, 1, 144),
    "mobilenetv2 1x1 384-64": (384, 64, 36, 48, 1, 1, 1),
    "mobilenetv2 dw 384": (384, 384, 36, 48, 3, 1, 384),
    "mobilenetv2 1x1 960-160": (960, 160, 18, 24, 1, 1, 1),
    "resnext50 3x3 128 g32": (128, 128, 144, 192, 3, 1, 32),
    "resnext50 3x3 256 g32": (256, 256, 72, 96, 3, 1, 32),
    "resnext50 3x3 1024 g32": (1024, 1024, 18, 24, 3, 1, 32),
}
DENSITIES = (0.05, 0.2, 1.0)


def channels_last(*shape: int) -> Tensor:
    """A random feature map."""
    return torch.randn(*shape).contiguous(memory_format=torch.channels_last)


def blob(h: int, w: int, share: float) -> Tensor:
    """A mask [1, h, w] with a filled rectangle over `share` of its area."""
    mask = torch.zeros(1, h, w, dtype=torch.bool)
    bh, bw = max(1, round(h * share**0.5)), max(1, round(w * share**0.5))
    y, x = (h - bh) // 2, (w - bw) // 3
    mask[:, y : y + bh, x : x + bw] = True
    return mask


class Layer:
    """One layer's tensors and its contestants."""

    def __init__(self, spec: tuple[int, ...]) -> None:
        cin, cout, h, w, k, s, g = spec
        p = k // 2
        self.x, weight, bias = (
            channels_last(1, cin, h, w),
            torch.randn(cout, cin // g, k, k),
            torch.randn(cout),
        )
        weight = weight.contiguous(memory_format=torch.channels_last)
        conv = (bias, (s, s), (p, p), (1, 1), g)
        acc = F.conv2d(self.x, weight, *conv).contiguous(memory_format=torch.channels_last)
        self.macs = acc.numel() * (cin // g) * k * k
        _, _, oh, ow = acc.shape
        mask, counts = torch.zeros(1, oh, ow, dtype=torch.bool), torch.zeros(2, dtype=torch.int64)
        packed = torch.ops.deltafx.pack_conv_weight(
            weight.contiguous(), (s, s), (p, p), (1, 1), g, False
        )
        inv_scale, threshold = torch.ones(cout), torch.tensor(0.1)
        empty = torch.zeros(1, h, w, dtype=torch.bool)

        geometry = ((k, k), (s, s), (p, p), (1, 1), g)
        end = (False, "relu", [], None, inv_scale, threshold, "rms")

        def delta(
            x_mask: Tensor, residual: Tensor | None, sites: Tensor | None
        ) -> Callable[[], None]:
            inputs = (self.x, x_mask, packed, bias, residual, sites, None, None, "identity")
            return lambda: torch.ops.deltafx.conv2d(acc, mask, counts, *inputs, *geometry, *end)

        residual = torch.zeros_like(acc)
        onednn = torch.ops.mkldnn._reorder_convolution_weight(
            weight, (p, p), (s, s), (1, 1), g, self.x.shape
        )
        prepacked = (onednn, bias, [p, p], [s, s], [1, 1], g, "relu", [], "")
        self.contestants: dict[str, Callable[[], object]] = {
            "torch": lambda: F.conv2d(self.x, weight, *conv),
            "torch prepacked": lambda: torch.ops.mkldnn._convolution_pointwise(self.x, *prepacked),
        }
        # Candidates are given through a residual's mask, so that their share is exact; the residual
        # itself is a part of what a site then costs, so the dense reference of these has it too.
        self.contestants["ours none"] = delta(empty, None, None)
        for share in DENSITIES:
            scattered = torch.rand(1, oh, ow) < share
            self.contestants[f"ours {share:g} random"] = delta(empty, residual, scattered)
            self.contestants[f"ours {share:g} blob"] = delta(empty, residual, blob(oh, ow, share))
        self.contestants["ours all"] = delta(~empty, None, None)


def measure(layer: Layer, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each contestant: minimum and median over alternating rounds."""
    clock = time.perf_counter if torch.get_num_threads() > 1 else time.thread_time
    times: dict[str, list[float]] = {name: [] for name in layer.contestants}
    for i in range(rounds + 2):
        for name, call in layer.contestants.items():
            start = clock()
            call()
            if i >= 2:
                times[name].append((clock() - start) * 1e3)
    return {name: {"min": min(t), "median": statistics.median(t)} for name, t in times.items()}


def row(name: str, layer: Layer, result: dict[str, dict[str, float]]) -> str:
    """A line of the table, from the minima."""
    dense = min(result["torch"]["min"], result["torch prepacked"]["min"])
    ours, every = result["ours all"]["min"], result["ours 1 blob"]["min"]
    sparse = [
        f"{result[f'ours {share} {kind}']['min'] / every / share:5.2f}"
        for share in (0.05, 0.2)
        for kind in ("random", "blob")
    ]
    rate, none = layer.macs * 2e-6 / ours, result["ours none"]["min"] * 1e3
    numbers = f"{dense:8.3f} {ours:8.3f} {ours / dense:5.2f} {rate:7.1f}  {' '.join(sparse)}"
    return f"{name:28s} {numbers}  {none:6.1f}"


def cpu_name() -> str:
    """The processor, in its own words."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def main() -> None:
    """Prints a table and, if asked, writes the figures as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", default="", help="only layers whose name contains this")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    results = {}
    print("milliseconds of torch and ours with all sites, their ratio, GFLOP/s of ours; cost of a")
    print("candidate against one of all, at 0.05 random, blob, 0.2 random, blob; no candidate, us")
    for name, spec in LAYERS.items():
        if args.layers in name:
            layer = Layer(spec)
            results[name] = measure(layer, args.rounds)
            print(row(name, layer, results[name]), flush=True)
    if args.json:
        about = {
            "cpu": cpu_name(),
            "threads": args.threads,
            "torch": torch.__version__,
            "unit": "ms",
            "rounds": args.rounds,
        }
        args.json.write_text(json.dumps({"about": about, "layers": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
