"""Every detector of torchvision at threshold 0: what the dense model finds, in every frame."""

from __future__ import annotations

import pytest
import torch

import deltafx
from tests.models.detectors import DETECTORS, DetectionOracle, detector_case
from tests.models.frames import PLAIN, clip

FAST = {"fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large"}
"""For `make test`; the rest are slow."""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in DETECTORS]
)
@torch.no_grad()
def test_finds_what_the_dense_model_finds(name: str) -> None:
    case = detector_case(name)
    model = case.load()
    compiled = deltafx.compile(model, threshold=0)
    oracle = case.oracle(model)
    for i, frame in enumerate(case.frames()):
        oracle.compare(compiled(*frame), *frame)
        if i == 2:
            nodes = compiled.stats().nodes
            assert all(n.candidates == 0 for n in nodes.values() if n.dense_macs)
    oracle.check()
    explained = compiled.explain()
    assert case.share(explained) >= 0.95
    assert {n.kind for n in explained if n.name.startswith("roi_heads")} <= {"dense"}
    if "rcnn" in name:
        assert list(compiled.regions) == ["backbone", "rpn.head"]
    else:
        assert list(compiled.regions) == ["backbone", "head"]


@torch.no_grad()
def test_pictures_of_changing_sizes() -> None:
    model = detector_case("fasterrcnn_mobilenet_v3_large_320_fpn").load()
    compiled = deltafx.compile(model, threshold=0, max_states=3)
    oracle = DetectionOracle(model)
    sizes = [(96, 128), (128, 96), (96, 96), (96, 128), (64, 160), (96, 128)]
    for i, size in enumerate(sizes):
        frame = list(clip("vtest", size, i + 1, PLAIN)[-1:])
        if i == 4:
            frame += list(clip("carphone", (96, 112), 1, PLAIN))  # two streams, of two sizes
        oracle.compare(compiled(frame), frame)
    oracle.check()
    assert all(len(region._cache) == 3 for region in compiled.regions.values())


def test_all_are_there() -> None:
    assert len(DETECTORS) == 12
    assert set(DETECTORS) >= FAST
