"""Feeds the same frames to a compiled model and to the dense one, and measures both.

In: raw RGB frames. Out: a `FrameRecord` a frame. Both models see the same tensors; the decoding and
the preprocessing are in neither time. The dense model runs the way PyTorch is quickest at without
a compiler: channels_last, in inference mode, at the same dtype, on the same device, warmed up.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import deltafx
from deltafx.models_zoo import ZooModel
from deltafx.report import FrameRecord

_DENSE_WARM_UP = 2


class Comparison:
    """One video stream through a compiled model and, beside it, through the dense one.

    Args:
        model: What to compile; it is left unchanged.
        first_frame: uint8 [H, W, 3]: the example from which the compiler takes shapes and scales.
        threshold: As in `deltafx.compile`; None takes the model's tuned one, else the default.
        dtype: Of weights and frames.
        device: Where both run.
        compare: False leaves the dense model out.

    Attributes:
        compiled: The `DeltaModule` or `DeltaRegions`.
    """

    def __init__(
        self,
        model: ZooModel,
        first_frame: np.ndarray,
        *,
        threshold: float | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        compare: bool = True,
    ) -> None:
        self._model, self._dtype = model, dtype
        self._pictures: deque[Tensor] = deque(maxlen=model.frames)
        self._device = torch.device(device)
        module = copy.deepcopy(model.module).to(device=self._device, dtype=dtype)
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._dense = module if compare else None
        example = self._arguments(first_frame)
        self._pictures.clear()
        self.compiled = deltafx.compile(
            copy.deepcopy(module),
            threshold=model.threshold if threshold is None else threshold,
            example_inputs=example,
        )
        if self._dense is not None:
            for _ in range(_DENSE_WARM_UP):
                self._timed(self._dense, example)

    def step(self, frame: np.ndarray) -> FrameRecord:
        """Feed the next frame.

        Args:
            frame: uint8 [H, W, 3], RGB, of the first frame's size.

        Returns:
            Times in ms, work done, and the relative L2 error against the dense model.
        """
        arguments = self._arguments(frame)
        ours, ours_ms = self._timed(self.compiled, arguments)
        stats = self.compiled.stats()
        dense_ms = error = None
        if self._dense is not None:
            expected, dense_ms = self._timed(self._dense, arguments)
            error = relative_error(ours, expected)
        return FrameRecord(
            ours_ms=ours_ms,
            dense_ms=dense_ms,
            flop_fraction=float(stats.flop_fraction),
            density=float(stats.density),
            error=error,
        )

    def mask(self, node: str | None = None) -> np.ndarray:
        """Return the last frame's update mask of a node, of the input by default: bool [H, W]."""
        mask: np.ndarray = self.compiled.update_mask(node)[0].cpu().numpy()
        return mask

    def _arguments(self, frame: np.ndarray) -> tuple[Tensor, ...]:
        """What the model is called with: this frame, with those before it that it looks at."""
        picture = self._model.preprocessing(frame, dtype=self._dtype, device=self._device)
        self._pictures.append(picture)
        return self._model.arguments(self._pictures)

    @torch.inference_mode()
    def _timed(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Any, float]:
        self._synchronize()
        start = time.perf_counter()
        result = module(*arguments)
        self._synchronize()
        return result, (time.perf_counter() - start) * 1e3

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def relative_error(ours: Any, expected: Any) -> float | None:
    """Return |ours - expected| / |expected| in L2 over all floating tensors of two results.

    Returns:
        None if the results cannot be compared value by value: another structure or other shapes, as
        with detectors that found another number of objects.
    """
    pairs = list(zip(_floats(ours), _floats(expected), strict=False))
    if not pairs or len(_floats(ours)) != len(_floats(expected)):
        return None
    if any(a.shape != b.shape for a, b in pairs):
        return None
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    norm = sum(float(b.double().square().sum()) for _, b in pairs)
    if norm == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return float((difference / norm) ** 0.5)


def _floats(result: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(result)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
