"""fold_constants: what the model computes of its weights alone is computed once.

    weight -> sub(mean) -> mul(gain) -> conv2d(x, weight')       weight standardisation
    weight' = constant                  conv2d(x, weight')

So do factories (`arange`, `zeros`) and casts of weights. A constant lives as long as the weights it
was made of: a compiled model whose weights changed is compiled anew.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from deltafx.ops.base import constant
from deltafx.passes.context import Context, add_constant, clean, rename


def fold_constants(gm: fx.GraphModule, context: Context) -> int:
    """Folds; returns how many calls vanished."""
    known: dict[fx.Node, Any] = {}
    folded: list[fx.Node] = []
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            known[node] = constant(node)
        elif _is_foldable(node) and all(n in known for n in node.all_input_nodes):
            known[node] = _evaluate(node, known)
            folded.append(node)
    for node in folded:
        kept = isinstance(known[node], Tensor) and any(user not in known for user in node.users)
        if kept:
            made = add_constant(gm, known[node], node)
            node.replace_all_uses_with(made, delete_user_cb=lambda user: user not in known)
            name = node.name
            node._rename(f"{name}_computed")
            rename(made, name)
    for node in reversed(folded):
        if not node.users:
            gm.graph.erase_node(node)
    clean(gm)
    return len(folded)


def _is_foldable(node: fx.Node) -> bool:
    if node.op != "call_function" or node.meta.get("mutated"):
        return False
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
        return False
    random = torch.Tag.nondeterministic_seeded in node.target.tags
    return not random and not any(n.meta.get("mutated") for n in node.all_input_nodes)


def _evaluate(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
    with torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]
