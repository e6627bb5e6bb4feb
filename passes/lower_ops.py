"""lower_ops: dense functions become operators on the state.

Enters: the planned graph. Leaves: a new graph over the attributes of a state and constants.

    conv2d(x=a, weight=w, act="relu")
    deltafx.conv2d(acc_n, mask_n, counts_n, acc_a, mask_a, const_n_weight, ..., threshold_n)

Where `share_lists` found several convolutions whose candidates are found at once, that is a call
before the first of them; what `list_ahead` wants found beside a convolution is a call before that.
A block of `recompute_maps` is lowered at its first call, as often as its streams take turns.
The calls that run beside others are marked as `run_beside` has them. The masks are cleared first.
Dense calls read accumulators as ordinary tensors. What leaves the graph is copied where it is, or
may show, an accumulator: the next frame must not change it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from deltafx.ops import DeltaOp, delta_op, is_view
from deltafx.ops.base import constant
from deltafx.ops.views import slice_channels
from deltafx.passes.context import Context
from deltafx.passes.list_ahead import AHEAD
from deltafx.passes.recompute_maps import BLOCK, BlockCalls
from deltafx.passes.run_beside import BESIDE
from deltafx.passes.share_lists import FURTHER, LIST, FurtherList, Window, window_of
from deltafx.state import (
    COUNTS,
    MASKS,
    Part,
    StatePlan,
    acc_name,
    counts_name,
    list_name,
    mask_name,
    place_name,
    scale_name,
    threshold_name,
)

aten = torch.ops.aten


class _Lowering:
    """The new graph while it grows; `part`: of which streams, where not of all."""

    def __init__(self, plan: StatePlan, policy: str) -> None:
        self.plan = plan
        self.policy = policy
        self.graph = fx.Graph()
        self.constants: dict[str, Tensor] = {}
        self.dense: dict[fx.Node, fx.Node] = {}
        self.shows_state: set[fx.Node] = set()
        self.part: Part | None = None
        self._attributes: dict[str, fx.Node] = {}
        self._kept: dict[tuple[fx.Node, str], str] = {}

    def attribute(self, name: str) -> fx.Node:
        """The node that reads an attribute of the emitted module."""
        if name not in self._attributes:
            self._attributes[name] = self.graph.get_attr(name)
        return self._attributes[name]

    def keep(self, owner: fx.Node, argument: str, tensor: Tensor) -> fx.Node:
        """Makes an argument of a node an attribute.

        The name cannot be one of the state's, nor another node's: nodes are named by the user.
        """
        if (owner, argument) not in self._kept:
            name = base = f"const_{owner.name}_{argument}"
            while name in self.constants:
                name = f"{base}_{len(self.constants)}"
            self.constants[name] = tensor
            self._kept[owner, argument] = name
        return self.attribute(self._kept[owner, argument])

    def place(self, node: fx.Node) -> fx.Node:
        """The node that reads a delta node's feature map."""
        place = self.plan.places[node.name]
        if self.part is not None and self.plan.kept(node.name):
            return self.attribute(acc_name(place.slot, self.part))
        return self.attribute(place_name(self.plan, place))

    def mask(self, node: fx.Node) -> fx.Node:
        """The node that reads the update mask of a delta node."""
        part = self.part if self.plan.kept(node.name) else None
        return self.attribute(mask_name(self.plan.places[node.name].slot, part))

    def counts(self, node: fx.Node) -> fx.Node:
        """The node that reads a delta node's row of counts."""
        return self.attribute(counts_name(node.name, self.part))

    def read(self, node: fx.Node) -> fx.Node:
        """What a dense call reads for a node of the old graph."""
        if node.meta.get("delta"):
            return self.place(node)
        if node.op == "get_attr":
            found = constant(node)
            assert found is not None
            return self.keep(node, "value", found)
        return self.dense[node]


def lower_ops(gm: fx.GraphModule, context: Context) -> tuple[fx.Graph, dict[str, Tensor]]:
    """Lowers; returns the new graph and its constants by attribute name."""
    lowering = _Lowering(context.plan, context.config.policy)
    count = 0
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            lowering.dense[node] = lowering.graph.placeholder(node.name)
    if context.plan.slots:
        arenas = (lowering.attribute(MASKS), lowering.attribute(COUNTS))
        lowering.graph.call_function(torch.ops.deltafx.clear_masks.default, arenas)
    lowered: set[fx.Node] = set()
    for node in gm.graph.nodes:
        op = delta_op(node)
        if node.op in ("placeholder", "get_attr") or (is_view(node) and node.meta.get("delta")):
            continue
        if node.op == "output":
            _lower_output(lowering, node)
        elif op is not None and node.meta.get("delta"):
            if BLOCK in node.meta:
                _lower_block(lowering, node.meta[BLOCK])
                lowered |= set(node.meta[BLOCK].calls)
            elif node not in lowered:
                _lower_delta(lowering, node, op)
            count += 1
        else:
            _lower_dense(lowering, node)
    context.counts["lower_ops"] = count
    lowering.graph.lint()
    return lowering.graph, lowering.constants


def _lower_block(lowering: _Lowering, block: BlockCalls) -> None:
    """The calls of a block of `recompute_maps`; nothing else reads its inner maps."""
    for i in range(block.parts):
        lowering.part = Part(i, block.parts) if block.parts > 1 else None
        for made in block.lists:
            first, *others = made.readers
            source = lowering.mask(made.source)
            find = _find_candidates(lowering, first, source, None, made.window, _same(others))
            if first is not block.calls[0]:
                find.meta[BESIDE] = first.meta[LIST]
        for node in block.calls:
            op = delta_op(node)
            assert op is not None
            _lower_delta(lowering, node, op)
    lowering.part = None


def _lower_delta(lowering: _Lowering, node: fx.Node, op: DeltaOp) -> None:
    own: dict[str, Any] = {
        "acc": lowering.place(node),
        "mask": lowering.mask(node),
        "counts": lowering.counts(node),
        "inv_scale": None,
        "threshold": None,
        "policy": lowering.policy,
        "memory": None,
        "listed": LIST in node.meta,
        # What is found beside it counts on its active sites being among those of its input.
        "filtered": LIST in node.meta and AHEAD in node.meta,
    }
    if lowering.plan.lists:
        number = node.meta.get(LIST, node.meta.get(BESIDE, 0))
        own["memory"] = lowering.attribute(list_name(number))
    if node.meta["truncates"]:
        own["inv_scale"] = lowering.attribute(scale_name(node.name))
        own["threshold"] = lowering.attribute(threshold_name(node.name))
    if op.workspace is not None:
        own |= {k: lowering.attribute(f"{k}_{node.name}") for k in op.workspace(node)}
    own |= _given(lowering, node, op)
    if AHEAD in node.meta:
        first, *others = node.meta[AHEAD].readers
        source, window = lowering.mask(node.meta[AHEAD].source), window_of(first)
        find = _find_candidates(lowering, first, source, None, window, _same(others))
        find.meta[BESIDE] = first.meta[LIST]
    if FURTHER in node.meta:
        residual = own["residual_mask"] if node.kwargs.get("residual") is not None else None
        further = node.meta[FURTHER]
        _find_candidates(lowering, node, own["x_mask"], residual, window_of(node), further)
    schema = op.operator._schema
    args = [own[a.name] if a.name in own else _absent(a) for a in schema.arguments]
    lowered = lowering.graph.call_function(op.operator, tuple(args))
    lowered.meta["lowered_from"] = node.name
    if BESIDE in node.meta:
        lowered.meta[BESIDE] = node.meta[BESIDE]


def _same(readers: Sequence[fx.Node]) -> tuple[FurtherList, ...]:
    """Of others that read the same list."""
    return tuple(FurtherList(reader, None, 1) for reader in readers)


def _find_candidates(
    lowering: _Lowering,
    node: fx.Node,
    source: fx.Node,
    residual: fx.Node | None,
    window: Window,
    further_lists: Sequence[FurtherList],
) -> fx.Node:
    """The call that lists the candidates of a convolution and of those behind it.

    Args:
        lowering: The new graph.
        node: The convolution.
        source: The mask that the windows of its sites are to touch.
        residual: The mask whose sites are candidates as well.
        window: Of its sites.
        further_lists: Those that are made along.
    """
    args: list[Any] = [
        lowering.attribute(list_name(node.meta[LIST])),
        lowering.counts(node),
        source,
        residual,
        *window,
    ]
    for further in further_lists:
        args += [
            lowering.attribute(list_name(further.node.meta[LIST])),
            lowering.counts(further.node),
            None if further.source is None else lowering.mask(further.source),
            further.stride,
        ]
    return lowering.graph.call_function(torch.ops.deltafx.find_candidates.default, tuple(args))


def _given(lowering: _Lowering, node: fx.Node, op: DeltaOp) -> dict[str, Any]:
    """The operator's arguments that the call of the dense function tells."""
    kwargs: dict[str, Any] = {}
    for name, arg in node.kwargs.items():
        tensor = constant(arg)
        kwargs[name] = arg if tensor is None or name in op.inputs else tensor
    if op.prepare is not None:
        kwargs = op.prepare(node, kwargs)
    given: dict[str, Any] = {}
    for name, arg in kwargs.items():
        if isinstance(arg, fx.Node) and arg.meta.get("delta"):
            given[name] = lowering.place(arg)
            given[f"{name}_mask"] = lowering.mask(arg)
        elif isinstance(arg, fx.Node):
            given[name] = lowering.read(arg)
        elif isinstance(arg, Tensor):
            tensor = arg.float() if arg.dtype == torch.float64 else arg
            given[name] = lowering.keep(node, name, tensor.contiguous())
        else:
            given[name] = list(arg) if isinstance(arg, tuple) else arg
    return given


_ABSENT: Mapping[str, Any] = {
    "act": "identity",
    "act_params": [],
    "pre_act": "identity",
    "stride": [1, 1],
    "padding": [0, 0],
    "dilation": [1, 1],
    "output_padding": [0, 0],
    "groups": 1,
    "residual_after_act": False,
    "count_include_pad": True,
    "align_corners": False,
    "value": 0.0,
    "block": 1,
}


def _absent(argument: Any) -> Any:
    """The value of an argument that the call leaves out: the dense function's default."""
    return _ABSENT.get(argument.name)


def _lower_dense(lowering: _Lowering, node: fx.Node) -> None:
    new = lowering.graph.node_copy(node, lowering.read)
    lowering.dense[node] = new
    shows = any(_is_shared(lowering, n) for n in node.all_input_nodes)
    if shows and _may_alias(node):
        lowering.shows_state.add(node)


def _is_shared(lowering: _Lowering, node: fx.Node) -> bool:
    """Whether a node's memory is not its own: the state's, the caller's, a weight's, or a view."""
    mine = node.op == "call_function" and not node.meta.get("delta")
    return not mine or node in lowering.shows_state


def _may_alias(node: fx.Node) -> bool:
    if isinstance(node.target, torch._ops.OpOverload):
        returns = node.target._schema.returns
        lists = any("[]" in str(r.type) or "List" in str(r.type) for r in returns)
        return lists or any(r.alias_info is not None for r in returns)
    return node.target is slice_channels or delta_op(node) is None


def _lower_output(lowering: _Lowering, node: fx.Node) -> None:
    def leave(source: Any) -> Any:
        read = lowering.read(source)
        if not _is_shared(lowering, source):
            return read
        return lowering.graph.call_function(aten.clone.default, (read,))

    lowering.graph.output(fx.node.map_arg(node.args[0], leave))
