"""compile: the one line that most users need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from deltafx.compiled import Compiled
from deltafx.config import Config
from deltafx.delta_regions import DeltaRegions
from deltafx.errors import InvalidInputError
from deltafx.module import DeltaModule
from deltafx.passes.captured_graph import capture_exported
from deltafx.passes.trace_model import check_eval, own_hooks


def compile(  # noqa: A001  the name that users of torch.compile look for
    model: nn.Module | ExportedProgram,
    *,
    threshold: float | None = None,
    thresholds: Mapping[str, float] | None = None,
    example_inputs: tuple[Any, ...] | None = None,
    **options: Any,
) -> Compiled:
    """Compiles a CNN for video: call the result with the frames of a clip, one after another.

    Args:
        model: In eval mode, or exported in it. Its weights are shared, not copied, and followed
            when they change.
        threshold: How far a value may be from what was last propagated without being propagated,
            in standard deviations of its channel; 0 is exact.
        thresholds: Thresholds of single nodes by name (`explain()` lists the names).
        example_inputs: Arguments of the model; with them compilation happens now, otherwise at the
            first frame.
        **options: Any other field of `deltafx.Config`.

    The default policy is the one that did the least work within the error of a JPEG of quality 95
    on a fixed outdoor camera (MobileNetV2's trunk, ImageNet weights, 300 frames of 576x768): all
    thresholds 0.1, the RMS over groups of 64 channels, an input gate of 16x16 sites, and nothing
    truncated in every sixth frame. There it does 0.32 of the multiply-adds at a relative error of
    0.139 (the JPEG's is 0.141). docs/performance.md has the alternatives.

    Returns:
        A `DeltaModule`; call it as the model. The batch dimension holds independent streams. Of a
        model that no one graph can stand for, such as a detector, a `DeltaRegions`, whose largest
        traceable parts are; it is called and asked in the same way. Where that shows only at a
        frame, the `DeltaModule` goes on as those parts by itself.

    Raises:
        InvalidOptionError: An option is unknown or out of its range.
        InvalidInputError: `model` is neither a module nor an exported program, or compiled already,
            or `example_inputs` is no tuple.
        TrainModeError: The model is in train mode.
    """
    config = Config.from_options({"threshold": threshold, "thresholds": thresholds, **options})
    if example_inputs is not None and not isinstance(example_inputs, (tuple, list)):
        raise InvalidInputError(
            "example_inputs must be a tuple of the model's arguments, such as (frame,), not "
            f"{type(example_inputs).__name__}"
        )
    if isinstance(model, ExportedProgram):
        model = capture_exported(model)
    model = getattr(model, "_orig_mod", model)  # behind `torch.compile`
    check_eval(model)
    already = [name for name, m in model.named_modules() if isinstance(m, Compiled)]
    if already:
        raise InvalidInputError(
            f"the model is compiled already{f' (at {already[0]!r})' if already[0] else ''}: give "
            "compile() the model itself"
        )
    compiled = _compiled(model, config)
    return compiled if example_inputs is None else compiled.prepare(*example_inputs)


def _compiled(model: nn.Module, config: Config) -> Compiled:
    if not own_hooks(model):
        whole = DeltaModule(model, config, otherwise=DeltaRegions)
        if whole.traced_whole:
            return whole
    return DeltaRegions(model, config)
