"""fuse_activations: an activation by itself becomes the end of the op before it.

conv2d(x=x, ...) -> affine(act="relu")
conv2d(x=x, ..., act="relu")
"""

from __future__ import annotations

from typing import Any

from torch import fx

from deltafx.ops import delta_op
from deltafx.ops.affine import affine
from deltafx.passes.context import Context, clean, only_user


def fuse_activations(gm: fx.GraphModule, context: Context) -> int:
    """Fuses; returns how many."""
    count = 0
    for node in list(gm.graph.nodes):
        if node.target is not affine or "scale" in node.kwargs or "shift" in node.kwargs:
            continue
        producer: Any = node.kwargs["x"]
        op = delta_op(producer)
        if op is None or not op.has_activation or only_user(producer) is not node:
            continue
        if producer.kwargs.get("act", "identity") != "identity":
            continue
        act = {k: v for k, v in node.kwargs.items() if k.startswith("act")}
        if "act_weight" in act:
            producer.append(node)
            _move_before(act["act_weight"], producer)
        producer.kwargs = {**producer.kwargs, **act}
        node.replace_all_uses_with(producer)
        gm.graph.erase_node(node)
        count += 1
    clean(gm)
    return count


def _move_before(attribute: Any, node: fx.Node) -> None:
    """A constant must stand before its reader."""
    node.prepend(attribute)
