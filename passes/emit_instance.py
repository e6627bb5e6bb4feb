"""emit_instance: the pipeline's end, an `Instance` that can run frames.

Enters: a traced model, options, example arguments. Leaves: the lowered graph with its constants,
the plan of its state, and what is known of every node. Nothing of the state is allocated yet.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode

from deltafx.config import Config
from deltafx.errors import StateLimitWarning
from deltafx.ops import delta_op, is_view
from deltafx.ops.base import value
from deltafx.ops.encode import encode, is_frame
from deltafx.passes import run_pipeline
from deltafx.passes.compute_everywhere import compute_everywhere
from deltafx.passes.context import Context
from deltafx.passes.insert_casts import no_autocast
from deltafx.passes.lower_ops import lower_ops
from deltafx.passes.normalize_graph import normalize_graph
from deltafx.passes.share_constants import ConstantPool, share_constants
from deltafx.passes.trace_model import TracedModel
from deltafx.state import StatePlan
from deltafx.verify import verify


@dataclasses.dataclass(frozen=True)
class NodeInfo:
    """What a node of a compiled model is.

    Attributes:
        name: Its name, the one that `thresholds` takes.
        op: The operator or ATen call.
        kind: `"delta"`, `"view"` (free: a place in another node's accumulator) or `"dense"`.
        reason: Why it is that.
        shape: Of its result; empty where that is no tensor.
        truncates: Whether it has a threshold.
        region: Of a delta node or view: the connected part of the delta world it is in.
        sites: Output sites, all streams; 0 for a dense node.
        macs_per_site: Multiply-adds of a site.
        dense_macs: Multiply-adds of the whole node.
    """

    name: str
    op: str
    kind: str
    reason: str
    shape: tuple[int, ...]
    truncates: bool
    region: int | None
    sites: int
    macs_per_site: int
    dense_macs: int


@dataclasses.dataclass(frozen=True)
class Instance:
    """A model compiled for the shapes, dtypes and device of its inputs.

    Attributes:
        graph: Over flat tensors; its attributes are `constants` and the state that `plan` tells.
        constants: Packed weights and the like, by attribute name.
        plan: Of the state.
        nodes: Every node, in order.
        frame_inputs: Names of the encodes of the model's own inputs.
        counts: Rewrites by pass.
        out_spec: Builds the model's output of the graph's.
        writes_inputs: Whether the model writes into its arguments; the graph does not.
        everywhere: The graph for frames that changed nearly everywhere, over the same attributes;
            `None` where there is no such branch.
    """

    graph: fx.Graph
    constants: dict[str, Tensor]
    plan: StatePlan
    nodes: tuple[NodeInfo, ...]
    frame_inputs: tuple[str, ...]
    counts: dict[str, int]
    out_spec: pytree.TreeSpec
    writes_inputs: bool
    everywhere: fx.Graph | None = None


def emit_instance(
    traced: TracedModel, config: Config, args: Sequence[Any], pool: ConstantPool
) -> Instance:
    """Runs every stage for the given example arguments.

    Args:
        traced: The model.
        config: The options.
        args: As `normalize_graph` takes them.
        pool: Constants of other instances, to be shared with them.
    """
    gm = normalize_graph(traced, args)
    with no_autocast():  # the graph says all of it by now
        made = _emit(gm, config)
    weights = (*traced.root.parameters(), *traced.root.buffers())
    return dataclasses.replace(made, constants=share_constants(made.constants, weights, pool))


def _emit(gm: fx.GraphModule, config: Config) -> Instance:
    context = Context(config)
    run_pipeline(gm, context)
    limit, needed = config.max_state_bytes, context.plan.bytes()
    if isinstance(limit, int) and needed > limit:
        warnings.warn(
            f"a state takes {needed} bytes, and max_state_bytes is {limit}: no other maps can be "
            "computed anew",
            StateLimitWarning,
            stacklevel=2,
        )
    graph, constants = lower_ops(gm, context)
    verify(graph, "lowered", context.plan)
    everywhere = None
    if config.dense_above != 1 and config.cuda_graph and context.plan.device.type == "cuda":
        everywhere, weights = compute_everywhere(gm, graph, context.plan)
        constants |= weights
        verify(everywhere, "lowered", context.plan)
    nodes = tuple(
        _describe(node, context)
        for node in gm.graph.nodes
        if node.op == "call_function" and "val" in node.meta
    )
    frame_inputs = tuple(
        node.name for node in gm.graph.nodes if node.target is encode and is_frame(node.kwargs["x"])
    )
    return Instance(
        graph, constants, context.plan, nodes, frame_inputs, context.counts, gm.meta["out_spec"],
        gm.meta["writes_inputs"],
        everywhere,
    )  # fmt: skip


def _describe(node: fx.Node, context: Context) -> NodeInfo:
    val = node.meta["val"]
    shape = tuple(int(s) for s in val.shape) if isinstance(val, Tensor) else ()
    op = delta_op(node)
    common = {"name": node.name, "shape": shape, "region": node.meta.get("region")}
    if op is not None and node.meta.get("delta"):
        sites = shape[0] * shape[2] * shape[3]
        per_site = op.macs_per_site(node)
        return NodeInfo(
            op=op.name,
            kind="delta",
            reason="computed where its inputs changed"
            if context.plan.kept(node.name)
            else "not kept: computed wherever its block is",
            truncates=node.meta["truncates"],
            sites=sites,
            macs_per_site=per_site,
            dense_macs=sites * per_site,
            **common,
        )
    view = is_view(node) and node.meta.get("delta")
    kind, reason = (
        ("view", "a place in an accumulator") if view else ("dense", _reason(node, context))
    )
    return NodeInfo(
        op=getattr(node.target, "__name__", str(node.target)),
        kind=kind,
        reason=reason,
        truncates=False,
        sites=0,
        macs_per_site=0,
        dense_macs=0 if view else _dense_macs(node),
        **common,
    )


def _reason(node: fx.Node, context: Context) -> str:
    return context.refusals.get(node, "there is no delta op for it")


def _dense_macs(node: fx.Node) -> int:
    """Multiply-adds of an ATen call, as torch's FLOP counter counts them."""

    def fake(n: fx.Node) -> Any:
        return value(n) if n.op != "get_attr" else mode.from_tensor(n.meta["val"])

    modes = [n.meta["val"] for n in node.all_input_nodes if hasattr(n.meta.get("val"), "fake_mode")]
    if not modes or node.meta.get("mutated"):
        return 0
    mode = modes[0].fake_mode
    with mode, FlopCounterMode(display=False) as counter:
        node.target(*fx.node.map_arg(node.args, fake), **fx.node.map_arg(node.kwargs, fake))  # type: ignore[operator]
    return counter.get_total_flops() // 2
