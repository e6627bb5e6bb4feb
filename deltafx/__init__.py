"""deltafx: CNNs on video, computed only where the picture changed.

import deltafx

model = deltafx.compile(model)
for frame in video:
    y = model(frame)
"""

from deltafx import errors, ops
from deltafx.api import compile  # noqa: A004
from deltafx.backend import modules, register_backend, reset, stats
from deltafx.compiled import Compiled
from deltafx.config import Config
from deltafx.delta_regions import DeltaRegions
from deltafx.module import DeltaModule
from deltafx.stats import Explanation, NodeStats, Stats

__version__ = "0.1.0"

register_backend()

__all__ = [
    "Compiled",
    "Config",
    "DeltaModule",
    "DeltaRegions",
    "Explanation",
    "NodeStats",
    "Stats",
    "compile",
    "errors",
    "modules",
    "ops",
    "reset",
    "stats",
]
