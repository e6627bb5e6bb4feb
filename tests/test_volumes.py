"""The invariants of the update rule, over random 3-D nets and clips that go on in random ways."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from tests.exactness import exact_over
from tests.nets import Net
from tests.scenes import Scene, scenes
from tests.test_invariants import POLICIES, check_bounded, check_exact, examples
from tests.volume_nets import volume_nets

Made = tuple[Net, tuple[int, ...]]


def check_in(
    dtype: torch.dtype, made: Made, scene: Scene, streams: int, device: torch.device
) -> None:
    # torch itself has no 3-D mean of this dtype on the CPU.
    means = any(isinstance(m, nn.AvgPool3d) for m in made[0].modules())
    assume(not (means and dtype is torch.bfloat16 and device.type == "cpu"))
    check_exact(made, scene, streams, dtype, device)


@given(made=volume_nets(), scene=scenes(), streams=st.integers(1, 3))
@examples(30)
def test_exact_at_zero(made: Made, scene: Scene, streams: int, device: torch.device) -> None:
    check_exact(made, scene, streams, torch.float32, device)


@given(made=volume_nets(), scene=scenes(), streams=st.integers(1, 2))
@examples(15)
def test_exact_at_zero_bf16(made: Made, scene: Scene, streams: int, device: torch.device) -> None:
    check_in(torch.bfloat16, made, scene, streams, device)


@pytest.mark.slow
@given(
    made=volume_nets(), scene=scenes(), streams=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
@examples(400)
def test_exact_at_zero_over_many_nets(
    made: Made, scene: Scene, streams: int, dtype: torch.dtype, device: torch.device
) -> None:
    check_in(dtype, made, scene, streams, device)


@given(
    made=volume_nets(), scene=scenes(), threshold=st.sampled_from([0.01, 0.1, 1.0]),
    policy=POLICIES, block=st.sampled_from([1, 3, 8]),
)  # fmt: skip
@examples(15)
def test_bounded(
    made: Made, scene: Scene, threshold: float, policy: str, block: int, device: torch.device
) -> None:
    check_bounded(made, scene, threshold, policy, block, torch.float32, device)


@given(made=volume_nets(), streams=st.integers(1, 2))
@examples(8)
def test_through_torch_compile(made: Made, streams: int, device: torch.device) -> None:
    net, shape = made[0].to(device), made[1]
    torch.compiler.reset()
    compiled = torch.compile(net, backend="deltafx", options={"threshold": 0})
    exact_over(net, compiled, [torch.randn(streams, *shape, device=device) for _ in range(3)])
    torch.compiler.reset()
