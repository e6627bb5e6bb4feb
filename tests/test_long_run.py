"""Months of frames: at threshold 0 the error does not grow, in half precision either."""

import copy

import torch
from torch import nn

import deltafx

FRAMES = 10_000


class Net(nn.Module):
    """A block with a norm, a residual, a gate (whose mean is kept as partial sums) and a pool."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x):
        y = self.norm(self.a(x)).relu()
        z = y + self.b(y)
        return self.pool(z * z.mean((2, 3), keepdim=True).sigmoid())


def relative(a, b):
    return float((a.double() - b).norm() / b.norm())


def test_the_last_error_is_not_above_the_first_ones():
    torch.manual_seed(0)
    model = Net().eval().to(torch.bfloat16)
    exact = copy.deepcopy(model).double()
    compiled = deltafx.compile(model, threshold=0)
    frame = torch.randn(1, 3, 24, 24)
    first = []
    with torch.inference_mode():
        for i in range(FRAMES):
            y, x = i * 5 % 20, i * 7 % 20
            frame[:, :, y : y + 4, x : x + 4] = torch.randn(1, 3, 4, 4)
            out = compiled(frame.bfloat16())
            if i < 10:
                first.append(relative(out, exact(frame.bfloat16().double())))
        last = relative(out, exact(frame.bfloat16().double()))
    assert 0 < compiled.stats().flop_fraction < 0.5, "it was to compute only what changed"
    assert 0 < last <= max(first)
