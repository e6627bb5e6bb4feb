"""The same models through `torch.compile(backend="deltafx")`: as exact as the dense model."""

from __future__ import annotations

import pytest
import torch
import torchvision

import deltafx
from tests.exactness import Oracle
from tests.models.catalogue import all_cases
from tests.models.frames import clip, scene

CASES = all_cases()

SPREAD = {
    "resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "googlenet",
    "lraspp_mobilenet_v3_large", "timm resnest14d", "timm tf_efficientnet_lite0", "smp FPN",
    "onnx face detector",
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
    oracle = Oracle(model)
    with torch.inference_mode():
        for frame in scene(case.size)[:6]:
            oracle.compare(compiled(frame), frame)
    oracle.check()
    modules = deltafx.modules(compiled)
    if case.convolutional:
        shares = [m.explain().delta_share for m in modules if m.stats().dense_macs]
        assert min(shares) >= 0.9


DETECTORS = ("ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn")


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTORS)
def test_detectors_in_parts(name: str) -> None:
    """The graph breaks, and their convolutions are in the regions."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None).eval()
    compiled = torch.compile(model, backend="deltafx", options={"threshold": 0})
    frames = clip("vtest", (240, 320), 4)
    with torch.inference_mode():
        for i in (0, 1, 1, 2, 3, 0):
            (got,), (expected,) = compiled([frames[i]]), model([frames[i]])
            assert got.keys() == expected.keys()
            assert torch.equal(got["labels"], expected["labels"])
            for key in ("boxes", "scores"):  # pixels of a box of hundreds; probabilities
                torch.testing.assert_close(got[key], expected[key], rtol=1e-4, atol=1e-4)
    stats = deltafx.stats(compiled)
    delta = sum(node.dense_macs for node in stats.nodes.values())
    assert delta >= 0.95 * stats.dense_macs


def test_all_are_there() -> None:
    assert set(CASES) >= SPREAD
