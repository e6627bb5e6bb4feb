"""split_volumes: 3-D convolutions on feature volumes become 2-D ones on feature maps.

    conv3d(x [N, C, T, H, W], w [O, C, kt, kh, kw])
    x = cat([x_t0, x_t1, ...], 1) [N, T * C, H, W]; conv2d(x[:, a * C : b * C], w'),  a plane of y

A volume becomes a list of *planes*, one feature map [N, C, H, W] a picture. Enters: ATen calls with
volumes. Leaves: ATen calls on planes; a volume is put together (`stack`) only for a reader that no
rule is for. A plane of a convolution's result reads the planes in its window of time as a slice of
the channels of all of them, which the state has side by side for nothing, with the taps that lie in
the clip: `w'` is [O, n * C, kh, kw] for n of them. Planes side by side share one update mask, the
union over time: more candidates than needed, never fewer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from deltafx.ops import RAISE
from deltafx.ops.affine import raise_activation
from deltafx.ops.base import Refusal, arguments, constant, has_kernels, is_map, value
from deltafx.ops.binary import raise_binary
from deltafx.passes.context import Context, add_constant, clean, rename
from deltafx.passes.volumes import Volumes, length, plane_shape

aten = torch.ops.aten

LONGEST = 64
"""Planes of a volume, at most: each has its own nodes."""


def split_volumes(gm: fx.GraphModule, context: Context) -> int:
    """Splits; returns the number of calls on volumes that vanished."""
    work = Volumes(gm, context)
    done: list[fx.Node] = []
    for node in list(gm.graph.nodes):
        rule = _RULES.get(node.target)
        if rule is None or not _may_split(node):
            continue
        found = rule(work, node)
        if isinstance(found, Refusal):
            context.refusals[node] = found.reason
            continue
        if isinstance(found, fx.Node):
            node.replace_all_uses_with(found)
        elif found is not None:
            work.planes[node] = found
        if found is not None:
            done.append(node)
    for node in reversed(done):
        name, together = node.name, work.stack(node) if node.users else None
        if together is not None:
            node.replace_all_uses_with(together)
        gm.graph.erase_node(node)
        if together is not None:
            rename(together, name)
    clean(gm)
    return len(done)


def _may_split(node: fx.Node) -> bool:
    mutated = any(n.meta.get("mutated") for n in (node, *node.all_input_nodes))
    val = node.meta["val"]
    return not mutated and isinstance(val, Tensor) and val.numel() > 0 and has_kernels(val)


def _triple(v: Any) -> list[int]:
    items = [v] if isinstance(v, int) else [int(i) for i in v]
    return items * 3 if len(items) == 1 else items


Split = list[fx.Node] | fx.Node | Refusal | None
"""The planes of a call's result; or what to replace it with, where that is no volume."""


def split_conv(work: Volumes, node: fx.Node) -> Split:
    """`aten.conv3d(x, w, b, ...)` -> a `conv2d` a plane."""
    a = arguments(node)
    x, weight = a["input"], constant(a["weight"])
    if not is_map(x, 5):
        return Refusal("the input of this convolution is not [N, C, T, H, W]")
    if max(length(x), length(node)) > LONGEST:
        return Refusal(f"a volume of more than {LONGEST} pictures")
    if weight is None or (a.get("bias") is not None and constant(a["bias"]) is None):
        return Refusal("the weight of this convolution is computed by the model")
    kernel, stride, dilation = (
        list(weight.shape[2:]), _triple(a["stride"]), _triple(a["dilation"])
    )  # fmt: skip
    padding = a["padding"]
    if isinstance(padding, str):
        total = [d * (k - 1) * (padding == "same") for d, k in zip(dilation, kernel, strict=True)]
        if any(t % 2 for t in total):
            return Refusal("'same' padding of an even kernel is not symmetric")
        padding = [t // 2 for t in total]
    padding = _triple(padding)
    taps = _taps(x, node, kernel[0], stride[0], padding[0], dilation[0])
    if not all(taps):
        return Refusal("some outputs of this convolution see no picture")
    if a["groups"] != 1 and any(len(found) > 1 for found in taps):
        return Refusal("this convolution is in groups, over more than one picture")
    weights: dict[tuple[int, int], fx.Node] = {}
    planes = []
    for t, found in enumerate(taps):
        first, last = found[0][0], found[-1][0] + 1
        if (first, last) not in weights:
            trimmed = weight[:, :, first:last].transpose(1, 2).flatten(1, 2)
            weights[first, last] = add_constant(work.gm, trimmed.contiguous(), node)
        source = work.window(x, [time for _, time in found], dilation[0], node)
        args = (
            source, weights[first, last], a.get("bias"),
            stride[1:], padding[1:], dilation[1:], a["groups"],
        )  # fmt: skip
        name, shape = f"{node.name}_t{t}", plane_shape(node)
        planes.append(work.call(node, aten.conv2d.default, args, name, shape))
    return planes


def _taps(
    x: fx.Node, node: fx.Node, kernel: int, stride: int, padding: int, dilation: int
) -> list[list[tuple[int, int]]]:
    """By output plane, its taps in time that lie in the clip, each with the time that it reads."""
    reads = [
        [(k, t * stride - padding + k * dilation) for k in range(kernel)]
        for t in range(length(node))
    ]
    return [[(k, time) for k, time in row if 0 <= time < length(x)] for row in reads]


def split_pool(work: Volumes, node: fx.Node) -> Split:
    """`aten.max_pool3d(x, ...)` -> a `max_pool2d` a plane, then their maximum in each window."""
    a = arguments(node)
    x = a["self"]
    if x not in work.planes:
        return None
    average = node.target == aten.avg_pool3d.default
    kernel, padding = _triple(a["kernel_size"]), _triple(a["padding"])
    stride = _triple(a["stride"]) if a["stride"] else kernel
    dilation = [1, 1, 1] if average else _triple(a["dilation"])
    taps = _taps(x, node, kernel[0], stride[0], padding[0], dilation[0])
    if not all(taps):
        return Refusal("some windows of this pool see no picture")
    args: tuple[Any, ...] = (kernel[1:], stride[1:], padding[1:])
    if average:
        target = aten.avg_pool2d.default
        divisor = a["divisor_override"]
        args = (*args, a["ceil_mode"], a["count_include_pad"], divisor)
    else:
        target = aten.max_pool2d.default
        args = (*args, dilation[1:], a["ceil_mode"])
    pooled = work.each(node, target, work.planes[x], args, plane_shape(node))
    result = []
    for t, found in enumerate(taps):
        parts, name = [pooled[time] for _, time in found], f"{node.name}_t{t}"
        if not average:
            result.append(work.fold(aten.maximum.default, parts, node, name))
            continue
        # A window over the end of the padded clip (`ceil_mode`) is cut there.
        begin = t * stride[0] - padding[0]
        whole = min(begin + kernel[0], length(x) + padding[0]) - begin
        counted = 1 if divisor else whole if a["count_include_pad"] else len(parts)
        result.append(work.mean(parts, counted, node, name))
    return result


def split_adaptive_pool(work: Volumes, node: fx.Node) -> Split:
    """`aten.adaptive_avg_pool3d(x, size)` -> a pool a plane, then means over planes."""
    x = node.args[0]
    if not isinstance(x, fx.Node) or x not in work.planes:
        return None
    shape, given, count = plane_shape(node), length(x), length(node)
    target, args = aten.adaptive_avg_pool2d.default, (list(shape[2:]),)
    pooled = work.each(node, target, work.planes[x], args, shape)
    planes = []
    for t in range(count):
        parts = pooled[t * given // count : -(-(t + 1) * given // count)]
        planes.append(work.mean(parts, len(parts), node, f"{node.name}_t{t}"))
    return planes


def split_mean(work: Volumes, node: fx.Node) -> Split:
    """`aten.mean(x, dims)` over the pictures, their sites, or both."""
    a = arguments(node)
    x, dims = a["self"], sorted(d % 5 for d in a["dim"] or [])
    known = dims in ([2], [2, 3, 4]) or (dims == [3, 4] and a["keepdim"])
    if x not in work.planes or not known or a.get("dtype") is not None:
        return None
    planes = work.planes[x]
    if 3 in dims:
        shape = (*plane_shape(x)[:2], 1, 1)
        planes = work.each(node, aten.mean.dim, planes, ([2, 3], True), shape)
    if 2 in dims:
        planes = [work.mean(planes, len(planes), node, f"{node.name}_t0")]
    return planes if a["keepdim"] else _reshaped(work, node, planes[0])


def split_reshape(work: Volumes, node: fx.Node) -> Split:
    """A volume of one plane in another shape is that plane in it."""
    x = node.args[0]
    if not isinstance(x, fx.Node) or len(work.planes.get(x, [])) != 1:
        return None
    return _reshaped(work, node, work.planes[x][0])


def _reshaped(work: Volumes, node: fx.Node, plane: fx.Node) -> fx.Node:
    shape = [int(s) for s in value(node).shape]
    if shape == list(value(plane).shape):
        return plane
    return work.call(node, aten.reshape.default, (plane, shape), f"{node.name}_of_plane", shape)


def split_cat(work: Volumes, node: fx.Node) -> Split:
    """`aten.cat([x, y], dim)` over channels, plane by plane, or over pictures."""
    a = arguments(node)
    volumes = list(a["tensors"])
    same = all(is_map(v, 5) and value(v).dtype == value(node).dtype for v in volumes)
    if not same or not any(v in work.planes for v in volumes) or a["dim"] % 5 not in (1, 2):
        return None
    parts = [work.planes_of(v, node) for v in volumes]
    if a["dim"] % 5 == 2:
        return [plane for planes in parts for plane in planes]
    return [
        work.call(node, aten.cat.default, (list(ps), 1), f"{node.name}_t{t}", plane_shape(node))
        for t, ps in enumerate(zip(*parts, strict=True))
    ]


def split_slice(work: Volumes, node: fx.Node) -> Split:
    """`aten.slice(x, dim, ...)` over channels, plane by plane, or over pictures."""
    a = arguments(node)
    x = a["self"]
    if x not in work.planes:
        return None
    if a["dim"] % 5 == 2:
        return work.planes[x][slice(a["start"], a["end"], a["step"])]
    if a["dim"] % 5 != 1:
        return None
    cut = (1, a["start"], a["end"], a["step"])
    return work.each(node, node.target, work.planes[x], cut, plane_shape(node))


def split_select(work: Volumes, node: fx.Node) -> Split:
    """`aten.select(x, 2, t)` -> the plane."""
    a = arguments(node)
    if a["self"] not in work.planes or a["dim"] % 5 != 2:
        return None
    return work.planes[a["self"]][a["index"]]


def split_norm(work: Volumes, node: fx.Node) -> Split:
    """`aten.batch_norm(x, ...)` in eval mode -> one a plane."""
    if arguments(node)["training"]:
        return Refusal("this batch norm uses the statistics of the batch")
    return split_pointwise(work, node)


def split_pointwise(work: Volumes, node: fx.Node) -> Split:
    """`f(x, y)` -> `f(x_t, y_t)`; a volume of one plane, a gate, serves all of the other."""
    volumes = [n for n in node.all_input_nodes if value(n).dim() > 0 and n.op != "get_attr"]
    if not any(v in work.planes for v in volumes):
        return None
    if not all(is_map(v, 5) and length(v) in (1, length(node)) for v in volumes):
        return Refusal("an operand of this call is not [N, C, T, H, W]")
    for operand in node.all_input_nodes:
        if operand.op == "get_attr" and not _follow_planes(work, node, operand):
            return Refusal("a constant of this call differs from picture to picture")
    parts = {v: work.planes_of(v, node) for v in volumes}
    made = []
    for t in range(length(node)):

        def at(n: fx.Node, t: int = t) -> fx.Node:
            return parts[n][t if len(parts[n]) > 1 else 0] if n in parts else n

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), at)
        plane = work.call(node, node.target, args, f"{node.name}_t{t}", plane_shape(node))
        plane.kwargs = kwargs
        made.append(plane)
    return made


def _follow_planes(work: Volumes, node: fx.Node, operand: fx.Node) -> bool:
    """Drops the axis of time of a constant that broadcasts over it; tells whether it does."""
    held = constant(operand)
    assert held is not None
    if held.numel() == 1 or held.dim() < 3:
        return True
    if held.shape[-3] != 1:
        return False
    node.replace_input_with(operand, add_constant(work.gm, held.squeeze(-3), node))
    return True


_RULES: dict[Any, Callable[[Volumes, fx.Node], Split]] = {
    aten.conv3d.default: split_conv,
    aten.conv3d.padding: split_conv,
    aten.max_pool3d.default: split_pool,
    aten.avg_pool3d.default: split_pool,
    aten.adaptive_avg_pool3d.default: split_adaptive_pool,
    aten.mean.dim: split_mean,
    aten.flatten.using_ints: split_reshape,
    aten.reshape.default: split_reshape,
    aten.squeeze.default: split_reshape,
    aten.squeeze.dim: split_reshape,
    aten.squeeze.dims: split_reshape,
    aten.cat.default: split_cat,
    aten.slice.Tensor: split_slice,
    aten.select.int: split_select,
    aten.batch_norm.default: split_norm,
    aten.to.dtype: split_pointwise,
    **{t: split_pointwise for t, r in RAISE.items() if r in (raise_activation, raise_binary)},
}
"""By call. Whatever is pointwise and a delta op on planes is one on volumes."""

__all__ = ["split_volumes"]
