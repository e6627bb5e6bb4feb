"""fuse_residuals: the add of a residual becomes part of a convolution.

    conv2d(x=x, ...) -> binary(a=conv, b=r, op="add", act=f)
    conv2d(x=x, ..., residual=r, act=f)

and, where the convolution has an activation and the add has none, with `residual_after_act`. Of two
convolutions the one whose inputs are computed later takes the add: the other's result, which could
be there before, is its residual.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from deltafx.ops.base import value
from deltafx.ops.binary import binary
from deltafx.ops.conv2d import conv2d
from deltafx.ops.conv_transpose2d import conv_transpose2d
from deltafx.passes.context import Context, clean, only_user


def fuse_residuals(gm: fx.GraphModule, context: Context) -> int:
    """Fuses; returns how many."""
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    count = 0
    for node in list(gm.graph.nodes):
        if node.target is not binary or node.kwargs["op"] != "add":
            continue
        a, b = node.kwargs["a"], node.kwargs["b"]
        if a is b or value(a).shape != value(b).shape:
            continue
        pairs = [(a, b), (b, a)]
        pairs.sort(key=lambda p: (_last_input(p[0], order), order[p[0]]), reverse=True)
        for conv, residual in pairs:
            if _takes(conv, node):
                _fuse(gm, node, conv, residual)
                order[conv] = order[node]
                count += 1
                break
    clean(gm)
    return count


def _last_input(node: fx.Node, order: dict[fx.Node, int]) -> int:
    """Where in the graph all that a node reads is computed."""
    inputs = (n for n in node.all_input_nodes if n.op != "get_attr")
    return max((order[n] for n in inputs), default=-1)


def _takes(conv: Any, add: fx.Node) -> bool:
    if conv.target not in (conv2d, conv_transpose2d) or only_user(conv) is not add:
        return False
    if "residual" in conv.kwargs:
        return False
    plain = conv.kwargs.get("act", "identity") == "identity"
    return plain or add.kwargs.get("act", "identity") == "identity"


def _fuse(gm: fx.GraphModule, add: fx.Node, conv: Any, residual: Any) -> None:
    kwargs = {**conv.kwargs, "residual": residual}
    if conv.kwargs.get("act", "identity") != "identity":
        kwargs["residual_after_act"] = True
    else:
        kwargs |= {k: v for k, v in add.kwargs.items() if k.startswith("act")}
    add.prepend(conv)  # the residual is computed by now
    conv.kwargs = kwargs
    add.replace_all_uses_with(conv)
    gm.graph.erase_node(add)
