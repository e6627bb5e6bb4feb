"""The arithmetic of the report, and what is drawn where."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from deltafx.report import FrameRecord, Report, draw_mask, save_png


def make_report(*frames: FrameRecord) -> Report:
    return Report("net", "clip", (48, 64), "cpu", "float32", 2, 3 * 2**20, frames=list(frames))


def record(ours: float, dense: float | None, error: float | None = 0.1) -> FrameRecord:
    return FrameRecord(ours_ms=ours, dense_ms=dense, flop_fraction=0.25, density=0.5, error=error)


def test_the_first_frame_is_told_apart() -> None:
    summary = make_report(record(100, 40), record(4, 40), record(20, 20), record(6, 36)).summary()
    assert summary["first_frame_ms"] == 100
    assert summary["ours_ms_mean"] == pytest.approx(10)
    assert summary["dense_ms_mean"] == pytest.approx(32)
    assert summary["ours_ms_median"] == pytest.approx(6)
    assert summary["speedup"] == pytest.approx(36 / 6)
    assert summary["frames"] == 4


def test_one_frame_alone_is_measured_too() -> None:
    summary = make_report(record(100, 50)).summary()
    assert summary["ours_ms_median"] == 100
    assert summary["speedup"] == pytest.approx(0.5)


def test_without_a_dense_model_nothing_is_claimed() -> None:
    summary = make_report(record(9, None, None), record(9, None, None)).summary()
    assert summary["dense_ms_median"] is None
    assert summary["speedup"] is None
    assert summary["error"] is None


def test_an_empty_run_still_has_a_table() -> None:
    console = Console(width=100, record=True, quiet=True)
    console.print(make_report().table())
    assert make_report().summary()["frames"] == 0


def test_the_table_shows_the_numbers() -> None:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(make_report(record(100, 40), record(8, 40, 0.125)).table())
    text = console.export_text()
    for shown in ("8.00", "40.00", "5.00x", "0.250", "0.1250", "3.0 MiB", "64x48", "2 threads"):
        assert shown in text


@pytest.mark.parametrize(("load", "warned"), [(0.1, False), (4.5, True)])
def test_times_of_a_busy_machine_are_not_to_be_trusted(load: float, warned: bool) -> None:
    report = make_report(record(100, 40), record(8, 40))
    report.load = load
    caption = str(report.table().caption)
    assert ("load 4.5" in caption) == warned
    assert ("do not trust" in caption) == warned


def test_the_json_holds_sum_and_frames(tmp_path: Path) -> None:
    report = make_report(record(100, 40), record(8, 40))
    report.save(tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["summary"] == report.summary()
    assert [frame["ours_ms"] for frame in content["frames"]] == [100, 8]
    assert content["size"] == [48, 64]


def test_only_active_sites_are_tinted() -> None:
    frame = np.full((8, 8, 3), 100, np.uint8)
    mask = np.zeros((8, 8), bool)
    mask[2:4, 5] = True
    drawn = draw_mask(frame, mask)
    assert np.array_equal((drawn != frame).any(axis=2), mask)
    assert (frame == 100).all()


def test_a_coarse_mask_is_scaled_to_the_frame() -> None:
    mask = np.array([[True, False], [False, False]])
    drawn = draw_mask(np.zeros((8, 12, 3), np.uint8), mask)
    changed = drawn.any(axis=2)
    assert changed[:4, :6].all()
    assert changed.sum() == 24


def test_the_caption_stays_in_its_corner() -> None:
    frame = np.full((96, 192, 3), 50, np.uint8)
    drawn = draw_mask(frame, np.zeros((96, 192), bool), "12.0 ms")
    changed = (drawn != frame).any(axis=2)
    assert changed[:24].any()
    assert not changed[48:].any()


def test_png_is_lossless(tmp_path: Path) -> None:
    picture = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    save_png(tmp_path / "picture.png", picture)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "picture.png")), picture)
