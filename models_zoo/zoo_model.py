"""What the zoo hands out: a model together with all that is needed to feed it frames."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from deltafx.models_zoo.preprocessing import Preprocessing


@dataclass(frozen=True)
class ZooModel:
    """A model in eval mode and how to feed it.

    Attributes:
        name: The name it was loaded by.
        module: The model, never rewritten: float32, on the CPU, in eval mode.
        preprocessing: Turns RGB frames into what `module` takes.
        origin: In words, where architecture and weights come from.
        input_size: (height, width) in pixels that the model insists on; None if any will do.
        trained: False for seeded random weights, whose batch norm statistics mean nothing before
            `calibrate_batch_norm` was called with a few real frames.
        threshold: The truncation threshold tuned for this model; None for the compiler's default.
    """

    name: str
    module: nn.Module
    preprocessing: Preprocessing
    origin: str
    input_size: tuple[int, int] | None = None
    trained: bool = True
    threshold: float | None = None
