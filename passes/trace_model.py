"""trace_model: any `nn.Module` to a graph that no longer depends on its Python code.

Enters: a model in eval mode. Leaves: a `TracedModel`, whose `root` computes what the model
computes and can be run at any input shape. `fx` is tried first, because its graph is whole and
keeps the module names; a model that it cannot take (control flow on shapes, keyword games) is
handed to normalization as it is, which follows its Python code once for every input shape.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import threading
from typing import Any

from torch import fx, nn

from deltafx.errors import InvalidInputError, TrainModeError


@dataclasses.dataclass(frozen=True)
class TracedModel:
    """What tracing leaves.

    Attributes:
        root: The traced graph, or the model itself.
        signature: Of `forward`, for binding arguments.
        front_end: `"fx"` or `"python"`.
        reason: Why not `"fx"`, if so.
    """

    root: nn.Module
    signature: inspect.Signature
    front_end: str
    reason: str = ""

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """All arguments in the order of `forward`, defaults filled in.

        Of a `"python"` model the last one is the dictionary of those that go by keyword.

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


def shadow(module: nn.Module, seen: dict[nn.Module, nn.Module] | None = None) -> nn.Module:
    """A copy of a tree of modules that holds the same tensors.

    Tracing swaps the tensors of the modules for fake ones; in the copy nobody else notices.
    """
    seen = {} if seen is None else seen
    if module not in seen:
        seen[module] = copied = copy.copy(module)
        copied._parameters = dict(module._parameters)
        copied._buffers = dict(module._buffers)
        copied._modules = {
            name: None if child is None else shadow(child, seen)
            for name, child in module._modules.items()
        }
    return seen[module]


def trace_model(model: nn.Module) -> TracedModel:
    """Traces a model.

    Args:
        model: In eval mode.

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
    model = shadow(model)
    signature = inspect.signature(model.forward)
    reason = _not_for_fx(signature)
    if reason:
        return TracedModel(model, signature, "python", reason)
    try:
        root = fx.GraphModule(model, Tracer().trace(model))
    except Exception as error:  # noqa: BLE001  whatever a user's code does under a tracer
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        return TracedModel(model, signature, "python", reason)
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


__all__ = ["TracedModel", "Tracer", "trace_model"]
