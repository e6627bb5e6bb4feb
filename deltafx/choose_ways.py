"""How each convolution of a dense frame is computed: the quickest way on this device.

No one of the `ways` is the best for all shapes. cuDNN can add bias, residual and relu to a
convolution itself, but has then few kernels to choose from, and for some shapes slow ones only (384
to 96 channels by a kernel without tensor cores); an activation that it cannot add is another pass
over memory, unless a kernel of ours takes the convolution. All ways give the same map.

Some of cuDNN's kernels want memory to work in, for an image's first layer as much as its result.
Where memory is short, those that want the least are taken, and of these the quickest.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

from torch import Tensor, fx

from deltafx.ops.everywhere import conv2d_everywhere, ways

LITTLE = 4 << 20
"""Bytes; less of them is none, as torch's allocator takes small tensors out of pieces of 2 MiB."""

_NAMES, _TELLING = tuple(signature(conv2d_everywhere).parameters), signature(ways).parameters


def choose_ways(
    gm: fx.GraphModule,
    inputs: tuple[Any, ...],
    measure: Callable[[Callable[[], None]], tuple[float, int]],
    *,
    frugal: bool,
) -> None:
    """Runs a frame, and writes into its graph how each convolution is to be computed.

    Args:
        gm: Of the graph that computes everything everywhere.
        inputs: Of the frame.
        measure: The milliseconds of a call, and the bytes that it works in.
        frugal: Whether memory is short.
    """
    _Chooser(gm, measure, frugal).run(*inputs)


class _Chooser(fx.Interpreter):
    def __init__(
        self,
        gm: fx.GraphModule,
        measure: Callable[[Callable[[], None]], tuple[float, int]],
        frugal: bool,
    ) -> None:
        super().__init__(gm)
        self._measure, self._frugal = measure, frugal
        self._quickest: dict[tuple[Any, ...], str] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.target is conv2d_everywhere:
            args = self.fetch_args_kwargs_from_env(n)[0]
            given = dict(zip(_NAMES, args, strict=False))
            found = ways(**{name: given[name] for name in _TELLING})
            if len(found) > 1:
                alike = (found, *map(_kind, args))
                if alike not in self._quickest:
                    costs = {way: self._cost(partial(n.target, *args, way=way)) for way in found}
                    self._quickest[alike] = min(costs, key=lambda way: costs[way])
                n.kwargs = {"way": self._quickest[alike]}
        return super().run_node(n)

    def _cost(self, call: Callable[[], None]) -> tuple[int, float]:
        milliseconds, needed = self._measure(call)
        return needed // LITTLE if self._frugal else 0, milliseconds


def _kind(argument: Any) -> Any:
    """What of an argument decides how long a call takes."""
    if isinstance(argument, Tensor):
        return argument.shape, argument.stride(), argument.dtype
    return str(argument)
