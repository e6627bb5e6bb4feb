"""normalize_graph, functionalize_inplace, drop_identities, split_into_slices."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import deltafx
from deltafx.passes.functionalize_inplace import functionalize_inplace
from deltafx.passes.normalize_graph import drop_identities, split_into_slices
from deltafx.verify import verify
from tests.exactness import exact_over
from tests.passes.graphs import Tiny, TinyPair, assert_same, calls, node, normalized, run, whole


def check(model, *xs):
    """The normalized graph, which computes what the model computes and leaves its input alone."""
    kept = [x.clone() for x in xs]
    with torch.no_grad():
        out = model(*[x.clone() for x in xs])
    expected = list(out) if isinstance(out, (list, tuple)) else [out]
    gm = normalized(model, *xs)
    verify(gm.graph, "normalized")
    assert_same(run(gm, *xs), expected)
    assert_same(list(xs), kept)
    for rewrite in (functionalize_inplace, drop_identities, split_into_slices):
        code = str(gm.graph)
        assert rewrite(gm) == 0
        assert str(gm.graph) == code
    return gm


def mutated(gm):
    return [n.name for n in gm.graph.nodes if n.meta.get("mutated")]


def test_modules_and_functions_become_one_spelling():
    net = Tiny(
        lambda m, x: F.relu(m.b(m.a(x))).relu() + torch.relu(x),
        a=nn.Conv2d(2, 2, 3, padding=1), b=nn.ReLU(),
    )  # fmt: skip
    gm = check(net, whole(1, 2, 5, 5))
    assert set(calls(gm)) == {"conv2d", "relu", "add"}


def test_nodes_are_named_after_their_modules():
    net = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Sequential(nn.ReLU(), nn.Conv2d(2, 2, 1))).eval()
    gm = normalized(net, whole(1, 2, 4, 4))
    names = [n.name for n in gm.graph.nodes if n.op == "call_function"]
    assert names == ["m_0", "m_1_0", "m_1_1"]


def test_a_module_called_twice_gives_two_nodes():
    net = Tiny(lambda m, x: m.a(m.a(x)), a=nn.Conv2d(2, 2, 1))
    gm = check(net, whole(1, 2, 4, 4))
    names = [n.name for n in gm.graph.nodes if n.op == "call_function"]
    assert names == ["a", "a_1"]
    weights = [n.args[1].target for n in gm.graph.nodes if n.op == "call_function"]
    assert weights == ["a.weight", "a.weight"]


def test_shapes_and_values_are_known():
    gm = normalized(Tiny(lambda m, x: x.mean((2, 3))), whole(2, 3, 4, 5))
    assert tuple(node(gm, "mean").meta["val"].shape) == (2, 3)


def test_constants_come_along():
    offset = whole(1, 2, 1, 1)
    gm = check(Tiny(lambda m, x: x + offset), whole(1, 2, 4, 4))
    assert calls(gm) == ["add"]


def test_grad_modes_play_no_part():
    def f(m, x):
        with torch.no_grad():
            return x + 1

    assert calls(check(Tiny(f), whole(1, 2, 4, 4))) == ["add"]


def test_structures_are_flattened_and_can_be_built_again():
    net = Tiny(lambda m, x: {"a": x + 1, "b": [x - 1, (x * 2,)]})
    x = whole(1, 2, 4, 4)
    gm = normalized(net, x)
    flat = run(gm, x)
    built = torch.utils._pytree.tree_unflatten(flat, gm.meta["out_spec"])
    assert torch.equal(built["b"][1][0], x * 2)


@pytest.mark.parametrize(
    "f",
    [
        lambda m, x: F.relu(x + 1, inplace=True),
        lambda m, x: (x + 1).add_(2).mul_(3).clamp_(0, 5),
        lambda m, x: F.hardswish(m.a(x), inplace=True),
    ],
    ids=["relu_", "chain", "after a module"],
)
def test_in_place_calls_become_functional(f):
    gm = check(Tiny(f, a=nn.Conv2d(2, 2, 1)), whole(1, 2, 4, 4))
    assert mutated(gm) == []


@pytest.mark.parametrize(
    "f",
    [
        lambda m, x: (x.relu_(), x + 1),
        lambda m, x: (lambda y: (y.relu_(), y * 2))(x - 1),
    ],
    ids=["the input", "an intermediate"],
)
def test_later_readers_see_the_write(f):
    gm = check(Tiny(f), whole(1, 2, 4, 4))
    assert mutated(gm) == []


def write_a_channel(m, x):
    y = x + 1
    y[:, 0] = 7
    return y * 2


def add_to_a_view(m, x):
    y = x + 1
    part = y[:, :1]
    part.add_(5)
    return y, part


def write_through_reshape(m, x):
    y = x * 2
    y.view(-1)[3:7].zero_()
    return y


def read_before_and_after(m, x):
    y = x + 1
    old = y * 1
    view = y[:, 1:]
    y.mul_(3)
    return old + y, view


def write_into_the_input(m, x):
    x[:, 0] = 3
    return x + 1


def write_into_a_copy(m, x):
    y = x.clone()
    y[:, 0] = 3
    return y + x


@pytest.mark.parametrize(
    "f",
    [
        write_a_channel, add_to_a_view, write_through_reshape, read_before_and_after,
        write_into_the_input, write_into_a_copy,
    ],
)  # fmt: skip
def test_writes_that_other_views_see_are_kept_on_a_copy(f):
    x = whole(2, 3, 4, 4)
    gm = normalized(Tiny(f), x)
    verify(gm.graph, "normalized")
    kept = x.clone()
    with torch.no_grad():
        out = Tiny(f)(x.clone())
    assert_same(run(gm, x), list(out) if isinstance(out, tuple) else [out])
    assert torch.equal(x, kept), "the graph wrote into its input"
    assert mutated(gm)
    code = str(gm.graph)
    assert functionalize_inplace(gm) == 0
    assert str(gm.graph) == code, "a second run changed the graph"


@pytest.mark.parametrize(
    ("f", "dropped"),
    [
        (lambda m, x: m.drop(x) + 1, True),
        (lambda m, x: x.clone() + 1, True),
        (lambda m, x: x.detach().contiguous() + 1, True),
        (lambda m, x: x.float() + 1, True),
        (lambda m, x: x.to(torch.float64) + 1, False),
        (lambda m, x: x.half() + 1, False),
    ],
    ids=["dropout", "clone", "contiguous", "float", "double", "half"],
)
def test_identities_are_dropped_and_conversions_are_not(f, dropped):
    gm = check(Tiny(f, drop=nn.Dropout(0.5)), whole(1, 2, 4, 4))
    assert (calls(gm) == ["add"]) is dropped


def test_dropout_that_stays_on_is_kept():
    gm = normalized(Tiny(lambda m, x: F.dropout(x, 0.5, training=True)), whole(1, 2, 4, 4))
    assert calls(gm) == ["dropout"]


@pytest.mark.parametrize(
    "f",
    [
        lambda m, x: x.chunk(2, 1),
        lambda m, x: x.chunk(2, -3)[1],
        lambda m, x: torch.split(x, [1, 3], dim=1)[1] * 2,
        lambda m, x: x.split(3, 1),
        lambda m, x: x.chunk(3, 2)[-1] + 1,
    ],
    ids=["chunk", "negative", "sizes", "split", "rows"],
)
def test_chunks_become_slices(f):
    gm = check(Tiny(f), whole(1, 4, 5, 5))
    assert {"chunk", "split", "split_with_sizes", "getitem"}.isdisjoint(calls(gm))
    assert "slice" in calls(gm)


def test_unbind_is_no_split():
    gm = normalized(Tiny(lambda m, x: x.unbind(1)[0] + 1), whole(1, 4, 5, 5))
    assert "slice" not in calls(gm)


def test_two_inputs_and_a_batch_of_integers():
    net = TinyPair(lambda m, x, y: m.a(x) + y.float(), a=nn.Conv2d(2, 2, 1))
    check(net, whole(1, 2, 4, 4), torch.randint(0, 255, (1, 2, 4, 4), dtype=torch.uint8))


class Scaled(nn.Module):
    """As models from ONNX do: the factor of a resize is read out of a buffer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 1)
        self.register_buffer("factors", torch.tensor([1.0, 1.0, 2.0, 3.0]))

    def forward(self, x):
        return F.interpolate(self.conv(x), scale_factor=self.factors.tolist()[2:])


def test_numbers_are_read_out_of_buffers():
    model = Scaled().eval()
    compiled = deltafx.compile(model, threshold=0)
    frames = [torch.randn(1, 2, 4, 4) for _ in range(3)]
    exact_over(model, compiled, frames)
    assert not [n for n in compiled.explain() if n.kind == "dense"]
    model.factors[2] = 4
    exact_over(model, compiled, frames)
    assert tuple(compiled(frames[0]).shape) == (1, 3, 16, 12)
