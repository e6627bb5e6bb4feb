"""torch.export: programs come in, and a compiled model goes out with its state."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import deltafx
from deltafx.errors import InvalidInputError, NotCompiledError, TrainModeError
from deltafx.models_zoo import load
from tests.branching_net import BranchingNet, clip
from tests.exactness import exact_over

ROOT = Path(__file__).resolve().parent.parent


class Net(nn.Module):
    """Shared slots (a concatenation), a workspace (the mean), a map of one value, a dense op."""

    def __init__(self):
        super().__init__()
        self.spread = nn.Conv2d(3, 8, 3, padding=1)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.join = nn.Conv2d(16, 4, 1)
        self.gate = nn.Conv2d(8, 1, 1)

    def forward(self, x):
        y = self.spread(x).relu()
        z = self.deep(y)
        gate = self.gate(y.mean((2, 3), keepdim=True)).sigmoid()
        joined = self.join(torch.cat([y, z], 1)) * gate
        return {"map": joined, "mean": y.mean((2, 3)).softmax(1), "gate": gate}


def moving(count):
    """Frames [1, 3, 24, 32] of a box that moves over noise, with a static one and a cut."""
    still = torch.randn(1, 3, 24, 32)
    frames = []
    for i in range(count):
        frame = still.clone()
        frame[:, :, 2 * i : 2 * i + 5, 3 * i : 3 * i + 6] += 1
        frames.append(frame)
    frames[3] = frames[2]
    frames[5] = torch.randn_like(still)
    return frames


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_is_compiled(strict):
    model = Net().eval()
    program = torch.export.export(model, (torch.randn(1, 3, 9, 9),), strict=strict)
    compiled = deltafx.compile(program, threshold=0)
    exact_over(model, compiled, [torch.randn(1, 3, 9, 9) for _ in range(4)])
    explanation = compiled.explain()
    assert explanation.front_end == "export"
    assert explanation.delta_share == 1
    assert {"spread", "deep", "join", "gate"} <= {n.name for n in explanation}
    with torch.no_grad():
        model.spread.weight.mul_(2)
    exact_over(model, compiled, [torch.randn(1, 3, 9, 9)])


def test_a_program_of_several_inputs_and_outputs():
    model = BranchingNet()
    frames = clip(1, 3, 9, 9)
    args = frames[0] if isinstance(frames[0], tuple) else (frames[0],)
    compiled = deltafx.compile(torch.export.export(model, args), threshold=0)
    exact_over(model, compiled, frames)


class Keywords(nn.Module):
    def forward(self, x, scale=1.0, *, bias=None):
        return {"x": x * scale, "b": [x + bias, None]}


def test_the_form_of_the_arguments():
    x = torch.randn(1, 3, 4, 4)
    program = torch.export.export(Keywords(), (x, 2.0), {"bias": x})
    compiled = deltafx.compile(program, threshold=0)
    out = compiled(x, 2.0, bias=x)
    assert torch.equal(out["x"], 2 * x)
    assert out["b"][1] is None
    with pytest.raises(InvalidInputError, match="was exported for arguments"):
        compiled(x)


def test_a_decomposed_program_is_right():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    program = torch.export.export(model, (torch.randn(1, 3, 9, 9),)).run_decompositions()
    compiled = deltafx.compile(program, threshold=0)
    exact_over(model, compiled, [torch.randn(1, 3, 9, 9) for _ in range(3)])


def test_a_program_in_train_mode():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    program = torch.export.export(model, (torch.randn(2, 3, 9, 9),))
    with pytest.raises(TrainModeError, match=r"model\.eval\(\)"):
        deltafx.compile(program)(torch.randn(2, 3, 9, 9))


def compiled_net(threshold, refresh_every):
    model = Net().eval()
    compiled = deltafx.compile(model, threshold=threshold, refresh_every=refresh_every)
    frames = moving(9)
    compiled(frames[0])
    return compiled, frames


@pytest.mark.parametrize(("threshold", "refresh_every"), [(0, 6), (0.3, 0), (0.3, 1), (0.3, 3)])
def test_a_compiled_model_is_exported(tmp_path, threshold, refresh_every):
    """And goes on from the frame seen last, bit for bit; so does the file's program."""
    compiled, frames = compiled_net(threshold, refresh_every)
    program = torch.export.export(compiled.frame_program(), (frames[0],))
    torch.export.save(program, tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    functional = program.run_decompositions().module()
    fractions = []
    for frame in frames[1:]:
        expected = compiled(frame)
        fractions.append(compiled.stats().flop_fraction)
        assert same(loaded(frame), expected)
        assert same(functional(frame), expected)
    assert min(fractions) == 0
    assert max(fractions) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v2", "lraspp_mobilenet_v3_large", "resnet18"])
def test_models_are_exported(tmp_path, name):
    """Frames that truncate, and frames that refresh everything, bit for bit."""
    model = load(name, weights="random").module
    compiled = deltafx.compile(model, threshold=0.1, refresh_every=3)
    frames = [F.interpolate(frame, (96, 128)) for frame in moving(9)]
    compiled(frames[0])
    program = torch.export.export(compiled.frame_program(), (frames[0],))
    torch.export.save(program, tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    for frame in frames[1:]:
        got, expected = (torch.utils._pytree.tree_flatten(m(frame)) for m in (loaded, compiled))
        assert got[1] == expected[1]
        assert all(map(torch.equal, got[0], expected[0]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_package_of_aotinductor(tmp_path):
    """On the CPU; its state is in the package, and its dense ops are inductor's own kernels."""
    compiled, frames = compiled_net(0.3, 3)
    program = torch.export.export(compiled.frame_program(), (frames[0],))
    path = str(tmp_path / "net.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=path)
    package, other = (torch._inductor.aoti_load_package(path) for _ in range(2))
    for frame in frames[1:]:
        got, expected = package(frame), compiled(frame)
        assert torch.equal(got["map"], expected["map"])
        assert torch.equal(got["gate"], expected["gate"])
        torch.testing.assert_close(got["mean"], expected["mean"])
        other(torch.randn_like(frame))  # a package that is loaded twice has two states


class Counter(nn.Module):
    """Counts its calls."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        self.count.add_(1)
        return x + self.count


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.xfail(reason="AOTInductor takes a buffer of one element for a constant")
def test_a_limit_of_aotinductor(tmp_path):
    """Why a frame program counts in a buffer of several; docs/export.md tells of it."""
    x = torch.zeros(2)
    path = str(tmp_path / "counter.pt2")
    torch._inductor.aoti_compile_and_package(
        torch.export.export(Counter(), (x,)), package_path=path
    )
    package = torch._inductor.aoti_load_package(path)
    assert [package(x)[0].item() for _ in range(3)] == [1, 2, 3]


def test_a_frame_program_is_a_copy():
    compiled, frames = compiled_net(0.1, 6)
    program = compiled.frame_program()
    before = {name: t.clone() for name, t in compiled.state_tensors().items()}
    first = program(frames[5])
    copied = {name: t.clone() for name, t in first.items()}
    program(frames[6])
    assert same(first, copied)
    for name, t in compiled.state_tensors().items():
        assert torch.equal(t, before[name]) or t.isnan().any()
    assert len(program.state_dict())


def test_the_scales_must_be_known():
    compiled = deltafx.compile(Net().eval(), threshold=0.1)
    with pytest.raises(NotCompiledError):
        compiled.frame_program()
    compiled.prepare(moving(6)[0])
    with pytest.raises(NotCompiledError, match="calibrate"):
        compiled.frame_program()
    exact = deltafx.compile(Net().eval(), threshold=0, example_inputs=(moving(6)[0],))
    assert exact.frame_program()


PROGRAM = """
import sys, torch
import deltafx.ops
program = torch.export.load(sys.argv[1]).module()
frames, expected = torch.load(sys.argv[2])
for frame, want in zip(frames, expected):
    got = program(frame)
    assert all(torch.equal(got[k], want[k]) for k in want)
print(len(frames), "same")
"""


def test_a_saved_program_runs_in_another_process(tmp_path):
    compiled, frames = compiled_net(0.2, 4)
    program = torch.export.export(compiled.frame_program(), (frames[0],))
    torch.export.save(program, tmp_path / "net.pt2")
    torch.save((frames[1:], [compiled(f) for f in frames[1:]]), tmp_path / "clip.pt")
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path / "net.pt2", tmp_path / "clip.pt"],
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads()), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert run.stdout == "8 same\n", run.stderr
