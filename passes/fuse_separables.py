"""fuse_separables: a depthwise convolution goes into the pointwise one that alone reads it.

    conv2d(x=x, weight=d, groups=C, act="relu6") -> conv2d(x=..., weight=w 1x1, ...)
    separable_conv2d(x=x, depthwise_weight=d, depthwise_act="relu6", weight=w, ...)

Where the op has kernels, which is on the CPU. The pointwise convolution keeps its name; the
depthwise one is no node any more. On other devices it stays one, and `assign_regions` leaves it
without a threshold, so that a model means the same on every device.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from deltafx.ops.base import constant, value
from deltafx.ops.conv2d import conv2d
from deltafx.ops.separable_conv2d import separable_conv2d
from deltafx.passes.context import Context, clean, only_user

_WINDOW = ("stride", "padding", "dilation")
_END = ("bias", "residual", "residual_after_act", "act", "act_params", "act_weight")


def fuse_separables(gm: fx.GraphModule, context: Context) -> int:
    """Fuses; returns how many."""
    count = 0
    for node in list(gm.graph.nodes):
        if not is_separable(node) or value(node).device.type != "cpu":
            continue
        before: Any = node.kwargs["x"]
        first, second = before.kwargs, node.kwargs
        kwargs = {
            "x": first["x"],
            "depthwise_weight": first["weight"],
            "depthwise_act": first.get("act", "identity"),
            "weight": second["weight"],
            **{k: first[k] for k in _WINDOW if k in first},
            **{k: second[k] for k in _END if k in second},
        }
        if "bias" in first:
            kwargs["depthwise_bias"] = first["bias"]
        node.target, node.kwargs = separable_conv2d, kwargs
        gm.graph.erase_node(before)
        count += 1
    clean(gm)
    return count


def is_separable(node: fx.Node) -> bool:
    """Whether a node is a pointwise convolution that alone reads a depthwise one."""
    if not is_pointwise(node) or "pre_scale" in node.kwargs:
        return False
    before = node.kwargs["x"]
    return only_user(before) is node and node.kwargs.get("residual") is not before and _fits(before)


def is_pointwise(node: fx.Node) -> bool:
    """Whether a node is a 1x1 convolution over all channels, at every site."""
    if node.target is not conv2d or node.kwargs.get("groups", 1) != 1:
        return False
    weight = constant(node.kwargs["weight"])
    if weight is None or tuple(weight.shape[2:]) != (1, 1):
        return False
    plain = (("stride", (1, 1)), ("padding", (0, 0)))
    return all(tuple(node.kwargs.get(k, v)) == v for k, v in plain)


def is_depthwise(node: Any) -> bool:
    """Whether a node is a depthwise convolution, by itself or as the first half of another."""
    if node.target is separable_conv2d:
        return True
    if node.target is not conv2d:
        return False
    weight = constant(node.kwargs["weight"])
    return weight is not None and weight.shape[1] == 1 and node.kwargs.get("groups", 1) != 1


def _fits(node: Any) -> bool:
    """Whether a node is a depthwise convolution, one channel out for one in, with a plain end."""
    if node.target is not conv2d or not is_depthwise(node):
        return False
    weight = constant(node.kwargs["weight"])
    assert weight is not None
    more = ("residual", "pre_scale", "act_weight")
    if any(k in node.kwargs for k in more) or node.kwargs.get("act_params"):
        return False
    return weight.shape[0] == node.kwargs["groups"]
