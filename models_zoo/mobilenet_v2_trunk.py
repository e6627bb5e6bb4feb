"""The convolutional trunk of MobileNetV2 with its real ImageNet weights, which ship with deltafx.

It is `torchvision.models.mobilenet_v2().features`: RGB frames of any size in, 1280 channels at 1/32
of the resolution out. `weights/ORIGIN.md` tells where the weights come from.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torchvision.models import mobilenet_v2

from deltafx.models_zoo.preprocessing import Preprocessing
from deltafx.models_zoo.torchvision_models import load_state
from deltafx.models_zoo.zoo_model import ZooModel

NAME = "mobilenet_v2_trunk"
_WEIGHTS = Path(__file__).parent / "weights" / f"{NAME}.npz"


def load_mobilenet_v2_trunk(*, weights: str, seed: int) -> ZooModel:
    """Build the trunk.

    Args:
        weights: "pretrained" (the shipped ones; no network needed), "random", or the path of a
            state dict saved with `torch.save`.
        seed: Of the random weights.

    Returns:
        The model with ImageNet normalisation.

    Raises:
        InvalidOptionError: If a state dict is missing or does not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = mobilenet_v2(weights=None).features
    if weights == "pretrained":
        _load_shipped(trunk)
    elif weights != "random":
        load_state(trunk, weights)
    return ZooModel(
        name=NAME,
        module=trunk.eval(),
        preprocessing=Preprocessing(),
        origin=f"torchvision.models.mobilenet_v2().features, {weights} weights",
        trained=weights != "random",
    )


def _load_shipped(trunk: nn.Module) -> None:
    """Copy the archive into the model, strictly; only the batch counters are not in it."""
    with np.load(_WEIGHTS, allow_pickle=False) as archive:
        shipped = {name: torch.from_numpy(archive[name]) for name in archive.files}
    trunk.load_state_dict(shipped)
