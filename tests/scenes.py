"""Frame sequences that a delta model must survive: what changes, and what is forgotten."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

EVENTS = ("static", "box", "noise", "cut", "nan", "reset", "reset stream")


@dataclasses.dataclass(frozen=True)
class Scene:
    """What happens, frame by frame, after a first random frame.

    Attributes:
        events: Each one of `EVENTS`.
        seed: Of the pictures.
    """

    events: tuple[str, ...]
    seed: int

    def frames(
        self, streams: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
        """The events with their frames, of any dimensions; a NaN lasts for its frame only."""
        random = torch.Generator().manual_seed(self.seed)

        def noise(*size: int) -> Tensor:
            return torch.randn(size, generator=random)

        frame = noise(streams, *shape)
        yield "cut", frame.to(device, dtype)
        for event in self.events:
            frame = frame.clone()
            shown = frame
            corner = [int(torch.randint(s, (1,), generator=random)) for s in shape[1:]]
            box = (slice(None), *(slice(i, i + 4) for i in corner))
            if event == "box":
                patch = frame[0][box]
                patch.copy_(noise(*patch.shape))
            elif event == "noise":
                frame += 0.05 * noise(*frame.shape)
            elif event == "cut":
                frame = shown = noise(streams, *shape)
            elif event == "nan":
                shown = frame.clone()
                shown[-1][box] = float("nan")
            yield event, shown.to(device, dtype)


@st.composite
def scenes(draw: Any) -> Scene:
    """At least 8 frames; a static one, a cut, a box, a NaN and a reset are always among them."""
    more = draw(st.lists(st.sampled_from(EVENTS), min_size=1, max_size=4))
    events = draw(st.permutations(("static", "cut", "box", "nan", "reset", "noise", *more)))
    return Scene(tuple(events), draw(st.integers(0, 1_000)))
