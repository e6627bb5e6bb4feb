"""What a dense run takes at its peak, for a state to be compared with."""

from __future__ import annotations

import itertools
from collections import Counter

import torch
import torch.utils._pytree as pytree
from torch import fx


def live_bytes(graph: fx.Graph) -> int:
    """Bytes of the tensors that there are at a time, at most, while a normalized graph runs.

    Each is there from the call that makes it to the last that reads it, inputs and outputs all the
    time; views are what they are of. Without weights, and what operators need while they run.
    """
    made: dict[int, tuple[int, int]] = {}  # where, and its bytes, by the tensor's storage
    read: dict[int, int] = {}  # where last
    nodes = list(graph.nodes)
    for i, node in enumerate(nodes):
        if node.op == "get_attr":
            continue
        for storage in _storages(node):
            made.setdefault(storage._cdata, (i, storage.nbytes()))
        for of in (node, *node.all_input_nodes):
            read.update((storage._cdata, i) for storage in _storages(of))
    kept = [n for n in nodes if n.op == "placeholder"] + nodes[-1].all_input_nodes
    read.update((storage._cdata, len(nodes)) for n in kept for storage in _storages(n))
    change = Counter[int]()
    for key, (first, size) in made.items():
        change[first] += size
        change[read[key] + 1] -= size
    return max(itertools.accumulate(change[i] for i in range(len(nodes))), default=0)


def _storages(node: fx.Node) -> list[torch.UntypedStorage]:
    if node.op in ("get_attr", "output"):
        return []
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return [t.untyped_storage() for t in leaves if isinstance(t, torch.Tensor)]


__all__ = ["live_bytes"]
