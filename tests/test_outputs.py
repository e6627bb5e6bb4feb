"""What a compiled model returns: the model's structures, in tensors that are safe to keep."""

import dataclasses
from collections import OrderedDict, defaultdict, namedtuple

import pytest
import torch
import torch.nn.functional as F

import deltafx
from tests.exactness import exact_over
from tests.small_net import Net, clip, follows

pytestmark = pytest.mark.usefixtures("on_device")

Pair = namedtuple("Pair", "left right")


@dataclasses.dataclass(frozen=True)
class Found:
    maps: list
    best: torch.Tensor
    name: str = "none"

    def __post_init__(self):
        assert self.name


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: {"out": m.a(x), "more": [m.b(m.a(x)), (x, None, 3)]},
        lambda m, x: (m.a(x),),
        lambda m, x: OrderedDict(z=m.a(x), a=[x.relu(), OrderedDict(b=x)]),
        lambda m, x: defaultdict(list, z=m.a(x), a=x.relu()),
        lambda m, x: Pair(m.a(x), [m.b(m.a(x))]),
        lambda m, x: {"size": x.shape, "best": m.a(x).max(1)},
        lambda m, x: [],
    ],
    ids=["nested", "tuple", "ordered", "default", "named tuple", "torch's", "nothing"],
)
def test_structures_of_outputs(function):
    model, x = Net(function), torch.randn(2, 3, 9, 10)
    compiled = deltafx.compile(model, threshold=0)
    expected, got = model(x), compiled(x)
    flat, spec = torch.utils._pytree.tree_flatten(got)
    assert spec == torch.utils._pytree.tree_structure(expected)
    assert type(got) is type(expected)
    if flat:
        follows(model, 2, 3, 9, 10)


@pytest.mark.parametrize("front_end", ["fx", "python"])
def test_a_dataclass_comes_back(front_end):
    def function(m, x):
        y = m.a(x)
        name = "fx" if front_end == "fx" else f"python, {len(list(y))}"
        return {"found": [Found([y, (x, m.b(y))], y.relu(), name)]}

    model = Net(function)
    compiled = deltafx.compile(model, threshold=0)
    for x in clip(2, 3, 9, 10):
        expected, got = model(x)["found"][0], compiled(x)["found"][0]
        assert type(got) is Found
        assert got.name == expected.name
        assert torch.allclose(got.best, expected.best, atol=1e-5)
        assert torch.equal(got.maps[1][0], x)
        assert torch.allclose(got.maps[1][1], expected.maps[1][1], atol=1e-5)
    assert compiled.explain().front_end == front_end


@dataclasses.dataclass
class Output(OrderedDict):
    """A dictionary as well, as some libraries have it."""

    best: torch.Tensor = None

    def __post_init__(self):
        self["best"] = self.best


@dataclasses.dataclass
class Derived:
    """More than its fields."""

    best: torch.Tensor

    def __post_init__(self):
        self.more = self.best + 1


@pytest.mark.parametrize("kind", [Output, Derived])
def test_a_dataclass_that_holds_more_than_its_fields(kind):
    model = Net(lambda m, x: kind(m.b(m.a(x))))
    compiled = deltafx.compile(model, threshold=0)
    for x in clip(2, 3, 9, 10):
        expected, got = model(x), compiled(x)
        more, ours = (r["best"] if kind is Output else r.more for r in (expected, got))
        torch.testing.assert_close((got.best, ours), (expected.best, more), atol=1e-5, rtol=1e-4)
    assert f"returns a {kind.__name__}" in compiled.explain().note


class Boxes:
    def __init__(self, maps):
        self.maps = maps


def test_an_object_of_the_models_own_comes_back():
    model = Net(lambda m, x: Boxes(m.b(m.a(x))))
    compiled = deltafx.compile(model, threshold=0)
    for x in clip(2, 3, 9, 10):
        assert torch.allclose(compiled(x).maps, model(x).maps, atol=1e-5)
    assert "returns a Boxes" in compiled.explain().note
    assert compiled.explain().delta_share == 1.0


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.a(x),
        lambda m, x: (m.a(x), m.b(m.a(x))),
        lambda m, x: m.a(x)[:, 2:4],
        lambda m, x: m.a(x).flatten(1),
        lambda m, x: m.a(x).permute(0, 2, 3, 1),
        lambda m, x: x,
        lambda m, x: x[:, :1],
        lambda m, x: [x + 1, x],
        lambda m, x: m.a(x).sum(1),
        lambda m, x: torch.cat([m.a(x), x], 1).chunk(2, 1),
    ],
)
def test_outputs_are_safe_to_keep(function):
    model = Net(function)
    compiled = deltafx.compile(model, threshold=0)
    kept, copies = [], []
    frame = torch.empty(1, 3, 8, 8)
    for picture in clip(1, 3, 8, 8):
        frame.copy_(picture)  # a caller that decodes into one buffer
        flat = torch.utils._pytree.tree_leaves(compiled(frame))
        kept += flat
        copies += [t.clone() for t in flat]
    frame.zero_()
    compiled.reset()
    for t, copy in zip(kept, copies, strict=True):
        assert torch.equal(t, copy)
    with torch.no_grad():
        for t in kept:  # nor does writing into them reach the state
            t.fill_(7)
    exact_over(model, compiled, clip(1, 3, 8, 8))


def relu_in_place(m, x):
    return m.b(F.relu_(m.a(x)))


def add_to_view(m, x):
    y = m.a(x)
    y[:, :2].add_(1)
    return m.b(y)


def write_channel(m, x):
    y = x * 2
    y[:, 0] = x[:, 1]
    return m.a(y)


def write_frame(m, x):
    x[:, 0] = 0.5
    return m.a(x)


def twice(m, x):
    y = m.b(m.a(x)).relu_()
    return m.b(y) + m.b(m.b(y)), y


def accumulate(m, x):
    y = m.a(x)
    z = m.b(y)
    y += z
    return y, z


@pytest.mark.parametrize(
    "function", [relu_in_place, add_to_view, write_channel, write_frame, twice, accumulate]
)
def test_models_that_write_in_place_or_share_modules(function):
    model = Net(function)
    compiled = deltafx.compile(model, threshold=0)
    for frame in clip(2, 3, 9, 8):
        given = frame.clone()
        out, expected = compiled(given), model(frame.clone())
        assert torch.equal(given, frame), "the caller's frame was written into"
        for o, e in zip(
            torch.utils._pytree.tree_leaves(out),
            torch.utils._pytree.tree_leaves(expected),
            strict=True,
        ):
            assert torch.allclose(o, e, atol=1e-5, rtol=1e-5)
