"""torchvision's models of clips, and of pairs of pictures."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torchvision
from torch import nn

from deltafx.models_zoo import calibrate_batch_norm
from tests.exactness import Oracle
from tests.models.case import Case
from tests.models.frames import clip

VIDEO = torchvision.models.list_models(module=torchvision.models.video)
FLOW = torchvision.models.list_models(module=torchvision.models.optical_flow)

FULL_SIZE = ("mvit_", "s3d")
TRANSFORMERS = ("mvit_", "swin3d_")


class VideoCase(Case):
    """A model of clips [1, 3, T, H, W]."""

    def load(self) -> nn.Module:
        """The model with batch norm statistics of two clips."""
        clips = torch.cat([frame for (frame,) in self.frames()[:2]])
        return calibrate_batch_norm(self.seeded(), clips)

    def frames(self) -> list[tuple[Any, ...]]:
        """Clips that move on by a picture, one of them twice, and a cut."""
        length = 16 if self.name.startswith(FULL_SIZE) else 6
        pictures = clip("vtest", self.size, length + 3)
        windows = [pictures[i : i + length] for i in (0, 1, 1, 2, 3)]
        windows.append(clip("carphone", self.size, length))
        return [(w.transpose(0, 1)[None].contiguous(),) for w in windows]


class FlowCase(Case):
    """RAFT, which is fed pairs of pictures."""

    def load(self) -> nn.Module:
        """The model; the feature encoder has no batch norm."""
        model = self.seeded()
        calibrate_batch_norm(model.context_encoder, clip("vtest", self.size, 5))
        return model

    def frames(self) -> list[tuple[Any, ...]]:
        """Pairs that move on by a picture, or stand still; the fourth is the third again."""
        pictures = clip("vtest", self.size, 5)
        return [
            (pictures[i : i + 1], pictures[j : j + 1])
            for i, j in ((0, 1), (1, 2), (2, 2), (2, 2), (2, 3), (3, 4))
        ]

    def oracle(self, model: nn.Module) -> Oracle:
        """RAFT fixes coordinates to float32, so float64 cannot judge; the other layout does."""
        return Oracle(model, exact=model)


def video_cases() -> list[Case]:
    """Frames are of the smallest size that a model takes."""
    return [
        VideoCase(
            name, "torchvision", partial(torchvision.models.get_model, name, weights=None),
            (224, 224) if name.startswith(FULL_SIZE) else (48, 64),
            convolutional=not name.startswith(TRANSFORMERS),
        )
        for name in VIDEO
    ]  # fmt: skip


def flow_cases() -> list[Case]:
    """Both of RAFT's sizes."""
    return [
        FlowCase(
            name, "torchvision", partial(torchvision.models.get_model, name, weights=None),
            (128, 160),
        )
        for name in FLOW
    ]  # fmt: skip
