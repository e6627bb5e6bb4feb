"""Case: a model that deltafx is tried on, what it is fed, and what exact means for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltafx import Explanation
from deltafx.models_zoo import Preprocessing, calibrate_batch_norm
from tests.exactness import Oracle
from tests.models.frames import clip, scene


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of pictures, by its name.

    Attributes:
        name: Unique.
        family: Where it comes from.
        build: Makes it; its weights come from torch's generator.
        size: Of its frames.
        convolutional: Whether it is to be in delta ops nearly whole.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    size: tuple[int, int] = (96, 128)
    convolutional: bool = True

    preprocessing: ClassVar[Preprocessing] = Preprocessing()

    def seeded(self) -> nn.Module:
        """The model in eval mode, with random weights."""
        torch.manual_seed(0)
        model = self.build().eval()
        for part in model.modules():
            # A head that starts as zeros (ViT) would hide whatever comes before it.
            if isinstance(part, nn.Linear) and not part.weight.any():
                nn.init.normal_(part.weight, std=0.02)
        return model

    def load(self) -> nn.Module:
        """The model in eval mode, with batch norm statistics of real frames."""
        return calibrate_batch_norm(self.seeded(), self.some_pictures())

    def some_pictures(self) -> Tensor:
        """Two pictures of each clip."""
        names = ("vtest", "carphone")
        return torch.cat([clip(name, self.size, 2, self.preprocessing) for name in names])

    def arguments(self, pictures: Tensor) -> tuple[Any, ...]:
        """What the model is called with for the pictures [N, 3, H, W] of N streams."""
        return (pictures,)

    def frames(self) -> list[tuple[Any, ...]]:
        """The arguments of at least six calls; of two calls in a row they are the same."""
        return [self.arguments(pictures) for pictures in scene(self.size)]

    def oracle(self, model: nn.Module) -> Oracle:
        """What tells whether a compiled model does as `model` does."""
        return Oracle(model)

    def share(self, explanation: Explanation) -> float:
        """Of the multiply-adds that could be in delta ops, those which are."""
        return explanation.delta_share

    def at(self, size: tuple[int, int]) -> Case:
        """The same model for frames of another size."""
        return dataclasses.replace(self, size=size)
