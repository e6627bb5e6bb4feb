"""From network output to something to look at: one class a task, each called with the output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Plain:
    """Hands the output on as it is."""

    def __call__(self, output: Any) -> Any:
        """Returns `output`."""
        return output


@dataclass(frozen=True)
class TopClasses:
    """The likeliest classes of each stream.

    Attributes:
        categories: Names of the classes, in the order of the logits.
        count: How many.
    """

    categories: tuple[str, ...] = field(repr=False)
    count: int = 5

    def __call__(self, output: Tensor) -> list[list[tuple[str, float]]]:
        """Logits [N, classes] in; by stream, (name, probability) from the likeliest down."""
        best = output.float().softmax(1).topk(min(self.count, output.shape[1]), dim=1)
        return [
            [(self.categories[i], p) for i, p in zip(indices, values, strict=True)]
            for indices, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]


@dataclass(frozen=True)
class LabelMap:
    """The likeliest class of each pixel.

    Attributes:
        categories: Names of the classes by their number.
    """

    categories: tuple[str, ...] = field(repr=False)

    def __call__(self, output: dict[str, Tensor]) -> Tensor:
        """`{"out": [N, classes, H, W], ...}` in; int64 [N, H, W]."""
        return output["out"].argmax(1)


@dataclass(frozen=True)
class Detections:
    """The detections that are sure enough, with the names of their classes.

    Attributes:
        categories: Names of the classes by their number.
        least_score: What is less sure is left out.
    """

    categories: tuple[str, ...] = field(repr=False)
    least_score: float = 0.5

    def __call__(self, output: Sequence[dict[str, Tensor]]) -> list[dict[str, Any]]:
        """By stream, the model's own dictionary, fewer detections in it, and `"names"`."""
        found = []
        for detections in output:
            sure = detections["scores"] >= self.least_score
            kept: dict[str, Any] = {key: value[sure] for key, value in detections.items()}
            kept["names"] = [self.categories[i] for i in kept["labels"].tolist()]
            found.append(kept)
        return found


@dataclass(frozen=True)
class LastFlow:
    """The last of the estimates that a flow model refines."""

    def __call__(self, output: Sequence[Tensor]) -> Tensor:
        """A list of [N, 2, H, W] in; the flow (x, y) in pixels, [N, 2, H, W]."""
        return torch.as_tensor(output[-1])
