"""The zoo's index: names in, models and clips out."""

from __future__ import annotations

import difflib
from pathlib import Path

from deltafx.errors import UnknownModelError, VideoError
from deltafx.models_zoo import mobilenet_v2_trunk, torchvision_models
from deltafx.models_zoo.zoo_model import ZooModel

_CLIPS = Path(__file__).parent / "clips"
_CLIP_SUFFIXES = (".avi", ".mp4")


def list_models() -> list[str]:
    """Return the names that `load` knows: the shipped models first, then torchvision's."""
    return [mobilenet_v2_trunk.NAME, *torchvision_models.list_torchvision_models()]


def load(name: str, *, weights: str = "pretrained", seed: int = 0) -> ZooModel:
    """Load a model by name.

    Args:
        name: One of `list_models()`.
        weights: "pretrained", "random", or the path of a state dict saved with `torch.save`.
        seed: Of the random weights; the global random state is left alone.

    Returns:
        The model in eval mode, with its preprocessing.

    Raises:
        UnknownModelError: If there is no such name; the message offers near ones.
        InvalidOptionError: If the weights cannot be fetched or read, or do not fit.
    """
    if name == mobilenet_v2_trunk.NAME:
        return mobilenet_v2_trunk.load_mobilenet_v2_trunk(weights=weights, seed=seed)
    if name not in torchvision_models.list_torchvision_models():
        near = difflib.get_close_matches(name, list_models())
        hint = f"did you mean {', '.join(near)}?" if near else "`deltafx models` lists all"
        raise UnknownModelError(f"no model is called {name!r}; {hint}")
    return torchvision_models.load_torchvision_model(name, weights=weights, seed=seed)


def list_clips() -> list[str]:
    """Return the names of the clips that ship with the package."""
    return sorted(path.stem for path in _CLIPS.iterdir() if path.suffix in _CLIP_SUFFIXES)


def clip_path(name: str) -> Path:
    """Return where a shipped clip lies.

    Args:
        name: One of `list_clips()`: "vtest" (fixed camera, 768x576) or "carphone" (176x144).

    Raises:
        VideoError: If there is no such clip.
    """
    for suffix in _CLIP_SUFFIXES:
        path = _CLIPS / f"{name}{suffix}"
        if path.is_file():
            return path
    raise VideoError(f"no clip is called {name!r}; there are {', '.join(list_clips())}")
