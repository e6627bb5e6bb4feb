"""The networks of the benchmark. Weights are random but for MobileNetV2's, which are real."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torchvision.models as tv
from torch import nn

from deltafx.models_zoo.mobilenet_v2_trunk import load_mobilenet_v2_trunk


@dataclasses.dataclass(frozen=True)
class Workload:
    """A network at a frame size, with a number of streams; `video`: whether it sees vtest.avi."""

    name: str
    build: Callable[[], nn.Module]
    streams: int
    height: int
    width: int
    video: bool = False


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return calmed(make()).eval()

    return build


def calmed(model: nn.Module) -> nn.Module:
    """Gives random batch norms the spread of trained ones, so that no activation explodes."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    return model


class Trunk(nn.Module):
    """A ResNet up to its last feature map."""

    def __init__(self, resnet: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*list(resnet.children())[:-2])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Segmenter(nn.Module):
    """A segmentation model's main output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)["out"]


def resnet50() -> nn.Module:
    return Trunk(tv.resnet50(weights=None))


def deeplab() -> nn.Module:
    return Segmenter(
        tv.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None, aux_loss=False)
    )


def retinanet() -> nn.Module:
    return tv.detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None).backbone


def mobilenet() -> nn.Module:
    return load_mobilenet_v2_trunk(weights="pretrained", seed=0).module


def efficientnet() -> nn.Module:
    return tv.efficientnet_b0(weights=None).features


WORKLOADS = (
    Workload("resnet50_16", seeded(resnet50), 16, 576, 768),
    Workload("resnet50_1", seeded(resnet50), 1, 576, 768),
    Workload("resnet50_1_hd", seeded(resnet50), 1, 1088, 1920),
    Workload("mobilenet_v2_16", mobilenet, 16, 576, 768, video=True),
    Workload("mobilenet_v2_1", mobilenet, 1, 576, 768, video=True),
    Workload("efficientnet_b0_16", seeded(efficientnet), 16, 576, 768),
    Workload("deeplabv3_1", seeded(deeplab), 1, 576, 768),
    Workload("deeplabv3_1_hd", seeded(deeplab), 1, 1088, 1920),
    Workload("retinanet_fpn_1", seeded(retinanet), 1, 800, 1088),
)
