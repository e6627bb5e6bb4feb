"""share_constants: packed weights that are the same are held once.

    head(level 3): conv2d(..., const_a)        const_a, const_b: the same packing of one weight
    head(level 4): conv2d(..., const_b)   ->   both read const_a

Every call of a module packs its weight for itself, and so does every input signature. Nobody writes
into a packed weight, so what is equal to the last bit can be one tensor.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


class ConstantPool:
    """The constants of compiled graphs that share them; it keeps none of them alive."""

    def __init__(self) -> None:
        """Is empty."""
        self._known: dict[object, list[weakref.ref[Tensor]]] = {}

    def share(self, t: Tensor) -> Tensor:
        """The tensor itself, or an equal one that was here before."""
        key = (t.shape, t.stride(), t.dtype, t.device)
        alive = [known for ref in self._known.get(key, ()) if (known := ref()) is not None]
        for known in alive:
            if torch.equal(known, t):
                return known
        self._known[key] = [weakref.ref(known) for known in (*alive, t)]
        return t


def share_constants(
    constants: Mapping[str, Tensor], weights: Iterable[Tensor], pool: ConstantPool
) -> dict[str, Tensor]:
    """Puts tensors of the pool in the place of constants that are equal to them.

    Args:
        constants: By name.
        weights: The model's own tensors. A constant that lies in the memory of one of them is left
            alone: it changes with it, and only who reads that weight is told.
        pool: What was seen before; all else goes in.
    """
    own = {t.untyped_storage().data_ptr() for t in weights}
    return {
        name: t if t.untyped_storage().data_ptr() in own else pool.share(t)
        for name, t in constants.items()
    }


__all__ = ["ConstantPool", "share_constants"]
