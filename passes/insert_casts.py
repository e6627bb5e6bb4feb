"""insert_casts: what autocast does in passing becomes calls in the graph.

    conv2d(x, w) -> bf16, by autocast        x' = to(x, bf16);  w' = to(w, bf16);  conv2d(x', w')

A trace records the calls that the model makes and not the casts that autocast puts before them, but
it knows the dtype of each result. A call that gives another one without autocast gets its
floating-point arguments cast to the dtype of its result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

_DEVICES = ("cpu", "cuda")


def autocast_state() -> tuple[torch.dtype | None, ...]:
    """The dtype of autocast for the CPU and for CUDA; `None` where it is off."""
    # Of a list: a generator would take half as long again, and every frame asks.
    return tuple(
        [torch.get_autocast_dtype(d) if torch.is_autocast_enabled(d) else None for d in _DEVICES]
    )


@contextlib.contextmanager
def no_autocast() -> Iterator[None]:
    """Turns autocast off for the devices that it is on for."""
    with contextlib.ExitStack() as stack:
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def insert_casts(gm: fx.GraphModule) -> int:
    """Inserts the casts; returns how many."""
    count = 0
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        val = node.meta["val"]
        if not isinstance(val, Tensor) or not val.is_floating_point():
            continue
        if str(node.target).startswith("aten.to.") or _dtype_without(node) == val.dtype:
            continue
        for source in node.all_input_nodes:
            given = source.meta.get("val")
            if not isinstance(given, Tensor) or not given.is_floating_point():
                continue
            if given.dtype != val.dtype:
                node.replace_input_with(source, _cast(gm, node, source, val.dtype))
                count += 1
    return count


def _dtype_without(node: fx.Node) -> torch.dtype | None:
    """The dtype of a call's result as it stands; `None` where it cannot be called so."""
    modes = [n.meta["val"] for n in node.all_input_nodes if hasattr(n.meta.get("val"), "fake_mode")]
    if not modes:
        return node.meta["val"].dtype
    mode = modes[0].fake_mode

    def fake(n: fx.Node) -> Any:
        val = n.meta["val"]
        real = isinstance(val, Tensor) and not hasattr(val, "fake_mode")
        return mode.from_tensor(val) if real else val

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), fake)
    try:
        with mode, no_autocast():
            return node.target(*args, **kwargs).dtype  # type: ignore[operator]
    except RuntimeError:
        return None


def _cast(gm: fx.GraphModule, node: fx.Node, source: fx.Node, dtype: torch.dtype) -> fx.Node:
    with gm.graph.inserting_before(node):
        made = gm.graph.call_function(aten.to.dtype, (source, dtype))
    with no_autocast():
        made.meta["val"] = source.meta["val"].to(dtype)
    made._rename(f"{source.name}_{str(dtype).removeprefix('torch.')}")
    return made


__all__ = ["autocast_state", "insert_casts", "no_autocast"]
