"""trace_model: any `nn.Module` to a graph that no longer depends on its Python code.

Enters: a model in eval mode. Leaves: a `TracedModel`, whose `root` computes what the model
computes and can be run at any input shape. `fx` is tried first, because its graph is whole and
keeps the module names; a model that it cannot take (control flow on shapes, keyword games), or
would take wrongly (state of its own, random numbers, sizes that depend on values), is handed to
normalization as it is, which follows its Python code once for every input shape, or finds that no
graph can stand for it.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import inspect
import operator
import threading
import types
from typing import Any

import torch
from torch import Tensor, fx, nn

from deltafx.errors import InvalidInputError, TrainModeError
from deltafx.passes.captured_graph import CapturedGraph
from deltafx.passes.insert_casts import autocast_state


@dataclasses.dataclass(frozen=True)
class TracedModel:
    """What tracing leaves.

    Attributes:
        root: The traced graph, or the model itself.
        signature: Of `forward`, for binding arguments.
        front_end: `"fx"`, `"python"`, or that of a `CapturedGraph`.
        reason: Why not `"fx"`, if so.
        obstacle: What the model does that no graph can, if that is known already.
    """

    root: nn.Module
    signature: inspect.Signature
    front_end: str
    reason: str = ""
    obstacle: str = ""

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """All arguments in the order of `forward`, defaults filled in.

        Of a model that is not of fx the last one is the dictionary of those that go by keyword.

        Raises:
            InvalidInputError: They do not fit it.
        """
        if not kwargs and len(args) == self._positional:
            return args
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InvalidInputError(f"the model's forward: {error}") from None
        bound.apply_defaults()
        if self.front_end == "fx":
            return tuple(bound.arguments.values())
        return (*bound.args, bound.kwargs)

    @functools.cached_property
    def _positional(self) -> int:
        """How many arguments are all of them, if they go by position; else -1."""
        kinds = {p.kind for p in self.signature.parameters.values()}
        by_position = kinds <= {
            inspect.Parameter.POSITIONAL_ONLY,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
        }
        return len(self.signature.parameters) if by_position and self.front_end == "fx" else -1


class Tracer(fx.Tracer):
    """Goes through a user's modules and stops at torch's own.

    While it traces, fx patches `nn.Module` for the whole process: other threads are let through.
    """

    def __init__(self) -> None:
        """Remembers its thread."""
        super().__init__()
        self._thread = threading.get_ident()
        self._autocast = autocast_state()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Adds a node as fx does, which has no word for autocast.

        Raises:
            TraceError: The model has switched autocast on or off.
        """
        if threading.get_ident() == self._thread and autocast_state() != self._autocast:
            raise fx.proxy.TraceError("the model sets autocast itself")
        return super().create_node(*args, **kwargs)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Calls a module as fx does, or as it is."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Reads an attribute of a module likewise."""
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any) -> Any:
        """An argument as fx takes it; an ordered dictionary stays one."""
        if type(a) is collections.OrderedDict:
            items = [(key, self.create_arg(item)) for key, item in a.items()]
            return self.create_node("call_function", collections.OrderedDict, (items,), {})
        if isinstance(a, dict) and type(a) is not dict:
            raise fx.proxy.TraceError(f"fx would make a dictionary of a {type(a).__name__}")
        return super().create_arg(a)


def shadow(module: nn.Module, seen: dict[nn.Module, nn.Module] | None = None) -> nn.Module:
    """A copy of a tree of modules that holds the same tensors.

    Tracing swaps the tensors of the modules for fake ones; in the copy nobody else notices.
    """
    seen = {} if seen is None else seen
    if module in seen:
        return seen[module]
    if isinstance(module, torch.jit.ScriptModule):
        seen[module] = module  # its modules live in C++
        return module
    # Not `copy.copy`: some modules (parametrized ones) refuse it.
    seen[module] = copied = object.__new__(type(module))
    copied.__dict__.update(module.__dict__)
    for name, value in module.__dict__.items():
        if type(value) in _CONTAINERS:
            copied.__dict__[name] = copy.copy(value)
        elif isinstance(value, types.MethodType) and value.__self__ is module:
            copied.__dict__[name] = types.MethodType(value.__func__, copied)
    copied._modules = {
        name: None if child is None else shadow(child, seen)
        for name, child in module._modules.items()
    }
    return copied


_CONTAINERS = (dict, collections.OrderedDict, collections.deque, list, set)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def check_eval(model: nn.Module) -> None:
    """Checks that there is a model, and that it is for inference.

    Raises:
        InvalidInputError: It is not an `nn.Module`.
        TrainModeError: It, or a part of it, is in train mode.
    """
    if not isinstance(model, nn.Module):
        raise InvalidInputError(
            f"deltafx compiles an nn.Module, not {type(model).__name__}; wrap a function in one"
        )
    training = [name or type(model).__name__ for name, m in model.named_modules() if m.training]
    if training:
        raise TrainModeError(
            f"the model is in train mode (at {training[0]!r}): call model.eval() first"
        )


@torch.inference_mode(False)
def trace_model(model: nn.Module) -> TracedModel:
    """Traces a model.

    Args:
        model: In eval mode. Hooks of its own are its caller's business and not in the graph.

    Raises:
        InvalidInputError: It is not an `nn.Module`.
        TrainModeError: It, or a part of it, is in train mode.
    """
    check_eval(model)
    signature = inspect.signature(model.forward)
    if isinstance(model, CapturedGraph):
        return TracedModel(shadow(model), signature, model.front_end)
    if any(isinstance(part, torch.jit.ScriptModule) for part in model.modules()):
        reason = "TorchScript has no Python code"
        return TracedModel(model, signature, "python", reason, reason)
    hooked = [path for path, part in model.named_modules() if path and own_hooks(part)]
    if hooked:
        reason = f"a hook on {hooked[0]!r} wants to be called"
        return TracedModel(_bare(model), signature, "python", reason, reason)
    own_forward = "its forward is not its class's" if "forward" in model.__dict__ else ""
    reason = own_forward or _not_for_fx(signature)
    if not reason:
        traced = _trace_with_fx(model, signature)
        if isinstance(traced, TracedModel):
            return traced
        reason = traced
    return TracedModel(_bare(model), signature, "python", reason)


def own_hooks(module: nn.Module) -> list[Any]:
    """The hooks on a module's calls that are a user's, not torch's way to compute a weight."""
    hooks = [hook for name in _HOOKS for hook in getattr(module, name).values()]
    return [hook for hook in hooks if not type(hook).__module__.startswith("torch.nn.utils.")]


def _bare(model: nn.Module) -> nn.Module:
    """A shadow to trace.

    Its call calls no hook of the user's. All tensors but the parameters are its own: fx runs what
    the model does with them alone, and it may write into them.
    """
    copied = shadow(model)
    for module in copied.modules():
        for held in (module.__dict__, module._buffers):
            held.update({k: v.clone() for k, v in held.items() if isinstance(v, Tensor)})
    own = set(map(id, own_hooks(model)))
    for name in _HOOKS:
        hooks = getattr(copied, name)
        for key in [key for key, hook in hooks.items() if id(hook) in own]:
            del hooks[key]
    return copied


def _trace_with_fx(model: nn.Module, signature: inspect.Signature) -> TracedModel | str:
    """The graph that fx makes of a model; or, in words, why it is none of it."""
    copied = _bare(model)
    before, seed = own_state(copied), torch.get_rng_state()
    try:
        graph = Tracer().trace(copied)
        root = fx.GraphModule(copied, graph)
    except Exception as error:  # noqa: BLE001  whatever a user's code does under a tracer
        return f"{type(error).__name__}: {error}".split("\n")[0]
    finally:
        after = torch.get_rng_state()
        torch.set_rng_state(seed)
    if not torch.equal(seed, after):
        return "the model draws random numbers"
    reason = changed(before, own_state(copied)) or _wrong_as_graph(graph)
    if reason:
        return reason
    root.eval()
    return TracedModel(root, signature, "fx")


def _not_for_fx(signature: inspect.Signature) -> str:
    """Why fx would trace something else than the model: it takes every argument for a tensor."""
    for p in signature.parameters.values():
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            return "forward takes *args or **kwargs"
        if p.default is not p.empty:
            return f"forward has an optional argument, {p.name!r}"
    return ""


LITERAL = "_tensor_constant"
"""How fx names the attributes that it makes of tensors written out in a model's code."""

State = dict[tuple[str, str], Any]


def own_state(model: nn.Module) -> State:
    """What the modules of a model hold, by module and attribute; to be compared later."""
    return {
        (path, name): _kept(value)
        for path, module in model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)
        for name, value in (*module.__dict__.items(), *module._buffers.items())
        if name not in _computed_weights(module) and not name.startswith(LITERAL)
    }


def _kept(value: Any) -> Any:
    if isinstance(value, Tensor):
        return [value, None if value.is_inference() else value._version]
    return copy.copy(value) if type(value) in _CONTAINERS else value


def _computed_weights(module: nn.Module) -> set[str]:
    """The attributes that `weight_norm` and its like write before every call."""
    hooks = module._forward_pre_hooks.values()
    return {hook.name for hook in hooks if hasattr(hook, "name")}


def changed(before: State, after: State) -> str:
    """In words, what a model changed of its own; nothing where it left all as it was."""
    for key in before.keys() | after.keys():
        if not (key in before and key in after and _same(before[key], after[key])):
            return f"the model changes its own {'.'.join(filter(None, key))!r}"
    return ""


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, collections.deque)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, set):
        return a == b
    return isinstance(a, (bool, int, float, str)) and a == b


_SIZES_BY_VALUE = {
    "argwhere", "batched_nms", "bincount", "masked_select", "nms", "nonzero", "repeat_interleave",
    "unique", "unique_consecutive",
}  # fmt: skip
"""What makes tensors whose sizes depend on values: in no graph for given shapes."""


def _wrong_as_graph(graph: fx.Graph) -> str:
    """In words, what in a graph of fx's makes it another thing than the model."""
    for node in graph.nodes:
        name = getattr(node.target, "__name__", str(node.target))
        if node.op == "call_module" or not node.op.startswith("call_"):
            continue
        by_value = name in _SIZES_BY_VALUE or (name == "where" and len(node.args) == 1)
        if by_value or (node.target is operator.getitem and _may_be_mask(node.args[1])):
            return f"{name} makes a tensor whose size depends on values"
        packet = isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket))
        if packet and not str(node.target).startswith(("aten", "torchvision")):
            return f"{node.target} is no operator of torch's"
        in_place = name.endswith("_") and not name.endswith("__")
        if in_place or node.target is operator.setitem or name in _IN_PLACE:
            source: Any = node
            while isinstance(source, fx.Node) and source.args and source.op != "call_module":
                source = source.args[0]
            if isinstance(source, fx.Node) and source.op == "get_attr":
                return f"the model writes into its own {source.target!r}"
    return ""


def _may_be_mask(index: Any) -> bool:
    indices = index if isinstance(index, tuple) else (index,)
    return any(isinstance(i, fx.Node) and i.op.startswith("call_") for i in indices)


_IN_PLACE = {"iadd", "isub", "imul", "itruediv", "ifloordiv", "iand", "ior", "ixor"}


__all__ = [
    "LITERAL",
    "TracedModel",
    "Tracer",
    "changed",
    "check_eval",
    "own_hooks",
    "own_state",
    "shadow",
    "trace_model",
]
