"""A block of a ResNet."""

from torch import Tensor, nn


class Bottleneck(nn.Module):
    """A bottleneck with a shortcut of its input, or of a convolution of that."""

    def __init__(self, cin: int, c: int, stride: int = 1) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(cin, c, 1), nn.Conv2d(c, c, 3, stride, 1)
        self.three = nn.Conv2d(c, 4 * c, 1)
        self.down = None if cin == 4 * c else nn.Conv2d(cin, 4 * c, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.three(self.two(self.one(x).relu()).relu())
        return (y + (x if self.down is None else self.down(x))).relu()
