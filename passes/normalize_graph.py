"""normalize_graph: one vocabulary for all front ends.

Enters: a `TracedModel` and example arguments. Leaves: an `fx.GraphModule` over the tensors among
the arguments, flat in and flat out, in which every call is a functional ATen overload with its
fake result in `node.meta["val"]`: no modules, no in-place ops, no dropout, one spelling of each op,
shapes as numbers. A node is named after the module that made it. `gm.meta["out_spec"]` tells how
to build the model's own output of the flat one.
"""

from __future__ import annotations

import contextlib
import logging
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.nn.utils.stateless import _reparametrize_module

from deltafx.errors import TrainModeError, UntraceableError
from deltafx.ops.base import arguments
from deltafx.passes.context import identifier, rename
from deltafx.passes.functionalize_inplace import functionalize_inplace, written_roots
from deltafx.passes.insert_casts import autocast_state, insert_casts
from deltafx.passes.trace_model import LITERAL, TracedModel, changed, own_state
from deltafx.results import CONSTANTS, flatten_result

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
        UntraceableError: No graph does what the model does on such arguments, be it that the model
            itself fails on them; the exception that showed it is the cause.
    """
    flat, spec = pytree.tree_flatten(tuple(args))
    _check_arguments(traced, flat)
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
        given = dict(held)
        with _reparametrize_module(traced.root, held), fx_traceback.preserve_node_meta():
            out = _run(traced, pytree.tree_unflatten(leaves, spec))
        replaced = [name for name, tensor in held.items() if tensor is not given[name]]
        if replaced:
            raise UntraceableError(f"the model replaces its own {replaced[0]!r}")
        out_flat, out_spec = flatten_result(out)
        out_specs.append(out_spec)
        return out_flat

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    weights = {name: mode.from_tensor(t, static_shapes=True) for name, t in state.items()}
    tensors = [mode.from_tensor(flat[i].detach(), static_shapes=True) for i in positions]
    before = own_state(traced.root)
    with torch.no_grad(), _quiet():
        try:
            try:
                made = make_fx(run, pre_dispatch=True)(weights, tensors)
            except DataDependentOutputException:
                read |= {name: t for name, t in state.items() if t.numel() <= READABLE}
                weights = {name: t for name, t in weights.items() if name not in read}
                made = make_fx(run, pre_dispatch=True)(weights, tensors)
        except UntraceableError:
            raise
        except Exception as error:
            raise UntraceableError(
                f"the model cannot be followed on ({', '.join(map(_kind, flat))}): "
                + f"{type(error).__name__}: {error}".split("\n")[0]
            ) from error
    reason = changed(before, own_state(traced.root))
    if reason:
        raise UntraceableError(reason)
    gm = _with_weights(made, list(weights), state)
    gm.meta["out_spec"] = out_specs[-1]
    _unify_values(gm, mode)
    if _drop_modes(gm) or any(autocast_state()):
        insert_casts(gm)
    if traced.front_end not in ("fx", "python"):
        _check_inference(gm)
    _name_nodes(gm)
    gm.meta["writes_inputs"] = _check_writes(gm, state)
    functionalize_inplace(gm)
    drop_identities(gm)
    split_into_slices(gm)
    _reshape_views(gm)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return gm


def _unify_values(gm: fx.GraphModule, mode: FakeTensorMode) -> None:
    """What the model makes of nothing (`arange`) comes with a fake mode of its own."""

    def unify(val: Any) -> Any:
        if not isinstance(val, FakeTensor) or val.fake_mode is mode:
            return val
        with mode:
            return torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device=val.device)

    for node in gm.graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = pytree.tree_map(unify, node.meta["val"])


def _check_arguments(traced: TracedModel, flat: Sequence[Any]) -> None:
    if traced.obstacle:
        raise UntraceableError(traced.obstacle)
    for arg in flat:
        if not isinstance(arg, (Tensor, *CONSTANTS)):
            raise UntraceableError(f"an argument is a {type(arg).__name__}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What a trial trace comes upon is told by the exception, not by torch's log."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


def _kind(arg: Any) -> str:
    if isinstance(arg, Tensor):
        return f"{str(arg.dtype).removeprefix('torch.')} {list(arg.shape)}"
    return type(arg).__name__


def _run(traced: TracedModel, args: Any) -> Any:
    if traced.front_end == "fx":
        assert isinstance(traced.root, fx.GraphModule)
        return _plain(_Interpreter(traced.root).run(*args))
    if traced.front_end != "python":
        return traced.root(*args[:-1], **args[-1])  # its nodes tell of themselves
    with _module_stacks(traced.root):
        return traced.root(*args[:-1], **args[-1])


class _Interpreter(fx.Interpreter):
    """Hands over arguments as the model wrote them: its functions may write into a list."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Calls a function."""
        return super().call_function(target, _plain(args), _plain(kwargs))


@contextlib.contextmanager
def _module_stacks(root: nn.Module) -> Iterator[None]:
    """Tells every node, as fx does, which modules' calls it is in."""
    calls: list[tuple[str, type]] = []
    handles = []

    def tell() -> None:
        stack = {f"{i}": call for i, call in enumerate(calls)}
        fx_traceback.get_current_meta()["nn_module_stack"] = stack

    for path, module in root.named_modules():
        if not path or isinstance(module, torch.jit.ScriptModule):
            continue

        def enter(module: nn.Module, args: Any, path: str = path) -> None:
            calls.append((path, type(module)))
            tell()

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            calls.pop()
            tell()

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _plain(out: Any) -> Any:
    """A result without the immutable containers of fx."""
    if isinstance(out, dict):
        items = {key: _plain(item) for key, item in out.items()}
        return items if type(out) is immutable_dict else type(out)(items)
    if isinstance(out, tuple) and hasattr(out, "_fields"):
        return type(out)(*map(_plain, out))
    if type(out) in (list, tuple, immutable_list):
        return (list if isinstance(out, list) else tuple)(map(_plain, out))
    return out


def _check_writes(gm: fx.GraphModule, state: dict[str, Tensor]) -> bool:
    """Whether the model writes into its arguments; it must not write into its own tensors."""
    inputs = False
    for root in written_roots(gm):
        name = str(root.target)
        if root.op == "get_attr" and name in state and not name.startswith(LITERAL):
            raise UntraceableError(f"the model writes into its own {name!r}")
        inputs = inputs or root.op == "placeholder"
    return inputs


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
