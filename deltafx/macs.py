"""MacCounter: the multiply-adds that ATen calls do while it is active, by who did them."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode_temporarily
from torch.utils.flop_counter import flop_registry


class MacCounter(TorchDispatchMode):
    """Counts as torch's own FLOP counter does, two FLOPs a multiply-add.

    Attributes:
        macs: By what `owner` said when the call was made.
    """

    def __init__(self, owner: Callable[[], str]) -> None:
        """Takes the function that names who is at work."""
        super().__init__()
        self.macs: Counter[str] = Counter()
        self._owner = owner

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs a call and counts it."""
        kwargs = kwargs or {}
        count = flop_registry.get(getattr(func, "_overloadpacket", None))
        if count is None and isinstance(func, torch._ops.OpOverload):
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if count is not None:
            self.macs[self._owner()] += int(count(*args, **kwargs, out_val=out)) // 2
        return out

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Counts nothing, and is not even there, for a while."""
        with _pop_mode_temporarily():
            yield
