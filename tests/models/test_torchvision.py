"""Every image model of torchvision at threshold 0: as exact as the dense model, and all delta.

Random weights from a seed, batch norm statistics from real frames; small frames of two streams,
with a static frame, a cut to another clip, a frame with NaNs and one after it among them.
"""

from __future__ import annotations

import pytest
import torch

import deltafx
from tests.models.catalogue import CLASSIFICATION, SEGMENTATION, torchvision_cases

CASES = {case.name: case for case in torchvision_cases()}

SPREAD = {
    "alexnet", "squeezenet1_1", "resnet18", "mobilenet_v2", "mobilenet_v3_small", "densenet121",
    "shufflenet_v2_x0_5", "mnasnet0_5", "regnet_y_400mf", "lraspp_mobilenet_v3_large",
}  # fmt: skip
"""Ten families for `make test`; the rest are slow."""

DELTA = {
    "conv2d", "conv_transpose2d", "batch_norm", "layer_norm", "relu", "relu_", "relu6", "hardswish",
    "hardsigmoid", "hardtanh", "silu", "gelu", "sigmoid", "max_pool2d", "avg_pool2d",
    "adaptive_avg_pool2d", "adaptive_max_pool2d", "mean", "upsample_bilinear2d", "add", "mul",
    "cat", "upsample_nearest2d", "linear",
}  # fmt: skip
"""What must not be left dense in a plain CNN."""


def parameters():
    for name in CASES:
        yield pytest.param(name, marks=[] if name in SPREAD else pytest.mark.slow)


@pytest.mark.parametrize("name", parameters())
def test_as_exact_as_the_dense_model(name: str, device: torch.device) -> None:
    case = CASES[name]
    model = case.load().to(device)
    compiled = deltafx.compile(model, threshold=0)
    oracle = case.oracle(model)
    for i, (frame,) in enumerate(case.frames()):
        frame = frame.to(device)
        oracle.compare(compiled(frame), frame)
        if i == 2:
            encodes = {n.name for n in compiled.explain() if n.op == "encode"}
            nodes = compiled.stats().nodes
            assert all(n.candidates == 0 for k, n in nodes.items() if k not in encodes)
    oracle.check()
    if case.convolutional:
        dense = {n.name: n.op for n in compiled.explain() if n.kind == "dense"}
        left = {k: op for k, op in dense.items() if op.split(".")[0] in DELTA}
        assert not left, f"dense nodes: {left}"
        assert compiled.explain().delta_share == 1.0


def test_all_are_there() -> None:
    assert len(CLASSIFICATION) == 80
    assert len(SEGMENTATION) == 6
    assert set(CASES) >= SPREAD
