"""raise_ops: ATen calls become calls of dense functions, or stay, with the reason written down.

Enters: functional ATen calls. Leaves: for each call that a delta op's module has a rule for, the
dense function with keyword arguments; for the others an entry in `context.refusals`.
"""

from __future__ import annotations

from torch import Tensor, fx

from deltafx.ops import RAISE, delta_op, is_view
from deltafx.ops.base import Call, Raised, Refusal, has_kernels
from deltafx.passes.context import Context, clean, replace


def raise_ops(gm: fx.GraphModule, context: Context) -> int:
    """Applies the rules; returns the number of raised calls."""
    count = 0
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or delta_op(node) or is_view(node):
            continue
        rule = RAISE.get(node.target)
        if rule is None:
            raised: Raised = None
        else:
            blocked = _blocked(node)
            raised = Refusal(blocked) if blocked else rule(node)
        if isinstance(raised, Call):
            replace(gm, node, raised)
            count += 1
            continue
        reason = raised.reason if raised else "there is no delta op for it"
        context.refusals.setdefault(node, reason)  # an earlier pass may know more
    clean(gm)
    return count


def _blocked(node: fx.Node) -> str:
    """Why no rule may touch a node, whatever it computes."""
    family = [node, *node.all_input_nodes]
    if any(n.meta.get("mutated") for n in family):
        return "the model writes into its memory"
    val = node.meta.get("val")
    if isinstance(val, Tensor) and not has_kernels(val):
        return f"{val.dtype} is not a dtype of the delta ops on {val.device.type}"
    return ""
