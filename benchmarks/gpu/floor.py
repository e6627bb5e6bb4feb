"""The time that a frame's work cannot go below, node by node.

A node's floor is the largest of: its bytes over the measured bandwidth (the candidates' own
accumulator read and written, and its weights; the input, which neighbours share, is left out), its
operations over the measured rate of a large matrix product, and 2 us for its launches.
"""

from __future__ import annotations

from typing import Any

from deltafx import DeltaModule, Stats

LAUNCH_SECONDS = 2e-6


def floor_of(model: DeltaModule, stats: Stats, limits: dict[str, float], itemsize: int) -> float:
    """Milliseconds over all delta nodes."""
    return sum(row["floor_us"] for row in _rows(model, stats, limits, itemsize)) / 1000


def table_of(model: DeltaModule, limits: dict[str, float], itemsize: int) -> list[dict[str, Any]]:
    """The rows by node, for the last frame."""
    return _rows(model, model.stats(), limits, itemsize)


def _rows(
    model: DeltaModule, stats: Stats, limits: dict[str, float], itemsize: int
) -> list[dict[str, Any]]:
    rows = []
    for info in model.explain():
        node = stats.nodes.get(info.name)
        if node is None:
            continue
        channels = info.shape[1]
        weights = info.macs_per_site
        moved = itemsize * (node.candidates * 2 * channels + (weights if node.candidates else 0))
        seconds = max(
            moved / limits["bytes_per_second"],
            2 * node.macs / limits["operations_per_second"],
            LAUNCH_SECONDS,
        )
        rows.append(
            {
                "node": info.name,
                "op": info.op,
                "candidates": node.candidates,
                "sites": node.sites,
                "floor_us": seconds * 1e6,
            }
        )
    return rows
