"""Whole models on the CPU: ours against the best dense run, frame by frame in one process.

Dense contestants: torch eager (channels_last), `torch.compile` with inductor freezing, and, where
it is installed, OpenVINO. They and ours take turns of ten frames and more, so that a busy machine
slows each alike and each has the caches to itself. A speedup is the ratio of the mean times;
medians and the 10th and 90th percentile stand beside them. Ours runs with the defaults of
`deltafx.compile`, its input as the video gives it.

    python -m benchmarks [--video FILE] [--frames 200] [--json FILE]
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import deltafx
from benchmarks import workloads
from deltafx import models_zoo

Run = Callable[[Tensor], Tensor]


def eager(model: nn.Module, example: Tensor) -> Run:
    """Torch as it is, channels_last."""
    moved = model.to(memory_format=torch.channels_last)
    return lambda x: moved(x)


def inductor(model: nn.Module, example: Tensor) -> Run:
    """`torch.compile` with frozen, prepacked weights."""
    import torch._inductor.config as inductor_config

    inductor_config.freezing = True
    compiled = torch.compile(model)
    compiled(example)
    return lambda x: compiled(x)


def openvino(model: nn.Module, example: Tensor) -> Run | None:
    """OpenVINO, fp32, latency hint, as many threads as torch; None where it is not installed."""
    try:
        import openvino as ov
    except ImportError:
        return None
    converted = ov.convert_model(model, example_input=example, input=[tuple(example.shape)])
    compiled = ov.Core().compile_model(
        converted,
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "f32",
        },
    )
    return lambda x: torch.from_numpy(compiled(x.numpy())[0])


def spread(times: list[float]) -> dict[str, float]:
    """Milliseconds: mean, median, 10th and 90th percentile."""
    tenths = statistics.quantiles(times, n=10)
    return {
        "mean_ms": statistics.fmean(times),
        "median_ms": statistics.median(times),
        "p10_ms": tenths[0],
        "p90_ms": tenths[-1],
    }


def batched(frames: Iterable[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Frames in lists of `size`; the last may be shorter."""
    source = iter(frames)
    while batch := list(islice(source, size)):
        yield batch


def measure(
    contestants: dict[str, Run],
    ours: deltafx.DeltaModule,
    frames: Iterable[Tensor],
    warmup: int = 3,
    turn: int = 10,
) -> dict[str, Any]:
    """Runs all contestants on all frames, `turn` frames at a time."""
    runs = {**contestants, "deltafx": ours}
    times: dict[str, list[float]] = {name: [] for name in runs}
    fractions: list[float] = []
    difference = total = 0.0
    done = 0
    for batch in batched(frames, turn):
        outputs: dict[str, list[Tensor]] = {}
        for name, run in runs.items():
            # Ours and OpenVINO take frames as the video gives them, torch in its best layout.
            plain = name in ("deltafx", "openvino")
            layout = torch.contiguous_format if plain else torch.channels_last
            mine = [frame.contiguous(memory_format=layout) for frame in batch]
            outputs[name] = []
            for i, frame in enumerate(mine):
                start = time.perf_counter()
                outputs[name].append(run(frame))
                elapsed = 1e3 * (time.perf_counter() - start)
                if done + i >= warmup:
                    times[name].append(elapsed)
                    if name == "deltafx":
                        fractions.append(ours.stats().flop_fraction)
        for i, (got, expected) in enumerate(zip(outputs["deltafx"], outputs["eager"], strict=True)):
            if done + i >= warmup:
                difference += float((got - expected).square().sum())
                total += float(expected.square().sum())
        done += len(batch)
    rows = {name: spread(values) for name, values in times.items()}
    torch_dense = min(rows["eager"]["mean_ms"], rows["inductor"]["mean_ms"])
    result: dict[str, Any] = {
        "times": rows,
        "frames": len(fractions),
        "flop_fraction": statistics.fmean(fractions),
        "relative_l2_error": (difference / total) ** 0.5,
        "speedup_over_best_torch": torch_dense / rows["deltafx"]["mean_ms"],
        "state_bytes": ours.state_bytes(),
    }
    if "openvino" in rows:
        openvino_ms = rows["openvino"]["mean_ms"]
        result["speedup_over_openvino"] = openvino_ms / rows["deltafx"]["mean_ms"]
    return result


def contestants_for(model: nn.Module, example: Tensor) -> dict[str, Run]:
    """The dense contestants for a model."""
    example = example.contiguous(memory_format=torch.channels_last)
    made = {
        "eager": eager(model, example),
        "inductor": inductor(model, example),
        "openvino": openvino(model, example),
    }
    return {name: run for name, run in made.items() if run is not None}


def jpeg_error(model: nn.Module, frames: list[Any], prepare: Callable[[Any], Tensor]) -> float:
    """The relative L2 error that re-encoding the frames as JPEG 95 causes, over all frames."""
    difference = total = 0.0
    for frame in frames:
        expected = model(prepare(frame))
        difference += float((model(prepare(workloads.jpeg(frame))) - expected).square().sum())
        total += float(expected.square().sum())
    return (difference / total) ** 0.5


def run_mobilenet(video: str, count: int) -> dict[str, Any]:
    """MobileNetV2's trunk, real weights, on the clip."""
    model, preprocessing = workloads.mobilenet_v2_trunk()
    raw = workloads.clip_frames(video, count)
    frames = [preprocessing(frame) for frame in raw]
    dense = contestants_for(model, frames[0])
    static = [frames[-1]] * 80
    results = {
        "clip": measure(dense, deltafx.compile(model), frames),
        "static": measure(dense, deltafx.compile(model), static, turn=40),
        "everything changed": measure(
            dense, deltafx.compile(model), workloads.noise(frames[0], 25)
        ),
    }
    results["clip"]["jpeg95_error"] = jpeg_error(model, raw[3:], preprocessing)
    return results


def run_resnet(video: str, count: int) -> dict[str, Any]:
    """ResNet-50's trunk, a textured box over 5 % of a still picture."""
    _, preprocessing = workloads.mobilenet_v2_trunk()
    raw = workloads.clip_frames(video, 8)
    frames = torch.cat([preprocessing(frame) for frame in raw])
    model = workloads.resnet50_trunk(frames)
    background = frames[:1]
    dense = contestants_for(model, background)
    box = workloads.moving_box(background, 0.05, count)
    return {
        "box over 5 %": measure(dense, deltafx.compile(model), box),
        "static": measure(dense, deltafx.compile(model), [background] * 30, turn=15),
        "everything changed": measure(
            dense, deltafx.compile(model), workloads.noise(background, 12)
        ),
    }


def environment() -> dict[str, Any]:
    """Device, versions and date."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "deltafx": deltafx.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "options": "defaults of deltafx.compile",
    }


def main() -> None:
    """Runs the benchmark and prints a table; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--video", default=str(models_zoo.clip_path("vtest")))
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--models", nargs="+", default=["mobilenet_v2_trunk", "resnet50_trunk"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console()
    results: dict[str, Any] = {"environment": environment(), "clip": Path(options.video).name}
    with torch.no_grad():
        if "mobilenet_v2_trunk" in options.models:
            results["mobilenet_v2_trunk"] = run_mobilenet(options.video, options.frames)
        if "resnet50_trunk" in options.models:
            results["resnet50_trunk"] = run_resnet(options.video, min(options.frames, 40))
    for model in options.models:
        for name, row in results[model].items():
            means = "  ".join(f"{k} {v['mean_ms']:.1f}" for k, v in row["times"].items())
            console.print(
                f"{model}, {name}: {means} ms; {row['speedup_over_best_torch']:.2f}x over torch, "
                f"FLOP fraction {row['flop_fraction']:.3f}, error {row['relative_l2_error']:.4f}"
            )
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
