"""Random nets of many branches, for whatever may run beside something else."""

import random

import torch
from torch import nn


class TangledNet(nn.Module):
    """Steps that each read one or two of the last few maps: few chains, many readers.

    Maps are all of one size and `channels` wide, an even number. Some steps are concatenations, of
    whose parts others read single ones, and some are dense.
    """

    def __init__(self, seed, channels=4, steps=24):
        super().__init__()
        torch.manual_seed(seed)
        chance = random.Random(seed)
        self.half = channels // 2
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.steps = []
        self.convs = nn.ModuleDict()
        kinds = ["conv"] * 5 + ["wide", "half", "add", "cat", "parts", "pool", "dense"]
        for i in range(steps):
            kind = chance.choice(kinds)
            least = max(0, i - chance.choice((1, 3, 8)))
            reads = [chance.randint(least, i) for _ in range(2)]
            self.steps.append((kind, *reads))
            cin = self.half if kind == "half" else channels
            if kind in ("conv", "half"):
                self.convs[str(i)] = nn.Conv2d(cin, channels, 1)
            elif kind == "wide":
                self.convs[str(i)] = nn.Conv2d(cin, channels, 3, padding=1)
            elif kind == "cat":
                self.convs[str(i)] = nn.Conv2d(2 * channels, channels, 1)
        self.eval()

    def forward(self, x):
        maps = [self.stem(x)]
        for i, (kind, first, second) in enumerate(self.steps):
            a, b = maps[first], maps[second]
            if kind in ("conv", "wide"):
                y = self.convs[str(i)](a).relu()
            elif kind == "half":
                y = self.convs[str(i)](a[:, self.half :]).tanh()
            elif kind == "add":
                y = (a + b).tanh()
            elif kind == "cat":
                y = self.convs[str(i)](torch.cat([a, b], 1))
            elif kind == "parts":
                y = torch.cat([a[:, : self.half], b[:, self.half :]], 1)
            elif kind == "pool":
                y = torch.max_pool2d(a, 3, 1, 1)
            else:
                y = a.cumsum(2).tanh()
            maps.append(y)
        return maps[-1], maps[-4], maps[len(maps) // 2]
