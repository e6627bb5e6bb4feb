"""fold_affines: batch norms and channel factors vanish into the convolution before them.

    conv2d(x=x, weight=w, bias=b) -> affine(scale=s, shift=t, act=f)
    conv2d(x=x, weight=w * s, bias=b * s + t, act=f)

and an affine into the affine before it. The arithmetic is done in fp64 and rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from deltafx.ops.affine import affine
from deltafx.ops.base import Call, constant, value
from deltafx.ops.conv2d import conv2d
from deltafx.ops.conv_transpose2d import conv_transpose2d
from deltafx.passes.context import Context, clean, insert_call, only_user, rename


def fold_affines(gm: fx.GraphModule, context: Context) -> int:
    """Folds; returns how many affines vanished."""
    count = 0
    for node in list(gm.graph.nodes):
        if node.target is not affine:
            continue
        producer: Any = node.kwargs["x"]
        if only_user(producer) is not node or producer.kwargs.get("act", "identity") != "identity":
            continue
        if node.kwargs.get("scale") is None and node.kwargs.get("shift") is None:
            continue
        if producer.target in (conv2d, conv_transpose2d) and "residual" not in producer.kwargs:
            kwargs = _fold_into_conv(producer, node)
        elif producer.target is affine:
            kwargs = _fold_into_affine(producer, node)
        else:
            continue
        kwargs |= {k: v for k, v in node.kwargs.items() if k.startswith("act")}
        new = insert_call(gm, Call(producer.target, kwargs), node, value(node))
        node.replace_all_uses_with(new)
        name = producer.name
        gm.graph.erase_node(node)
        gm.graph.erase_node(producer)
        rename(new, name)
        count += 1
    clean(gm)
    return count


def _row(node: fx.Node, name: str, missing: float) -> Tensor:
    found = constant(node.kwargs.get(name))
    channels = int(value(node).shape[1])
    device = value(node).device
    if found is None:
        return torch.full((channels,), missing, dtype=torch.float64, device=device)
    return found.double()


def _fold_into_conv(conv: fx.Node, node: fx.Node) -> dict[str, Any]:
    scale, shift = _row(node, "scale", 1.0), _row(node, "shift", 0.0)
    weight = constant(conv.kwargs["weight"])
    assert weight is not None
    weight, bias = weight.double(), _row(conv, "bias", 0.0)
    if conv.target is conv2d:
        folded = weight * scale.reshape(-1, 1, 1, 1)
    else:
        groups = int(conv.kwargs.get("groups", 1))
        per_group = weight.reshape(groups, -1, *weight.shape[1:])
        folded = (per_group * scale.reshape(groups, 1, -1, 1, 1)).reshape(weight.shape)
    return {
        **conv.kwargs,
        "weight": folded.float(),
        "bias": (bias * scale + shift).float(),
    }


def _fold_into_affine(first: fx.Node, second: fx.Node) -> dict[str, Any]:
    scale, shift = _row(second, "scale", 1.0), _row(second, "shift", 0.0)
    return {
        **first.kwargs,
        "scale": _row(first, "scale", 1.0) * scale,
        "shift": _row(first, "shift", 0.0) * scale + shift,
    }
