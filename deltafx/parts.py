"""The parts of a model that is called as it is: a copy of its modules whose calls come by here.

    model.backbone(x)      the copy's backbone(x), which may run a region instead

Enters: a user's model. Leaves: a *shell*, the same modules with the same tensors and hooks, each
module with weights being a `Part`: its `forward`, and only that, goes to whoever runs the frame. So
the model's own code runs unchanged: its classes, attributes, loops, indices and exceptions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, nn

from deltafx.module import DeltaModule
from deltafx.passes.trace_model import shadow


@dataclasses.dataclass(eq=False)
class Part:
    """A module of the model.

    Attributes:
        path: Its name in the model; empty for the model itself.
        module: The user's own.
        dense: The call of its shell, nothing replaced but what its parts are.
        kind: `"unknown"` before the first call; `"delta"`: regions stand for it; `"parts"`: it runs
            as it is, its own parts by themselves; `"dense"`: it runs as it is, all of it.
        reason: Why it is no region.
        regions: One for each call in a frame.
        per_stream: Rows of its maps a stream.
    """

    path: str
    module: nn.Module
    dense: Callable[..., Any]
    kind: str = "unknown"
    reason: str = ""
    regions: list[DeltaModule] = dataclasses.field(default_factory=list)
    per_stream: int = 1

    @property
    def convolves(self) -> bool:
        """Whether a 2-D convolution may be in it."""
        return any(p.dim() == 4 for p in self.module.parameters())

    def settle(self, kind: str, reason: str) -> None:
        """Makes it no region for good."""
        self.kind, self.reason = kind, reason
        self.regions.clear()

    def region_names(self) -> list[str]:
        """The names of its regions: its path, and for further calls in a frame `path[1]`, ..."""
        return [self.path if i == 0 else f"{self.path}[{i}]" for i in range(len(self.regions))]


Call = Callable[[Part, tuple[Any, ...], dict[str, Any]], Any]


def make_parts(model: nn.Module, call: Call) -> tuple[nn.Module, dict[str, Part]]:
    """Makes the shell of a model and its parts by path, the model itself first.

    Args:
        model: The user's.
        call: `call(part, args, kwargs)` stands for the calls of a part.
    """
    copies: dict[nn.Module, nn.Module] = {}
    shell = shadow(model, copies)
    parts: dict[str, Part] = {}
    for path, module in model.named_modules():
        copied = copies.get(module)
        if copied is None or copied is module:
            continue
        # The tensors and the hooks of the model itself: what is done to them is followed.
        for name in ("_parameters", "_buffers", "_forward_pre_hooks", "_forward_hooks"):
            copied.__dict__[name] = module.__dict__[name]
        if not path or any(p.dim() > 1 for p in module.parameters()):
            parts[path] = part = Part(path, module, copied.forward)
            copied.__dict__["forward"] = _forward(call, part)
    return shell, parts


def _forward(call: Call, part: Part) -> Callable[..., Any]:
    @functools.wraps(part.dense)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return call(part, args, kwargs)

    return forward


def streams_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The streams of a frame: the pictures in a list [C, H, W], or the batch of the first map."""
    for argument in (*args, *kwargs.values()):
        if isinstance(argument, (list, tuple)):
            pictures = [t for t in argument if isinstance(t, Tensor) and t.dim() == 3]
            if pictures and len(pictures) == len(argument):
                return len(pictures)
        rows = rows_of((argument,), {})
        if rows:
            return rows[0]
    return 1


def rows_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """The batch sizes of the maps among arguments, each once."""
    leaves = pytree.tree_leaves((args, kwargs))
    maps = [t for t in leaves if isinstance(t, Tensor) and t.dim() >= 4]
    return list(dict.fromkeys(t.shape[0] for t in maps))
