"""A net with a branch of every kind, and a clip for it."""

import torch
from torch import nn


class BranchingNet(nn.Module):
    """Branches, a concatenation, a gate, a resize and a dense op; any number of sites."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.c = nn.Conv2d(16, 8, 1)
        self.up = nn.Upsample(scale_factor=2)
        self.eval()

    def forward(self, x):
        y = self.norm(self.a(x)).relu()
        z = self.c(torch.cat([self.b(y), y], 1)) + y
        return self.up(z * z.mean((2, 3), keepdim=True).sigmoid()), z.sin()


def clip(*shape, count=8, seed=0):
    """A first frame, the same again, a box that moves, and a cut."""
    torch.manual_seed(seed)
    frames = [torch.randn(shape)]
    frames.append(frames[0])
    for i in range(count - 3):
        frame = frames[-1].clone()
        frame[0, :, i : i + 3, i : i + 3] = torch.randn_like(frame[0, :, i : i + 3, i : i + 3])
        frames.append(frame)
    return [*frames, torch.randn(shape)]
