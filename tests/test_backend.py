"""torch.compile(backend="deltafx"): weights, breaks, shapes, modes, and whose the state is."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import tomllib
import torch
import torch.nn.functional as F
from torch import nn

import deltafx
from deltafx.backend import GROUP
from deltafx.errors import (
    InvalidInputError,
    InvalidOptionError,
    NotCompiledError,
    TrainModeError,
)
from tests.branching_net import BranchingNet, clip
from tests.exactness import Oracle, exact_over

EXACT = {"threshold": 0}
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled_with(model, options=EXACT, **kwargs):
    return torch.compile(model, backend="deltafx", options=options, **kwargs)


class Net(nn.Module):
    """Two convolutions with, if wanted, something between them that breaks the graph."""

    def __init__(self, breaks=False):
        super().__init__()
        self.first = nn.Conv2d(3, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.second = nn.Conv2d(5, 4, 3)
        self.breaks = breaks

    def forward(self, x):
        y = F.relu(self.norm(self.first(x)))
        if self.breaks:
            torch._dynamo.graph_break()
        return self.second(y)


def frames(*shape, count=4):
    """Random ones, the second of them twice."""
    made = [torch.randn(shape) for _ in range(count)]
    return [made[0], made[1], *made[1:]]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("dynamic", [None, False, True])
@pytest.mark.parametrize("fullgraph", [False, True])
def test_as_exact_as_the_model(mode, dynamic, fullgraph):
    model = Net().eval()
    compiled = compiled_with(model, fullgraph=fullgraph, dynamic=dynamic)
    with mode():
        exact_over(model, compiled, frames(2, 3, 9, 9))
        exact_over(model, compiled, frames(2, 3, 12, 7))  # recompiles, or is dynamic
        exact_over(model, compiled, frames(1, 3, 9, 9))
    (region, *_) = deltafx.modules(compiled)
    assert region.explain().delta_share == 1
    assert region.explain().front_end == "dynamo"


def test_several_inputs_and_nested_outputs():
    model = BranchingNet()
    compiled = compiled_with(model, fullgraph=True)
    with torch.no_grad():
        exact_over(model, compiled, clip(2, 3, 9, 9))


def test_a_static_frame_does_no_work():
    compiled = compiled_with(Net().eval())
    frame = torch.randn(1, 3, 9, 9)
    compiled(frame)
    assert deltafx.stats(compiled).flop_fraction == 1
    compiled(frame)
    assert deltafx.stats(compiled).flop_fraction == 0
    deltafx.reset(compiled)
    compiled(frame)
    assert deltafx.stats(compiled).flop_fraction == 1


def test_nodes_have_the_names_that_deltafx_compile_gives():
    model = Net().eval()
    compiled, ours = compiled_with(model), deltafx.compile(model, threshold=0)
    frame = torch.randn(1, 3, 9, 9)
    compiled(frame), ours(frame)
    assert [n.name for n in deltafx.modules(compiled)[0].explain()] == [
        n.name for n in ours.explain()
    ]


def test_graph_breaks_make_several_regions():
    model = Net(breaks=True).eval()
    compiled = compiled_with(model, {**EXACT, "thresholds": {"second": 0.5}})
    with torch.no_grad():
        compiled(torch.randn(1, 3, 9, 9))
    first, second = deltafx.modules(compiled)
    assert "first" in first.thresholds
    assert "second" not in first.thresholds
    assert second.thresholds["second"] == 0.5
    stats = deltafx.stats(compiled)
    assert {"0.first", "1.second"} <= set(stats.nodes)
    assert stats.dense_macs == first.stats().dense_macs + second.stats().dense_macs
    del second.thresholds["second"]
    deltafx.reset(compiled)
    with torch.no_grad():
        exact_over(model, compiled, frames(1, 3, 9, 9))


def test_the_stats_are_those_of_the_last_recompilation():
    compiled = compiled_with(Net().eval(), dynamic=False)
    with torch.no_grad():
        compiled(torch.randn(1, 3, 9, 9))
        compiled(torch.randn(1, 3, 12, 12))
    assert len(deltafx.modules(compiled)) == 2
    assert deltafx.stats(compiled).nodes["first"].sites == 144
    with torch.no_grad():
        compiled(torch.randn(1, 3, 9, 9))
    assert deltafx.stats(compiled).nodes["first"].sites == 81


def change_in_place(model):
    with torch.no_grad():
        model.first.weight.mul_(1.5)


def replace_data(model):
    model.second.weight.data = torch.randn_like(model.second.weight)


def replace_parameter(model):
    model.second.weight = nn.Parameter(torch.randn_like(model.second.weight))


def change_statistics(model):
    model.norm.running_mean += 1


def assign(model):
    torch.manual_seed(7)
    model.load_state_dict(Net().state_dict(), assign=True)


@pytest.mark.parametrize(
    "change", [change_in_place, replace_data, replace_parameter, change_statistics, assign]
)
@pytest.mark.parametrize("inline", [True, False])
def test_weights_are_followed(change, inline):
    model = Net().eval()
    with torch._dynamo.config.patch(inline_inbuilt_nn_modules=inline), torch.no_grad():
        compiled = compiled_with(model)
        exact_over(model, compiled, frames(1, 3, 9, 9))
        change(model)
        exact_over(model, compiled, frames(1, 3, 9, 9))


def test_a_replaced_parameter_keeps_its_region():
    model = Net().eval()
    compiled = compiled_with(model)
    frame = torch.randn(1, 3, 9, 9)
    compiled(frame)
    before = deltafx.modules(compiled)
    replace_parameter(model)
    compiled(frame)
    assert deltafx.modules(compiled) == before


def test_two_models_of_a_class_share_nothing():
    """Dynamo keeps compiled code with the class."""
    one, two = Net().eval(), Net().eval()
    compiled = [compiled_with(one), compiled_with(two)]
    oracles = [Oracle(one), Oracle(two)]
    frame = torch.randn(1, 3, 9, 9)
    with torch.no_grad():
        for frame in frames(1, 3, 9, 9):
            for c, oracle in zip(compiled, oracles, strict=True):
                oracle.compare(c(frame), frame)
        compiled[0](frame)
        compiled[1](frame)
    for c, oracle in zip(compiled, oracles, strict=True):
        oracle.check()
        assert deltafx.stats(c).flop_fraction == 0
    assert set(deltafx.modules(compiled[0])).isdisjoint(deltafx.modules(compiled[1]))
    deltafx.reset(compiled[0])
    with torch.no_grad():
        compiled[0](frame)
        compiled[1](frame)
    assert [deltafx.stats(c).flop_fraction for c in compiled] == [1, 0]


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("how", ["module", "function", "in place"])
def test_two_calls_on_one_model_have_a_state_each(how, breaks):
    """One of them watches one street, the other another."""
    model = Net(breaks).eval()
    options = {**EXACT, "input_block": 1}
    if how == "in place":
        twin = copy.copy(model)  # the same tensors
        for m in (model, twin):
            m.compile(backend="deltafx", options=options)
        compiled = [model, twin]
    else:
        compiled = [
            compiled_with(model if how == "module" else lambda x: model(x), options)
            for _ in range(2)
        ]
    frame, other = torch.randn(2, 1, 3, 9, 9)
    with torch.no_grad():
        for _ in range(2):
            for c, x in zip(compiled, (frame, other), strict=True):
                torch.testing.assert_close(c(x), Net.forward(model, x))
    assert [deltafx.stats(c).flop_fraction for c in compiled] == [0, 0]
    assert set(deltafx.modules(compiled[0])).isdisjoint(deltafx.modules(compiled[1]))
    deltafx.reset(compiled[0])
    with torch.no_grad():
        compiled[0](frame), compiled[1](other)
    assert [deltafx.stats(c).flop_fraction for c in compiled] == [1, 0]


def test_several_models_through_one_function():
    """It is one call of `torch.compile`: the models share graphs, and no state."""
    compiled = compiled_with(lambda m, x: m(x), {**EXACT, "max_states": 2})
    models = [Net().eval() for _ in range(3)]
    frame = torch.randn(1, 3, 9, 9)
    with torch.no_grad():
        for m in (*models, models[2]):
            torch.testing.assert_close(compiled(m, frame), m(frame))
    assert len(deltafx.modules(compiled)) == 2, "only so many are kept"
    assert deltafx.stats(compiled).flop_fraction == 0


@pytest.mark.filterwarnings("ignore")
def test_more_calls_than_dynamo_compiles_for():
    """Those run as if they were not compiled; torch warns of it and names the limit."""
    model, frame = Net().eval(), torch.randn(1, 3, 9, 9)
    with torch._dynamo.config.patch(recompile_limit=2), torch.no_grad():
        compiled = [compiled_with(model) for _ in range(3)]
        for c in compiled:
            torch.testing.assert_close(c(frame), model(frame))
        assert all(deltafx.modules(c) for c in compiled[:2])
        with pytest.raises(NotCompiledError):
            deltafx.modules(compiled[2])


def test_a_compiled_module_within_another():
    model = nn.Sequential(compiled_with(Net().eval()), nn.ReLU())
    with torch.no_grad():
        for _ in range(2):
            model(torch.ones(1, 3, 9, 9))
    assert deltafx.stats(model).flop_fraction == 0
    assert deltafx.modules(model) == deltafx.modules(model[0])


@pytest.mark.parametrize("kwargs", [{"options": {"treshold": 0}}, {"mode": "max-autotune"}])
def test_unknown_options(kwargs):
    compiled = torch.compile(Net().eval(), backend="deltafx", **kwargs)
    with pytest.raises(InvalidOptionError, match=r"the options are cuda_graph, .*threshold"):
        compiled(torch.randn(1, 3, 9, 9))


def test_options_out_of_range():
    with pytest.raises(InvalidOptionError, match="finite and >= 0"):
        compiled_with(Net().eval(), {"threshold": -1})(torch.randn(1, 3, 9, 9))


def test_options_arrive():
    compiled = compiled_with(Net().eval(), {"threshold": 0.3, "policy": "max"})
    compiled(torch.randn(1, 3, 9, 9))
    (region,) = deltafx.modules(compiled)
    assert region.config.policy == "max"
    assert region.thresholds["first"] == 0.3


def test_train_mode():
    with pytest.raises(TrainModeError, match=r"model\.eval\(\)"):
        compiled_with(Net().train())(torch.randn(1, 3, 9, 9))


def test_gradients():
    model = Net().eval()
    compiled = compiled_with(model)
    frame = torch.randn(1, 3, 9, 9, requires_grad=True)
    with pytest.raises(InvalidInputError, match="inference"):
        compiled(frame)
    assert not compiled(frame.detach()).requires_grad
    with torch.no_grad():
        assert not compiled(frame).requires_grad


def test_autocast():
    model = Net().eval()
    compiled = compiled_with(model)
    with torch.no_grad():
        exact_over(model, compiled, frames(1, 3, 9, 9))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            exact_over(model, compiled, frames(1, 3, 9, 9))
        exact_over(model, compiled, frames(1, 3, 9, 9))


class InPlace(nn.Module):
    """Writes into its argument, into a buffer, and into the other side of a graph break."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        x.mul_(2)
        self.seen += 1
        y = self.conv(x)
        torch._dynamo.graph_break()
        z = F.relu(y, inplace=True)
        torch._dynamo.graph_break()
        return z + y + self.seen


def test_what_the_model_writes_into_is_written():
    model, ours = InPlace().eval(), InPlace().eval()
    ours.load_state_dict(model.state_dict())
    compiled = compiled_with(ours)
    with torch.no_grad():
        for frame in frames(1, 3, 9, 9):
            theirs, own = frame.clone(), frame.clone()
            expected = model(theirs)
            torch.testing.assert_close(compiled(own), expected)
            assert torch.equal(own, theirs)
            assert torch.equal(ours.seen, model.seen)


class Anchors(nn.Module):
    """A region that reads no input: constants, and random numbers that cannot be folded."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.register_buffer("grid", torch.randn(1, 3, 5, 5))

    def forward(self, x):
        y = torch.relu(self.grid + 0 * torch.rand(1, 3, 5, 5))
        torch._dynamo.graph_break()
        return self.conv(x) + y


def test_a_region_without_inputs():
    model = Anchors().eval()
    compiled = compiled_with(model)
    with torch.no_grad():
        exact_over(model, compiled, frames(1, 3, 5, 5))


def test_functions():
    net, other = Net().eval(), nn.Conv2d(4, 2, 1)

    def f(x):
        return {"out": other(net(x)), "shape": x.shape[2]}

    compiled = compiled_with(f)
    with torch.no_grad():
        for frame in frames(1, 3, 9, 9):
            got = compiled(frame)
            torch.testing.assert_close(got["out"], f(frame)["out"])
            assert got["shape"] == 9
    (region,) = deltafx.modules(compiled)
    assert region.explain().delta_share == 1
    deltafx.reset(compiled)
    assert deltafx.stats(compiled).nodes


def test_the_model_itself_compiled_in_place():
    model = Net().eval()
    model.compile(backend="deltafx", options=EXACT)
    with torch.no_grad():
        model(torch.randn(1, 3, 9, 9))
    assert deltafx.stats(model).flop_fraction == 1


def test_what_is_not_compiled():
    model = Net().eval()
    for f in (deltafx.modules, deltafx.reset, deltafx.stats):
        with pytest.raises(NotCompiledError, match="call it with a frame"):
            f(compiled_with(model))
        with pytest.raises(InvalidInputError, match="not int"):
            f(3)
    ours = deltafx.compile(model, example_inputs=(torch.randn(1, 3, 9, 9),))
    assert deltafx.modules(ours) == (ours,)
    assert deltafx.stats(ours).nodes == ours.stats().nodes
    deltafx.reset(ours)


@pytest.mark.parametrize("breaks", [False, True])
def test_compiler_reset_frees_everything(breaks):
    model = Net(breaks).eval()
    compiled = compiled_with(model)
    with torch.no_grad():
        compiled(torch.randn(1, 3, 9, 9))
    found = deltafx.modules(compiled)
    held = [weakref.ref(m) for m in found]
    held += [weakref.ref(t) for m in found for t in m.state_tensors().values()]
    del found
    torch.compiler.reset()
    gc.collect()
    assert [r for r in held if r() is not None] == []
    with pytest.raises(NotCompiledError):
        deltafx.stats(compiled)
    with torch.no_grad():
        exact_over(model, compiled, frames(1, 3, 9, 9))


def test_a_users_error_stays_one():
    class Broken(nn.Module):
        def forward(self, x):
            raise LookupError("of the user")

    with pytest.raises(LookupError, match="of the user"):
        compiled_with(Broken().eval())(torch.randn(1, 3, 9, 9))


def test_numbers_that_change_from_frame_to_frame():
    """Dynamo's graph takes them as they come; it is not compiled for each of them."""
    net = Net().eval()
    compiled = compiled_with(lambda x, factor: net(x) * factor, {**EXACT, "max_states": 2})
    with torch.no_grad():
        for i, x in enumerate(frames(1, 3, 9, 9, count=7)):
            torch.testing.assert_close(compiled(x, float(i)), net(x) * i, atol=1e-5, rtol=1e-4)
    assert "numbers" in deltafx.modules(compiled)[-1].explain().note


class ReadsValues(nn.Module):
    """Dynamo breaks the graph where it does, or with `fullgraph` takes it into the graph."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.first = nn.Conv2d(3, 5, 3, padding=1)
        self.second = nn.Conv2d(5, 4, 3)

    def forward(self, x):
        y = self.first(x).relu()
        number = y.amax().item() if self.how == "number" else (y > 0).nonzero().float().mean()
        return self.second(y) * number


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["number", "sites"])
@pytest.mark.parametrize("fullgraph", [False, True])
def test_what_depends_on_values(how, fullgraph):
    model = ReadsValues(how).eval()
    compiled = compiled_with(model, fullgraph=fullgraph)
    with torch.no_grad():
        exact_over(model, compiled, frames(1, 3, 9, 9))
    for region in deltafx.modules(compiled):
        assert region.explain().front_end == ("parts" if fullgraph else "dynamo")
    assert deltafx.stats(compiled).dense_macs > 0
    deltafx.reset(compiled)


PROGRAM = """
import sys, torch
compiled = torch.compile(torch.nn.Conv2d(1, 1, 1).eval(), backend="deltafx")
print(sys.argv[1:], "deltafx" in sys.modules)
x = torch.randn(1, 1, 4, 4)
with torch.no_grad():
    compiled(x)
import deltafx
assert torch._dynamo.list_backends().count("deltafx") == 1
print(deltafx.stats(compiled).flop_fraction)
"""


@pytest.mark.parametrize("imported", [False, True])
def test_the_entry_point(tmp_path, imported):
    """As an installed package has it; without an import of deltafx, and after one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (point,) = project["entry-points"][GROUP].items()
    info = tmp_path / "deltafx-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: deltafx\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{point[0]} = {point[1]}\n")
    program = ("import deltafx\n" if imported else "") + PROGRAM
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-1] == "1.0"
