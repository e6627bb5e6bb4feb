"""Models ready to be compiled: every torchvision model, and those shipped with the package.

A `ZooModel` is a model as its authors wrote it, in eval mode, with the preprocessing that its
weights were trained for, and what turns its output into something to look at. Two
short clips come along, so that a first run needs no network.
"""

from deltafx.models_zoo.calibration import calibrate_batch_norm
from deltafx.models_zoo.catalogue import clip_path, list_clips, list_models, load
from deltafx.models_zoo.preprocessing import Preprocessing
from deltafx.models_zoo.zoo_model import ZooModel

__all__ = [
    "Preprocessing",
    "ZooModel",
    "calibrate_batch_norm",
    "clip_path",
    "list_clips",
    "list_models",
    "load",
]
