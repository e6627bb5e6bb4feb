"""DeltaRegions: models that no one graph can stand for, and what their parts become."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import deltafx
from deltafx import DeltaModule, DeltaRegions
from deltafx.errors import (
    InvalidInputError,
    NotCompiledError,
    TrainModeError,
    UnknownNodeError,
    UntraceableError,
)
from tests.branching_net import BranchingNet
from tests.exactness import exact_over
from tests.small_net import clip


class Body(nn.Module):
    """Convolutions that a graph can stand for."""

    def __init__(self, channels=3, out=6):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, 3, padding=1)
        self.norm = nn.BatchNorm2d(out)

    def forward(self, x):
        return self.norm(self.conv(x)).relu()


class Pyramid(nn.Module):
    """A body, a head on each of three levels, and boxes that depend on values."""

    def __init__(self):
        super().__init__()
        self.body = Body()
        self.head = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 2, 1))
        self.score = nn.Linear(2, 3)
        self.eval()

    def forward(self, x, floor=0.0):
        y = self.body(x)
        found = []
        for level in range(3):
            z = self.head(y)
            keep = (z[:, 0] > floor).nonzero()
            sites = z.permute(0, 2, 3, 1)[keep[:, 0], keep[:, 1], keep[:, 2]]
            found.append({"level": level, "sites": self.score(sites), "keep": keep})
            y = F.avg_pool2d(y, 2)
        return found


def compiled_pyramid(**options):
    torch.manual_seed(3)
    model = Pyramid()
    return model, deltafx.compile(model, **{"threshold": 0, **options})


def sequence(model, compiled, frames):
    for x in frames:
        with torch.no_grad():
            expected, got = model(x), compiled(x)
        for e, g in zip(expected, got, strict=True):
            assert g["level"] == e["level"]
            assert torch.equal(g["keep"], e["keep"])
            assert torch.allclose(g["sites"], e["sites"], atol=1e-5)


def test_a_detector_of_parts():
    model, compiled = compiled_pyramid()
    assert isinstance(compiled, DeltaRegions)
    sequence(model, compiled, clip(2, 3, 16, 20))
    assert list(compiled.regions) == ["body", "head", "head[1]", "head[2]"]
    assert all(isinstance(r, DeltaModule) for r in compiled.regions.values())
    explained = compiled.explain()
    assert explained.front_end == "parts"
    assert "nonzero" in explained.note
    kinds = {n.name: (n.kind, n.op) for n in explained}
    assert kinds["body.conv"] == ("delta", "conv2d")
    assert kinds["head[2].m_2"] == ("delta", "conv2d")
    assert kinds["score"] == ("dense", "Linear")
    assert "there is no 2-D convolution in it" in str(explained)
    assert len({n.region for n in explained if n.region is not None}) == 4


def test_every_call_has_its_own_state():
    _, compiled = compiled_pyramid()
    x = torch.randn(1, 3, 16, 20)
    compiled(x)
    compiled(x)
    computed = {k: n for k, n in compiled.stats().nodes.items() if n.dense_macs}
    assert len(computed) == 7
    assert all(n.candidates == 0 for n in computed.values())
    sites = [compiled.accumulator(f"head{i}.m_2").shape[2:] for i in ("", "[1]", "[2]")]
    assert sites == [(16, 20), (8, 10), (4, 5)]


def test_image_sizes_may_change():
    model, compiled = compiled_pyramid(max_states=2)
    frames = [torch.randn(n, 3, h, w) for n, h, w in ((1, 16, 20), (2, 8, 8), (1, 12, 12))]
    sequence(model, compiled, [*frames, *frames, frames[0], frames[0]])
    assert compiled.stats().flop_fraction < 0.1
    assert all(len(r._cache) <= 2 for r in compiled.regions.values())
    assert len(compiled._rest) <= 2


def test_multiply_adds_outside_of_the_regions_count():
    _, compiled = compiled_pyramid()
    x = torch.randn(1, 3, 16, 20)
    found = compiled(x)
    outside = sum(len(level["keep"]) for level in found) * 2 * 3
    inside = 320 * 3 * 9 * 6 + (320 + 80 + 20) * (6 * 9 * 6 + 6 * 2)
    assert compiled.stats().dense_macs == compiled.stats().macs == inside + outside
    assert compiled.explain().delta_share == pytest.approx(inside / (inside + outside))
    compiled(x)
    assert compiled.stats().macs == outside
    assert sum(n.dense_macs for n in compiled.explain()) == inside + outside


def test_compiled_ahead():
    torch.manual_seed(3)
    model = Pyramid()
    x = torch.randn(1, 3, 16, 20)
    compiled = deltafx.compile(model, threshold=0, example_inputs=(x,))
    names = list(compiled.regions)
    assert names == ["body", "head", "head[1]", "head[2]"]
    assert compiled.stats().density == 0, "no frame was seen"
    assert compiled.state_bytes() == compiled.stats().state_bytes > 0
    sequence(model, compiled, [x, x])
    lazy = deltafx.compile(model, threshold=0)
    assert lazy.state_bytes(x) == compiled.state_bytes()
    assert lazy.explain().nodes == compiled.explain().nodes


def test_what_is_known_only_after_compiling():
    _, compiled = compiled_pyramid()
    for ask in (
        compiled.stats, compiled.explain, compiled.state_bytes, compiled.state_tensors,
        compiled.update_mask, lambda: compiled.accumulator("a"),
    ):  # fmt: skip
        with pytest.raises(NotCompiledError, match="call the model with a frame"):
            ask()
    compiled.reset()
    compiled.reset(0)


def test_thresholds_by_region():
    _, compiled = compiled_pyramid(threshold=0.1, thresholds={"head[1].m_0": 3.0})
    compiled.thresholds["body.conv"] = 0.5
    x = torch.randn(1, 3, 16, 20)
    compiled(x)
    assert compiled.thresholds["head[1].m_0"] == 3.0
    assert compiled.thresholds["head[2].m_0"] == 0.1
    assert compiled.regions["body"].thresholds["conv"] == 0.5
    assert len(compiled.thresholds) == len(list(compiled.thresholds)) == 11
    compiled.thresholds.set_all(9.0)
    compiled(x + 0.01)
    assert set(compiled.thresholds.values()) == {9.0}
    assert compiled.update_mask("head[2].m_2").sum() == 0
    compiled.thresholds["body.conv"] = 0.5
    del compiled.thresholds["body.conv"]
    assert compiled.thresholds["body.conv"] == 9.0
    for name in ("conv", "nothing.conv", "body.nothing"):
        with pytest.raises(UnknownNodeError):
            compiled.thresholds[name] = 0.1
        with pytest.raises(UnknownNodeError):
            compiled.update_mask(name)


@pytest.mark.parametrize("name", ["nothing.conv", "body.nothing", "conv"])
def test_a_threshold_of_no_node_is_told_after_the_first_frame(name):
    _, compiled = compiled_pyramid(thresholds={name: 0.1})
    with pytest.raises(UnknownNodeError, match=name.rpartition(".")[2]):
        compiled(torch.randn(1, 3, 16, 20))


def test_calibration_over_regions():
    _, compiled = compiled_pyramid(threshold=0.1)
    frames = clip(1, 3, 16, 16)
    compiled.calibrate(frames)
    scale = 1 / compiled.state_tensors()["body.inv_scale_input_0_encoded"]
    expected = torch.cat(frames).double().std((0, 2, 3), correction=0)
    assert torch.allclose(scale.double(), expected, rtol=1e-5)
    with pytest.raises(InvalidInputError, match="at least one frame"):
        compiled.calibrate([])


def test_streams_are_reset_one_by_one():
    _, compiled = compiled_pyramid()
    x = torch.randn(3, 3, 16, 16)
    compiled(x)
    compiled.reset([1])
    compiled(x)
    mask = compiled.update_mask("head[1].m_0")
    assert mask[1].all()
    assert not mask[[0, 2]].any()
    assert compiled.update_mask()[1].all()
    compiled.reset()
    compiled(x)
    assert compiled.stats().flop_fraction == 1
    with pytest.raises(InvalidInputError, match="there are 3 streams"):
        compiled.reset(3)


def test_the_users_model_is_left_alone():
    model, compiled = compiled_pyramid()
    before = {name: dict(m.__dict__) for name, m in model.named_modules()}
    sequence(model, compiled, clip(1, 3, 16, 20))
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys()
        assert all(module.__dict__[k] is v for k, v in before[name].items())
    assert set(compiled.state_dict()) == {f"model.{name}" for name in model.state_dict()}


def change_in_place(model):
    with torch.no_grad():
        model.body.conv.weight.mul_(1.5)
        model.score.weight.mul_(-1)


def assign(model):
    torch.manual_seed(9)
    model.load_state_dict(Pyramid().state_dict(), assign=True)


def replace_data(model):
    model.score.weight.data = torch.randn_like(model.score.weight)
    model.head[0].weight.data = torch.randn_like(model.head[0].weight)


@pytest.mark.parametrize("change", [change_in_place, assign, replace_data])
def test_weights_are_followed(change):
    model, compiled = compiled_pyramid()
    frames = clip(1, 3, 16, 20)
    sequence(model, compiled, frames)
    change(model)
    sequence(model, compiled, frames)


def test_the_calls_of_a_head_share_what_is_packed():
    model, compiled = compiled_pyramid()
    frames = clip(1, 3, 16, 20)
    sequence(model, compiled, frames)
    heads = [compiled.regions[name] for name in ("head", "head[1]", "head[2]")]
    packed = [[t for n, t in h.named_buffers() if "weight" in n] for h in heads]
    assert [len(p) for p in packed] == [2, 2, 2]
    assert len({t.data_ptr() for p in packed for t in p}) == 2
    with torch.no_grad():
        model.head[0].weight.mul_(-1)
    sequence(model, compiled, frames)


def test_equal_weights_of_two_parts_stay_two():
    model = Wrapped(lambda m, x: m.tail(m.body(x)), nn.Conv2d(3, 6, 1))
    for conv in (model.body, model.tail):
        nn.init.zeros_(conv.bias)
    nn.init.zeros_(model.body.weight)
    compiled = deltafx.compile(model, threshold=0)
    frames = clip(1, 3, 9, 9)
    for parameter in (None, model.body.bias, model.tail.bias, model.body.weight):
        if parameter is not None:
            nn.init.normal_(parameter)
        exact_over(model, compiled, frames)


def test_modes():
    model, compiled = compiled_pyramid()
    with torch.inference_mode():
        sequence(model, compiled, clip(1, 3, 16, 20))
    sequence(model, compiled, clip(1, 3, 16, 20))
    with pytest.raises(TrainModeError):
        compiled.train()
    with pytest.raises(TrainModeError, match=r"model\.eval"):
        deltafx.compile(Pyramid().train())
    for dtype in (torch.bfloat16, torch.float32):
        compiled.to(dtype)
        assert model.score.weight.dtype == dtype
        compiled(torch.randn(1, 3, 16, 20).to(dtype))
        assert compiled.accumulator("body.conv").dtype == dtype


def test_a_copy_has_its_own_state():
    model, compiled = compiled_pyramid()
    frames = clip(1, 3, 16, 20)
    sequence(model, compiled, frames)
    other = copy.deepcopy(compiled)
    change_in_place(other.model)
    sequence(other.model, other, frames)
    sequence(model, compiled, frames)


def test_the_rest_of_the_model_is_there():
    class Named(Pyramid):
        classes = ("a", "b")

        def predict(self, x):
            return len(self(x))

    compiled = deltafx.compile(Named().eval())
    assert compiled.classes == ("a", "b")
    assert compiled.score.out_features == 3
    assert compiled.predict(torch.randn(1, 3, 16, 20)) == 3
    with pytest.raises(AttributeError, match="nothing"):
        compiled.nothing  # noqa: B018


class Wrapped(nn.Module):
    """A function of a body, that no graph can stand for."""

    def __init__(self, function, body=None):
        super().__init__()
        self.body = Body() if body is None else body
        self.tail = nn.Conv2d(6, 4, 3, padding=1)
        self.function = function
        self.eval()

    def forward(self, *args, **kwargs):
        out = self.function(self, *args, **kwargs)
        float(out.sum())
        return out


def in_a_list(m, images):
    return m.tail(m.body(torch.stack(images)))


def in_a_dictionary(m, inputs):
    return m.tail(m.body(inputs["left"]) + m.body(inputs["right"]))


def two_in_one_batch(m, a, b):
    return m.tail(m.body(torch.cat([a, b])))


def by_keyword(m, *, x, scale=1.0):
    return m.tail(m.body(x=x) * scale)


INPUTS = [
    (in_a_list, lambda x: ([x[0], x[1]],), {}, ["body", "tail"]),
    (in_a_dictionary, lambda x: ({"left": x, "right": x + 1},), {}, ["body", "body[1]", "tail"]),
    (two_in_one_batch, lambda x: (x, x.flip(3)), {}, ["body", "tail"]),
    (by_keyword, lambda x: (), {"scale": 2.0}, ["body", "tail"]),
]


@pytest.mark.parametrize(("function", "args", "kwargs", "regions"), INPUTS)
def test_inputs(function, args, kwargs, regions):
    model = Wrapped(function)
    compiled = deltafx.compile(model, threshold=0)
    for x in clip(2, 3, 12, 14):
        named = {**kwargs, "x": x} if kwargs else {}
        with torch.no_grad():
            assert torch.allclose(compiled(*args(x), **named), model(*args(x), **named), atol=1e-5)
    assert list(compiled.regions) == regions
    compiled.reset([1])
    assert compiled.stats().nodes


class Writes(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Body()

    def forward(self, x):
        x.mul_(2)
        return self.inner(x)


def test_a_part_that_writes_into_its_arguments():
    model = Wrapped(lambda m, x: m.tail(m.body(x) + m.body.inner(x)), Writes())
    compiled = deltafx.compile(model, threshold=0)
    for x in clip(1, 3, 12, 14):
        with torch.no_grad():
            assert torch.allclose(compiled(x.clone()), model(x.clone()), atol=1e-5)
    assert list(compiled.regions) == ["body.inner", "body.inner[1]", "tail"]


class Remembers(nn.Module):
    """What a module keeps between calls is part of what it computes."""

    def __init__(self, how):
        super().__init__()
        self.inner = Body()
        self.how = how
        self.register_buffer("last", torch.zeros(1))
        self.frames = []
        self.count = 0
        self.eval()

    def forward(self, x):
        y = self.inner(x)
        if self.how == "buffer":
            y = y + self.last
            self.last = 0.5 * self.last + y.mean()
        elif self.how == "in place":
            y = y + self.last
            self.last += 1
        elif self.how == "count":
            self.count += 1
            y = y * self.count
        elif self.how == "list":
            self.frames.append(y)
            y = y + self.frames[0]
        return y


@pytest.mark.parametrize("how", ["buffer", "in place", "count", "list"])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_model_with_a_memory_of_its_own(how, ahead):
    model = Remembers(how)
    other = copy.deepcopy(model)
    frames = clip(1, 3, 12, 14)
    compiled = deltafx.compile(model, threshold=0)
    with torch.no_grad():
        for x in frames:
            assert torch.allclose(compiled(x), other(x), atol=1e-5)
    assert list(compiled.regions) == ["inner"]
    assert "its own" in compiled.explain().note
    assert model.frames == []
    assert model.count == 0


def test_hooks_are_called():
    seen = []
    model = BranchingNet()
    hook = model.norm.register_forward_hook(lambda m, args, out: seen.append(out))
    compiled = deltafx.compile(model, threshold=0)
    frames = clip(1, 3, 12, 14)
    exact_over(copy.deepcopy(model), compiled, [])
    with torch.no_grad():
        for x in frames:
            compiled(x)
    assert len(seen) == len(frames)
    assert all(t.isfinite().all() for t in seen)
    assert "a hook on 'norm'" in compiled.explain().note
    hook.remove()
    outer = []
    model.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    model.register_forward_hook(lambda m, args, out: outer.append(1))
    compiled = deltafx.compile(model, threshold=0)
    with torch.no_grad():
        for x in frames:
            ours, expected = compiled(x), model(x)
            assert torch.allclose(ours[0], expected[0], atol=1e-5)
    assert len(outer) == 2 * len(frames)
    assert list(compiled.regions) == [""]


class ReadsValues(nn.Module):
    """What fx takes down, and no graph for given shapes can do: a value becomes a number."""

    def __init__(self):
        super().__init__()
        self.body = Body()
        self.tail = nn.Conv2d(6, 4, 3, padding=1)
        self.eval()

    def forward(self, x):
        y = self.body(x)
        return self.tail(y) / (1 + y.amax().item())


@pytest.mark.parametrize("ahead", [False, True])
def test_what_turns_out_to_be_no_graph(ahead):
    """At its first frame, or at the example: the parts go on, and answer what is asked."""
    model = ReadsValues()
    frames = clip(2, 3, 12, 14)
    example = {"example_inputs": (frames[0],)} if ahead else {}
    compiled = deltafx.compile(model, threshold=0, **example)
    told = compiled.state_bytes(frames[0])
    exact_over(model, compiled, [*frames, frames[-1]])
    explained = compiled.explain()
    assert explained.front_end == "parts"
    assert "item" in explained.note or "_local_scalar_dense" in explained.note
    assert explained.delta_share == 1
    assert list(compiled.regions) == ["body", "tail"]
    assert told == compiled.state_bytes() == compiled.stats().state_bytes > 0
    assert compiled.stats().flop_fraction == 0
    assert not compiled.update_mask("body.conv").any()
    assert compiled.accumulator("body.conv").shape == (2, 6, 12, 14)
    assert set(compiled.state_dict()) == {f"model.{name}" for name in model.state_dict()}
    compiled.reset([1])
    compiled(frames[-1])
    assert compiled.update_mask().any((1, 2)).tolist() == [False, True]
    with pytest.raises(UntraceableError, match=r"each of `regions` has a frame_program\(\)"):
        compiled.frame_program()
    assert compiled.regions["body"].frame_program()
    with pytest.raises(RuntimeError, match="expected input"):
        compiled(torch.randn(1, 4, 8, 8))
    exact_over(model, compiled, clip(1, 3, 9, 9))


class Scaled(nn.Module):
    """A number that the caller chooses anew for every frame."""

    def __init__(self):
        super().__init__()
        self.body = Body()
        self.tail = nn.Conv2d(6, 4, 3, padding=1)
        self.eval()

    def forward(self, x, factor):
        return self.tail(self.body(x)) * factor


def test_numbers_that_change_from_frame_to_frame():
    """No frame may cost a compilation for ever."""
    model = Scaled()
    compiled = deltafx.compile(model, threshold=0, max_states=3)
    x = torch.randn(1, 3, 9, 9)
    exact_over(model, compiled, [(x, float(i % 3)) for i in range(6)])
    assert compiled.explain().front_end == "fx"
    exact_over(model, compiled, [(x, float(i)) for i in range(8)])
    assert "numbers among its arguments change" in compiled.explain().note
    assert list(compiled.regions) == ["body", "tail"]
    assert compiled.stats().flop_fraction == 0
    tensors = deltafx.compile(model, threshold=0, max_states=3)
    exact_over(model, tensors, [(x, torch.tensor(float(i))) for i in range(8)])
    assert tensors.explain().front_end == "fx"
    assert tensors.stats().flop_fraction == 0


def test_thresholds_go_along_to_the_parts():
    compiled = deltafx.compile(ReadsValues(), threshold=0.1, thresholds={"body.conv": 3.0})
    compiled.thresholds["tail.conv2d"] = 2.0
    frames = clip(1, 3, 12, 14)
    compiled(frames[0])
    assert compiled.thresholds["body.conv"] == 3.0
    assert compiled.thresholds["tail.conv2d"] == 2.0
    compiled.thresholds.set_all(9.0)
    compiled(frames[0] + 0.01)
    assert compiled.update_mask("tail.conv2d").sum() == 0
    compiled.calibrate(frames)
    assert compiled.stats().nodes
    other = copy.deepcopy(compiled)
    assert not torch.equal(other(frames[1]), torch.zeros(()))
    assert set(other.thresholds.values()) == {9.0}


def test_a_frame_that_the_model_refuses_makes_no_parts():
    compiled = deltafx.compile(Body().eval(), threshold=0)
    with pytest.raises(RuntimeError, match="expected input"):
        compiled(torch.randn(1, 4, 8, 8))
    exact_over(compiled.model, compiled, clip(1, 3, 8, 8))
    assert compiled.explain().front_end == "fx"


class Head(nn.Module):
    def __init__(self, out):
        super().__init__()
        self.conv = nn.Conv2d(6, out, 1)

    def forward(self, x):
        return self.conv(x).tanh()


@pytest.mark.parametrize("whole", [True, False])
def test_modules_may_be_replaced(whole):
    model = nn.Sequential(Body(), Head(2), nn.ReLU()).eval()
    outer = model if whole else Wrapped(lambda m, x: m.body(x), model)
    compiled = deltafx.compile(outer, threshold=0)
    frames = clip(1, 3, 9, 9)
    exact_over(outer, compiled, frames)
    model[1] = Head(5).eval()
    exact_over(outer, compiled, frames)
    model[2] = nn.Sigmoid().eval()  # no weight tells of it
    exact_over(outer, compiled, frames)
    with torch.no_grad():
        model[1].conv.weight.mul_(2)
    exact_over(outer, compiled, frames)
    model.append(nn.Conv2d(5, 1, 3))
    model.eval()
    exact_over(outer, compiled, frames)
    model[1] = Head(5).train()
    with pytest.raises(TrainModeError, match=r"model\.eval"):
        compiled(frames[0])


def test_cut_outs_stay_dense():
    """What runs on many pieces of the picture has no streams; nor what runs on any number."""

    def function(m, x):
        y = m.body(x)
        many = y.unfold(2, 4, 1).unfold(3, 4, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 6, 4, 4)
        few = many[: 1 + int(x[0, 0, 0, 0] > 0)]
        return m.tail(many).mean((2, 3))[: len(few)] + m.tail2(few).mean((2, 3))

    model = Wrapped(function)
    model.tail2 = nn.Conv2d(6, 4, 3).eval()
    compiled = deltafx.compile(model, threshold=0)
    for value in (1.0, 1.0, -1.0, 1.0):
        x = torch.randn(1, 3, 12, 12)
        x[0, 0, 0, 0] = value
        with torch.no_grad():
            assert torch.allclose(compiled(x), model(x), atol=1e-5)
    assert list(compiled.regions) == ["body"]
    reasons = {n.name: n.reason for n in compiled.explain() if n.kind == "dense"}
    assert "cut-outs" in reasons["tail"]
    assert "another one" in reasons["tail2"]


def test_calls_without_an_end_are_bounded():
    model = Wrapped(lambda m, x: sum(m.body(x + i) for i in range(70)))
    compiled = deltafx.compile(model, threshold=0)
    x = torch.randn(1, 3, 6, 6)
    for frame in (x, x, x + 1):
        with torch.no_grad():
            assert torch.allclose(compiled(frame), model(frame), atol=1e-4)
    assert len(compiled.regions) == 64


def test_attributes_and_containers_of_modules_work():
    def function(m, x):
        for layer in m.body:
            assert isinstance(layer, (nn.Conv2d, nn.ReLU))
            x = layer(x)
        return x + m.body[0].weight.sum() + len(m.body)

    body = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 1))
    model = Wrapped(function, body)
    compiled = deltafx.compile(model, threshold=0)
    for x in clip(1, 3, 9, 9):
        with torch.no_grad():
            assert torch.allclose(compiled(x), model(x), atol=1e-5)
    assert list(compiled.regions) == ["body.0", "body.2"]


def weight_norm():
    return nn.utils.weight_norm(nn.Conv2d(3, 6, 3, padding=1))


def parametrized():
    return parametrizations.weight_norm(nn.Conv2d(3, 6, 3, padding=1))


def spectral():
    return parametrizations.spectral_norm(nn.Conv2d(3, 6, 3, padding=1))


@pytest.mark.parametrize("make", [weight_norm, parametrized, spectral])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("whole", [True, False])
def test_computed_weights(make, whole):
    model = nn.Sequential(make(), nn.ReLU(), nn.Conv2d(6, 2, 1)).eval()
    if not whole:
        model = Wrapped(lambda m, x: m.body(x), model)
    compiled = deltafx.compile(model, threshold=0)
    frames = clip(1, 3, 9, 9)
    with torch.no_grad():
        for x in frames:
            assert torch.allclose(compiled(x), model(x), atol=1e-5)
        for parameter in model.parameters():
            parameter.mul_(1.2)
        for x in frames:
            assert torch.allclose(compiled(x), model(x), atol=1e-5)


def test_random_numbers_are_drawn_anew():
    model = Wrapped(lambda m, x: m.body(x))
    plain = nn.Sequential(Body()).eval()
    plain.forward = lambda x: Body.forward(plain[0], x) + torch.rand(1)
    for noisy in (plain, Wrapped(lambda m, x: m.body(x) + torch.rand(()))):
        compiled = deltafx.compile(noisy, threshold=0)
        x = torch.randn(1, 3, 6, 6)
        assert not torch.equal(compiled(x), compiled(x))
    assert model is not None


def test_a_scripted_part_runs_as_it_is():
    model = Wrapped(lambda m, x: m.tail(m.body(x)), torch.jit.script(Body().eval()))
    compiled = deltafx.compile(model, threshold=0)
    for x in clip(1, 3, 9, 9):
        with torch.no_grad():
            assert torch.allclose(compiled(x), model(x), atol=1e-5)
    assert list(compiled.regions) == ["tail"]
