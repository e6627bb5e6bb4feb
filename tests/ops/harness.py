"""Runs an op from a made-up state and checks the state after against the reference.

A test gives the dense function's arguments and the candidates. The sweep over dtypes, channels,
masks, thresholds, policies and channel slices is here, the same for every op.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from deltafx.ops.base import DeltaOp
from tests.ops.reference import State, bound, check_update

DTYPES = (torch.float32, torch.bfloat16)
CHANNELS = (1, 3, 17, 64, 65, 130)
MASKS = ("empty", "full", "one", "random")
# policy, threshold; no threshold: every candidate is written.
TRUNCATIONS = (("rms", None), ("rms", 0.0), ("rms", 0.25), ("max", 0.25))
OUTSIDE = 77.0  # what the channels around a slice hold

sweep = pytest.mark.parametrize(
    ("dtype", "channels", "pattern"),
    list(itertools.product(DTYPES, CHANNELS, MASKS)),
    ids=lambda v: str(v).removeprefix("torch."),
)


def rotated(options: Sequence[Any], take: int, channels: int, pattern: str) -> list[Any]:
    """`take` of the options, other ones for other channels and masks, so that pairs are covered."""
    start = CHANNELS.index(channels) * (len(MASKS) + 1) + MASKS.index(pattern)
    return [options[(start * take + i) % len(options)] for i in range(take)]


def make_mask(pattern: str, n: int, h: int, w: int) -> Tensor:
    mask = torch.zeros(n, h, w, dtype=torch.bool)
    if pattern == "full":
        mask.fill_(True)
    elif pattern == "one":
        mask[n - 1, h // 2, w - 1] = True
    elif pattern == "random":
        mask = torch.rand(n, h, w) < 0.2
    return mask


def make_map(values: Tensor, dtype: torch.dtype, device: torch.device, sliced: bool) -> Tensor:
    """`values` as an accumulator: channels_last, or a slice of the channels of a wider one."""
    n, c, h, w = values.shape
    before, after = (5, 2) if sliced else (0, 0)
    wide = torch.full((n, before + c + after, h, w), OUTSIDE, dtype=dtype, device=device)
    wide = wide.contiguous(memory_format=torch.channels_last)
    part = wide[:, before : before + c]
    part.copy_(values)
    return part


def around(t: Tensor) -> Tensor:
    """All of the storage that a map is a slice of, with the map's own values blanked."""
    whole = t._base if t._base is not None else t
    own = t.clone()
    t.fill_(0)
    rest = whole.clone()
    t.copy_(own)
    return rest


def cast(kwargs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in kwargs.items()
    }


def disturbed(exact: Tensor, inv_scale: Tensor, threshold: float) -> Tensor:
    """An accumulator that each group is nearer to, equal to or farther from than the threshold."""
    n, c, h, w = exact.shape
    groups = -(-c // 64)
    factor = torch.tensor([0.0, 0.25, 4.0])[torch.randint(0, 3, (n, groups, h, w))]
    factor = factor.repeat_interleave(64, 1)[:, :c].double()
    sign = (torch.randint(0, 2, exact.shape) * 2 - 1).double()
    return exact + factor * sign * threshold / inv_scale.double()[None, :, None, None]


def operator_arguments(op: DeltaOp, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The dense function's arguments as the operator wants them, with its defaults."""
    defaults = {
        k: p.default
        for k, p in inspect.signature(op.dense).parameters.items()
        if p.default is not inspect.Parameter.empty
    }
    given = {**defaults, **kwargs}
    return op.prepare(None, given) if op.prepare else given  # type: ignore[arg-type]


def run(
    op: DeltaOp,
    state: State,
    kwargs: dict[str, Any],
    masks: dict[str, Tensor | None],
    truncation: dict[str, Any],
    workspace: dict[str, Tensor] | None = None,
) -> None:
    given = operator_arguments(op, kwargs)
    op.operator(
        acc=state.acc,
        mask=state.mask,
        counts=state.counts,
        **given,
        **{f"{name}_mask": mask for name, mask in masks.items()},
        **truncation,
        **(workspace or {}),
    )


def check(
    op: DeltaOp,
    kwargs: dict[str, Any],
    masks: dict[str, Tensor | None],
    candidates: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    index: int = 0,
    workspace: Callable[[], dict[str, Tensor]] = dict,
    lost: bool = False,
    at_most: Tensor | None = None,
) -> None:
    """Checks an op at every truncation, alternating between plain maps and channel slices.

    Args:
        op: The op.
        kwargs: The dense function's arguments; feature maps in fp32 on the CPU.
        masks: The update masks of its inputs.
        candidates: [N, H', W'].
        dtype: Of the accumulators.
        device: Of the operator.
        index: Varies which of the truncations get slices.
        workspace: Makes the buffers that the operator keeps.
        lost: Whether the state before is NaN.
        at_most: Where `candidates` are only those that there must be: those that there may be.
    """
    inputs = {name: kwargs[name].to(dtype) for name in op.inputs}
    exact = op.dense(**cast({**kwargs, **inputs}, torch.float64))
    dense = op.dense(**cast({**kwargs, **inputs}, dtype))
    tolerance = bound(dense, exact, dtype)
    inv_scale = torch.rand(exact.shape[1]) + 0.5
    for i, (policy, threshold) in enumerate(TRUNCATIONS):
        sliced = (i + index) % 2 == 1
        start = disturbed(exact, inv_scale, threshold or 0.25)
        if lost:
            start = torch.full_like(exact, float("nan"))
        before_mask = torch.rand(candidates.shape) < 0.1 if i % 2 else torch.zeros_like(candidates)
        state = State(
            make_map(start, dtype, device, sliced),
            before_mask.to(device, copy=True),
            torch.zeros(2, dtype=torch.int64, device=device),
        )
        before = State(state.acc.clone().cpu(), before_mask, torch.zeros(2))
        untouched = around(state.acc)
        moved = {
            k: v.to(device) if isinstance(v, Tensor) else v for k, v in kwargs.items()
        } | {k: make_map(v, dtype, device, sliced) if v.dim() == 4 else v.to(device)
             for k, v in inputs.items()}  # fmt: skip
        truncation = {
            "inv_scale": None if threshold is None else inv_scale.to(device),
            "threshold": None if threshold is None else torch.tensor([threshold], device=device),
            "policy": policy,
        }
        on_device = {k: None if m is None else m.to(device) for k, m in masks.items()}
        run(op, state, moved, on_device, truncation, workspace())
        assert torch.equal(around(state.acc), untouched), "written outside of the slice"
        after = State(state.acc.cpu(), state.mask.cpu(), state.counts)
        either = check_update(
            before, after, exact, tolerance, candidates, policy, inv_scale, threshold, at_most
        )
        if threshold:
            assert either < 0.1, "the bound leaves too many decisions open to be a test"


def opcheck(op: DeltaOp, kwargs: dict[str, Any], out_size: tuple[int, int], device) -> None:
    """torch.library.opcheck on one sample."""
    n = max(kwargs[name].shape[0] for name in op.inputs)
    channels = op.dense(**kwargs).shape[1]
    masks = {
        f"{name}_mask": make_mask(
            "random", kwargs[name].shape[0], *kwargs[name].shape[2:]
        ).to(device)
        for name in op.inputs
    }  # fmt: skip
    given = {
        k: make_map(v, v.dtype, device, False)
        if isinstance(v, Tensor) and v.dim() == 4
        else v.to(device)
        if isinstance(v, Tensor)
        else v
        for k, v in operator_arguments(op, kwargs).items()
    }
    arguments = {
        "acc": make_map(torch.zeros(n, channels, *out_size), torch.float32, device, False),
        "mask": torch.zeros(n, *out_size, dtype=torch.bool, device=device),
        "counts": torch.zeros(2, dtype=torch.int64, device=device),
        **given,
        **masks,
        "inv_scale": torch.ones(channels, device=device),
        "threshold": torch.zeros(1, device=device),
        "policy": "rms",
        "memory": None,
        "listed": False,
    }
    names = [a.name for a in op.operator._schema.arguments]
    torch.library.opcheck(op.operator, tuple(arguments[name] for name in names))
