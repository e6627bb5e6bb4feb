"""What a delta op is to the passes.

An op has one name. Under it stand the C++ operator `torch.ops.deltafx.<name>`, the module
`deltafx.ops.<name>`, and in that module a *dense function* of the same name: the op evaluated
everywhere, in plain torch. Between the passes `raise_ops` and `lower_ops` a node of the graph is a
call of the dense function with keyword arguments only; so the graph can be run, and compared with
the model, after every pass. Lowering is then a walk over the operator's schema: an argument of the
operator has the same name as the argument of the dense function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a rule leaves a node dense, in words for the user."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a dense function that a node is to be replaced with.

    Attributes:
        target: The dense function.
        kwargs: Its arguments; nodes stand for tensors, tensors are made constants of the graph.
    """

    target: Callable[..., Any]
    kwargs: dict[str, Any]


Raised = Call | Refusal | None
"""What a raise rule says of a node: a replacement, a refusal, or that it is none of its."""


def no_macs(node: fx.Node) -> int:
    """The op multiplies nothing worth counting."""
    return 0


@dataclasses.dataclass(frozen=True)
class DeltaOp:
    """One delta op.

    Attributes:
        dense: The dense function; its name is the op's.
        inputs: Its arguments that are feature maps, each with an update mask `<input>_mask`.
        has_activation: Whether `act`, `act_params` and `act_weight` are among its arguments.
        macs_per_site: Multiply-adds of one output site, all channels.
        prepare: From the arguments of the dense function to those of the operator, where they
            differ (packed weights, geometry); constants are tensors.
        workspace: Shapes of fp32 buffers that the operator keeps between frames, by argument.
    """

    dense: Callable[..., Tensor]
    inputs: tuple[str, ...] = ("x",)
    has_activation: bool = True
    macs_per_site: Callable[[fx.Node], int] = no_macs
    prepare: Callable[[fx.Node, dict[str, Any]], dict[str, Any]] | None = None
    workspace: Callable[[fx.Node], dict[str, tuple[int, ...]]] | None = None

    @property
    def name(self) -> str:
        """The op's one name."""
        return self.dense.__name__

    @property
    def operator(self) -> torch._ops.OpOverload:
        """The C++ operator."""
        return getattr(torch.ops.deltafx, self.name).default


def value(node: fx.Node) -> Tensor:
    """The fake tensor that stands for a node's result."""
    return node.meta["val"]


def is_map(node: Any, dims: int = 4) -> bool:
    """Whether a node's result is a floating-point tensor of `dims` dimensions, and not empty."""
    if not isinstance(node, fx.Node):
        return False
    val = node.meta.get("val")
    if not isinstance(val, Tensor) or val.dim() != dims:
        return False
    return val.is_floating_point() and val.numel() > 0


def has_kernels(t: Tensor) -> bool:
    """Whether the operators take tensors of this dtype on this device."""
    supported = (torch.float32, torch.bfloat16, torch.float16)
    return t.dtype in (supported if t.device.type != "cpu" else supported[:2])


def pair(v: Any) -> tuple[int, int]:
    """`v`, `[v]` or `[a, b]` as two ints, as ATen expands them."""
    if isinstance(v, int):
        return v, v
    items = [int(i) for i in v]
    return (items[0], items[0]) if len(items) == 1 else (items[0], items[1])


def constant(node: Any) -> Tensor | None:
    """The tensor behind a `get_attr` node; `None` for anything else."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    found: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        found = getattr(found, part)
    return found.detach() if isinstance(found, Tensor) else None


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of an ATen call by their schema names, defaults filled in."""
    bound: dict[str, Any] = {}
    for i, argument in enumerate(node.target._schema.arguments):
        if i < len(node.args):
            bound[argument.name] = node.args[i]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
    return bound


def packable(weight: Tensor, node: fx.Node) -> Tensor:
    """A convolution's weight as `pack_conv_weight` wants it for the device of a node's result.

    The CUDA kernels multiply in the dtype of the feature maps, those of the CPU in fp32.
    """
    result = value(node)
    dtype = result.dtype if result.is_cuda else weight.dtype
    return weight.to(result.device, dtype).contiguous()


def pack_conv(node: fx.Node, kwargs: dict[str, Any], *, transposed: bool) -> dict[str, Any]:
    """A convolution's arguments with its weight packed for the kernels, and what its shape was."""
    weight = kwargs["weight"]
    defaults = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
    geometry = [list(kwargs.get(name, default)) for name, default in defaults.items()]
    packed = torch.ops.deltafx.pack_conv_weight(
        packable(weight, node), *geometry, kwargs.get("groups", 1), transposed
    )
    return {**kwargs, "weight": packed, "kernel": list(weight.shape[2:])}


def like(t: Tensor | None, x: Tensor) -> Tensor | None:
    """`t` in the dtype of `x`, for a dense function to compute in."""
    return None if t is None else t.to(x.dtype)


def per_channel(t: Tensor, channels: int) -> Tensor | None:
    """A constant that broadcasts over [N, C, H, W] by channel alone, as fp64 [C]; else `None`."""
    if t.numel() == 1:
        return t.reshape(1).to(torch.float64).expand(channels).contiguous()
    shape = (1,) * (4 - t.dim()) + tuple(t.shape)
    if t.dim() <= 4 and shape == (1, channels, 1, 1):
        return t.reshape(channels).to(torch.float64)
    return None
