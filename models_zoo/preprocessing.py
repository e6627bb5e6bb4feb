"""From decoded video to network input: uint8 RGB frames in, normalised float frames out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """Scale to 0..1, subtract `mean` and divide by `std`, channel by channel (R, G, B)."""

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __call__(
        self,
        frames: np.ndarray | Tensor,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Make a batch of network input from RGB frames.

        Args:
            frames: uint8, [H, W, 3] for one frame or [N, H, W, 3] for a batch.
            dtype: The type of the result; the arithmetic is done in float32.
            device: Where the result shall be.

        Returns:
            A channels_last tensor [N, 3, H, W] of `dtype`, N = 1 for a single frame.

        Raises:
            ValueError: If `frames` is not uint8 with three channels last.
        """
        pixels = torch.as_tensor(frames)
        if pixels.dim() == 3:
            pixels = pixels.unsqueeze(0)
        if pixels.dtype != torch.uint8 or pixels.dim() != 4 or pixels.shape[-1] != 3:
            raise ValueError(
                f"expected uint8 RGB frames [N, H, W, 3] or [H, W, 3], "
                f"got {pixels.dtype} {list(pixels.shape)}"
            )
        scale = torch.tensor([1.0 / (255.0 * s) for s in self.std], device=device)
        shift = torch.tensor([-m / s for m, s in zip(self.mean, self.std, strict=True)])
        scaled = pixels.to(device).to(torch.float32) * scale + shift.to(device)
        # Sites keep their channels together: [N, H, W, 3] is the memory of a channels_last tensor.
        return scaled.to(dtype).permute(0, 3, 1, 2)
