"""The invariants of the update rule, over random nets and random scenes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import fx
from torch.utils import _pytree as pytree

import deltafx
from deltafx.ops import is_view
from deltafx.ops.base import constant
from deltafx.passes import Context, run_pipeline
from deltafx.passes.normalize_graph import normalize_graph
from deltafx.passes.trace_model import trace_model
from tests.exactness import Oracle
from tests.nets import Net, nets
from tests.scenes import Scene, scenes

GROUP = 64
"""Channels that are truncated together, as in the operators."""

CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]


def examples(count: int) -> settings:
    return settings(
        max_examples=count,
        deadline=None,
        suppress_health_check=CHECKS,
        derandomize=True,
        database=None,
        print_blob=True,
    )


Made = tuple[Net, tuple[int, int, int]]


def check_exact(
    made: Made, scene: Scene, streams: int, dtype: torch.dtype, device: torch.device, **options: Any
) -> None:
    """I1, and I3: whatever the state held before, and no work for a static frame."""
    net, shape = made[0].to(device, dtype), made[1]
    compiled = deltafx.compile(net, threshold=0, **options)
    oracle = Oracle(net)
    for i, (event, frame) in enumerate(scene.frames(streams, shape, dtype, device)):
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
def test_exact_at_zero(made: Made, scene: Scene, streams: int, device: torch.device) -> None:
    check_exact(made, scene, streams, torch.float32, device)


@given(made=nets(), scene=scenes(), streams=st.integers(1, 2))
@examples(15)
def test_exact_at_zero_bf16(made: Made, scene: Scene, streams: int, device: torch.device) -> None:
    check_exact(made, scene, streams, torch.bfloat16, device)


@pytest.mark.slow
@given(made=nets(), scene=scenes(), streams=st.integers(1, 3))
@examples(500)
def test_exact_at_zero_over_many_nets(
    made: Made, scene: Scene, streams: int, device: torch.device
) -> None:
    check_exact(made, scene, streams, torch.float32, device)


@pytest.mark.slow
@given(made=nets(), scene=scenes(), streams=st.integers(1, 2))
@examples(200)
def test_exact_at_zero_bf16_over_many_nets(
    made: Made, scene: Scene, streams: int, device: torch.device
) -> None:
    check_exact(made, scene, streams, torch.bfloat16, device)


def raised_graph(compiled: deltafx.DeltaModule, frame: torch.Tensor) -> fx.GraphModule:
    """The graph before lowering, whose dense functions can be evaluated, with the same names."""
    traced = trace_model(compiled.model)
    gm = normalize_graph(traced, traced.bind((frame,), {}))
    context = Context(compiled.config)
    run_pipeline(gm, context)
    assert context.plan == compiled._require().instance.plan
    gm.meta["plan"] = context.plan
    return gm


def evaluate(gm: fx.GraphModule, compiled: deltafx.DeltaModule, frame: torch.Tensor) -> dict:
    """Every delta node's `f` of its inputs' accumulators: in fp64, and in the dtype itself."""
    known: dict[fx.Node, torch.Tensor] = {}
    found: dict[fx.Node, tuple[torch.Tensor, torch.Tensor]] = {}
    for node in gm.graph.nodes:
        if node.op == "output":
            continue
        if node.op == "placeholder":
            known[node] = frame
        elif node.op == "get_attr":
            known[node] = constant(node)
        elif node.meta.get("delta"):
            args = fx.node.map_arg(node.kwargs, known.__getitem__)
            wide = pytree.tree_map_only(torch.Tensor, lambda t: t.double(), args)
            known[node] = node.target(**args)
            if gm.meta["plan"].kept(node.name):
                found[node] = node.target(**wide), known[node]
                known[node] = compiled.accumulator(node.name)
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*args, **kwargs)
    return found


def norms(change: torch.Tensor, policy: str, block: int) -> torch.Tensor:
    """The policy's norm of each truncation group; of each square, where the input is gated so."""
    if block > 1:
        ones = torch.ones_like(change[:, :1])

        def total(t):
            return F.avg_pool2d(t, block, ceil_mode=True, divisor_override=1)

        count = total(ones) * change.shape[1]
        return (total(change.square().sum(1, keepdim=True)) / count).sqrt()
    groups = change.split(GROUP, 1)
    if policy == "max":
        return torch.stack([g.abs().amax(1) for g in groups])
    return torch.stack([g.square().mean(1).sqrt() for g in groups])


def check_bounded(
    made: Made, scene: Scene, threshold: float, policy: str, block: int, dtype: torch.dtype,
    device: torch.device, **options: Any,
) -> None:  # fmt: skip
    net, shape = made[0].to(device, dtype), made[1]
    compiled = deltafx.compile(
        net, threshold=threshold, input_threshold=threshold / 2, policy=policy, input_block=block,
        refresh_every=scene.seed % 4, **options,
    )  # fmt: skip
    gm = None
    with torch.no_grad():
        for event, frame in scene.frames(2, shape, dtype, device):
            if event == "reset":
                compiled.reset()
            elif event == "reset stream":
                compiled.reset(0)
            compiled(frame)
            if event == "nan":
                continue
            gm = gm or raised_graph(compiled, frame)
            for node, (exact, rough) in evaluate(gm, compiled, frame).items():
                if is_view(node):
                    continue
                acc = compiled.accumulator(node.name).double()
                assert acc.isfinite().all() or not exact.isfinite().all(), node.name
                t, scale = 0.0, torch.ones(acc.shape[1], dtype=torch.float64, device=device)
                if node.meta["truncates"]:
                    t = compiled.thresholds[node.name]
                    scale = compiled.state_tensors()[f"inv_scale_{node.name}"].double()
                gate = node.kwargs.get("block", 1) if policy == "rms" and t > 0 else 1
                rows = scale.reshape(1, -1, 1, 1)
                change = norms((acc - exact) * rows, policy, gate)
                # What the arithmetic itself may be off by: twice the dense function's own error,
                # and two units in the last place (our gelu is within 1.5 times torch's error).
                own = 2 * norms((rough.double() - exact) * rows, policy, gate).max()
                last = 2 * torch.finfo(dtype).eps * norms(exact * rows, policy, gate)
                bound = t * (1 + 1e-5) + own + last
                assert (change <= bound).all(), (node.name, float((change - bound).max()))


POLICIES = st.sampled_from(["rms", "max"])


@given(
    made=nets(), scene=scenes(), threshold=st.sampled_from([0.01, 0.1, 1.0]), policy=POLICIES,
    block=st.sampled_from([1, 3, 8]),
)  # fmt: skip
@examples(25)
def test_bounded(
    made: Made, scene: Scene, threshold: float, policy: str, block: int, device: torch.device
) -> None:
    """I2: no group is farther than t from f of its inputs' accumulators."""
    check_bounded(made, scene, threshold, policy, block, torch.float32, device)


@pytest.mark.slow
@given(
    made=nets(), scene=scenes(), threshold=st.sampled_from([0.01, 0.1, 1.0]), policy=POLICIES,
    block=st.sampled_from([1, 3, 8]), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
@examples(300)
def test_bounded_over_many_nets(
    made: Made, scene: Scene, threshold: float, policy: str, block: int, dtype: torch.dtype,
    device: torch.device,
) -> None:  # fmt: skip
    check_bounded(made, scene, threshold, policy, block, dtype, device)


@given(made=nets(), scene=scenes(), threshold=st.sampled_from([0, 0.1, 0.5]))
@examples(12)
def test_streams_do_not_touch_each_other(
    made: Made, scene: Scene, threshold: float, device: torch.device
) -> None:
    """I4: a stream in a batch has the accumulators and masks that it has alone, bit for bit.

    So it is where each convolution is computed at its candidates; the choice of a dense frame is
    one for all streams.
    """
    net, shape = made[0].to(device), made[1]
    together = deltafx.compile(net, threshold=threshold, dense_above=1)
    alone = [deltafx.compile(net, threshold=threshold, dense_above=1) for _ in range(2)]
    generator = torch.Generator().manual_seed(scene.seed)
    first = torch.randn(1, *shape, generator=generator).to(device)
    for compiled in (together, *alone):
        compiled.calibrate([first])
    gm = raised_graph(alone[0], first)
    delta = delta_only(gm)
    other = Scene(scene.events[::-1], scene.seed + 1)
    pairs = zip(
        scene.frames(1, shape, device=device), other.frames(1, shape, device=device), strict=True
    )
    for (event, a), (_, b) in pairs:
        if event == "reset stream":
            together.reset(1)
            alone[1].reset(0)
        together(torch.cat([a, b]))
        alone[0](a)
        alone[1](b)
        for name in delta:
            acc, mask = together.accumulator(name), together.update_mask(name)
            for i, compiled in enumerate(alone):
                mine = compiled.accumulator(name)[0]
                assert torch.equal(acc[i].nan_to_num(7), mine.nan_to_num(7)), name
                assert torch.equal(mask[i], compiled.update_mask(name)[0]), name


def delta_only(gm: fx.GraphModule) -> list[str]:
    """Delta nodes that no dense op is behind: torch's may round otherwise in another batch."""
    dense: set[fx.Node] = set()
    for node in gm.graph.nodes:
        reads_dense = any(n in dense for n in node.all_input_nodes)
        own = node.op == "call_function" and not node.meta.get("delta")
        if reads_dense or own:
            dense.add(node)
    return [n.name for n in gm.graph.nodes if n.meta.get("delta") and n not in dense]
