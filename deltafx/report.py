"""What a run tells afterwards: its numbers as a table and as JSON, and pictures of update masks.

In: one `FrameRecord` a frame. Out: a `Report`, rich tables, RGB arrays and PNG files.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.table import Table

_TINT = np.array([255.0, 64.0, 0.0])
_TINT_STRENGTH = 0.55
BUSY_LOAD = 0.75


@dataclass(frozen=True)
class FrameRecord:
    """What was measured at one frame.

    Attributes:
        ours_ms: Time of the compiled model in ms.
        dense_ms: Time of the dense model in ms, if it ran.
        flop_fraction: Multiply-adds done / multiply-adds of the dense model.
        density: Active sites / all sites, over all nodes.
        error: Relative L2 distance of the output to the dense model's on the same raw frame.
    """

    ours_ms: float
    dense_ms: float | None
    flop_fraction: float
    density: float
    error: float | None


@dataclass
class Report:
    """The record of a run; `frames` is filled while it goes on.

    The first frame fills the state and computes everything, so it is told apart: every figure is of
    the frames after it (of the first alone if there is no other). Times are told as mean and
    median; the speedup is that of the medians, which a busy machine disturbs least.

    Attributes:
        model: The name of the model.
        source: The video.
        size: (height, width) of the frames in pixels.
        device: In words.
        dtype: Of weights and frames.
        threads: CPU threads that PyTorch used.
        state_bytes: Memory of the accumulators and masks.
        load: Processes that wanted a CPU, per CPU, in the minute before the run.
        frames: One record a frame.
    """

    model: str
    source: str
    size: tuple[int, int]
    device: str
    dtype: str
    threads: int
    state_bytes: int
    load: float = 0.0
    frames: list[FrameRecord] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Return the numbers of the table; None where nothing was measured."""
        steady = self.frames[1:] or self.frames
        ours = _known([frame.ours_ms for frame in steady])
        dense = _known([frame.dense_ms for frame in steady])
        errors = _known([frame.error for frame in steady])
        return {
            "frames": len(self.frames),
            "first_frame_ms": self.frames[0].ours_ms if self.frames else None,
            "ours_ms_mean": fmean(ours) if ours else None,
            "ours_ms_median": median(ours) if ours else None,
            "dense_ms_mean": fmean(dense) if dense else None,
            "dense_ms_median": median(dense) if dense else None,
            "speedup": median(dense) / median(ours) if dense and ours else None,
            "flop_fraction": fmean([f.flop_fraction for f in steady]) if steady else None,
            "density": fmean([f.density for f in steady]) if steady else None,
            "error": fmean(errors) if errors else None,
            "error_last": self.frames[-1].error if self.frames else None,
            "state_bytes": self.state_bytes,
        }

    def table(self) -> Table:
        """Return the table that ends a run."""
        numbers = self.summary()
        height, width = self.size
        busy = f"; the machine was busy (load {self.load:.1f} per CPU), do not trust the times"
        table = Table(
            title=f"{self.model} on {self.source}",
            caption=f"{width}x{height}, {self.dtype}, {self.device}, {self.threads} threads; "
            "frames after the first; without decoding and preprocessing"
            + (busy if self.load > BUSY_LOAD else ""),
        )
        table.add_column("")
        table.add_column("deltafx", justify="right")
        table.add_column("dense", justify="right")
        table.add_row("frames", str(numbers["frames"]), "")
        table.add_row("ms, first frame", _show(numbers["first_frame_ms"], ".1f"), "")
        for kind in ("median", "mean"):
            ours, dense = numbers[f"ours_ms_{kind}"], numbers[f"dense_ms_{kind}"]
            table.add_row(f"ms per frame, {kind}", _show(ours, ".2f"), _show(dense, ".2f"))
        table.add_row("speedup of the median", _show(numbers["speedup"], ".2f", "x"), "")
        table.add_row("FLOP fraction", _show(numbers["flop_fraction"], ".3f"), "1")
        table.add_row("density", _show(numbers["density"], ".3f"), "1")
        table.add_row("relative error, mean", _show(numbers["error"], ".4f"), "")
        table.add_row("relative error, last frame", _show(numbers["error_last"], ".4f"), "")
        table.add_row("state memory", _show(self.state_bytes / 2**20, ".1f", " MiB"), "")
        return table

    def save(self, path: str | Path) -> None:
        """Write everything, frame by frame and in sum, as JSON."""
        content = {"summary": self.summary(), **dataclasses.asdict(self)}
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def draw_mask(frame: np.ndarray, mask: np.ndarray, caption: str = "") -> np.ndarray:
    """Tint the active sites of a frame.

    Args:
        frame: uint8 [H, W, 3], RGB; left unchanged.
        mask: bool [h, w], the update mask of a node; scaled to the frame's size, nearest.
        caption: A line of text for the top left corner.

    Returns:
        uint8 [H, W, 3].
    """
    height, width = frame.shape[:2]
    small = mask.astype(np.uint8)
    scaled = Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST)
    active = np.asarray(scaled).astype(bool)
    drawn = frame.copy()
    tinted = frame[active] * (1.0 - _TINT_STRENGTH) + _TINT * _TINT_STRENGTH
    drawn[active] = tinted.astype(np.uint8)
    if not caption:
        return drawn
    image = Image.fromarray(drawn)
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=max(10, height // 32))
    pen.rectangle(pen.textbbox((6, 4), caption, font=font), fill=(0, 0, 0))
    pen.text((6, 4), caption, font=font, fill=(255, 255, 255))
    return np.array(image)


def save_png(path: str | Path, picture: np.ndarray) -> None:
    """Write an RGB picture, uint8 [H, W, 3], as PNG."""
    Image.fromarray(picture).save(path, format="PNG", optimize=True)


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _show(value: float | None, digits: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{digits}}{unit}"
