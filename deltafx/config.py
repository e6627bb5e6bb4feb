"""The one place of defaults: what `deltafx.compile` takes as options.

A `Config` is frozen; every stage reads it and none changes it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from deltafx.errors import InvalidOptionError

POLICIES = ("rms", "max")

MANY_STREAMS = 8
STATE_SHARE = 1.4


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of a compiled model.

    Attributes:
        threshold: How far a value may be from its accumulator without being propagated, in units
            of the channel's standard deviation over the calibration frames; 0 is exact.
        input_threshold: The same for the gate of the input node; `None` takes `threshold`.
        thresholds: Thresholds of single nodes by name; they win over the two above.
        policy: The norm of a change over a truncation group: `"rms"` or `"max"`.
        input_block: The input is gated in squares of this many sites a side; 1 gates every site by
            itself.
        refresh_every: Every so many frames nothing is truncated (all thresholds are 0 in it), so
            that small changes do not pile up for longer; 0 is never. What did not change at all
            is not computed then either: a still picture stays free.
        scale_floor: A channel's scale is at least this share of its layer's mean scale.
        max_states: How many states (one for each shape, dtype and device of the input) are kept;
            the least recently used is dropped.
        max_state_bytes: How large a state may be, of each part of a model that is compiled in
            parts. Where it would be larger, fewer accumulators are kept, as few as that takes: the
            inner maps of blocks of convolutions are computed anew wherever the block is. That costs
            multiply-adds, and nothing is truncated within a block; results are otherwise the same.
            On CUDA devices; where it cannot be held, a `StateLimitWarning` says so. `None` is no
            limit. `"auto"` is one for `MANY_STREAMS` streams and more, where memory decides how
            many there can be: `STATE_SHARE` of what the dense model's feature maps take at their
            peak, with which the whole takes about half as much again as the dense model.
        cuda_graph: Whether a frame on a CUDA device is launched as one CUDA graph.
        dense_above: In such a graph, the share of the input's squares of 16x16 sites that must have
            changed for a frame to be computed everywhere, convolutions by cuDNN; 1 is never. It is
            the same function of the same state by other kernels. All streams of a batch share
            the choice, so with it their last bits, and what is truncated, may depend on each other.
            `None` takes the share at which both ways are equally fast, by their times on this
            device when the graph is captured (which truncates nothing of the frame before); then
            two runs of a program may choose differently.
    """

    threshold: float = 0.1
    input_threshold: float | None = None
    thresholds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    policy: str = "rms"
    input_block: int = 16
    refresh_every: int = 6
    scale_floor: float = 0.05
    max_states: int = 4
    max_state_bytes: int | Literal["auto"] | None = "auto"
    cuda_graph: bool = True
    dense_above: float | None = None

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            InvalidOptionError: A value is out of its range.
        """
        check_threshold("threshold", self.threshold)
        if self.input_threshold is not None:
            check_threshold("input_threshold", self.input_threshold)
        if not isinstance(self.thresholds, Mapping):
            raise InvalidOptionError(
                f"thresholds must be a mapping of node names to numbers, not {self.thresholds!r}"
            )
        for name, value in self.thresholds.items():
            check_threshold(f"thresholds[{name!r}]", value)
        object.__setattr__(self, "thresholds", MappingProxyType(dict(self.thresholds)))
        if self.policy not in POLICIES:
            raise InvalidOptionError(f"policy must be one of {POLICIES}, not {self.policy!r}")
        for name, least in (("input_block", 1), ("max_states", 1), ("refresh_every", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidOptionError(f"{name} must be an int >= {least}, not {value!r}")
        limit = self.max_state_bytes
        if limit not in (None, "auto") and (
            isinstance(limit, bool) or not isinstance(limit, int) or limit < 1
        ):
            raise InvalidOptionError(
                f'max_state_bytes must be an int >= 1, "auto" or None, not {limit!r}'
            )
        share = self.dense_above
        if share is not None and (
            isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1
        ):
            raise InvalidOptionError(f"dense_above must be in [0, 1] or None, not {share!r}")
        floor = self.scale_floor
        if isinstance(floor, bool) or not isinstance(floor, (int, float)) or not 0 < floor <= 1:
            raise InvalidOptionError(f"scale_floor must be in (0, 1], not {floor!r}")
        if not isinstance(self.cuda_graph, bool):
            raise InvalidOptionError(f"cuda_graph must be a bool, not {self.cuda_graph!r}")

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Config:
        """Makes a config of keyword options.

        Args:
            options: Field names and values; a value of `None` for `threshold` or `thresholds`
                means its default.

        Raises:
            InvalidOptionError: A name is unknown (the message lists the known ones) or a value is
                out of its range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        for name in options:
            if name not in known:
                raise InvalidOptionError(
                    f"unknown option {name!r}; the options are {', '.join(sorted(known))}"
                )
        given = {
            name: value
            for name, value in options.items()
            if not (value is None and name in ("threshold", "thresholds"))
        }
        return cls(**given)


def check_threshold(name: str, value: Any) -> float:
    """Returns `value` as a float if it can be a threshold.

    Raises:
        InvalidOptionError: It is not a finite number >= 0.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidOptionError(f"{name} must be a number, not {value!r}")
    if not math.isfinite(value) or value < 0:
        raise InvalidOptionError(f"{name} must be finite and >= 0, not {value!r}")
    return float(value)
