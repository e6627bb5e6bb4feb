"""trace_model: fx where it can, the model's own Python code where not."""

import pytest
import torch
from torch import nn

from deltafx.errors import InvalidInputError, TrainModeError
from deltafx.passes.trace_model import trace_model
from tests.passes.graphs import whole

pytestmark = pytest.mark.usefixtures("on_device")


class Branching(nn.Module):
    def forward(self, x):
        return x + 1 if x.shape[2] > 4 and bool(x.ndim == 4) else x - 1


class OnValues(nn.Module):
    def forward(self, x):
        return [r + 0 for r in x]  # iterating over a tensor is what fx cannot follow


class Variadic(nn.Module):
    def forward(self, *xs):
        return xs[0] + xs[1]


def test_fx_traces_a_plain_model():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).eval()
    traced = trace_model(model)
    assert (traced.front_end, traced.reason) == ("fx", "")
    x = torch.randn(1, 3, 5, 5)
    assert torch.equal(traced.root(x), model(x))
    assert traced.root.get_parameter("0.weight") is model[0].weight, "the weights are shared"


def test_a_model_that_fx_cannot_trace_stays_python_and_says_why():
    traced = trace_model(OnValues().eval())
    assert traced.front_end == "python"
    assert "TraceError" in traced.reason
    x = whole(2, 3, 4, 4)
    assert torch.equal(traced.root(x)[1], x[1])


def test_control_flow_on_shapes_is_followed():
    model = Branching().eval()
    traced = trace_model(model)
    for size in (3, 8):
        x = whole(1, 1, size, size)
        assert torch.equal(traced.root(x), model(x))


def test_variadic_forwards_stay_python():
    traced = trace_model(Variadic().eval())
    assert traced.front_end == "python"
    assert traced.bind((1, 2, 3), {}) == (1, 2, 3, {})


def test_binding_orders_keywords_and_fills_defaults():
    class Two(nn.Module):
        def forward(self, x, y=None, scale=2.0):
            return x * scale

    traced = trace_model(Two().eval())
    assert traced.bind((1,), {"scale": 3.0}) == (1, None, 3.0, {})
    with pytest.raises(InvalidInputError, match="missing a required argument: 'x'"):
        traced.bind((), {})
    with pytest.raises(InvalidInputError, match="unexpected keyword argument 'z'"):
        traced.bind((1,), {"z": 1})


def test_keyword_only_arguments_come_along():
    class Keywords(nn.Module):
        def forward(self, x, *, scale=2.0, rows=False):
            return x * scale

    traced = trace_model(Keywords().eval())
    assert (traced.front_end, traced.reason) == (
        "python",
        "forward has an optional argument, 'scale'",
    )
    assert traced.bind((1,), {"scale": 3.0}) == (1, {"scale": 3.0, "rows": False})

    class Required(nn.Module):
        def forward(self, x, *, y):
            return x * y

    traced = trace_model(Required().eval())
    assert traced.front_end == "fx"
    assert traced.bind((1,), {"y": 2}) == (1, 2)


def test_train_mode_is_refused_and_the_module_named():
    with pytest.raises(TrainModeError, match=r"model\.eval\(\)"):
        trace_model(nn.Sequential(nn.Conv2d(3, 4, 1)).train())
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4))).eval()
    model[1][0].train()
    with pytest.raises(TrainModeError, match=r"'1\.0'"):
        trace_model(model)


def test_only_modules_are_taken():
    with pytest.raises(InvalidInputError, match="not function; wrap a function in one"):
        trace_model(lambda x: x)
