"""The activations that every delta op can end with.

Enters: a name, its numbers and, for `prelu`, a weight per channel. Leaves: the torch function. The
names and parameters are those of the C++ `Act`; the ATen spellings of each are matched here too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from deltafx.ops.base import Raised, Refusal, arguments, constant

aten = torch.ops.aten

ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "leaky_relu": F.leaky_relu,
    "prelu": F.prelu,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "elu": lambda x, alpha, scale, input_scale: torch.ops.aten.elu(x, alpha, scale, input_scale),
    "mish": F.mish,
    "softplus": F.softplus,
}


def activate(
    x: Tensor, act: str, act_params: Sequence[float] = (), act_weight: Tensor | None = None
) -> Tensor:
    """Applies an activation to `x` of any shape with channels in dimension 1."""
    if act == "prelu":
        assert act_weight is not None
        return F.prelu(x, act_weight.to(x.dtype))
    return ACTIVATIONS[act](x, *act_params)


def _hardtanh(low: float, high: float) -> dict[str, Any]:
    if (low, high) == (0.0, 6.0):
        return {"act": "relu6"}
    return {"act": "hardtanh", "act_params": (low, high)}


def match_activation(node: fx.Node) -> dict[str, Any] | Refusal | None:
    """The `act` arguments that an ATen call stands for; `None` if it is no activation."""
    simple = {
        aten.relu.default: "relu",
        aten.relu6.default: "relu6",
        aten.silu.default: "silu",
        aten.hardswish.default: "hardswish",
        aten.hardsigmoid.default: "hardsigmoid",
        aten.sigmoid.default: "sigmoid",
        aten.tanh.default: "tanh",
        aten.mish.default: "mish",
    }
    if node.target in simple:
        return {"act": simple[node.target]}
    if node.target == aten.selu.default:
        alpha, scale = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946
        return {"act": "elu", "act_params": (alpha, scale, 1.0)}
    parametric = (
        aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default, aten.leaky_relu.default,
        aten.prelu.default, aten.gelu.default, aten.elu.default, aten.softplus.default,
    )  # fmt: skip
    if node.target not in parametric:
        return None
    a = arguments(node)
    if node.target == aten.hardtanh.default:
        return _hardtanh(float(a["min_val"]), float(a["max_val"]))
    if node.target in (aten.clamp.default, aten.clamp_min.default):
        low, high = a.get("min"), a.get("max")
        if not isinstance(low, (int, float)):
            return Refusal("a clamp without a lower bound is not a delta op")
        if high is None:
            return {"act": "relu"} if low == 0 else _hardtanh(float(low), float("inf"))
        return _hardtanh(float(low), float(high))
    if node.target == aten.leaky_relu.default:
        return {"act": "leaky_relu", "act_params": (float(a["negative_slope"]),)}
    if node.target == aten.gelu.default:
        return {"act": "gelu_tanh" if a["approximate"] == "tanh" else "gelu"}
    if node.target == aten.elu.default:
        return {
            "act": "elu",
            "act_params": (float(a["alpha"]), float(a["scale"]), float(a["input_scale"])),
        }
    if node.target == aten.softplus.default:
        return {"act": "softplus", "act_params": (float(a["beta"]), float(a["threshold"]))}
    weight = constant(a["weight"])
    if weight is None:
        return Refusal("the weight of this prelu is computed by the model")
    channels = node.meta["val"].shape[1]
    return {"act": "prelu", "act_weight": weight.float().reshape(-1).expand(channels).contiguous()}


__all__ = ["ACTIVATIONS", "Raised", "activate", "match_activation"]
