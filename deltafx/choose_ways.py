"""How each convolution of a dense frame is computed: the quickest way on this device.

No one of the `ways` is the best for all shapes. cuDNN can add bias, residual and relu to a
convolution itself, but has then few kernels to choose from, and for some shapes slow ones only (384
to 96 channels by a kernel without tensor cores); an activation that it cannot add is another pass
over memory, unless a kernel of ours takes the convolution. All ways give the same map.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

from torch import Tensor, fx

from deltafx.ops.everywhere import conv2d_everywhere, ways

_NAMES, _TELLING = tuple(signature(conv2d_everywhere).parameters), signature(ways).parameters


def choose_ways(
    gm: fx.GraphModule, inputs: tuple[Any, ...], milliseconds: Callable[[Callable[[], None]], float]
) -> None:
    """Runs a frame, and writes into its graph how each convolution is to be computed.

    Args:
        gm: Of the graph that computes everything everywhere.
        inputs: Of the frame.
        milliseconds: Times a call.
    """
    _Chooser(gm, milliseconds).run(*inputs)


class _Chooser(fx.Interpreter):
    def __init__(
        self, gm: fx.GraphModule, milliseconds: Callable[[Callable[[], None]], float]
    ) -> None:
        super().__init__(gm)
        self._milliseconds = milliseconds
        self._quickest: dict[tuple[Any, ...], str] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.target is conv2d_everywhere:
            args = self.fetch_args_kwargs_from_env(n)[0]
            given = dict(zip(_NAMES, args, strict=False))
            found = ways(**{name: given[name] for name in _TELLING})
            if len(found) > 1:
                alike = (found, *map(_kind, args))
                if alike not in self._quickest:
                    calls = {way: partial(conv2d_everywhere, *args, way=way) for way in found}
                    times = {way: self._milliseconds(call) for way, call in calls.items()}
                    self._quickest[alike] = min(times, key=lambda way: times[way])
                n.kwargs = {"way": self._quickest[alike]}
        return super().run_node(n)


def _kind(argument: Any) -> Any:
    """What of an argument decides how long a call takes."""
    if isinstance(argument, Tensor):
        return argument.shape, argument.stride(), argument.dtype
    return str(argument)
