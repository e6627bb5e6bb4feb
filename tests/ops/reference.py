"""The update rule, literally and slowly, for every op.

Enters: what the op computes everywhere in fp64, a bound on how far another evaluation may be from
it, the candidates, and the state before. Leaves: what the state after must be. A group of channels
whose change is nearer to the threshold than that bound may go either way; all others may not.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

GROUP = 64


@functools.lru_cache(maxsize=256)
def taps(
    in_size: tuple[int, int],
    out_size: tuple[int, int],
    rows: tuple[tuple[int, ...], ...],
    columns: tuple[tuple[int, ...], ...],
) -> Tensor:
    """[out sites, in sites], 1 where the window of an output site holds an input site.

    rows[y] are the input rows that output row y reads, columns[x] likewise; those outside of the
    input are left out.
    """
    touched = torch.zeros(*out_size, *in_size)
    for y, x in itertools.product(range(out_size[0]), range(out_size[1])):
        for iy, ix in itertools.product(rows[y], columns[x]):
            if 0 <= iy < in_size[0] and 0 <= ix < in_size[1]:
                touched[y, x, iy, ix] = 1
    return touched.reshape(out_size[0] * out_size[1], -1)


def windows(out: int, kernel: int, stride: int, padding: int, dilation: int):
    """What each output coordinate of a convolution or pool reads along one axis."""
    return tuple(
        tuple(o * stride - padding + k * dilation for k in range(kernel)) for o in range(out)
    )


def touching(mask: Tensor, out_size: tuple[int, int], rows, columns) -> Tensor:
    """The candidates [N, H', W']: output sites whose window holds an active site of `mask`."""
    n, h, w = mask.shape
    matrix = taps((h, w), tuple(out_size), rows, columns)
    hits = mask.cpu().reshape(n, -1).float() @ matrix.T
    return (hits > 0).reshape(n, *out_size)


def ulp(y: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbours of `dtype` at y, in fp64."""
    return torch.finfo(dtype).eps * y.abs().clamp_min(torch.finfo(dtype).tiny)


def bound(dense: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """How far from fp64 a delta op may be: twice what torch's dense op is, and a rounding.

    Where torch is exact everywhere (copies, maxima), so must the delta op be.
    """
    error = (dense.double() - exact).abs().nan_to_num(0.0).max() if exact.numel() else 0.0
    if error == 0.0:
        return torch.zeros_like(exact)
    return 2 * error + ulp(exact.nan_to_num(0.0), dtype) / 2


@dataclasses.dataclass
class State:
    """An accumulator [N, C, H, W] with its mask [N, H, W] and counts [2].

    What was written is brought to the CPU; only the counts stay where they are, as what is in them
    depends on it.
    """

    acc: Tensor
    mask: Tensor
    counts: Tensor


def check_counts(counts: Tensor, candidates: int, active: int) -> None:
    """Asserts what an op counted: on CUDA no active sites, which the mask tells there."""
    assert counts.tolist() == [candidates, 0 if counts.is_cuda else active]


def decide(
    exact: Tensor,
    tolerance: Tensor,
    acc: Tensor,
    policy: str,
    inv_scale: Tensor,
    threshold: float | None,
) -> tuple[Tensor, Tensor]:
    """Where [N, H, W] a group of channels [N, c, H, W] may be written, and may be left."""
    always = torch.ones_like(exact[:, 0], dtype=torch.bool)
    if threshold is None:
        return always, ~always
    change = (exact - acc).abs()
    unknown = change.isnan().any(1)
    if threshold == 0.0:
        return (change + tolerance > 0).any(1) | unknown, (change <= tolerance).all(1) & ~unknown
    scale = inv_scale.double()[None, :, None, None]
    norm: Callable[[Tensor], Tensor] = (
        (lambda v: v.square().mean(1).sqrt()) if policy == "rms" else (lambda v: v.amax(1))
    )
    size, slack = norm(change * scale), norm(tolerance * scale)
    slack = slack + 1e-5 * (size + threshold)  # the norm itself is evaluated in fp32
    return (size + slack > threshold) | unknown, (size - slack <= threshold) & ~unknown


def same(a: Tensor, b: Tensor) -> Tensor:
    """Where a equals b, a NaN being equal to a NaN."""
    return (a == b) | (a.isnan() & b.isnan())


def check_update(
    before: State,
    after: State,
    exact: Tensor,
    tolerance: Tensor,
    candidates: Tensor,
    policy: str,
    inv_scale: Tensor,
    threshold: float | None,
    at_most: Tensor | None = None,
) -> float:
    """Asserts that `after` follows from `before`; returns the share that could go either way.

    Where `at_most` is given, sites of it that are not in `candidates` may be candidates or not.
    """
    least, candidates = candidates, candidates if at_most is None else at_most
    old, new = before.acc.double(), after.acc.double()
    untouched = same(old, new).all(1)
    assert bool((untouched | candidates).all()), "a site that is no candidate was written"
    must = torch.zeros_like(candidates)
    may = torch.zeros_like(candidates)
    either = 0.0
    for first in range(0, exact.shape[1], GROUP):
        group = slice(first, first + GROUP)
        want, slack, got = exact[:, group], tolerance[:, group], new[:, group]
        write, leave = decide(want, slack, old[:, group], policy, inv_scale[group], threshold)
        leave = leave | ~least
        either = max(either, float((write & leave & least).float().mean()))
        # A NaN that was written is a NaN; everything else is within the bound.
        near = ((got - want).abs() <= slack) | same(got, want)
        written, left = near.all(1), same(got, old[:, group]).all(1)
        wrong = ~((write & written) | (leave & left)) & candidates
        if wrong.any():
            n, y, x = wrong.nonzero()[0].tolist()
            at = (n, slice(None), y, x)
            raise AssertionError(
                f"{int(wrong.sum())} sites, first {(n, y, x)}, channels from {first}: may be "
                f"written {bool(write[n, y, x])}, left {bool(leave[n, y, x])}; "
                f"is {got[at]}, was {old[:, group][at]}, exact {want[at]}, bound {slack[at]}"
            )
        must |= ~leave & candidates
        may |= write & candidates
    now = after.mask & ~before.mask
    assert not (now & ~may).any(), "a site is active that was not to be written"
    assert not (must & ~after.mask).any(), "a written site is not active"
    assert not (before.mask & ~after.mask).any(), "the mask was cleared"
    count, active = after.counts.tolist()
    assert int(least.sum()) <= count <= int(candidates.sum())
    if after.counts.is_cuda:
        assert active == 0, "on CUDA the mask tells, and that was looked at"
    else:
        assert int(must.sum()) <= active <= int(may.sum())
        if not before.mask.any():
            assert active == int(after.mask.sum())
    return either
