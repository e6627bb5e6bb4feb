"""Every torchvision model, untouched, under its torchvision name: what torchvision lists is here.

Left out are the quantized ones, which do not compute in floats.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any
from urllib.error import URLError

import torch
from torch import nn
from torchvision import models

from deltafx.errors import InvalidOptionError
from deltafx.models_zoo.postprocessing import Detections, LabelMap, LastFlow, TopClasses
from deltafx.models_zoo.preprocessing import Preprocessing
from deltafx.models_zoo.zoo_model import ZooModel

_FIXED_SIZE_PREFIXES = ("vit_", "maxvit_", "mvit_", "s3d")
_CLIP_LENGTH = 16
_TASKS = ("segmentation", "detection", "video", "optical_flow")


def list_torchvision_models() -> list[str]:
    """Return the names of all torchvision models that compute in floats."""
    return sorted(models.list_models(exclude="quantized_*"))


def load_torchvision_model(name: str, *, weights: str, seed: int) -> ZooModel:
    """Build a torchvision model.

    Args:
        name: One of `list_torchvision_models()`.
        weights: "pretrained" (fetched by torchvision into its cache at the first use), "random", or
            the path of a state dict saved with `torch.save`.
        seed: Of the random weights.

    Returns:
        The model with the preprocessing of torchvision's own transforms for it.

    Raises:
        InvalidOptionError: If the weights cannot be fetched or read, or do not fit the model.
    """
    builder = models.get_model_builder(name)
    folder = builder.__module__.removeprefix("torchvision.models.").split(".")[0]
    task = folder if folder in _TASKS else "classification"
    described = models.get_model_weights(name).DEFAULT
    transforms = described.transforms()
    input_size = None
    if name.startswith(_FIXED_SIZE_PREFIXES):
        input_size = (transforms.crop_size[0], transforms.crop_size[0])
    return ZooModel(
        name=name,
        module=_build(builder, name, weights, seed).eval(),
        preprocessing=_preprocessing(task, transforms),
        origin=f"torchvision.models.{name}, {weights} weights",
        input_size=input_size,
        trained=weights != "random",
        task=task,
        frames={"video": _CLIP_LENGTH, "optical_flow": 2}.get(task, 1),
        postprocessing=_postprocessing(task, tuple(described.meta.get("categories", ()))),
    )


def _preprocessing(task: str, transforms: Any) -> Preprocessing:
    if task == "detection":
        return Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # they normalise inside
    if task == "optical_flow":
        return Preprocessing((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return Preprocessing(tuple(transforms.mean), tuple(transforms.std))


def _postprocessing(task: str, categories: tuple[str, ...]) -> Callable[[Any], Any]:
    if task == "optical_flow":
        return LastFlow()
    made = {"segmentation": LabelMap, "detection": Detections}.get(task, TopClasses)
    return made(categories)


def _build(builder: Callable[..., nn.Module], name: str, weights: str, seed: int) -> nn.Module:
    if weights == "pretrained":
        try:
            return builder(weights="DEFAULT")
        except (URLError, OSError) as error:
            raise InvalidOptionError(
                f"the weights of {name} could not be fetched ({error}); "
                "give the path of a state dict or weights='random'"
            ) from error
    arguments: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        arguments["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        arguments["init_weights"] = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = builder(**arguments)
    return module if weights == "random" else load_state(module, weights)


def load_state(module: nn.Module, path: str) -> nn.Module:
    """Load a state dict saved with `torch.save` into a model, strictly.

    Raises:
        InvalidOptionError: If the file is missing, is not a state dict, or does not fit.
    """
    try:
        module.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError as error:
        raise InvalidOptionError(
            f"no weights at {path!r}; give 'pretrained', 'random' or the path of a state dict"
        ) from error
    except Exception as error:  # torch raises anything from pickle errors to RuntimeError here
        raise InvalidOptionError(f"the weights in {path!r} do not fit: {error}") from error
    return module
