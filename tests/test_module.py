"""DeltaModule: calls, errors, outputs, and what it tells of itself."""

import pytest
import torch
from torch import nn

import deltafx
from deltafx.errors import InvalidInputError, NotCompiledError, UnknownNodeError
from tests.exactness import exact_over
from tests.small_net import Net, clip, follows

pytestmark = pytest.mark.usefixtures("on_device")


def test_a_model_that_fx_cannot_trace():
    model = Net(lambda m, x: torch.stack([m.b(m.a(row[None])) for row in x]))
    compiled = follows(model, 2, 3, 9, 9)
    explanation = compiled.explain()
    assert explanation.front_end == "python"
    assert "TraceError" in explanation.note
    assert "TraceError" in str(explanation)


class Normalized(nn.Module):
    """Takes uint8 frames, or floats, and normalises them itself."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).reshape(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.2, 0.3, 0.2]))
        self.conv = nn.Conv2d(3, 4, 3)
        self.eval()

    def forward(self, x):
        x = x.to(self.conv.weight.dtype) / 255
        return self.conv((x - self.mean) / self.std.view(1, 3, 1, 1))


def test_a_model_that_normalises_its_input():
    model = Normalized()
    compiled = follows(model, 1, 3, 8, 9)
    dense = [n.name for n in compiled.explain() if n.kind == "dense"]
    assert dense == [], "normalising is done where the frame changed"


def test_integer_frames():
    model = Normalized()
    compiled = deltafx.compile(model, threshold=0)
    frames = [torch.randint(0, 256, (2, 3, 8, 9), dtype=torch.uint8) for _ in range(3)]
    exact_over(model, compiled, [frames[0], frames[0], *frames])


def test_buffers_of_the_model_follow_a_conversion():
    model = Normalized()
    compiled = deltafx.compile(model, threshold=0)
    compiled(torch.rand(1, 3, 8, 9))
    for convert in (lambda: compiled.to(torch.bfloat16), lambda: model.to(torch.float32)):
        convert()
        dtype = model.mean.dtype
        assert model.conv.weight.dtype == dtype
        exact_over(model, compiled, [f.to(dtype) for f in clip(1, 3, 8, 9)])


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_any_number_of_channels(channels):
    follows(Net(lambda m, x: m.b(m.a(x)).relu(), channels), 1, channels, 7, 9)


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (3, 3, 1, 7), (0, 3, 4, 4)])
def test_odd_shapes(shape):
    model = Net(lambda m, x: m.b(m.a(x)).relu())
    compiled = deltafx.compile(model, threshold=0)
    for _ in range(2):
        x = torch.randn(shape)
        assert torch.allclose(compiled(x), model(x), atol=1e-5)


@pytest.mark.parametrize("layout", ["channels_last", "strided", "expanded"])
def test_any_memory_layout(layout):
    model = Net(lambda m, x: m.b(m.a(x)).relu())

    def laid(x):
        if layout == "channels_last":
            return x.to(memory_format=torch.channels_last)
        return x[:, :, ::2, 1:] if layout == "strided" else x[:, :1].expand(-1, 3, -1, -1)

    compiled = deltafx.compile(model, threshold=0)
    exact_over(model, compiled, [laid(f) for f in clip(1, 3, 12, 12)])


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.eval()

    def forward(self, x, mask=None, *, scale=1.0):
        y = self.conv(x) * scale
        return y if mask is None else y * mask


def test_keyword_arguments():
    model = TwoInputs()
    compiled = deltafx.compile(model, threshold=0)
    x, mask = torch.randn(1, 3, 8, 8), torch.rand(1, 1, 8, 8)
    for kwargs in ({}, {"mask": mask}, {"scale": 3.0}, {"mask": mask, "scale": 2.0}, {}):
        for frame in (x, x + 1):
            assert torch.allclose(compiled(frame, **kwargs), model(frame, **kwargs), atol=1e-5)
    assert torch.allclose(compiled(mask=mask, x=x), model(x, mask), atol=1e-5)


def test_a_dictionary_of_frames():
    class Dictionary(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, frames):
            return {k: self.conv(v) for k, v in frames.items()}

    model = Dictionary().eval()
    compiled = deltafx.compile(model, threshold=0)
    for _ in range(3):
        frames = {"left": torch.randn(1, 3, 5, 6), "right": torch.randn(2, 3, 4, 4)}
        exact_over(model, compiled, [(frames,)])


NO_ARGUMENTS = [
    ((), {}, "missing a required argument: 'x'"),
    ((torch.randn(1, 3, 8, 8), 1, 2), {}, "too many positional arguments"),
    ((torch.randn(1, 3, 8, 8),), {"size": 3}, "unexpected keyword argument 'size'"),
]


@pytest.mark.parametrize(("args", "kwargs", "message"), NO_ARGUMENTS)
def test_arguments_that_forward_does_not_have(args, kwargs, message):
    model = Net(lambda m, x: m.b(m.a(x)))
    compiled = deltafx.compile(model, threshold=0)
    exact_over(model, compiled, clip(1, 3, 8, 8))
    with pytest.raises(InvalidInputError, match=message):
        compiled(*args, **kwargs)
    exact_over(model, compiled, clip(1, 3, 8, 8))


BAD = [
    torch.randn(1, 4, 8, 8), torch.randn(1, 3, 8, 8).double(), torch.randint(0, 9, (1, 3, 8, 8)),
    "frame.png", None,
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=["channels", "float64", "integers", "text", "none"])
@pytest.mark.parametrize("front_end", ["fx", "python", "parts"])
def test_what_the_model_raises_comes_through(bad, front_end):
    def forward(m, x):
        if front_end == "fx":
            return m.b(m.a(x))
        rows = [m.b(m.a(r[None])) for r in x]
        return [r for r in rows if front_end == "python" or float(r.sum()) == float(r.sum())]

    model = Net(forward)
    compiled = deltafx.compile(model, threshold=0)
    exact_over(model, compiled, clip(1, 3, 8, 8))
    assert compiled.explain().front_end == front_end
    with pytest.raises(Exception) as own:  # noqa: PT011  whatever torch says
        model(bad)
    with pytest.raises(type(own.value)) as ours:
        compiled(bad)
    assert str(ours.value) == str(own.value)
    last = own.traceback[-1].frame.code.raw
    assert any(entry.frame.code.raw is last for entry in ours.traceback)
    assert ours.value.__cause__ is ours.value.__context__ is None
    exact_over(model, compiled, clip(1, 3, 8, 8))


class Picky(nn.Module):
    """Raises an error of its own, on shapes or on values."""

    class Error(Exception):
        pass

    def __init__(self, on):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.on = on
        self.eval()

    def forward(self, x):
        y = self.conv(x)
        if (x.shape[2] if self.on == "shapes" else float(x.max())) > 100:
            raise self.Error(x)
        return y


@pytest.mark.parametrize("on", ["shapes", "values"])
def test_an_error_of_the_model_is_its_own(on):
    model = Picky(on)
    compiled = deltafx.compile(model, threshold=0)
    good, bad = torch.rand(1, 3, 20, 20), 200 * torch.rand(1, 3, 120, 20)
    for _ in range(2):
        with pytest.raises(Picky.Error) as error:
            compiled(bad)
        assert error.traceback[-1].frame.code.raw is Picky.forward.__code__
        assert error.value.__cause__ is error.value.__context__ is None
        exact_over(model, compiled, [good, good])


def test_within_what_torch_compiles():
    """Dynamo leaves it alone, and takes what is around it."""
    compiled = deltafx.compile(Net(lambda m, x: m.b(m.a(x))), threshold=0)
    around = torch.nn.Sequential(compiled, nn.ReLU())
    frames = clip(1, 3, 8, 8)
    for outer in (around, compiled):
        optimized = torch.compile(outer, backend="eager")
        for x in (*frames, frames[-1]):
            expected = compiled.model(x).relu() if outer is around else compiled.model(x)
            assert torch.allclose(optimized(x), expected, atol=1e-5)
        assert compiled.stats().flop_fraction == 0
    torch.compiler.reset()


def test_what_is_compiled_already():
    model = Net(lambda m, x: m.b(m.a(x)))
    compiled = deltafx.compile(model)
    with pytest.raises(InvalidInputError, match="compiled already: give compile"):
        deltafx.compile(compiled)
    with pytest.raises(InvalidInputError, match=r"compiled already \(at '0'\)"):
        deltafx.compile(nn.Sequential(compiled).eval())
    assert deltafx.compile(torch.compile(model, backend="eager")).model is model


def test_what_is_known_only_after_compiling():
    compiled = deltafx.compile(Net(lambda m, x: m.a(x)))
    for ask in (
        compiled.stats, compiled.explain, compiled.state_bytes, compiled.state_tensors,
        compiled.update_mask, lambda: compiled.accumulator("a"),
    ):  # fmt: skip
        with pytest.raises(NotCompiledError, match="call the model with a frame"):
            ask()


def test_stats_count_the_sites_that_changed():
    model = Net(lambda m, x: m.b(m.a(x)))
    compiled = deltafx.compile(model, threshold=0, dense_above=1)
    x = torch.randn(2, 3, 10, 12)
    compiled(x)
    stats = compiled.stats()
    dense = 2 * 120 * (3 * 9 * 6 + 6 * 6)
    assert (stats.macs, stats.dense_macs, stats.flop_fraction, stats.density) == (
        dense,
        dense,
        1,
        1,
    )
    compiled(x)
    assert (compiled.stats().macs, compiled.stats().density) == (0, 0)
    x[1, 2, 4, 5] += 1
    compiled(x)
    nodes = compiled.stats().nodes
    assert (nodes["input_0_encoded"].active, nodes["a"].candidates, nodes["b"].active) == (1, 9, 9)
    assert nodes["a"].macs == 9 * 3 * 9 * 6
    assert nodes["b"].density == 9 / 240
    assert nodes["b"].active_density == 9 / 240
    assert compiled.stats().flop_fraction == 9 / 240


def test_masks_and_accumulators_can_be_read():
    model = Net(lambda m, x: m.b(m.a(x)))
    compiled = deltafx.compile(model, threshold=0, dense_above=1)
    x = torch.randn(2, 3, 10, 12)
    compiled(x)
    y = x.clone()
    y[0, :, 0, 0] += 1
    out = compiled(y)
    mask = compiled.update_mask()
    assert mask.dtype == torch.bool
    assert mask.nonzero().tolist() == [[0, 0, 0]]
    assert compiled.update_mask("b").sum() == 4
    assert torch.equal(compiled.accumulator("b"), out)
    assert torch.equal(compiled.accumulator("input_0_encoded"), y)
    compiled.accumulator("b").zero_()
    assert torch.equal(compiled(y), out)
    for ask in (compiled.update_mask, compiled.accumulator):
        with pytest.raises(UnknownNodeError, match=r"no delta node 'c'; see explain\(\)"):
            ask("c")


def test_explain_tells_every_node():
    model = Net(lambda m, x: m.b(m.a(x).sign())[:, 1:])
    compiled = deltafx.compile(model, example_inputs=(torch.randn(1, 3, 8, 8),))
    kinds = {n.name: (n.kind, n.op) for n in compiled.explain()}
    assert kinds["a"] == ("delta", "conv2d")
    assert kinds["sign"][0] == "dense"
    assert kinds["slice_1"][0] == "view" if "slice_1" in kinds else True
    assert compiled.explain().delta_share == 1.0
    table = str(compiled.explain())
    for text in ("sign", "there is no delta op for it", "rewrites:", "raise_ops 3"):
        assert text in table
    assert len(compiled.explain()) == len(kinds)
    assert compiled.explain()[0].name == "input_0_encoded"


def test_modes_of_autograd_in_any_order():
    model = Net(lambda m, x: m.b(m.a(x)).relu())
    compiled = deltafx.compile(model, threshold=0)
    x = torch.randn(1, 3, 8, 8)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode):
        for size in (8, 9):
            with mode():
                frame = torch.randn(1, 3, size, size)
                out = compiled(frame)
                compiled.reset(0)
                compiled.thresholds.set_all(0)
            assert not out.requires_grad
            assert torch.allclose(out, model(frame.clone()), atol=1e-5)
    assert torch.allclose(compiled(x.requires_grad_()), model(x), atol=1e-5)


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model = Net(lambda m, x: m.b(m.a(x)).relu())
    compiled = deltafx.compile(model, threshold=0)
    x = torch.randn(1, 3, 8, 8)
    with torch.inference_mode():
        for _ in range(2):
            assert torch.allclose(compiled(x), model(x), atol=1e-5)


def test_buffers_made_in_inference_mode():
    """They have no version that would tell whether the model writes into them."""
    with torch.inference_mode():
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
        compiled = deltafx.compile(model, threshold=0)
        x = torch.randn(1, 3, 8, 8)
        assert torch.allclose(compiled(x), model(x), atol=1e-5)
        assert compiled.explain().front_end == "fx"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_dtypes_without_operators_run_dense(dtype, device):
    if device.type == "cuda" and dtype == torch.float16:
        pytest.skip("CUDA has operators for it")
    model = Net(lambda m, x: m.b(m.a(x).relu()).mean((2, 3))).to(dtype)
    compiled = deltafx.compile(model)
    for frame in clip(2, 3, 8, 8):
        assert torch.equal(compiled(frame.to(dtype)), model(frame.to(dtype)))
    assert {n.kind for n in compiled.explain()} == {"dense"}
    assert str(dtype).split(".")[1] in str(compiled.explain())


def test_bf16():
    model = Net(lambda m, x: m.b(m.a(x).relu()))
    model.to(torch.bfloat16)
    compiled = deltafx.compile(model, threshold=0)
    exact_over(model, compiled, [f.bfloat16() for f in clip(2, 3, 8, 8)])


@pytest.mark.parametrize(("channels", "outputs", "groups"), [(12, 6, 3), (4, 8, 4), (6, 6, 2)])
def test_a_nan_stays_in_its_group(channels, outputs, groups):
    model = nn.Conv2d(channels, outputs, 3, padding=1, groups=groups).eval()
    compiled = deltafx.compile(model, threshold=0)
    frame = torch.randn(1, channels, 9, 9)
    frame[0, 0, 4, 4] = float("nan")
    assert torch.equal(compiled(frame).isnan(), model(frame).isnan())
