"""What a run tells afterwards: its numbers as a table and as JSON, and pictures of update masks.

In: one `FrameRecord` a frame. Out: a `Report`, rich tables, RGB arrays and PNG files.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.table import Table

_TINT = np.array([255.0, 64.0, 0.0])
_TINT_STRENGTH = 0.55


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

    The first frame fills the state and computes everything, so it is told apart: every mean is over
    the frames after it (over the first alone if there is no other).

    Attributes:
        model: The name of the model.
        source: The video.
        size: (height, width) of the frames in pixels.
        device: In words.
        dtype: Of weights and frames.
        threads: CPU threads that PyTorch used.
        state_bytes: Memory of the accumulators and masks.
        frames: One record a frame.
    """

    model: str
    source: str
    size: tuple[int, int]
    device: str
    dtype: str
    threads: int
    state_bytes: int
    frames: list[FrameRecord] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Return the numbers of the table; None where nothing was measured."""
        steady = self.frames[1:] or self.frames
        ours = _mean([frame.ours_ms for frame in steady])
        dense = _mean([frame.dense_ms for frame in steady])
        return {
            "frames": len(self.frames),
            "first_frame_ms": self.frames[0].ours_ms if self.frames else None,
            "ours_ms": ours,
            "ours_ms_median": median([f.ours_ms for f in steady]) if steady else None,
            "dense_ms": dense,
            "dense_ms_median": median([f.dense_ms or 0.0 for f in steady]) if dense else None,
            "speedup": dense / ours if dense and ours else None,
            "flop_fraction": _mean([frame.flop_fraction for frame in steady]),
            "density": _mean([frame.density for frame in steady]),
            "error": _mean([frame.error for frame in steady]),
            "error_last": self.frames[-1].error if self.frames else None,
            "state_bytes": self.state_bytes,
        }

    def table(self) -> Table:
        """Return the table that ends a run."""
        numbers = self.summary()
        height, width = self.size
        table = Table(
            title=f"{self.model} on {self.source}",
            caption=f"{width}x{height}, {self.dtype}, {self.device}, {self.threads} threads; "
            "means over the frames after the first; without decoding and preprocessing",
        )
        table.add_column("")
        table.add_column("deltafx", justify="right")
        table.add_column("dense", justify="right")
        table.add_row("frames", str(numbers["frames"]), "")
        table.add_row("ms, first frame", _show(numbers["first_frame_ms"], ".1f"), "")
        table.add_row(
            "ms per frame", _show(numbers["ours_ms"], ".2f"), _show(numbers["dense_ms"], ".2f")
        )
        table.add_row("speedup", _show(numbers["speedup"], ".2f", "x"), "")
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


def _mean(values: list[float] | list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _show(value: float | None, digits: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{digits}}{unit}"
