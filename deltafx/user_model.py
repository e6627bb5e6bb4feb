"""A user's own model for the command line: the text `module:factory` in, a `ZooModel` out."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from torch import nn

from deltafx.errors import UnknownModelError
from deltafx.models_zoo import Preprocessing, ZooModel


def load_user_model(name: str) -> ZooModel:
    """Import `module` and call its `factory` without arguments.

    Args:
        name: "package.module:factory"; modules of the current directory are found too.

    Returns:
        What the factory returned if that is a `ZooModel`; an `nn.Module` is put into eval mode and
        gets ImageNet normalisation.

    Raises:
        UnknownModelError: If the module or the factory is missing, or returns anything else. An
            exception raised inside of the factory comes through as it is.
    """
    module_name, _, factory_name = name.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise UnknownModelError(f"cannot import {module_name!r} of {name!r}: {error}") from error
    finally:
        sys.path.remove(here)
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        raise UnknownModelError(f"{module_name!r} has no factory function {factory_name!r}")
    model = factory()
    if isinstance(model, ZooModel):
        return model
    if not isinstance(model, nn.Module):
        raise UnknownModelError(
            f"{name!r} returned a {type(model).__name__}, expected a torch.nn.Module"
        )
    return ZooModel(
        name=name, module=model.eval(), preprocessing=Preprocessing(), origin=f"{name}, by its user"
    )
