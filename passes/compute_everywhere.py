"""compute_everywhere: the same frame with every convolution computed at all of its sites.

    deltafx.conv2d(acc, mask, counts, x, x_mask, packed, ...)
    conv2d_everywhere(acc, mask, counts, not_finite, x, weight, ...)

Enters: the graph before and after lowering. Leaves: a lowered graph over the same state, which
gives the same results for every frame, and is the faster one where most of the picture changed. All
other operators stay; their candidates are everywhere then anyway.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, fx

from deltafx.ops.base import constant, value
from deltafx.ops.finish_conv2d import conv2d_everywhere
from deltafx.state import NOT_FINITE


def compute_everywhere(gm: fx.GraphModule, lowered: fx.Graph) -> tuple[fx.Graph, dict[str, Tensor]]:
    """Makes the graph; returns it with the weights that `lowered` holds packed only."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(lowered, {}))
    sources = {node.name: node for node in gm.graph.nodes}
    weights: dict[str, Tensor] = {}
    not_finite = None
    for node in list(graph.nodes):
        if node.target is not torch.ops.deltafx.conv2d.default:
            continue
        source = sources[node.meta["lowered_from"]]
        name = f"everywhere_{source.name}_weight"
        weights[name] = _weight(source)
        names = [a.name for a in node.target._schema.arguments]
        given = dict(zip(names, node.args, strict=True))
        with graph.inserting_before(node):
            not_finite = not_finite or graph.get_attr(NOT_FINITE)
            given |= {"not_finite": not_finite, "weight": graph.get_attr(name)}
            call = tuple(given[name] for name in _ARGUMENTS)
            graph.call_function(conv2d_everywhere, call).meta = dict(node.meta)
        graph.erase_node(node)
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    return graph, weights


_ARGUMENTS = tuple(inspect.signature(conv2d_everywhere).parameters)


def _weight(source: fx.Node) -> Tensor:
    """A convolution's weight as cuDNN wants it."""
    weight, like = constant(source.kwargs["weight"]), value(source)
    assert weight is not None
    return weight.to(like.device, like.dtype).contiguous(memory_format=torch.channels_last)


__all__ = ["compute_everywhere"]
