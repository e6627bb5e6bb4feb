"""The update rule of the two convolutions, literally: one site at a time, values in float64.

In: the arguments of an op. Out: what its accumulator, mask and counts must be. It exists to be the
oracle of `test_conv2d.py` and `test_conv_transpose2d.py`, so it shares no code with the kernels and
is slow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import deltafx.ops  # noqa: F401  (registers the operators)

GROUP = 64


@dataclass
class Case:
    """One convolution; sizes in input coordinates."""

    cin: int
    cout: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    size: tuple[int, int, int] = (2, 9, 13)
    output_padding: tuple[int, int] = (0, 0)
    transposed: bool = False
    act: str = "relu"
    act_params: tuple[float, ...] = ()
    residual: bool = False
    residual_after_act: bool = False
    prologue: str | None = None
    bias: bool = True
    dtype: torch.dtype = torch.float32
    policy: str | None = "rms"
    threshold: float = 0.0
    margin: int = 0  # channels of the wider buffer on either side of x and of the accumulator

    def __str__(self) -> str:
        kind = "transposed-" if self.transposed else ""
        k, s, p, d = (
            f"{a}x{b}" for a, b in (self.kernel, self.stride, self.padding, self.dilation)
        )
        return f"{kind}{self.cin}-{self.cout}-k{k}-s{s}-p{p}-d{d}-g{self.groups}"


def sliced(dense: Tensor, margin: int) -> Tensor:
    """`dense` in channels_last, a slice of a buffer with `margin` more channels on either side."""
    n, c, h, w = dense.shape
    wide = torch.full((n, c + 2 * margin, h, w), 7.0, dtype=dense.dtype)
    wide = wide.contiguous(memory_format=torch.channels_last)
    part = wide[:, margin : margin + c]
    part.copy_(dense)
    return part


class Problem:
    """Seeded tensors of a case, the call of the op, and the expected outcome."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        gen = torch.Generator().manual_seed(seed)

        def rand(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=gen)

        self.case = c = case
        n, h, w = c.size
        self.x = sliced(rand(n, c.cin, h, w).to(c.dtype), c.margin)
        shape = (c.cin, c.cout // c.groups) if c.transposed else (c.cout, c.cin // c.groups)
        fan_in = c.cin // c.groups * c.kernel[0] * c.kernel[1]
        self.weight = rand(*shape, *c.kernel) / fan_in**0.5
        self.bias = rand(c.cout) if c.bias else None
        self.pre_scale = rand(c.cin) if c.prologue else None
        self.pre_shift = rand(c.cin) if c.prologue else None
        out = self.dense(torch.float32).shape
        self.acc = sliced(rand(*out).to(c.dtype), c.margin)
        self.residual = sliced(rand(*out).to(c.dtype), c.margin) if c.residual else None
        self.inv_scale = rand(c.cout).abs() + 0.5 if c.policy else None
        self.threshold = torch.tensor(c.threshold) if c.policy else None
        self.x_mask = torch.zeros(n, h, w, dtype=torch.bool)
        self.residual_mask = torch.zeros(out[0], *out[2:], dtype=torch.bool) if c.residual else None
        self.mask = torch.zeros(out[0], *out[2:], dtype=torch.bool)
        self.counts = torch.zeros(2, dtype=torch.int64)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The node's value from its inputs, by torch, in `dtype`."""
        c = self.case

        def to(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(dtype)

        x, weight, bias = self.x.to(dtype), self.weight.to(dtype), to(self.bias)
        if self.pre_scale is not None and self.pre_shift is not None:
            assert c.prologue is not None
            x = x * self.pre_scale.to(dtype).view(1, -1, 1, 1) + self.pre_shift.to(dtype).view(
                1, -1, 1, 1
            )
            x = activation(x, c.prologue)
        if c.transposed:
            y = F.conv_transpose2d(
                x, weight, bias, c.stride, c.padding, c.output_padding, c.groups, c.dilation
            )
        else:
            y = F.conv2d(x, weight, bias, c.stride, c.padding, c.dilation, c.groups)
        residual = to(getattr(self, "residual", None))
        if residual is not None and not c.residual_after_act:
            y = y + residual
        y = activation(y, c.act, c.act_params)
        return y + residual if residual is not None and c.residual_after_act else y

    def candidates(self) -> Tensor:
        """Output sites whose window touches an active input site, window by window."""
        n, h, w = self.case.size
        _, oh, ow = self.mask.shape
        every = [(y, x) for y in range(h) for x in range(w)]
        active = self.x_mask.tolist()
        result = torch.zeros_like(self.mask).tolist()
        for oy in range(oh):
            for ox in range(ow):
                window = [(y, x) for y in self.taps(oy, 0, h) for x in self.taps(ox, 1, w)]
                for i in range(n):
                    # A window with no input site at all follows its stream.
                    seen = [active[i][y][x] for y, x in window or every]
                    result[i][oy][ox] = any(seen)
        found = torch.tensor(result)
        return found if self.residual_mask is None else found | self.residual_mask

    def taps(self, o: int, axis: int, size: int) -> list[int]:
        """The input coordinates that output coordinate `o` sees along an axis."""
        c = self.case
        s, p, d = c.stride[axis], c.padding[axis], c.dilation[axis]
        steps = [k * d for k in range(c.kernel[axis])]
        if c.transposed:
            found = [(o + p - step) // s for step in steps if (o + p - step) % s == 0]
        else:
            found = [o * s - p + step for step in steps]
        return [i for i in found if 0 <= i < size]

    def call(self) -> None:
        """Runs the op under test, in place."""
        args, kwargs = self.arguments()
        op = (
            torch.ops.deltafx.conv_transpose2d if self.case.transposed else torch.ops.deltafx.conv2d
        )
        op(*args, **kwargs)

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the op, in the order of its schema."""
        c = self.case
        pack = torch.ops.deltafx.pack_conv_weight
        packed = pack(self.weight, c.stride, c.padding, c.dilation, c.groups, c.transposed)
        first = (
            self.acc,
            self.mask,
            self.counts,
            self.x,
            self.x_mask,
            packed,
            self.bias,
            self.residual,
        )
        middle: tuple[Any, ...] = (self.residual_mask,)
        if not c.transposed:
            middle += (self.pre_scale, self.pre_shift, c.prologue or "identity")
        middle += (c.kernel, c.stride, c.padding)
        if c.transposed:
            middle += (c.output_padding,)
        last = (c.dilation, c.groups, c.residual_after_act, c.act, list(c.act_params), None)
        return first + middle + last + (self.inv_scale, self.threshold, c.policy or "rms"), {}

    def tolerance(self, exact: Tensor) -> Tensor:
        """Twice the error of torch's own dense convolution in this dtype, at least one rounding.

        Torch has two ways to a transposed convolution, with different orders of summation; the
        worse one counts: by columns, and as a convolution of the zero-stuffed input.
        """
        dtype = self.case.dtype
        error = (self.dense(dtype).double() - exact).abs().max()
        if self.case.transposed:
            error = torch.maximum(
                error, (self.stuffed(dtype).double() - self.stuffed(torch.float64)).abs().max()
            )
        return 2 * torch.maximum(error, torch.finfo(dtype).eps * exact.abs().max())

    def stuffed(self, dtype: torch.dtype) -> Tensor:
        """The transposed convolution alone, as an ordinary one of the input with zeros between."""
        c = self.case
        n, h, w = c.size
        x = torch.zeros(n, c.cin, (h - 1) * c.stride[0] + 1, (w - 1) * c.stride[1] + 1, dtype=dtype)
        x[:, :, :: c.stride[0], :: c.stride[1]] = self.x.to(dtype)
        weight = self.weight.to(dtype).flip(2, 3)
        weight = weight.unflatten(0, (c.groups, -1)).transpose(1, 2).flatten(0, 1)
        reach = [d * (k - 1) for d, k in zip(c.dilation, c.kernel, strict=True)]
        return F.conv2d(x, weight, None, 1, reach, c.dilation, c.groups)

    def check(self) -> None:
        """Calls the op and compares all it writes with the rule."""
        c = self.case
        exact, candidates, before = self.dense(torch.float64), self.candidates(), self.acc.clone()
        tolerance = self.tolerance(exact)
        self.call()
        active = torch.zeros_like(self.mask)
        for first in range(0, c.cout, GROUP):
            part = slice(first, first + GROUP)
            old, new, want = before[:, part], self.acc[:, part], exact[:, part]
            written = (new != old).any(1)
            right = ((new.double() - want).abs() <= tolerance).all(1)
            assert not (written & ~candidates).any(), "wrote a site that is not a candidate"
            assert right[written].all(), "wrote a wrong value"
            if self.inv_scale is None:
                assert right[candidates].all(), "left a candidate unwritten"
                active |= candidates
                continue
            scale = self.inv_scale[part].double().view(1, -1, 1, 1)
            change = (want - old.double()) * scale
            size = change.square().mean(1).sqrt() if c.policy == "rms" else change.abs().amax(1)
            slack = tolerance * scale.max() * 2
            assert written[candidates & (size > c.threshold + slack)].all(), "missed a change"
            assert not written[candidates & (size < c.threshold - slack)].any(), (
                "wrote within the threshold"
            )
            active |= written
        assert self.acc.isfinite().all()
        assert torch.equal(self.mask, active)
        assert self.counts.tolist() == [int(candidates.sum()), int(active.sum())]
        self.check_margin(self.acc)

    def check_margin(self, part: Tensor) -> None:
        """Nothing around a channel slice was touched."""
        m = self.case.margin
        if m == 0:
            return
        n, c, h, w = part.shape
        wide = torch.as_strided(
            part, (n, h, w, c + 2 * m), (h * w * (c + 2 * m), w * (c + 2 * m), c + 2 * m, 1), 0
        )
        assert (wide[..., :m] == 7).all()
        assert (wide[..., m + c :] == 7).all()


def activation(x: Tensor, name: str, params: tuple[float, ...] = ()) -> Tensor:
    """The few activations the tests use; their own test covers the others."""
    if name == "identity":
        return x
    if name == "leaky_relu":
        return F.leaky_relu(x, params[0])
    return {"relu": F.relu, "relu6": F.relu6, "silu": F.silu}[name](x)


def set_mask(mask: Tensor, kind: str, seed: int = 1) -> None:
    """Fills a mask: empty, full, one (a single site) or random."""
    mask.zero_()
    if kind == "full":
        mask.fill_(True)
    elif kind == "one":
        mask[-1, mask.shape[1] // 2, mask.shape[2] // 3] = True
    elif kind == "random":
        gen = torch.Generator().manual_seed(seed)
        mask.copy_(torch.rand(mask.shape, generator=gen) < 0.15)
