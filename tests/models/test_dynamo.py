"""The same models through `torch.compile(backend="deltafx")`: as exact as the dense model."""

from __future__ import annotations

import pytest
import torch

import deltafx
from tests.models.catalogue import all_cases

CASES = all_cases()

SPREAD = {
    "resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "googlenet",
    "lraspp_mobilenet_v3_large", "timm resnest14d", "timm tf_efficientnet_lite0", "smp FPN",
    "onnx face detector", "ssdlite320_mobilenet_v3_large", "r3d_18",
}  # fmt: skip
"""For `make test`; the rest are slow."""


def parameters():
    for name in CASES:
        yield pytest.param(name, marks=[] if name in SPREAD else pytest.mark.slow)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", parameters())
def test_as_exact_as_the_dense_model(name: str) -> None:
    case = CASES[name]
    model = case.load()
    compiled = torch.compile(model, backend="deltafx", options={"threshold": 0})
    oracle = case.oracle(model)
    with torch.inference_mode():
        for frame in case.frames()[:6]:
            oracle.compare(compiled(*frame), *frame)
    oracle.check()
    modules = deltafx.modules(compiled)
    if case.convolutional:
        shares = [m.explain().delta_share for m in modules if m.stats().dense_macs]
        assert min(shares) >= 0.9


def test_all_are_there() -> None:
    assert set(CASES) >= SPREAD
