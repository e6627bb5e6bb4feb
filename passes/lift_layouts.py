"""lift_layouts: computations on transposed or flattened feature maps become ones on the maps.

    permute(x, NHWC) -> layer_norm -> linear -> gelu -> permute(NCHW)
    layer_norm(x=x)  -> conv2d 1x1           -> affine(act="gelu")

    flatten(x, 1) -> linear -> relu -> linear
    conv2d(x, kernel = the map's size) -> affine(act="relu") -> conv2d 1x1, then flatten

    reshape(x, [N, g, C / g, H, W]) -> mul(gate) -> sum(1)          split attention
    binary(a=x, b=gate, op="mul") -> the sum of its g slices

Enters: ATen calls. Leaves: dense functions for the calls above, and a permute or flatten behind
each, for readers that stay as they are; the unread ones are dropped.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, fx

from deltafx.ops.activation import match_activation
from deltafx.ops.affine import affine
from deltafx.ops.base import Call, arguments, constant, has_kernels, is_map, per_channel, value
from deltafx.ops.binary import binary
from deltafx.ops.conv2d import conv2d
from deltafx.ops.global_pool2d import global_pool2d
from deltafx.ops.layer_norm import layer_norm
from deltafx.ops.views import concat, slice_channels
from deltafx.passes.context import Context, clean, insert_call, rename

aten = torch.ops.aten
_TO_NHWC, _TO_NCHW = [0, 2, 3, 1], [0, 3, 1, 2]


@dataclasses.dataclass(frozen=True)
class Lifted:
    """A tensor of the graph as a form of a feature map.

    Attributes:
        map: The feature map [N, C, H, W].
        form: `"nhwc"`, `"flat"` ([N, C * H * W]), `"groups"` ([N, g, C / g, H, W]) or `"map"`.
    """

    map: fx.Node
    form: str


def lift_layouts(gm: fx.GraphModule, context: Context) -> int:
    """Lifts what it can; returns the number of lifted computations."""
    lifted: dict[fx.Node, Lifted] = {}
    count = 0
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.meta.get("mutated") or any(n.meta.get("mutated") for n in node.all_input_nodes):
            continue
        form = _view_of(node, lifted)
        if form is not None:
            if form.form == "map":
                node.replace_all_uses_with(form.map)
            else:
                lifted[node] = form
            continue
        found = _computation(node, lifted) or _on_groups(gm, node, lifted)
        if found is None or not has_kernels(value(node)):
            continue
        call, form_name = found
        name = node.name
        node._rename(f"{name}_{form_name}")
        new = insert_call(gm, call, node, _evaluate(call))
        rename(new, name)
        count += 1
        if form_name == "map":
            node.replace_all_uses_with(new)
            continue
        shown = _show(gm, new, form_name, node)
        node.replace_all_uses_with(shown)
        lifted[shown] = Lifted(new, form_name)
    clean(gm)
    return count


def _evaluate(call: Call) -> Any:
    """The fake result of a call."""
    nodes: list[fx.Node] = []
    fx.node.map_arg(call.kwargs, nodes.append)
    mode = next(value(n).fake_mode for n in nodes if hasattr(value(n), "fake_mode"))  # type: ignore[attr-defined]
    with mode:
        return call.target(**{
            k: mode.from_tensor(v) if isinstance(v, Tensor) else fx.node.map_arg(v, value)
            for k, v in call.kwargs.items()
        })  # fmt: skip


def _show(gm: fx.GraphModule, new: fx.Node, form: str, before: fx.Node) -> fx.Node:
    shape = [int(s) for s in value(before).shape]
    with gm.graph.inserting_before(before):
        if form == "nhwc":
            shown = gm.graph.call_function(aten.permute.default, (new, _TO_NHWC))
        elif form == "flat":
            shown = gm.graph.call_function(aten.flatten.using_ints, (new, 1))
        else:
            shown = gm.graph.call_function(aten.reshape.default, (new, shape))
    shown.meta["val"] = before.meta["val"]
    return shown


def _view_of(node: fx.Node, lifted: dict[fx.Node, Lifted]) -> Lifted | None:
    """What a pure rearrangement shows; form `"map"` where that is the feature map itself."""
    x = node.args[0] if node.args else None
    if not isinstance(x, fx.Node):
        return None
    if node.target == aten.permute.default:
        dims = [int(d) % 4 for d in node.args[1]] if len(node.args[1]) == 4 else []
        if dims == _TO_NHWC and is_map(x):
            return Lifted(x, "nhwc")
        if dims == _TO_NCHW and x in lifted and lifted[x].form == "nhwc":
            return Lifted(lifted[x].map, "map")
        return None
    reshapes = {
        aten.flatten.using_ints, aten.reshape.default, aten.squeeze.dims,
        aten.squeeze.dim, aten.squeeze.default, aten.unsqueeze.default,
    }  # fmt: skip
    if node.target not in reshapes or not isinstance(node.meta["val"], Tensor):
        return None
    shape = tuple(node.meta["val"].shape)
    if is_map(x) and _is_grouping(shape, tuple(value(x).shape)):
        return Lifted(x, "groups")
    if x in lifted and lifted[x].form == "groups":
        return Lifted(lifted[x].map, "map") if shape == tuple(value(lifted[x].map).shape) else None
    if is_map(x) and not _is_one_site(x) and len(shape) != 2:
        return None
    if is_map(x) and shape == (value(x).shape[0], value(x)[0].numel()):
        return Lifted(x, "flat")
    if x in lifted and lifted[x].form == "flat":
        source = lifted[x].map
        if shape == tuple(value(source).shape):
            return Lifted(source, "map")
        if shape == tuple(x.meta["val"].shape):
            return lifted[x]
    return None


def _is_grouping(shape: tuple[int, ...], of: tuple[int, ...]) -> bool:
    """Whether [N, g, C / g, H, W] is a shape of groups of channels of [N, C, H, W]."""
    return len(shape) == 5 and (shape[0], shape[1] * shape[2], *shape[3:]) == of


def _is_one_site(x: fx.Node) -> bool:
    return tuple(value(x).shape[2:]) == (1, 1)


def _computation(node: fx.Node, lifted: dict[fx.Node, Lifted]) -> tuple[Call, str] | None:
    """The call on the feature map that `node` amounts to, and the form of its result."""
    x = node.args[0] if node.args else None
    if node.target == aten.mean.dim and is_map(x):
        a = arguments(node)
        over_sites = {d % 4 for d in a["dim"] or []} == {2, 3}
        if over_sites and not a["keepdim"] and a.get("dtype") is None:
            return Call(global_pool2d, {"x": x}), "flat"
        return None
    if node.target in (aten.add.Tensor, aten.mul.Tensor):
        return _binary(node, lifted)
    if node.target == aten.cat.default:
        a = arguments(node)
        forms = [lifted.get(part) for part in a["tensors"]]
        if a["dim"] % 4 == 3 and all(f is not None and f.form == "nhwc" for f in forms):
            return Call(concat, {"maps": [f.map for f in forms if f is not None]}), "nhwc"
        return None
    if not isinstance(x, fx.Node) or x not in lifted:
        return None
    source, form = lifted[x].map, lifted[x].form
    if node.target == aten.linear.default:
        return _linear(node, source, form)
    if node.target == aten.slice.Tensor and form == "nhwc":
        a = arguments(node)
        if a["dim"] % 4 != 3 or a["step"] != 1:
            return None
        channels, start = int(value(source).shape[1]), int(a["start"] or 0)
        start = max(0, start + channels if start < 0 else start)
        length = int(value(node).shape[3])
        return Call(slice_channels, {"x": source, "start": start, "length": length}), form
    if node.target == aten.layer_norm.default and (form == "nhwc" or _is_one_site(source)):
        a = arguments(node)
        weight, bias = constant(a["weight"]), constant(a["bias"])
        if list(a["normalized_shape"]) != [value(source).shape[1]]:
            return None
        kwargs: dict[str, Any] = {"x": source, "eps": float(a["eps"])}
        if weight is not None:
            kwargs["weight"] = weight.float()
        if bias is not None:
            kwargs["bias"] = bias.float()
        return Call(layer_norm, kwargs), form
    matched = match_activation(node)
    if isinstance(matched, dict) and matched["act"] != "prelu":
        return Call(affine, {"x": source, **matched}), form
    return None


def _linear(node: fx.Node, source: fx.Node, form: str) -> tuple[Call, str] | None:
    a = arguments(node)
    weight = constant(a["weight"])
    bias = None if a.get("bias") is None else constant(a["bias"])
    if weight is None or (a.get("bias") is not None and bias is None):
        return None
    _, c, h, w = value(source).shape
    kernel = (h, w) if form == "flat" else (1, 1)
    kwargs: dict[str, Any] = {
        "x": source,
        "weight": weight.float().reshape(weight.shape[0], c, *kernel),
    }
    if bias is not None:
        kwargs["bias"] = bias.float()
    return Call(conv2d, kwargs), form


def _binary(node: fx.Node, lifted: dict[fx.Node, Lifted]) -> tuple[Call, str] | None:
    a = arguments(node)
    left, right = a["self"], a["other"]
    if a.get("alpha", 1) != 1:
        return None
    op = "add" if node.target == aten.add.Tensor else "mul"
    if left in lifted and right in lifted and lifted[left].form != "groups":
        one, two = lifted[left], lifted[right]
        same = one.form == two.form and value(one.map).shape == value(two.map).shape
        return (Call(binary, {"a": one.map, "b": two.map, "op": op}), one.form) if same else None
    if right in lifted:
        left, right = right, left
    if left not in lifted or lifted[left].form != "nhwc":
        return None
    source = lifted[left].map
    number = isinstance(right, (int, float))
    k = torch.tensor(float(right), device=value(source).device) if number else constant(right)
    if k is None or k.dim() > 1:
        return None
    row = per_channel(k.reshape(-1, 1, 1) if k.dim() else k, int(value(source).shape[1]))
    if row is None:
        return None
    return Call(affine, {"x": source, ("shift" if op == "add" else "scale"): row}), "nhwc"


def _on_groups(
    gm: fx.GraphModule, node: fx.Node, lifted: dict[fx.Node, Lifted]
) -> tuple[Call, str] | None:
    """The call that a computation on groups of channels amounts to."""
    if node.target == aten.stack.default:
        a = arguments(node)
        maps = a["tensors"]
        if a["dim"] != 1 or not all(is_map(m) for m in maps):
            return None
        return Call(concat, {"maps": list(maps)}), "groups"
    if node.target == aten.mul.Tensor:
        a = arguments(node)
        for x, gate in ((a["self"], a["other"]), (a["other"], a["self"])):
            if x in lifted and lifted[x].form == "groups":
                b = _gate(gm, node, value(x).shape, gate, lifted)
                if b is not None:
                    return Call(binary, {"a": lifted[x].map, "b": b, "op": "mul"}), "groups"
        return None
    x = node.args[0] if node.args else None
    if node.target != aten.sum.dim_IntList or x not in lifted or lifted[x].form != "groups":
        return None
    a = arguments(node)
    if list(a["dim"] or []) != [1] or a["keepdim"] or a.get("dtype") is not None:
        return None
    return _sum_of_groups(gm, node, lifted[x].map, int(value(x).shape[1])), "map"


def _gate(
    gm: fx.GraphModule,
    before: fx.Node,
    shape: tuple[int, ...],
    gate: Any,
    lifted: dict[fx.Node, Lifted],
) -> fx.Node | None:
    """A factor [N, g, C / g, 1, 1] (or of the whole shape) of groups, as a map [N, C, 1, 1]."""
    n, groups, channels, h, w = shape
    if not is_map(gate, 5):
        return None
    given = tuple(value(gate).shape)
    if given not in ((n, groups, channels, h, w), (n, groups, channels, 1, 1)):
        return None
    if gate in lifted and lifted[gate].form == "groups":
        return lifted[gate].map
    as_map = [n, groups * channels, *given[3:]]
    with gm.graph.inserting_before(before):
        made = gm.graph.call_function(aten.reshape.default, (gate, as_map))
    made.meta["val"] = value(gate).reshape(as_map)
    return made


def _sum_of_groups(gm: fx.GraphModule, node: fx.Node, x: fx.Node, groups: int) -> Call:
    length = int(value(node).shape[1])
    total: fx.Node | None = None
    for i in range(groups):
        part = Call(slice_channels, {"x": x, "start": i * length, "length": length})
        found = insert_call(gm, part, node, _evaluate(part), f"{node.name}_{i}")
        if total is None:
            total = found
            continue
        call = Call(binary, {"a": total, "b": found, "op": "add"})
        if i < groups - 1:
            total = insert_call(gm, call, node, _evaluate(call), f"{node.name}_to_{i}")
    return call if groups > 1 else part


__all__ = ["Lifted", "lift_layouts"]
