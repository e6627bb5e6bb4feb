"""Models from timm, segmentation_models_pytorch and ONNX at threshold 0: as exact as they are."""

from __future__ import annotations

import pytest

import deltafx
from tests.models.catalogue import TIMM, onnx_cases, smp_cases, timm_cases

CASES = {case.name: case for case in timm_cases() + smp_cases() + onnx_cases()}

SPREAD = {
    "timm resnest14d", "timm repvgg_a0", "timm mobilenetv4_conv_small", "timm convnext_atto",
    "timm skresnet18", "timm ghostnet_100", "timm tinynet_e", "timm eca_nfnet_l0",
    "smp Unet", "smp PAN", "smp Unet of timm", "onnx face detector",
}  # fmt: skip
"""For `make test`; the rest are slow."""


def parameters():
    for name in CASES:
        yield pytest.param(name, marks=[] if name in SPREAD else pytest.mark.slow)


LEAST = {"timm mambaout_femto": 0.9, "timm inception_next_atto": 0.99}
"""The least share of the multiply-adds in delta ops, where it is not 0.995."""


@pytest.mark.parametrize("name", parameters())
def test_as_exact_as_the_dense_model(name: str) -> None:
    case = CASES[name]
    model = case.load()
    compiled = deltafx.compile(model, threshold=0)
    oracle = case.oracle(model)
    for frame in case.frames()[:6]:
        oracle.compare(compiled(*frame), *frame)
    oracle.check()
    if case.convolutional:
        assert compiled.explain().delta_share >= LEAST.get(name, 0.995)


def test_the_listed_families_are_there() -> None:
    assert len(TIMM) >= 25
    assert set(CASES) >= SPREAD
    families = (
        "hrnet", "resnest", "repvgg", "efficientnet_lite", "ghostnet", "regnet", "convnext", "csp",
        "nfnet", "mobilenetv4", "fastvit",
    )  # fmt: skip
    for family in families:
        assert any(family in name for name in TIMM)
    for name in ("Unet", "FPN", "DeepLabV3Plus", "PAN"):
        assert f"smp {name}" in CASES
