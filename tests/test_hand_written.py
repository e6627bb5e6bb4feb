"""Modules as users write them, through `deltafx.compile` and through `torch.compile`."""

from __future__ import annotations

import functools
import traceback
from collections import OrderedDict, defaultdict, namedtuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils import _pytree as pytree

import deltafx
from tests.exactness import Oracle
from tests.small_net import Net, clip

Pair = namedtuple("Pair", "left right")

ENTRANCES = {
    "compile": lambda model, x: deltafx.compile(model, threshold=0),
    "ahead": lambda model, x: deltafx.compile(model, threshold=0, example_inputs=x),
    "torch.compile": lambda model, x: torch.compile(
        model, backend="deltafx", options={"threshold": 0}
    ),
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(params=ENTRANCES)
def entrance(request):
    return ENTRANCES[request.param]


def agrees(model, compiled, arguments):
    """Over a clip: as exact as the model, in the same structure with the same constants."""
    oracle = Oracle(model)
    for args in arguments:
        with torch.no_grad():
            got, expected = compiled(*args), model(*args)
        oracle.compare(got, *args)
        ours, form = pytree.tree_flatten(got)
        theirs, wanted = pytree.tree_flatten(expected)
        assert form == wanted
        assert type(got) is type(expected)
        for o, t in zip(ours, theirs, strict=True):
            assert type(o) is type(t)
            assert isinstance(t, torch.Tensor) or o == t
    oracle.check()


def functional(m, x):
    y = F.conv2d(F.pad(x, (1, 1, 1, 1)), m.a.weight, m.a.bias)
    y = F.leaky_relu(y, 0.1)
    return F.interpolate(F.conv2d(F.avg_pool2d(y, 2), m.b.weight), scale_factor=2.0)


def loop(m, x):
    y, seen = m.a(x), []
    for i in range(3):
        y = m.b(y).relu() if i % 2 else m.b(y).tanh()
        seen.append(y)
    return torch.cat(seen, 1)


def while_loop(m, x):
    y = m.a(x)
    while y.shape[-1] > 4:
        y = F.max_pool2d(m.b(y), 2)
    return y


def nothing_and_more(m, x):
    return m.a(x), None, 3, "text", [], {}


def reading_a_value(m, x):
    y = m.a(x)
    return m.b(y) * y.amax().item()


FUNCTIONS = {
    "functional": functional,
    "loop": loop,
    "while": while_loop,
    "shared modules": lambda m, x: m.b(m.b(m.a(x)).relu()) + m.b(m.a(x.flip(3))),
    "dictionary": lambda m, x: {"b": m.b(m.a(x)), "a": {"z": m.a(x), "none": None}},
    "ordered": lambda m, x: OrderedDict(z=m.a(x), a=OrderedDict(b=m.b(m.a(x)))),
    "ordered within": lambda m, x: [{"z": OrderedDict(z=m.a(x))}, (OrderedDict(),)],
    "default": lambda m, x: defaultdict(list, z=m.a(x)),
    "tuple": lambda m, x: (m.a(x), (m.b(m.a(x)),)),
    "named tuple": lambda m, x: Pair(m.a(x), [Pair(m.b(m.a(x)), None)]),
    "nothing and more": nothing_and_more,
    "size": lambda m, x: {"map": m.a(x), "size": x.shape, "height": x.shape[2]},
    "a value": reading_a_value,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_modules(name, entrance):
    model = Net(FUNCTIONS[name])
    frames = [(x,) for x in clip(2, 3, 9, 10)]
    agrees(model, entrance(model, frames[0]), frames)


class Inputs(nn.Module):
    """A function of anything, with a convolution."""

    def __init__(self, function):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.function = function
        self.eval()

    def forward(self, *args, **kwargs):
        return self.function(self.conv, *args, **kwargs)


INPUTS = {
    "two": (lambda c, x, y: c(x) + c(y), lambda x: (x, x.flip(3))),
    "of two sizes": (lambda c, x, y: (c(x), c(y)), lambda x: (x, F.avg_pool2d(x, 2))),
    "list": (lambda c, xs: [c(x) for x in xs], lambda x: ([x, x + 1],)),
    "dictionary": (
        lambda c, d: {k: c(v) for k, v in d.items()}, lambda x: ({"left": x, "right": x + 1},)
    ),
    "ordered": (
        lambda c, d: OrderedDict((k, c(v)) for k, v in d.items()),
        lambda x: (OrderedDict(right=x, left=x + 1),),
    ),
    "named tuple": (lambda c, p: Pair(c(p.right), p.left.relu()), lambda x: (Pair(x, x + 1),)),
    "none": (lambda c, x, y: c(x) if y is None else c(x) + y, lambda x: (x, None)),
    "number": (lambda c, x, s: c(x) * s, lambda x: (x, 0.5)),
    "scalar tensor": (lambda c, x, s: c(x) * s, lambda x: (x, x.mean())),
}  # fmt: skip


@pytest.mark.parametrize("name", INPUTS)
def test_inputs(name, entrance):
    function, arguments = INPUTS[name]
    model = Inputs(function)
    frames = [arguments(x) for x in clip(2, 3, 8, 10)]
    agrees(model, entrance(model, frames[0]), frames)


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.eval()

    def forward(self, x, mask=None, *, scale=1.0, **more):
        y = self.conv(x) * scale
        y = y if mask is None else y * mask
        return {"y": y} | {name: self.conv(t) for name, t in more.items()}


def test_keywords(entrance):
    model = Keywords()
    frames = clip(1, 3, 9, 9)
    compiled = entrance(model, (frames[0],))
    mask = torch.rand(1, 1, 9, 9)
    for x in (*frames, *frames):
        for kwargs in ({}, {"mask": mask}, {"scale": 2.0}, {"left": x, "right": x.flip(3)}):
            with torch.no_grad():
                got, expected = compiled(x, **kwargs), model(x, **kwargs)
            assert list(got) == list(expected)
            for name, tensor in expected.items():
                torch.testing.assert_close(got[name], tensor, atol=1e-5, rtol=1e-4)


class Buffers(nn.Module):
    """Tensors of every kind that a module may hold, and containers of modules and parameters."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c, 4, 3, padding=1) for c in (3, 4, 4))
        self.heads = nn.ModuleDict({"x": nn.Conv2d(4, 2, 1), "y": nn.Conv2d(4, 1, 1)})
        self.scales = nn.ParameterList([torch.rand(4, 1, 1) for _ in range(3)])
        self.register_buffer("mean", torch.rand(3, 1, 1))
        self.register_buffer("spread", torch.rand(3, 1, 1) + 0.5, persistent=False)
        self.plain = torch.rand(4, 1, 1)
        self.eval()

    def forward(self, x):
        x = (x - self.mean) / self.spread
        for conv, scale in zip(self.convs, self.scales, strict=True):
            x = F.relu(conv(x)) * scale + self.plain
        return {name: head(x) for name, head in self.heads.items()}


def nest(depth=4):
    """Sequentials in Sequentials, and one module at two places."""
    shared = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True))
    inner = nn.Sequential(OrderedDict(norm=nn.BatchNorm2d(4), act=nn.Sequential(nn.SiLU())))
    for _ in range(depth):
        inner = nn.Sequential(shared, nn.Sequential(inner), nn.Identity())
    return nn.Sequential(nn.Conv2d(3, 4, 3), inner, shared).eval()


def weight_norm(norm):
    model = nn.Sequential(norm(nn.Conv2d(3, 6, 3)), nn.ReLU(), nn.Conv2d(6, 2, 1))
    return model.eval()


MODULES = {
    "buffers": Buffers,
    "nest": nest,
    "weight norm by hook": functools.partial(weight_norm, nn.utils.weight_norm),
    "weight norm": functools.partial(weight_norm, parametrizations.weight_norm),
    "spectral norm by hook": functools.partial(weight_norm, nn.utils.spectral_norm),
    "spectral norm": functools.partial(weight_norm, parametrizations.spectral_norm),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, entrance):
    model = MODULES[name]()
    frames = clip(2, 3, 9, 10)
    compiled = entrance(model, (frames[0],))
    same(model, compiled, frames)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(1.1)
    same(model, compiled, frames)


def same(model, compiled, frames):
    """Not by the oracle: what weight norm computes cannot be copied."""
    for x in frames:
        with torch.no_grad():
            got, expected = compiled(x), model(x)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_a_head_is_replaced(entrance):
    model = nn.Sequential(OrderedDict(body=nn.Conv2d(3, 4, 3), head=nn.Conv2d(4, 2, 1))).eval()
    frames = [(x,) for x in clip(1, 3, 9, 9)]
    compiled = entrance(model, frames[0])
    agrees(model, compiled, frames)
    model.head = nn.Sequential(nn.Conv2d(4, 5, 3), nn.Tanh()).eval()
    agrees(model, compiled, frames)
    model.head[1] = nn.ReLU().eval()
    agrees(model, compiled, frames)


class Failing(nn.Module):
    """Raises an error of its own, deep within, at the frames that are too bright."""

    class Error(Exception):
        pass

    def __init__(self, how):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.how = how
        self.eval()

    def forward(self, x):
        y = self.conv(x)
        return self.conv(self.check(y, x)).relu()

    def check(self, y, x):
        if self.how == "size":
            bad = x.shape[3] > 16
        elif self.how == "value":
            bad = bool(x.max() > 100)
        else:  # torch's own
            return y + torch.zeros(1, 3, 1, 8, device=y.device)
        if bad:
            raise self.Error("too bright", x.shape)
        return y


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["size", "value", "torch"])
def test_a_users_error_stays_one(how, entrance):
    """Its type, its text, its arguments, and the line that raised it in its traceback.

    What torch's own functions raise on shapes, Dynamo finds while it captures the graph, whatever
    the backend: it raises a `RuntimeError` of its own, which tells theirs and the line.
    """
    model = Failing(how)
    good, bad = torch.rand(1, 3, 8, 8), 200 * torch.rand(1, 3, 8, 20)
    compiled = entrance(model, (good,))
    for _ in range(2):
        torch.testing.assert_close(compiled(good), model(good), atol=1e-5, rtol=1e-4)
        with pytest.raises((Failing.Error, RuntimeError)) as own:
            model(bad)
        with pytest.raises(type(own.value)) as ours:
            compiled(bad)
        if how == "torch" and entrance is ENTRANCES["torch.compile"]:
            torch.compiler.reset()
            with pytest.raises(type(own.value)) as others:
                torch.compile(model, backend="eager")(bad)
            assert type(ours.value) is type(others.value)
            assert "in check" in str(ours.value)
            continue
        assert type(ours.value) is type(own.value)
        assert ours.value.args == own.value.args
        raised = [frame.name for frame in traceback.extract_tb(ours.value.__traceback__)]
        assert "check" in raised


EDGES = st.lists(
    st.tuples(st.sampled_from(["a", "b", "c"]), st.integers(0, 9), st.integers(0, 9)),
    min_size=1, max_size=6,
)  # fmt: skip


class Wired(nn.Module):
    """Calls three modules in any order on any of what there is, and returns any structure."""

    def __init__(self, edges, form):
        super().__init__()
        self.a = nn.Conv2d(4, 4, 3, padding=1)
        self.b = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.c = parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1, groups=2))
        self.edges = edges
        self.form = form
        self.eval()

    def forward(self, x, others):
        maps = [x, *others.values()]
        for name, i, j in self.edges:
            left, right = maps[i % len(maps)], maps[j % len(maps)]
            maps.append(getattr(self, name)(left) + (right if i != j else 0))
        return self.form(maps)


FORMS = {
    "dictionary": lambda maps: {f"{i}": t for i, t in enumerate(maps)},
    "ordered": lambda maps: OrderedDict(reversed([(f"{i}", t) for i, t in enumerate(maps)])),
    "named": lambda maps: Pair(maps[-1], {"rest": tuple(maps[1:])}),
    "last": lambda maps: (maps[-1], None),
}


@given(
    EDGES, st.sampled_from(sorted(FORMS)), st.sampled_from(sorted(ENTRANCES)), st.integers(0, 99)
)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_wiring(edges, form, entrance, seed):
    torch.compiler.reset()
    torch.manual_seed(seed)
    model = Wired(edges, FORMS[form])
    frames = [(x, {"one": x.flip(2), "two": torch.ones_like(x)}) for x in clip(1, 4, 7, 8)]
    compiled = ENTRANCES[entrance](model, frames[0])
    for args in frames:
        with torch.no_grad():
            got, expected = compiled(*args), model(*args)
        assert type(got) is type(expected)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
