"""Tiny models for the tests of the passes, in arithmetic that makes no error.

Weights are small integers, norms have power-of-two scales and frames hold small integers: every sum
is exact in fp32, in any order, so a rewrite may not change a single bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from deltafx.config import Config
from deltafx.passes import PIPELINE, Context, Pass
from deltafx.passes.normalize_graph import normalize_graph
from deltafx.passes.run_beside import run_beside
from deltafx.passes.trace_model import trace_model
from deltafx.state import list_room
from deltafx.verify import verify


def whole(*shape: int, least: int = -3, most: int = 3) -> Tensor:
    """Small integers as floats."""
    return torch.randint(least, most + 1, shape).float()


class Tiny(nn.Module):
    """`function(self, x)` over sub-modules, with exact arithmetic, in eval mode."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)
        for m in self.modules():
            for p in m.parameters(recurse=False):
                p.data = whole(*p.shape)
            if isinstance(m, (nn.BatchNorm2d, nn.BatchNorm3d)):
                m.eps = 0.25
                m.running_mean = whole(m.num_features)
                m.running_var = 4.0 ** torch.randint(0, 2, (m.num_features,)) - m.eps
                m.weight.data = 2.0 ** torch.randint(-1, 2, (m.num_features,))
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class TinyPair(Tiny):
    """The same with two inputs."""

    def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
        return self.function(self, x, y)


def normalized(model: nn.Module, *xs: Tensor) -> fx.GraphModule:
    """The normalized graph of a model."""
    traced = trace_model(model)
    return normalize_graph(traced, traced.bind(xs, {}))


def run(gm: fx.GraphModule, *xs: Tensor) -> list[Tensor]:
    """Evaluates a graph as it is now; dense functions run as any others."""
    gm.graph.lint()
    with torch.no_grad():
        return list(fx.Interpreter(gm).run(*xs))


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    """Bit for bit, and of the same kind."""
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def before(rewrite: Pass, model: nn.Module, *xs: Tensor) -> tuple[fx.GraphModule, Context]:
    """The graph as the pipeline hands it to a pass."""
    gm, context = normalized(model, *xs), Context(Config())
    for earlier, _ in PIPELINE:
        if earlier is rewrite:
            break
        earlier(gm, context)
    return gm, context


def give_lists(context: Context) -> None:
    """Plans a list that is long enough for every operator, as on a device with lists."""
    longest = max(list_room(s.sites, s.shape[0]) for s in context.plan.slots.values())
    context.plan = dataclasses.replace(context.plan, lists=(longest,))


def with_lists(rewrite: Pass, model: nn.Module, *xs: Tensor) -> tuple[fx.GraphModule, Context, int]:
    """The planned graph after a pass on lists, as for a device with lists; and the pass's count."""
    gm, context = before(rewrite, model, *xs)
    give_lists(context)
    run_beside(gm, context)
    count = rewrite(gm, context)
    verify(gm.graph, "planned", context.plan)
    return gm, context, count


def rewritten(rewrite: Pass, model: nn.Module, *xs: Tensor) -> tuple[fx.GraphModule, int]:
    """The graph after a pass, with its count.

    Asserts what holds for every pass: the numbers are those of the model, the graph verifies, and a
    second run changes nothing.
    """
    gm, context = before(rewrite, model, *xs)
    count = rewrite(gm, context)
    stage = dict(PIPELINE)[rewrite]
    verify(gm.graph, stage, context.plan)
    with torch.no_grad():
        out = model(*xs)
    assert_same(run(gm, *xs), list(out) if isinstance(out, (list, tuple)) else [out])
    shape = str(gm.graph)
    again = rewrite(gm, context)
    assert str(gm.graph) == shape, "a second run changed the graph"
    if stage not in ("assigned", "planned"):  # those count what is there
        assert again == 0
    return gm, count


def calls(gm: fx.GraphModule) -> list[str]:
    """The names of the functions that a graph calls, in order."""
    names = [getattr(n.target, "__name__", "") for n in gm.graph.nodes if n.op == "call_function"]
    return [name.split(".")[0] for name in names]


def node(gm: fx.GraphModule, call: str) -> fx.Node:
    """The one node that calls a function of that name."""
    found = [
        n
        for n in gm.graph.nodes
        if n.op == "call_function" and getattr(n.target, "__name__", "").split(".")[0] == call
    ]
    assert len(found) == 1, f"{len(found)} calls of {call} among {calls(gm)}"
    return found[0]
