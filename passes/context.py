"""What the passes share: the module under work is an `fx.GraphModule`; the rest stands here."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from torch import Tensor, fx

from deltafx.config import Config
from deltafx.ops.base import Call


@dataclasses.dataclass
class Context:
    """Of one run of the pipeline.

    Attributes:
        config: The options.
        counts: How many rewrites each pass did, by its name, in order.
        refusals: By node, why a rule left it dense.
        plan: Of the state, once there is one.
        dense_bytes: What the feature maps of a dense run take at their peak.
    """

    config: Config
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    refusals: dict[fx.Node, str] = dataclasses.field(default_factory=dict)
    plan: Any = None
    dense_bytes: int = 0


def add_constant(gm: fx.GraphModule, tensor: Tensor, near: fx.Node) -> fx.Node:
    """Registers a tensor with the module and inserts its `get_attr` node before `near`."""
    i = 0
    while hasattr(gm, f"_constant_{i}"):
        i += 1
    taken = gm.meta.setdefault("constants", 0)
    name = f"_constant_{max(i, taken)}"
    gm.meta["constants"] = max(i, taken) + 1
    gm.register_buffer(name, tensor, persistent=False)
    with gm.graph.inserting_before(near):
        node = gm.graph.create_node("get_attr", name, name=name)
    node.meta["val"] = tensor
    return node


def insert_call(
    gm: fx.GraphModule, call: Call, before: fx.Node, val: Any, name: str | None = None
) -> fx.Node:
    """Inserts a call of a dense function; tensors among its arguments become constants."""
    kwargs = {
        key: add_constant(gm, arg, before) if isinstance(arg, Tensor) else arg
        for key, arg in call.kwargs.items()
    }
    with gm.graph.inserting_before(before):
        node = gm.graph.create_node("call_function", call.target, (), kwargs, name=name)
    node.meta["val"] = val
    return node


def replace(gm: fx.GraphModule, node: fx.Node, call: Call) -> fx.Node:
    """Puts a call of a dense function in a node's place and gives it the node's name."""
    new = insert_call(gm, call, node, node.meta["val"])
    node.replace_all_uses_with(new)
    name = node.name
    gm.graph.erase_node(node)
    rename(new, name)
    return new


def rename(node: fx.Node, name: str) -> None:
    """Renames a node, also to the name of an erased one, which fx keeps reserved.

    Users address nodes by name, so `layer1_0_conv2` must not become `layer1_0_conv3`.
    """
    if all(other.name != name for other in node.graph.nodes):
        node.graph._graph_namespace._used_names.discard(name)
    node._rename(name)


def only_user(node: Any) -> fx.Node | None:
    """The one user of a node, if it has just one."""
    if not isinstance(node, fx.Node) or len(node.users) != 1:
        return None
    return next(iter(node.users))


def identifier(path: str) -> str:
    """A module path as a node name."""
    name = re.sub(r"\W+", "_", path).strip("_")
    return f"m_{name}" if not name or name[0].isdigit() else name


def clean(gm: fx.GraphModule) -> None:
    """Drops what no longer leads to an output, and constants that nobody reads."""
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    used = {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}
    for name in [n for n, _ in gm.named_buffers() if n not in used and "." not in n]:
        delattr(gm, name)


__all__ = [
    "Context",
    "add_constant",
    "clean",
    "identifier",
    "insert_call",
    "only_user",
    "rename",
    "replace",
]
