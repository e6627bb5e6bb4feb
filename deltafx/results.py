"""What a model returns, taken apart into its tensors, and put together again of later ones.

Torch's own pytrees know lists, tuples, named tuples and dictionaries of every kind; a dataclass is
taken apart here, field by field, and a `torch.Size` (of which they make a tuple) as one. Anything
else that may hold a tensor cannot be rebuilt.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from deltafx.errors import UntraceableError

CONSTANTS = (
    type(None), bool, int, float, complex, str, bytes, enum.Enum, slice, range,
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
"""Types of leaves that are the same in every frame of a signature."""


@dataclasses.dataclass
class _Record:
    """A dataclass, opened: a pytree of its fields."""

    model: Any
    fields: dict[str, Any]


def _close(values: Any, context: Any) -> Any:
    model, names = context
    made = copy.copy(model)
    for name, value in zip(names, values, strict=True):
        object.__setattr__(made, name, value)
    return made


pytree.register_pytree_node(
    _Record,
    lambda record: (list(record.fields.values()), (record.model, tuple(record.fields))),
    _close,
)


@dataclasses.dataclass
class _Size:
    """A `torch.Size`: a pytree that is put together as one."""

    numbers: torch.Size


pytree.register_pytree_node(
    _Size, lambda size: (list(size.numbers), None), lambda numbers, _: torch.Size(numbers)
)


def flatten_result(result: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """The leaves of a result, and the tree that `pytree.tree_unflatten` rebuilds it by.

    Raises:
        UntraceableError: A leaf is neither a tensor nor a plain constant.
    """
    leaves, spec = pytree.tree_flatten(_open(result))
    for leaf in leaves:
        if not isinstance(leaf, (Tensor, *CONSTANTS)):
            raise UntraceableError(f"the model returns a {type(leaf).__name__}")
    return leaves, spec


def _open(value: Any) -> Any:
    if _is_record(value) and _unknown(value):
        fields = {f.name: _open(getattr(value, f.name)) for f in dataclasses.fields(value)}
        blank = copy.copy(value)
        for name in fields:
            object.__setattr__(blank, name, None)
        return _Record(blank, fields)
    if isinstance(value, torch.Size):
        return _Size(value)
    if _unknown(value):
        return value
    leaves, spec = pytree.tree_flatten(value, is_leaf=lambda part: part is not value)
    return pytree.tree_unflatten([_open(leaf) for leaf in leaves], spec)


def _is_record(value: Any) -> bool:
    """Whether a dataclass holds nothing but its fields."""
    if not dataclasses.is_dataclass(value) or isinstance(value, (type, dict, list, tuple, set)):
        return False
    return getattr(value, "__dict__", {}).keys() <= {f.name for f in dataclasses.fields(value)}


def _unknown(value: Any) -> bool:
    return pytree.tree_structure(value, is_leaf=lambda part: part is not value).is_leaf()
