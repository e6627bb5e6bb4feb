"""Writes the README's table from `benchmarks/results/cpu.json`.

python -m benchmarks.table
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- figures: benchmarks/results -->", "<!-- end of figures -->"
HEAD = (
    "| workload | eager | inductor | OpenVINO | deltafx | over best torch | over OpenVINO "
    "| FLOP fraction | relative error |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def row(model: str, name: str, result: dict[str, Any]) -> str:
    """One line of the table; times are means in ms."""
    times = [result["times"].get(k) for k in ("eager", "inductor", "openvino", "deltafx")]
    cells = [f"{t['mean_ms']:.1f}" if t else "-" for t in times]
    error = f"{result['relative_l2_error']:.3f}"
    if "jpeg95_error" in result:
        error += f" (JPEG 95: {result['jpeg95_error']:.3f})"
    openvino = result.get("speedup_over_openvino")
    cells += [
        f"**{result['speedup_over_best_torch']:.2f}x**",
        f"{openvino:.2f}x" if openvino else "-",
        f"{result['flop_fraction']:.3f}",
        error,
    ]
    return f"| {model}, {name} | " + " | ".join(cells) + " |"


def main() -> None:
    """Rewrites the lines between the markers."""
    results = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())
    rows = [
        row(model, results["clip"] if name == "clip" else name, result)
        for model in ("mobilenet_v2_trunk", "resnet50_trunk")
        for name, result in results[model].items()
    ]
    where = results["environment"]
    note = (
        f"Mean ms a frame, fp32, 576x768, {where['threads']} threads of {where['cpu']}, "
        f"torch {where['torch']}, {where['date']}; MobileNetV2 has its ImageNet weights, ResNet-50 "
        "seeded ones."
    )
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    after = rest.split(END)[1]
    table = "\n".join([HEAD, *rows])
    readme.write_text(f"{before}{BEGIN}\n{table}\n\n{note}\n{END}{after}")


if __name__ == "__main__":
    main()
