"""Compiled: what a compiled model offers, be it one graph (`DeltaModule`) or several regions.

What both do in the same way is here as well; what they share of words is here alone.
"""

from __future__ import annotations

import abc
import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from deltafx.calibration import Moments
from deltafx.config import Config
from deltafx.errors import InvalidInputError, NotCompiledError, TrainModeError
from deltafx.stats import Explanation, Stats
from deltafx.thresholds import RegionThresholds, Thresholds

if TYPE_CHECKING:
    from deltafx.frame_program import FrameProgram
    from deltafx.module import DeltaModule


class Compiled(nn.Module, abc.ABC):
    """A compiled model; made by `deltafx.compile`, and called as the model.

    Attributes:
        model: The user's model; its weights are shared, and followed when they change.
        config: The options.
        thresholds: Thresholds by node name; may be changed between frames.
    """

    model: nn.Module
    config: Config
    thresholds: Thresholds | RegionThresholds

    def _hide(self) -> None:
        """Keeps Dynamo out: within what `torch.compile` compiles it runs as it is."""
        self.__dict__["forward"] = torch.compiler.disable(self.forward)

    def __deepcopy__(self, memo: dict[int, Any]) -> Compiled:
        """Another compiled model, of a copy of the model, with nothing seen yet."""
        made = self._like(copy.deepcopy(self.model, memo))
        made.thresholds.copied(self.thresholds)
        return made

    @property
    @abc.abstractmethod
    def regions(self) -> Mapping[str, DeltaModule]:
        """The graphs by name; one with an empty name stands for the whole model."""

    @abc.abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Feeds one frame of every stream.

        Args:
            *args: As the model takes them; frames are float [N, C, H, W], N independent streams. A
                graph is for given numbers, tensors may change: where more than `max_states` numbers
                come with the same frames, the parts of the model that take none go on as graphs.
            **kwargs: Likewise.

        Returns:
            What the model returns, in tensors that later frames do not change.

        Raises:
            InvalidInputError: The arguments are not those of the model's `forward`. What the model
                itself raises on them comes through as it is.
        """

    @abc.abstractmethod
    def prepare(self, *args: Any, **kwargs: Any) -> Self:
        """Compiles for the signature of example arguments; no state sees them.

        Raises:
            InvalidInputError: As `forward` does; what the model itself raises comes through too.
        """

    def calibrate(self, frames: Iterable[Any]) -> None:
        """Sets the channel scales from frames, instead of from the first one seen.

        Args:
            frames: Each an argument of the model, or a tuple of them. The state is reset after.

        Raises:
            InvalidInputError: There is no frame.
        """
        moments: dict[str, dict[str, Moments]] = {}
        frame = None
        for frame in frames:
            self(*(frame if isinstance(frame, tuple) else (frame,)))
            for name in self._visited():
                self.regions[name].observe(moments.setdefault(name, {}))
        if frame is None:
            raise InvalidInputError("calibrate needs at least one frame")
        for name, seen in moments.items():
            self.regions[name].rescale(seen)
        self.reset()

    @abc.abstractmethod
    def reset(self, streams: int | Sequence[int] | None = None) -> None:
        """Forgets what was seen; the next frame is computed in full.

        Args:
            streams: Indices of streams; all streams, of all signatures, by default. A region that
                has several rows a stream forgets all of them.

        Raises:
            InvalidInputError: A stream does not exist.
        """

    @abc.abstractmethod
    def stats(self) -> Stats:
        """What the last frame cost: density, FLOP fraction and bytes, per node and in all."""

    @abc.abstractmethod
    def explain(self) -> Explanation:
        """Every node, and every module that runs as it is: delta, view or dense, and why."""

    @abc.abstractmethod
    def state_bytes(self, *args: Any, **kwargs: Any) -> int:
        """Bytes of the state, accumulators and all.

        Args:
            *args: Example arguments; with none, those of the last frame are meant. Nothing is
                allocated for them where one graph stands for the model.
            **kwargs: Likewise.
        """

    @abc.abstractmethod
    def state_tensors(self) -> dict[str, Tensor]:
        """The tensors of the current state by (region and) attribute name; no weights."""

    @abc.abstractmethod
    def update_mask(self, node: str | None = None) -> Tensor:
        """The update mask of a node in the last frame, as a copy.

        Args:
            node: Its name; the (first) input node by default.

        Returns:
            Bool [N, H, W]. Nodes that write into one concatenated buffer share a mask.

        Raises:
            UnknownNodeError: No delta node of that name.
        """

    @abc.abstractmethod
    def accumulator(self, node: str) -> Tensor:
        """A copy of a node's accumulator, [N, C, H, W].

        Raises:
            UnknownNodeError: No delta node of that name.
        """

    @abc.abstractmethod
    def frame_program(self) -> FrameProgram:
        """The current signature as a plain module, which `torch.export.export` takes.

        It has its own copy of the state and goes on from the frame that was seen last.

        Raises:
            NotCompiledError: No frame was seen, from which the scales of the thresholds come.
            UntraceableError: No one graph stands for the model.
        """

    def train(self, mode: bool = True) -> Self:
        """Only `train(False)`: a compiled model is for inference.

        Raises:
            TrainModeError: `mode` is true.
        """
        if mode:
            raise TrainModeError("a compiled model is for inference; train the model itself")
        return super().train(False)

    @abc.abstractmethod
    def _like(self, model: nn.Module) -> Compiled:
        """Another model, compiled in the same way."""

    @abc.abstractmethod
    def _visited(self) -> Sequence[str]:
        """The names of the regions that the last frame ran through."""


def not_compiled() -> NotCompiledError:
    """What to raise where something is asked before the first frame."""
    return NotCompiledError(
        "nothing is compiled yet: call the model with a frame, or give compile() example_inputs"
    )


__all__ = ["Compiled", "not_compiled"]
