"""normalize_graph: one vocabulary for all front ends.

Enters: a `TracedModel` and example arguments. Leaves: an `fx.GraphModule` over the tensors among
the arguments, flat in and flat out, in which every call is a functional ATen overload with its
fake result in `node.meta["val"]`: no modules, no in-place ops, no dropout, one spelling of each op,
shapes as numbers. A node is named after the module that made it. `gm.meta["out_spec"]` tells how
to build the model's own output of the flat one.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.stateless import _reparametrize_module

from deltafx.errors import InvalidInputError, TrainModeError
from deltafx.ops.base import arguments
from deltafx.passes.context import identifier, rename
from deltafx.passes.functionalize_inplace import functionalize_inplace
from deltafx.passes.insert_casts import autocast_state, insert_casts
from deltafx.passes.trace_model import TracedModel

aten = torch.ops.aten

_IDENTITIES = {
    aten.detach.default,
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
}
READABLE = 64
"""Elements of a weight that a model may make numbers of (sizes, factors), at most."""

_DROPOUTS = {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default}


def normalize_graph(traced: TracedModel, args: Sequence[Any]) -> fx.GraphModule:
    """Normalizes a traced model for the shapes, dtypes and device of its arguments.

    Args:
        traced: The model.
        args: Its arguments, as `TracedModel.bind` gives them; tensors are inputs of the graph, all
            else is taken as constant.

    Returns:
        The graph module; see the module's docstring.

    Raises:
        InvalidInputError: The model fails on such arguments; its own exception is the cause.
    """
    flat, spec = pytree.tree_flatten(tuple(args))
    positions = [i for i, arg in enumerate(flat) if isinstance(arg, Tensor)]
    state = {**dict(traced.root.named_parameters()), **dict(traced.root.named_buffers())}
    state = {name: tensor.detach() for name, tensor in state.items()}
    out_specs: list[pytree.TreeSpec] = []

    read: dict[str, Tensor] = {}  # weights whose values the model reads while it is traced

    def run(weights: dict[str, Tensor], tensors: list[Tensor]) -> list[Any]:
        leaves = list(flat)
        for i, tensor in zip(positions, tensors, strict=True):
            leaves[i] = tensor
        held = {**weights, **read}
        with _reparametrize_module(traced.root, held), fx_traceback.preserve_node_meta():
            out = _run(traced, pytree.tree_unflatten(leaves, spec))
        out_flat, out_spec = pytree.tree_flatten(out)
        out_specs.append(out_spec)
        return out_flat

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    weights = {name: mode.from_tensor(t, static_shapes=True) for name, t in state.items()}
    tensors = [mode.from_tensor(flat[i].detach(), static_shapes=True) for i in positions]
    with torch.no_grad():
        try:
            try:
                made = make_fx(run, pre_dispatch=True)(weights, tensors)
            except DataDependentOutputException:
                read |= {name: t for name, t in state.items() if t.numel() <= READABLE}
                weights = {name: t for name, t in weights.items() if name not in read}
                made = make_fx(run, pre_dispatch=True)(weights, tensors)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise InvalidInputError(
                f"the model does not run on ({', '.join(map(_kind, flat))}): "
                + str(error).split("\n")[0]
            ) from error
    gm = _with_weights(made, list(weights), state)
    gm.meta["out_spec"] = out_specs[-1]
    if _drop_modes(gm) or any(autocast_state()):
        insert_casts(gm)
    if traced.front_end != "fx":
        _check_inference(gm)
    _name_nodes(gm)
    functionalize_inplace(gm)
    drop_identities(gm)
    split_into_slices(gm)
    _reshape_views(gm)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return gm


def _kind(arg: Any) -> str:
    if isinstance(arg, Tensor):
        return f"{str(arg.dtype).removeprefix('torch.')} {list(arg.shape)}"
    return type(arg).__name__


def _run(traced: TracedModel, args: Any) -> Any:
    if traced.front_end == "fx":
        assert isinstance(traced.root, fx.GraphModule)
        return _plain(fx.Interpreter(traced.root).run(*args))
    return traced.root(*args[:-1], **args[-1])


def _plain(out: Any) -> Any:
    """A result without the immutable containers of fx."""
    if isinstance(out, dict):
        return {key: _plain(item) for key, item in out.items()}
    if isinstance(out, tuple) and hasattr(out, "_fields"):
        return type(out)(*map(_plain, out))
    if isinstance(out, (list, tuple)):
        return (list if isinstance(out, list) else tuple)(map(_plain, out))
    return out


def _with_weights(
    made: fx.GraphModule, names: list[str], state: dict[str, Tensor]
) -> fx.GraphModule:
    """Turns the placeholders of the weights into `get_attr` nodes of their names."""
    graph = made.graph
    graph.set_codegen(fx.graph.CodeGen())
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    root: dict[str, Any] = {}
    for node, name in zip(placeholders, names, strict=False):
        if not node.users:
            graph.erase_node(node)
            continue
        with graph.inserting_before(node):
            attr = graph.create_node("get_attr", name, name=identifier(name))
        attr.meta["val"] = state[name]
        node.replace_all_uses_with(attr)
        graph.erase_node(node)
        root[name] = state[name]
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in root:
            root[node.target] = getattr(made, node.target)
            node.meta["val"] = root[node.target]
    for i, node in enumerate(n for n in graph.nodes if n.op == "placeholder"):
        node._rename(f"input_{i}")
        node.target = node.name
    return fx.GraphModule(root, graph, "Normalized")


def _reshape_views(gm: fx.GraphModule) -> None:
    """A view becomes a reshape, for accumulators are channels_last whatever the model's maps."""
    views = (aten.view.default, aten.view_copy.default, aten._unsafe_view.default)
    for node in gm.graph.nodes:
        if node.target in views and not node.meta.get("mutated"):
            node.target = aten.reshape.default


def _drop_modes(gm: fx.GraphModule) -> bool:
    """Drops grad modes, assertions and autocast; tells whether autocast was among them."""
    autocast = False
    for node in reversed(list(gm.graph.nodes)):  # what leaves a mode reads what entered it
        if node.op != "call_function" or isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target is not operator.getitem and not node.users:
            autocast |= node.target is torch.amp.autocast_mode._enter_autocast
            gm.graph.erase_node(node)
    return autocast


def _check_inference(gm: fx.GraphModule) -> None:
    """A captured graph no longer tells the mode of its modules; their calls do.

    Raises:
        TrainModeError: A batch norm updates its statistics.
    """
    for node in gm.graph.nodes:
        if node.target == aten.batch_norm.default:
            a = arguments(node)
            if a["training"] and a["running_mean"] is not None:
                raise TrainModeError(
                    "a batch norm of the model is in train mode: call model.eval() first"
                )


def _name_nodes(gm: fx.GraphModule) -> None:
    """Names each node after the module that made it: `layer1_0_conv2`, `layer1_0_add`."""
    names: dict[fx.Node, str] = {}
    taken: set[str] = {n.name for n in gm.graph.nodes if n.op in ("placeholder", "get_attr")}
    for node in gm.graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        op = str(node.target._schema.name).split("::")[-1].strip("_")
        stack = list(node.meta.get("nn_module_stack", {}).values())
        path, kind = stack[-1] if stack else ("", None)
        leaf = str(getattr(kind, "__module__", kind)).startswith("torch.nn")
        name = path if leaf and path else f"{path}_{op}" if path else op
        base = name = identifier(name)
        i = 1
        while name in taken:
            name, i = f"{base}_{i}", i + 1
        taken.add(name)
        names[node] = name
    for i, node in enumerate(names):
        node._rename(f"unnamed_{i}")
    for node, name in names.items():
        rename(node, name)


def drop_identities(gm: fx.GraphModule) -> int:
    """Drops dropout in eval mode, copies, and conversions to the dtype a tensor has."""
    count = 0
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.meta.get("mutated"):
            continue
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or source.meta.get("mutated"):
            continue
        dropout = node.target in _DROPOUTS and not node.args[2]
        convert = str(node.target).startswith("aten.to.") and _same_kind(node, source)
        if dropout or convert or node.target in _IDENTITIES:
            node.replace_all_uses_with(source)
            gm.graph.erase_node(node)
            count += 1
    return count


def _same_kind(node: fx.Node, source: fx.Node) -> bool:
    a, b = node.meta["val"], source.meta["val"]
    return a.dtype == b.dtype and a.device == b.device


def split_into_slices(gm: fx.GraphModule) -> int:
    """`getitem(chunk(x, n, d), i)`, and of split, -> `slice(x, d, a, b)`."""
    targets = {aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default}
    count = 0
    for node in list(gm.graph.nodes):
        if node.target not in targets or node.meta.get("mutated"):
            continue
        x = node.args[0]
        dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
        dim = dim % x.meta["val"].dim()
        sizes = [part.shape[dim] for part in node.meta["val"]]
        for user in list(node.users):
            if user.target is not operator.getitem:
                continue
            i = user.args[1] % len(sizes)
            start = sum(sizes[:i])
            with gm.graph.inserting_before(user):
                part = gm.graph.call_function(aten.slice.Tensor, (x, dim, start, start + sizes[i]))
            part.meta["val"] = node.meta["val"][i]
            part._rename(f"{node.name}_{i}")
            user.replace_all_uses_with(part)
            gm.graph.erase_node(user)
            count += 1
    return count
