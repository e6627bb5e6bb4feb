"""fuse_prologues: in pre-activation nets a batch norm goes into the convolution after it.

affine(x=x, scale=s, shift=t, act="relu") -> conv2d(x=affine)
conv2d(x=x, pre_scale=s, pre_shift=t, pre_act="relu")
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from deltafx.ops.affine import affine
from deltafx.ops.base import constant, value
from deltafx.ops.conv2d import conv2d
from deltafx.passes.context import Context, add_constant, clean, only_user


def fuse_prologues(gm: fx.GraphModule, context: Context) -> int:
    """Fuses; returns how many."""
    count = 0
    for node in list(gm.graph.nodes):
        if node.target is not conv2d or "pre_scale" in node.kwargs:
            continue
        before: Any = node.kwargs["x"]
        if before.target is not affine or only_user(before) is not node:
            continue
        if node.kwargs.get("residual") is before or before.kwargs.get("act_params"):
            continue
        if "act_weight" in before.kwargs:
            continue
        node.kwargs = {
            **node.kwargs,
            "x": before.kwargs["x"],
            "pre_scale": add_constant(gm, _row(before, "scale", 1.0), node),
            "pre_shift": add_constant(gm, _row(before, "shift", 0.0), node),
            "pre_act": before.kwargs.get("act", "identity"),
        }
        gm.graph.erase_node(before)
        count += 1
    clean(gm)
    return count


def _row(node: fx.Node, name: str, missing: float) -> torch.Tensor:
    found = constant(node.kwargs.get(name))
    if found is not None:
        return found.float()
    channels = int(value(node).shape[1])
    return torch.full((channels,), missing, device=value(node).device)
