"""Weights that change under a compiled model, and the scales of its thresholds."""

import pytest
import torch

import deltafx
from deltafx.errors import InvalidInputError, TrainModeError
from tests.branching_net import BranchingNet, clip
from tests.exactness import exact_over
from tests.small_net import Net

pytestmark = pytest.mark.usefixtures("on_device")


def change_in_place(model):
    with torch.no_grad():
        model.a.weight.mul_(1.5)


def change_statistics(model):
    model.norm.running_mean += 1


def load(model):
    model.load_state_dict(BranchingNet(seed=5).state_dict())


def assign(model):
    model.load_state_dict(BranchingNet(seed=6).state_dict(), assign=True)


def replace_data(model):
    model.c.weight.data = torch.randn_like(model.c.weight)


@pytest.mark.parametrize("change", [change_in_place, change_statistics, load, assign, replace_data])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_weights_are_followed(change, mode):
    model = BranchingNet()
    compiled = deltafx.compile(model, threshold=0)
    frame = torch.randn(1, 3, 9, 9)
    with mode():
        compiled(frame)
    change(model)
    with mode():
        exact_over(model, compiled, clip(1, 3, 9, 9))


def packed(compiled):
    """The packed weights of all input signatures, by name."""
    return [
        (name, tensor)
        for entry in compiled._cache.values()
        for name, tensor in entry.instance.constants.items()
        if name.startswith("const_") and "weight" in name
    ]


def test_what_is_packed_is_packed_once():
    """For all input signatures, and all calls of a module."""
    model = BranchingNet()
    compiled = deltafx.compile(model, threshold=0)
    for size in (8, 9, 11):
        exact_over(model, compiled, clip(1, 3, size, size))
    found = packed(compiled)
    assert len(found) == 3 * 3
    assert len({t.data_ptr() for _, t in found}) == 3
    change_in_place(model)
    for size in (8, 9, 11):
        exact_over(model, compiled, clip(1, 3, size, size))
    shared = Net(lambda m, x: m.b(m.b(m.b(m.a(x)).tanh()).tanh()))
    compiled = deltafx.compile(shared, threshold=0)
    exact_over(shared, compiled, clip(1, 3, 8, 8))
    assert sorted({name for name, _ in packed(compiled)}) == [
        "const_a_weight", "const_b_1_weight", "const_b_2_weight", "const_b_weight"
    ]  # fmt: skip
    assert len({t.data_ptr() for _, t in packed(compiled)}) == 2


def test_training_in_between():
    model = BranchingNet()
    compiled = deltafx.compile(model, threshold=0)
    frame = torch.randn(2, 3, 9, 9)
    compiled(frame)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sum(out.square().mean() for out in model(frame)).backward()
    optimizer.step()
    with pytest.raises(TrainModeError, match=r"model\.eval\(\)"):
        compiled(frame)
    model.eval()
    exact_over(model, compiled, clip(2, 3, 9, 9))


@pytest.mark.parametrize("convert", ["model", "compiled"])
def test_conversions(convert):
    model = BranchingNet()
    compiled = deltafx.compile(model, threshold=0)
    compiled(torch.randn(1, 3, 9, 9))
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        (model if convert == "model" else compiled).to(dtype)
        exact_over(model, compiled, [f.to(dtype) for f in clip(1, 3, 9, 9)])
    with pytest.raises(RuntimeError, match="BFloat16"):
        compiled(torch.randn(1, 3, 9, 9).bfloat16())


def test_calibration_sets_the_scales():
    model = BranchingNet()
    compiled = deltafx.compile(model, threshold=0.1)
    frames = clip(1, 3, 16, 16)
    compiled.calibrate(frames)
    scale = 1 / compiled.state_tensors()["inv_scale_input_0_encoded"]
    expected = torch.cat(frames).double().std((0, 2, 3), correction=0)
    assert torch.allclose(scale.double(), expected, rtol=1e-5)
    exact_over(model, compiled, frames[:1])  # and the state was reset
    with pytest.raises(InvalidInputError, match="at least one frame"):
        compiled.calibrate([])


def test_the_first_frame_calibrates_where_nothing_else_did():
    compiled = deltafx.compile(BranchingNet(), threshold=0.1)
    frame = 3 * torch.randn(1, 3, 16, 16)
    compiled(frame)
    scale = 1 / compiled.state_tensors()["inv_scale_input_0_encoded"]
    assert torch.allclose(scale, frame.std((0, 2, 3), correction=0), rtol=1e-5)


def test_a_first_frame_of_nans_does_not_calibrate():
    model = BranchingNet()
    compiled = deltafx.compile(model, threshold=0.1)
    compiled(torch.full((1, 3, 8, 8), float("nan")))
    frame = torch.randn(1, 3, 8, 8)
    exact_over(model, compiled, [frame])
    scale = 1 / compiled.state_tensors()["inv_scale_input_0_encoded"]
    assert torch.allclose(scale, frame.std((0, 2, 3), correction=0), rtol=1e-5)
