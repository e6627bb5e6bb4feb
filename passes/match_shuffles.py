"""match_shuffles: a channel shuffle becomes one gather of channels.

reshape(x, [N, g, C/g, H, W]) -> transpose(1, 2) -> reshape([N, C, H, W])
gather_channels(x=x, index=[...])
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from deltafx.ops.base import Call, has_kernels, is_map, value
from deltafx.ops.gather_channels import gather_channels
from deltafx.passes.context import Context, only_user, replace

aten = torch.ops.aten
_RESHAPES = (aten.reshape.default, aten.flatten.using_ints)


def match_shuffles(gm: fx.GraphModule, context: Context) -> int:
    """Rewrites the shuffles; returns how many."""
    count = 0
    for node in list(gm.graph.nodes):
        if node.target not in _RESHAPES or not is_map(node) or not has_kernels(value(node)):
            continue
        x, index = _shuffle(node)
        if x is None or node.meta.get("mutated") or x.meta.get("mutated"):
            continue
        replace(gm, node, Call(gather_channels, {"x": x, "index": tuple(index)}))
        count += 1
    return count


def _shuffle(node: fx.Node) -> tuple[fx.Node | None, list[int]]:
    swap = node.args[0]
    if not isinstance(swap, fx.Node) or only_user(swap) is not node:
        return None, []
    split = swap.args[0] if swap.args else None
    if not isinstance(split, fx.Node) or split.target not in _RESHAPES:
        return None, []
    if only_user(split) is not swap or not _swaps_groups(swap):
        return None, []
    x = split.args[0]
    if not is_map(x) or not isinstance(x, fx.Node):
        return None, []
    parts: Tensor = value(split)
    n, c, h, w = value(x).shape
    whole = tuple(value(node).shape) == (n, c, h, w)
    if parts.dim() != 5 or not whole or tuple(parts.shape[3:]) != (h, w) or parts.shape[0] != n:
        return None, []
    groups = int(parts.shape[1])
    index = torch.arange(c).reshape(groups, c // groups).t().reshape(-1).tolist()
    return x, index


def _swaps_groups(node: fx.Node) -> bool:
    if node.target == aten.transpose.int:
        return sorted(int(d) % 5 for d in node.args[1:3]) == [1, 2]
    return node.target == aten.permute.default and list(node.args[1]) == [0, 2, 1, 3, 4]
