"""What "exact at threshold 0" means: at most twice the dense model's own error against float64."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def floats(result: Any) -> list[Tensor]:
    """The floating-point tensors of a result."""
    leaves = pytree.tree_leaves(result)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


class Oracle:
    """The dense model beside a compiled one: it collects both errors over a sequence of frames.

    The dense model is run in both memory formats, and the larger of its two errors counts: they
    differ in nothing but the order of additions, and so tell how much of an error is luck. On CUDA,
    where both may well be the same kernels, it is also run on frames that are off by a unit in the
    last place, up and down. A value is moreover never known better than to the last place of its
    dtype. A copy of an oracle goes on by itself from what was seen.
    """

    def __init__(self, model: nn.Module, exact: nn.Module | None = None) -> None:
        """Takes the dense model, and what is right, if that is not the model in float64.

        A model that cannot compute in float64 may itself be taken: its results on tensors of the
        one memory format then judge, and those of the other tell how exact they are.
        """
        self.dense = model
        self.exact = copy.deepcopy(model).double() if exact is None else exact
        self._in_float64 = exact is None
        self.ours = 0.0
        self.norm = 0.0
        self.own: list[float] = [0.0]
        self.eps = 0.0

    def compare(self, outputs: Any, *args: Any) -> None:
        """Takes in a frame's result; asserts that NaNs and infinities are where they belong.

        On CUDA a library may spread a NaN of the frame farther than the model does; but the next
        frame must be rid of it.
        """
        self.take(outputs, self.reference(*args))

    @torch.no_grad()
    def reference(self, *args: Any) -> tuple[list[Tensor], list[list[Tensor]]]:
        """What the model gives for a frame: in float64, and by itself in two ways or four."""
        exactly = pytree.tree_map(_double, args) if self._in_float64 else args
        expected = floats(self.exact(*exactly))
        ways = [
            pytree.tree_map(functools.partial(_formatted, layout), args)
            for layout in (torch.contiguous_format, torch.channels_last)
        ]
        if any(isinstance(a, Tensor) and a.is_cuda for a in pytree.tree_leaves(args)):
            ways += [pytree.tree_map(functools.partial(_nearly, by), ways[0]) for by in (1, -1)]
        return expected, [floats(self.dense(*way)) for way in ways]

    def take(self, outputs: Any, reference: tuple[list[Tensor], list[list[Tensor]]]) -> None:
        """The same, of a reference that is there already."""
        expected, dense = reference
        got = floats(outputs)
        assert [t.shape for t in got] == [t.shape for t in expected]
        spread = any(e.is_cuda and e.isnan().any() for e in expected)
        for i, (o, e) in enumerate(zip(got, expected, strict=True)):
            assert o.dtype == dense[0][i].dtype
            self.eps = max(self.eps, torch.finfo(o.dtype).eps)
            assert not (e.isnan() & ~o.isnan()).any(), "numbers where the model has NaNs"
            assert spread or not (o.isnan() & ~e.isnan()).any(), "NaNs where the model has numbers"
            finite = e.isfinite() & (o.isfinite() | (not spread))
            self.ours += _squares(o, e, finite)
            self.norm += _squares(e, torch.zeros_like(e), finite)
            # Dense kernels may spread a NaN farther than the model does; that is no error here.
            found = [_squares(way[i], e, finite & way[i].isfinite()) for way in dense]
            self.own = [a + b for a, b in itertools.zip_longest(self.own, found, fillvalue=0.0)]

    @property
    def error(self) -> float:
        """Relative L2 over everything seen."""
        return (self.ours / self.norm) ** 0.5 if self.norm else self.ours**0.5

    @property
    def bound(self) -> float:
        """Twice the dense model's own, or a unit in the last place."""
        own = max(self.own) ** 0.5
        return max(2 * own / self.norm**0.5, self.eps) if self.norm else 2 * own

    @property
    def holds(self) -> bool:
        """Whether the compiled model is as exact as the dense one."""
        return self.error <= self.bound

    def check(self) -> None:
        """Asserts it."""
        assert self.holds, f"error {self.error:.3e}, allowed {self.bound:.3e}"


def exact_over(model: nn.Module, compiled: Any, frames: Iterable[Any]) -> None:
    """Feeds frames (tensors, or tuples of arguments) to both and checks the error."""
    oracle = Oracle(model)
    for frame in frames:
        args = frame if isinstance(frame, tuple) else (frame,)
        oracle.compare(compiled(*args), *args)
    oracle.check()


def _double(a: Any) -> Any:
    return a.double() if isinstance(a, Tensor) and a.is_floating_point() else a


def _formatted(layout: torch.memory_format, a: Any) -> Any:
    return a.clone(memory_format=layout) if isinstance(a, Tensor) and a.dim() == 4 else a


def _nearly(by: int, a: Any) -> Any:
    """The same to a unit in the last place, up in every other element and down in the rest."""
    if not isinstance(a, Tensor) or not a.is_floating_point():
        return a
    signs = torch.full_like(a, by).flatten()
    signs[::2] = -by
    return a * (1 + signs.view_as(a).double() * torch.finfo(a.dtype).eps).to(a.dtype)


def _squares(a: Tensor, b: Tensor, where: Tensor) -> float:
    return float((a.double() - b.double())[where].square().sum())
