"""Channel scales: what one unit of a threshold means in a channel.

The scale of a channel is its standard deviation over the calibration frames, but at least a share
(the floor) of its layer's mean scale. A map of very few sites (a gate) has no spread of its own to
speak of; there all channels take the layer's.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from deltafx.state import StatePlan, acc_name, scale_name

FEW_SITES = 16


@dataclasses.dataclass
class Moments:
    """Sums over finite values, fp64 [C]: count, sum, sum of squares; and the sites of a stream."""

    count: Tensor
    total: Tensor
    squares: Tensor
    sites: int


def observe(moments: dict[str, Moments], plan: StatePlan, buffers: dict[str, Tensor]) -> None:
    """Adds the accumulators of the truncating nodes, as they are now, to their moments."""
    for node in plan.truncating:
        place = plan.places[node]
        whole = buffers[acc_name(place.slot)]
        acc = whole[:, place.start : place.start + place.channels]
        sums = [_sums(stream) for stream in acc.split(1)]  # one at a time: fp32 copies are large
        count, total, squares = (torch.stack(s).sum(0) for s in zip(*sums, strict=True))
        new = Moments(count, total, squares, acc.shape[2] * acc.shape[3])
        old = moments.get(node)
        if old is not None:
            new.count += old.count
            new.total += old.total
            new.squares += old.squares
        moments[node] = new


def _sums(acc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, sum and sum of squares of the finite values of each channel."""
    acc = acc.float()
    finite = acc.isfinite()
    acc = torch.where(finite, acc, torch.zeros((), device=acc.device))
    return (
        finite.sum((0, 2, 3)).double(),
        acc.sum((0, 2, 3), dtype=torch.float64),
        acc.square().sum((0, 2, 3), dtype=torch.float64),
    )


def scales(moments: dict[str, Moments], floor: float) -> dict[str, Tensor]:
    """The scale of each channel, fp32 [C] by node; nodes that saw no finite value are left out."""
    found: dict[str, Tensor] = {}
    for node, m in moments.items():
        if not bool(m.count.sum() > 0):
            continue
        if m.sites < FEW_SITES:
            deviation = _deviation(m.count.sum(), m.total.sum(), m.squares.sum())
            deviation = deviation.expand_as(m.count)
        else:
            deviation = _deviation(m.count, m.total, m.squares)
        mean = deviation.mean()
        scale = torch.maximum(deviation, floor * mean)
        found[node] = torch.where(scale > 0, scale, torch.ones_like(scale)).float()
    return found


def _deviation(count: Tensor, total: Tensor, squares: Tensor) -> Tensor:
    count = count.clamp(min=1)
    mean = total / count
    return (squares / count - mean.square()).clamp(min=0).sqrt()


def apply(found: dict[str, Tensor], plan: StatePlan, buffers: dict[str, Tensor]) -> None:
    """Writes the inverses of the scales into a state."""
    for node in plan.truncating:
        if node in found:
            buffers[scale_name(node)].copy_(found[node].reciprocal())
