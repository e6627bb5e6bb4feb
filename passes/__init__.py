"""The passes, in their order: one direction, no way back.

    trace -> normalize -> fuse -> assign regions -> plan state -> recompute maps -> run beside
    -> share lists -> lower -> emit

Each pass is a file with one public function of the same name. A rewriting pass takes the graph
module and the `Context`, changes the module in place and returns how many rewrites it did; a second
run of it finds nothing. After each stage `verify` checks what the stage promises.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from deltafx.passes.assign_regions import assign_regions
from deltafx.passes.context import Context
from deltafx.passes.fold_affines import fold_affines
from deltafx.passes.fold_constants import fold_constants
from deltafx.passes.fuse_activations import fuse_activations
from deltafx.passes.fuse_prologues import fuse_prologues
from deltafx.passes.fuse_residuals import fuse_residuals
from deltafx.passes.fuse_separables import fuse_separables
from deltafx.passes.lift_layouts import lift_layouts
from deltafx.passes.list_ahead import list_ahead
from deltafx.passes.live_bytes import live_bytes
from deltafx.passes.match_shuffles import match_shuffles
from deltafx.passes.plan_state import plan_state
from deltafx.passes.raise_ops import raise_ops
from deltafx.passes.recompute_maps import recompute_maps
from deltafx.passes.run_beside import run_beside
from deltafx.passes.share_lists import share_lists
from deltafx.passes.split_volumes import split_volumes
from deltafx.verify import verify

Pass = Callable[[fx.GraphModule, Context], int]

PIPELINE: tuple[tuple[Pass, str], ...] = (
    (fold_constants, "normalized"),  # must run first: the others look for constants
    (split_volumes, "normalized"),  # must run before whatever looks for feature maps
    (lift_layouts, "normalized"),
    (match_shuffles, "normalized"),
    (raise_ops, "raised"),
    (fold_affines, "raised"),
    (fuse_activations, "raised"),  # must run before fuse_residuals: conv -> relu -> add
    (fuse_residuals, "raised"),
    (fuse_activations, "raised"),  # again: conv -> add -> relu
    (fuse_prologues, "raised"),  # must run after them: what could go backwards has gone
    (fuse_separables, "raised"),  # must run last: both convolutions have all that they take
    (assign_regions, "assigned"),
    (plan_state, "planned"),
    (recompute_maps, "planned"),  # must run before whatever looks for lists or moves calls
    (run_beside, "planned"),  # must run before those on lists: these take no part in them
    (list_ahead, "planned"),
    (share_lists, "planned"),
)
"""Each pass with the stage that the graph is in after it."""


def run_pipeline(gm: fx.GraphModule, context: Context) -> None:
    """Runs all passes on a normalized graph; leaves the plan and the counts in the context."""
    verify(gm.graph, "normalized")
    context.dense_bytes = live_bytes(gm.graph)
    for rewrite, stage in PIPELINE:
        name = rewrite.__name__
        context.counts[name] = context.counts.get(name, 0) + rewrite(gm, context)
        verify(gm.graph, stage, context.plan)


__all__ = ["PIPELINE", "Context", "Pass", "run_pipeline"]
