"""The command line: `deltafx run`, `deltafx explain`, `deltafx models`.

In: arguments. Out: a progress bar, a table and the files that were asked for. A mistake of the
user's (`DeltafxError`) is told in one line with exit code 2; anything else is a bug and keeps its
traceback.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from enum import Enum
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import deltafx
from deltafx import models_zoo
from deltafx.comparison import Comparison
from deltafx.errors import DeltafxError, InvalidOptionError, VideoError
from deltafx.models_zoo import ZooModel
from deltafx.report import FrameRecord, Report, draw_mask, save_png
from deltafx.user_model import load_user_model
from deltafx.video import VideoReader, VideoWriter

CALIBRATION_FRAMES = 4
EXPLAIN_SIZE = (224, 224)

app = typer.Typer(
    help="Compute only where the video changed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()


class Dtype(str, Enum):
    """Floating types that models can be run in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Model = Annotated[
    str,
    typer.Option("--model", "-m", help="A name from `deltafx models`, or module:factory."),
]
Size = Annotated[
    str | None, typer.Option(help="WIDTHxHEIGHT in pixels to which frames are scaled.")
]


@app.command()
def run(
    video: Annotated[
        str,
        typer.Argument(help="A file, an address (rtsp://...), a webcam (0), or the clip `vtest`."),
    ],
    model: Model,
    weights: Annotated[
        str, typer.Option(help="`pretrained`, `random`, or the path of a state dict.")
    ] = "pretrained",
    threshold: Annotated[
        float | None, typer.Option(help="How far values may drift; 0 is exact. [default: tuned]")
    ] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Stop after so many frames.")] = None,
    size: Size = None,
    device: Annotated[str, typer.Option(help="`cpu`, `cuda`, `cuda:1`, ...")] = "cpu",
    dtype: Annotated[Dtype, typer.Option(help="Of weights and frames.")] = Dtype.float32,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    compare: Annotated[
        bool, typer.Option("--compare/--no-compare", help="Run the dense model beside it.")
    ] = True,
    output: Annotated[
        Path | None, typer.Option(help="An mp4 of the frames, active sites tinted.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="A PNG of the last such frame.")] = None,
    report: Annotated[Path | None, typer.Option(help="A JSON of all the numbers.")] = None,
    node: Annotated[
        str | None, typer.Option(help="Whose update mask to draw. [default: the input's]")
    ] = None,
) -> None:
    """Run a model over a video and tell what was saved. Ctrl-C ends it early, with the table."""
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    chosen_device = parse_device(device)
    outputs = [path for path in (output, picture, report) if path is not None]
    check_folders(outputs)
    if threads is not None:
        torch.set_num_threads(threads)
    zoo_model = load_model(model, weights)
    with ExitStack() as stack:
        reader = stack.enter_context(
            VideoReader(find_source(video), size=parse_size(size) or zoo_model.input_size)
        )
        head = read_head(reader, zoo_model)
        with console.status("compiling"):
            comparison = Comparison(
                zoo_model,
                head[0],
                threshold=threshold,
                dtype=getattr(torch, dtype.value),
                device=chosen_device,
                compare=compare,
            )
        result = Report(
            model=model,
            source=video,
            size=reader.size,
            device=describe_device(chosen_device),
            dtype=dtype.value,
            threads=torch.get_num_threads(),
            state_bytes=comparison.compiled.state_bytes(),
            load=load,
        )
        writer = stack.enter_context(VideoWriter(output, fps=reader.fps)) if output else None
        stream = itertools.islice(itertools.chain(head, reader), frames)
        total = min(filter(None, (frames, reader.frame_count)), default=None)
        artist = Artist(comparison, node, writer) if output or picture else None
        run_frames(stream, comparison, result, total=total, artist=artist)
    if picture is not None and artist is not None and artist.last is not None:
        save_png(picture, artist.last)
    if report is not None:
        result.save(report)
    console.print(result.table())
    for path in outputs:
        console.print(f"wrote {path}", highlight=False)


def read_head(reader: VideoReader, model: ZooModel) -> list[np.ndarray]:
    """Read the frames that compiling needs, and calibrate an untrained model on them."""
    wanted = 1 if model.trained else CALIBRATION_FRAMES + model.frames - 1
    head = list(itertools.islice(reader, wanted))
    if not head:
        raise VideoError(f"{reader.source!r} has no frame in it")
    if not model.trained and len(head) > model.frames:
        pictures = [model.preprocessing(frame) for frame in head]
        windows = [
            model.arguments(pictures[: i + model.frames])
            for i in range(len(pictures) - model.frames + 1)
        ]
        models_zoo.calibrate_batch_norm(model.module, *map(torch.cat, zip(*windows, strict=True)))
    return head


class Artist:
    """Draws the update mask over each frame, for the video and for the picture of the last one.

    Args:
        comparison: Has the mask.
        node: Whose mask to draw; None is the input's.
        writer: Where frames go; None draws only `last`.

    Attributes:
        last: The last frame drawn, uint8 [H, W, 3].
    """

    def __init__(
        self, comparison: Comparison, node: str | None, writer: VideoWriter | None
    ) -> None:
        self._comparison, self._node, self._writer = comparison, node, writer
        self.last: np.ndarray | None = None

    def draw(self, frame: np.ndarray, caption: str) -> None:
        """Draw the frame just computed, uint8 [H, W, 3]."""
        self.last = draw_mask(frame, self._comparison.mask(self._node), caption)
        if self._writer is not None:
            self._writer.write(self.last)


def run_frames(
    stream: Iterable[np.ndarray],
    comparison: Comparison,
    report: Report,
    *,
    total: int | None,
    artist: Artist | None,
) -> None:
    """Feed a stream until it ends or Ctrl-C is pressed, and fill the report.

    Args:
        stream: RGB frames, uint8 [H, W, 3].
        comparison: The models.
        report: Gets one record a frame.
        total: The length of the progress bar, if known.
        artist: Draws the frames, if anyone wants to see them.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=total)
        try:
            for frame in stream:
                record = comparison.step(frame)
                report.frames.append(record)
                if artist is not None:
                    artist.draw(frame, describe(record))
                progress.update(task, advance=1, description=describe(record))
        except KeyboardInterrupt:
            progress.console.print("stopped; so far:")


@app.command()
def explain(
    model: Model,
    weights: Annotated[
        str, typer.Option(help="`pretrained`, `random`, or the path of a state dict.")
    ] = "random",
    size: Size = None,
) -> None:
    """Tell which nodes of a model become delta ops, which stay dense, and why."""
    zoo_model = load_model(model, weights)
    height, width = parse_size(size) or zoo_model.input_size or EXPLAIN_SIZE
    example = zoo_model.arguments([torch.rand(1, 3, height, width)])
    compiled = deltafx.compile(zoo_model.module, example_inputs=example)
    table = Table("node", "op", "kind", "reason", title=f"{model} at {width}x{height}")
    kinds: Counter[str] = Counter()
    for info in compiled.explain():
        kinds[info.kind] += 1
        table.add_row(*(escape(str(x)) for x in (info.name, info.op, info.kind, info.reason)))
    console.print(table)
    console.print(
        f"{sum(kinds.values())} nodes: "
        + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        + f"; state {compiled.state_bytes() / 2**20:.1f} MiB"
    )


@app.command()
def models() -> None:
    """List the models that `--model` knows by name."""
    for name in models_zoo.list_models():
        console.print(name, highlight=False)


def load_model(name: str, weights: str) -> ZooModel:
    """Load a zoo model by name, or a user's own from `module:factory`."""
    return load_user_model(name) if ":" in name else models_zoo.load(name, weights=weights)


def find_source(video: str) -> str:
    """Return what to open: a shipped clip for its bare name, else the text as it is."""
    if video in models_zoo.list_clips() and not Path(video).exists():
        return str(models_zoo.clip_path(video))
    return video


def check_folders(paths: Iterable[Path]) -> None:
    """Refuse a file in a folder that does not exist, before the work and not after it."""
    for path in paths:
        if not path.parent.is_dir():
            raise InvalidOptionError(f"cannot write {path}: there is no folder {path.parent}")


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Turn "WIDTHxHEIGHT" into (height, width)."""
    if text is None:
        return None
    width, cross, height = text.partition("x")
    if not (cross and width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise InvalidOptionError(f"--size must look like 768x576 (width x height), not {text!r}")
    return int(height), int(width)


def parse_device(name: str) -> torch.device:
    """Turn a device name into a device that this machine has."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).splitlines()[0]
        raise InvalidOptionError(f"--device {name!r} cannot be used: {first_line}") from error
    return device


def describe_device(device: torch.device) -> str:
    """Return the name of a device as its maker calls it, where PyTorch knows it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def describe(record: FrameRecord) -> str:
    """Return one frame's numbers in a line."""
    error = "" if record.error is None else f"  error {record.error:.3f}"
    return f"{record.ours_ms:6.1f} ms  FLOPs {record.flop_fraction:6.1%}{error}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, of this process by default; ends in SystemExit."""
    try:
        app(args=list(arguments) if arguments is not None else None)
    except DeltafxError as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
