"""The invariants of the update rule, over random nets and random scenes."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import deltafx
from tests.exactness import Oracle
from tests.nets import Net, nets
from tests.scenes import Scene, scenes

CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]


def examples(count: int) -> settings:
    return settings(
        max_examples=count, deadline=None, suppress_health_check=CHECKS, derandomize=True,
        print_blob=True,
    )  # fmt: skip


Made = tuple[Net, tuple[int, int, int]]


def check_exact(made: Made, scene: Scene, streams: int, dtype: torch.dtype) -> None:
    """I1, and I3: whatever the state held before, and no work for a static frame."""
    net, shape = made[0].to(dtype), made[1]
    compiled = deltafx.compile(net, threshold=0)
    oracle = Oracle(net)
    for i, (event, frame) in enumerate(scene.frames(streams, shape, dtype)):
        if i and event == "reset":
            compiled.reset()
        elif i and event == "reset stream":
            compiled.reset([i % streams])
        oracle.compare(compiled(frame), frame)
    oracle.check()
    again = compiled(frame)
    if not frame.isnan().any():
        again = compiled(frame)
        nodes = compiled.stats().nodes
        ops = {n.name: n.op for n in compiled.explain()}
        work = {k: v.candidates for k, v in nodes.items() if ops[k] != "encode" and v.candidates}
        assert not work, f"a static frame made work: {work}"
    assert isinstance(again, list)


@given(made=nets(), scene=scenes(), streams=st.integers(1, 3))
@examples(40)
def test_exact_at_zero(made: Made, scene: Scene, streams: int) -> None:
    check_exact(made, scene, streams, torch.float32)


@given(made=nets(), scene=scenes(), streams=st.integers(1, 2))
@examples(15)
def test_exact_at_zero_bf16(made: Made, scene: Scene, streams: int) -> None:
    check_exact(made, scene, streams, torch.bfloat16)


@pytest.mark.slow
@given(made=nets(), scene=scenes(), streams=st.integers(1, 3))
@examples(500)
def test_exact_at_zero_over_many_nets(made: Made, scene: Scene, streams: int) -> None:
    check_exact(made, scene, streams, torch.float32)


@pytest.mark.slow
@given(made=nets(), scene=scenes(), streams=st.integers(1, 2))
@examples(200)
def test_exact_at_zero_bf16_over_many_nets(made: Made, scene: Scene, streams: int) -> None:
    check_exact(made, scene, streams, torch.bfloat16)
