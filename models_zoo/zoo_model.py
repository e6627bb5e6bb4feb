"""What the zoo hands out: a model together with all that is needed to feed it frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deltafx.models_zoo.postprocessing import Plain
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
        task: "classification", "segmentation", "detection", "video", "optical_flow" or "features".
        frames: How many pictures of a stream, the last ones, it looks at at once.
        postprocessing: Turns what `module` returns into something to look at.
    """

    name: str
    module: nn.Module
    preprocessing: Preprocessing
    origin: str
    input_size: tuple[int, int] | None = None
    trained: bool = True
    threshold: float | None = None
    task: str = "features"
    frames: int = 1
    postprocessing: Callable[[Any], Any] = field(default_factory=Plain)

    def arguments(self, pictures: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What `module` is called with.

        Args:
            pictures: The last `frames` ones, [N, 3, H, W] each, preprocessed; fewer at the
                beginning of a video, where the first one stands for those before it.

        Returns:
            One picture; of a video model one clip [N, 3, T, H, W]; of a flow model the last two.
        """
        pictures = list(pictures)[-self.frames :]
        pictures = [pictures[0]] * (self.frames - len(pictures)) + pictures
        if self.task == "video":
            return (torch.stack(pictures, dim=2),)
        return tuple(pictures)
