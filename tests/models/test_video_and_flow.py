"""Every video and optical flow model of torchvision at threshold 0, over six frames.

The video CNNs are delta; of the transformers attention runs dense, which `explain` tells. RAFT's
encoders and its update block, call by call, are delta regions.
"""

from __future__ import annotations

import pytest
import torch

import deltafx
from tests.exactness import floats
from tests.models.video_and_flow import FLOW, VIDEO, flow_cases, video_cases

CASES = {case.name: case for case in video_cases() + flow_cases()}

FAST = {"r3d_18", "raft_small"}
"""For `make test`; the rest are slow."""


def marked(names: list[str]) -> list:
    return [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in names]


@pytest.mark.parametrize("name", marked(VIDEO))
def test_video_models(name: str) -> None:
    case = CASES[name]
    model = case.load()
    compiled = deltafx.compile(model, threshold=0)
    oracle = case.oracle(model)
    for frame in case.frames():
        oracle.compare(compiled(*frame), *frame)
    oracle.check()
    told = compiled.explain()
    if case.convolutional:
        assert told.delta_share >= 0.95
    else:
        assert "there is no delta op for it" in str(told)


@pytest.mark.parametrize("name", marked(FLOW))
@torch.no_grad()
def test_flow_models(name: str) -> None:
    case = CASES[name]
    model = case.load()
    compiled = deltafx.compile(model, threshold=0)
    oracle = case.oracle(model)
    for i, frame in enumerate(case.frames()):
        found = compiled(*frame)
        assert len(floats(found)) == 12
        oracle.compare(found, *frame)
        if i == 3:
            nodes = compiled.stats().nodes.values()
            assert sum(n.candidates for n in nodes if n.dense_macs) == 0, "nothing has changed"
    oracle.check()
    assert {"feature_encoder", "context_encoder", "update_block", "update_block[11]"} <= set(
        compiled.regions
    )
    assert compiled.explain().delta_share >= 0.95


def test_all_are_there() -> None:
    assert (len(VIDEO), len(FLOW)) == (9, 2)
    assert set(VIDEO + FLOW) >= FAST
