"""functionalize_inplace: no op writes into its argument where a rewrite can tell.

    y = relu_(x)          y = relu(x)

The tracer already sends later readers of `x` to `y`. Where other views of the same memory are read
afterwards the write is kept: the memory becomes a copy of its own, so that no accumulator is ever
written to, and its nodes are marked `meta["mutated"]`, which keeps them and their readers dense.
"""

from __future__ import annotations

import torch
from torch import fx


def functionalize_inplace(gm: fx.GraphModule) -> int:
    """Rewrites in-place calls; returns how many."""
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    roots = _alias_roots(gm)
    count = 0
    for node in list(gm.graph.nodes):
        written = _written(node)
        if not written:
            continue
        functional = _functional(node)
        family = [n for n in order if n in roots and roots[n] is roots[written[0]]]
        read_later = any(
            order.get(user, len(order)) > order[node]
            for member in family
            if member is not node and not _derives(member, node, order)
            for user in member.users
            if user is not node
        )
        if functional is not None and not read_later:
            node.target = functional
            roots[node] = node
            count += 1
        else:
            _protect(gm, roots[written[0]], family)
    return count


def written_roots(gm: fx.GraphModule) -> list[fx.Node]:
    """The nodes whose memory an in-place call writes into."""
    roots = _alias_roots(gm)
    return [roots[source] for node in gm.graph.nodes for source in _written(node)]


def _written(node: fx.Node) -> list[fx.Node]:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return []
    found = []
    for i, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
        if isinstance(given, fx.Node):
            found.append(given)
    return found


def _functional(node: fx.Node) -> torch._ops.OpOverload | None:
    namespace, _, name = node.target._schema.name.partition("::")
    if not name.endswith("_"):
        return None
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
    return getattr(packet, node.target._overloadname, None)


def _alias_roots(gm: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """For each node, the node whose memory it shows."""
    roots: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        roots[node] = node
        if node.op != "call_function":
            continue
        if not isinstance(node.target, torch._ops.OpOverload):
            source = node.args[0] if node.args else None
        else:
            aliases = any(r.alias_info is not None for r in node.target._schema.returns)
            source = node.args[0] if aliases and node.args else None
        if isinstance(source, fx.Node):
            roots[node] = roots[source]
    return roots


def _derives(member: fx.Node, node: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether `member` is made of the result of `node`, and so comes after the write."""
    while order[member] > order[node]:
        source = member.args[0] if member.args else None
        if not isinstance(source, fx.Node):
            return False
        if source is node:
            return True
        member = source
    return False


def _protect(gm: fx.GraphModule, root: fx.Node, family: list[fx.Node]) -> None:
    if not root.meta.get("protected"):
        root.meta["protected"] = True
        with gm.graph.inserting_after(root):
            # An accumulator is channels_last; views of the copy may need the model's own strides.
            plain = root.meta["val"].is_contiguous()
            layout = torch.contiguous_format if plain else torch.preserve_format
            copy = gm.graph.call_function(
                torch.ops.aten.clone.default, (root,), {"memory_format": layout}
            )
        copy.meta["val"] = root.meta["val"]
        root.replace_all_uses_with(copy, delete_user_cb=lambda user: user is not copy)
        copy.meta |= {"mutated": True, "protected": True}
    for member in family:
        if member is not root:
            member.meta["mutated"] = True
