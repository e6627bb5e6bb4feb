"""The operators under fake tensors, torch.export and torch.compile."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import deltafx


def state(device="cpu"):
    """An accumulator of 4 channels with its mask and counters, before the first frame."""
    return (
        torch.full((1, 4, 6, 7), float("nan"), device=device).to(memory_format=torch.channels_last),
        torch.zeros(1, 6, 7, dtype=torch.bool, device=device),
        torch.zeros(2, dtype=torch.int64, device=device),
    )


class Relu(nn.Module):
    """One delta op, a relu by itself, that writes into its arguments and a dense op behind it."""

    def forward(self, acc, mask, counts, x, x_mask):
        torch.ops.deltafx.affine(
            acc, mask, counts, x, x_mask, None, None, "relu", [], None, None, None, "rms"
        )
        return acc * 2


def inputs():
    x = torch.randn(1, 4, 6, 7).to(memory_format=torch.channels_last)
    return *state(), x, torch.ones(1, 6, 7, dtype=torch.bool)


def check(run):
    """`run` does what the eager operator does, to its result and to its arguments."""
    args = inputs()
    ours, theirs = [a.clone() for a in args], [a.clone() for a in args]
    expected = Relu()(*theirs)
    assert torch.equal(expected, 2 * args[3].relu())
    assert torch.equal(run(*ours), expected)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    assert ours[2].tolist() == [42, 42]


def test_fake_tensors():
    with FakeTensorMode() as mode:
        args = [mode.from_tensor(a) for a in inputs()]
        out = Relu()(*args)
    assert (out.shape, out.dtype, out.stride()) == ((1, 4, 6, 7), torch.float32, (168, 1, 28, 4))


def test_export():
    exported = torch.export.export(Relu(), inputs())
    targets = {str(n.target) for n in exported.graph.nodes}
    assert any("deltafx.affine" in t for t in targets)
    check(exported.module())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_without_graph_breaks(backend):
    torch._dynamo.reset()
    check(torch.compile(Relu(), fullgraph=True, backend=backend))


def test_export_of_a_compiled_model():
    """The emitted graph, with its state as buffers, is an ordinary module to torch.export."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)).eval()
    x = torch.randn(1, 3, 8, 8)
    compiled = deltafx.compile(model, threshold=0, example_inputs=(x,))
    frame = nn.Module()
    for name, tensor in compiled.named_buffers(recurse=False):
        if any(n.op == "get_attr" and n.target == name for n in compiled.graph.nodes):
            frame.register_buffer(name, tensor.clone())
    module = torch.fx.GraphModule(frame, compiled.graph)
    with torch.no_grad():
        exported = torch.export.export(module, (x,))
        expected = model(x)
        (out,) = exported.module()(x)
    assert torch.allclose(out, expected, atol=1e-6)
