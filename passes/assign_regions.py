"""assign_regions: which nodes are delta, where dense tensors are encoded, who truncates.

Enters: dense functions and ATen calls, mixed. Leaves: `meta["delta"]` on every node whose feature
map has a place in the state, an `encode` wherever such a node reads a dense tensor,
`meta["truncates"]`, and `meta["region"]`, the connected part of the delta world a node is in.
"""

from __future__ import annotations

from typing import Any

import networkx as nx
from torch import fx

from deltafx.ops import delta_op, is_view
from deltafx.ops.base import Call, value
from deltafx.ops.encode import encode, is_frame
from deltafx.ops.gather_channels import gather_channels
from deltafx.ops.pad2d import pad2d
from deltafx.passes.context import Context, insert_call, only_user
from deltafx.passes.fuse_separables import is_depthwise, is_pointwise, is_separable


def assign_regions(gm: fx.GraphModule, context: Context) -> int:
    """Assigns; returns the number of delta nodes."""
    for node in gm.graph.nodes:
        if delta_op(node):
            node.meta["delta"] = True
        elif is_view(node):
            # A view of dense tensors only is an ordinary op.
            node.meta["delta"] = any(_is_delta(n) for n in node.all_input_nodes)
            if not node.meta["delta"]:
                context.refusals[node] = "all its inputs are dense"
    _insert_encodes(gm, context)
    for node in gm.graph.nodes:
        if _is_delta(node) and not is_view(node):
            node.meta["truncates"] = _truncates(node)
    graph = nx.Graph()
    for node in gm.graph.nodes:
        if _is_delta(node):
            graph.add_node(node)
            graph.add_edges_from((n, node) for n in node.all_input_nodes if _is_delta(n))
    for i, members in enumerate(nx.connected_components(graph)):
        for node in members:
            node.meta["region"] = i
    return graph.number_of_nodes()


def _is_delta(node: Any) -> bool:
    return isinstance(node, fx.Node) and bool(node.meta.get("delta"))


def maps_of(node: fx.Node) -> list[fx.Node]:
    """The feature maps that a delta node reads, each once."""
    op = delta_op(node)
    if op is not None:
        found = [node.kwargs.get(name) for name in op.inputs]
    elif node.kwargs.get("maps") is not None:
        found = list(node.kwargs["maps"])
    else:
        found = [node.kwargs["x"]]
    return list(dict.fromkeys(n for n in found if isinstance(n, fx.Node)))


def _insert_encodes(gm: fx.GraphModule, context: Context) -> None:
    encodes: dict[fx.Node, fx.Node] = {}
    # Constants may stand before the inputs.
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for node in list(gm.graph.nodes):
        if not _is_delta(node):
            continue
        for source in maps_of(node):
            if _is_delta(source):
                continue
            if source not in encodes:
                before = inputs[-1].next if source.op == "placeholder" else source.next
                encodes[source] = insert_encode(gm, context, source, before)
                encodes[source].meta["delta"] = True
            node.replace_input_with(source, encodes[source])


def insert_encode(
    gm: fx.GraphModule, context: Context, source: fx.Node, before: fx.Node
) -> fx.Node:
    """Inserts the `encode` of a dense tensor; a frame's is gated in blocks."""
    block = context.config.input_block if is_frame(source) else 1
    call = Call(encode, {"x": source, "block": block})
    return insert_call(gm, call, before, value(source), f"{source.name}_encoded")


def _truncates(node: fx.Node) -> bool:
    """Whether comparing pays: not for copies, nor inside an inverted residual."""
    if node.target in (gather_channels, pad2d):
        return False
    if node.users and is_pointwise(node):
        return not all(is_depthwise(user) for user in node.users)
    reader = only_user(node)
    return reader is None or not is_separable(reader) or reader.kwargs["x"] is not node
