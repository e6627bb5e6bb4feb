"""The command line from argument to exit code, on a real clip."""

import json
from pathlib import Path

import pytest
from PIL import Image

from deltafx import cli
from deltafx.comparison import Comparison
from deltafx.report import FrameRecord
from deltafx.video import VideoReader


def invoke(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    code = end.value.code
    assert isinstance(code, int)
    return code


def test_run_writes_table_video_picture_and_report(
    small_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: tmp_path / name for name in ("o.mp4", "o.png", "o.json")}
    options = ("--output", "o.mp4", "--picture", "o.png", "--report", "o.json")
    assert invoke("run", "carphone", "-m", small_model, "--frames", "5", *options) == 0
    shown = capsys.readouterr().out
    for word in ("speedup", "FLOP fraction", "state memory", *files):
        assert word in shown
    with VideoReader(str(files["o.mp4"])) as reader:
        assert (reader.size, len(list(reader))) == ((144, 176), 5)
    assert Image.open(files["o.png"]).size == (176, 144)
    summary = json.loads(files["o.json"].read_text())["summary"]
    assert summary["frames"] == 5
    assert 0 < summary["flop_fraction"] < 1
    assert summary["speedup"] == pytest.approx(
        summary["dense_ms_median"] / summary["ours_ms_median"]
    )


def test_threshold_zero_is_exact(small_model: str, tmp_path: Path) -> None:
    arguments = ("--frames", "4", "--threshold", "0", "--report", "o.json")
    assert invoke("run", "carphone", "-m", small_model, *arguments) == 0
    content = json.loads((tmp_path / "o.json").read_text())
    assert all(frame["error"] < 1e-5 for frame in content["frames"])


def test_size_dtype_and_no_compare(small_model: str, tmp_path: Path) -> None:
    arguments = ("--frames", "3", "--size", "64x48", "--dtype", "bfloat16", "--no-compare")
    assert invoke("run", "carphone", "-m", small_model, *arguments, "--report", "o.json") == 0
    content = json.loads((tmp_path / "o.json").read_text())
    assert content["size"] == [48, 64]
    assert content["dtype"] == "bfloat16"
    assert content["summary"]["dense_ms_median"] is None


def test_random_weights_are_calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ("--weights", "random", "--frames", "6", "--size", "64x64", "--threshold", "0")
    assert invoke("run", "carphone", "-m", "resnet18", *arguments, "--report", "o.json") == 0
    content = json.loads((tmp_path / "o.json").read_text())
    assert content["summary"]["frames"] == 6
    assert all(frame["error"] < 1e-4 for frame in content["frames"])


def test_ctrl_c_ends_with_the_table(
    small_model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    done: list[FrameRecord] = []
    step = Comparison.step

    def interrupted(self: Comparison, frame: object) -> FrameRecord:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(step(self, frame))  # type: ignore[arg-type]
        return done[-1]

    monkeypatch.setattr(Comparison, "step", interrupted)
    assert invoke("run", "carphone", "-m", small_model, "--output", "o.mp4") == 0
    shown = capsys.readouterr().out
    assert "stopped" in shown
    assert "FLOP fraction" in shown
    with VideoReader(str(tmp_path / "o.mp4")) as reader:
        assert len(list(reader)) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "nowhere.mp4", "-m", "mobilenet_v2_trunk"), "nowhere.mp4"),
        (("run", "carphone", "-m", "resnet5O"), "resnet50"),
        (("run", "carphone", "-m", "no_such_module:make"), "no_such_module"),
        (("run", "carphone", "-m", "app_test_net:missing"), "missing"),
        (("run", "carphone", "-m", "app_test_net:not_a_model"), "int"),
        (("run", "carphone", "-m", "app_test_net:make", "--size", "big"), "768x576"),
        (("run", "carphone", "-m", "app_test_net:make", "--device", "tpu9"), "tpu9"),
        (("run", "carphone", "-m", "app_test_net:make", "--threshold", "-1"), "threshold"),
        (("run", "carphone", "-m", "app_test_net:make", "--output", "no/o.mp4"), "no/o.mp4"),
        (("run", "carphone", "-m", "resnet18", "--weights", "none.pt"), "none.pt"),
        (
            ("run", "carphone", "-m", "app_test_net:make", "--node", "x9", "--picture", "o.png"),
            "x9",
        ),
        (("run", "carphone"), "--model"),
        (("explain", "-m", "app_test_net:make", "--size", "0x4"), "0x4"),
    ],
)
def test_mistakes_are_told_in_words(
    arguments: tuple[str, ...],
    message: str,
    small_model: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert invoke(*arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


def test_explain_gives_every_node_a_reason(
    small_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke("explain", "-m", small_model, "--size", "64x48") == 0
    shown = capsys.readouterr().out
    assert "64x48" in shown
    assert "delta" in shown
    assert "conv2d" in shown
    assert "nodes:" in shown


def test_models_lists_the_zoo(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke("models") == 0
    names = capsys.readouterr().out.split()
    assert {"mobilenet_v2_trunk", "resnet50", "deeplabv3_resnet50"} <= set(names)
