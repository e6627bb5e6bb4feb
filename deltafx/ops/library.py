"""Loads the shared object that registers the C++ operators."""

from __future__ import annotations

from pathlib import Path

import torch

from deltafx.errors import DeltafxError

FILE = "_C.abi3.so"


def load() -> None:
    """Loads it; loading twice is harmless.

    Raises:
        DeltafxError: It was not built, or for another version of torch.
    """
    path = Path(__file__).resolve().parent.parent / FILE
    if not path.is_file():
        raise DeltafxError(
            f"the operators are not built ({path} is missing): run `pip install -e .` or "
            "`python setup.py build_ext --inplace`"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise DeltafxError(
            f"the operators in {path} do not load with torch {torch.__version__}; "
            "build them again with this torch"
        ) from error
