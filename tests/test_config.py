"""Options of compile: every one, and what is refused."""

import math

import pytest
import torch
from torch import nn

import deltafx
from deltafx.errors import (
    DeltafxError,
    InvalidInputError,
    InvalidOptionError,
    StateLimitWarning,
    TrainModeError,
)
from tests.exactness import exact_over


def small():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()


def frames(count=3):
    return [torch.randn(1, 3, 12, 13) for _ in range(count)]


def test_one_line_without_options():
    model = small()
    compiled = deltafx.compile(model)
    first = torch.randn(1, 3, 12, 13)
    assert torch.allclose(compiled(first), model(first), atol=1e-5)
    assert compiled(first).shape == (1, 4, 12, 13)
    assert compiled.config == deltafx.Config()


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": None, "thresholds": None},
        {"threshold": 0.3, "input_threshold": 0.0},
        {"thresholds": {"m_0": 0.7, "input_0_encoded": 0}},
        {"policy": "max", "input_block": 1},
        {"input_block": 5, "scale_floor": 1.0, "max_states": 1},
        {"refresh_every": 3, "threshold": 0.5},
        {"max_state_bytes": 1 << 30},
    ],
)
def test_every_option(options):
    model, (a, b, c) = small(), frames()
    compiled = deltafx.compile(model, **options)
    for frame in (a, b, c, a):
        assert compiled(frame).shape == (1, 4, 12, 13)
    for name, value in (options.get("thresholds") or {}).items():
        assert compiled.thresholds[name] == value
    for name in ("threshold", "policy", "input_block", "scale_floor", "max_states"):
        if options.get(name) is not None:
            assert getattr(compiled.config, name) == options[name]
    compiled.thresholds.set_all(0)
    exact_over(model, compiled, frames())


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "1GB"])
def test_a_limit_that_is_none_is_refused(limit):
    with pytest.raises(InvalidOptionError, match="max_state_bytes"):
        deltafx.compile(small(), max_state_bytes=limit)


def test_a_limit_that_cannot_be_held_is_told():
    with torch.device("cpu"):
        model, (first, *_) = small(), frames()
        with pytest.warns(StateLimitWarning, match="max_state_bytes is 1000"):
            compiled = deltafx.compile(model, threshold=0, max_state_bytes=1000)(first)
    assert torch.allclose(compiled, model(first), atol=1e-5)


def test_the_input_threshold_is_for_the_input():
    compiled = deltafx.compile(
        small(), threshold=0.3, input_threshold=0.1, example_inputs=(frames()[0],)
    )
    assert dict(compiled.thresholds) == {"input_0_encoded": 0.1, "m_0": 0.3, "m_2": 0.3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"treshold": 1},
            "unknown option 'treshold'; the options are cuda_graph, dense_above, input_block,",
        ),
        ({"threshold": -0.1}, "threshold must be finite and >= 0, not -0.1"),
        ({"threshold": math.nan}, "threshold must be finite"),
        ({"threshold": "high"}, "threshold must be a number, not 'high'"),
        ({"threshold": True}, "threshold must be a number"),
        ({"input_threshold": math.inf}, "input_threshold must be finite"),
        ({"thresholds": {"m_0": -1}}, r"thresholds\['m_0'\] must be finite and >= 0"),
        ({"thresholds": 3}, "thresholds must be a mapping"),
        ({"policy": "mean"}, r"policy must be one of \('rms', 'max'\), not 'mean'"),
        ({"input_block": 0}, "input_block must be an int >= 1, not 0"),
        ({"input_block": 2.5}, "input_block must be an int >= 1, not 2.5"),
        ({"input_block": True}, "input_block must be an int >= 1, not True"),
        ({"scale_floor": 0}, r"scale_floor must be in \(0, 1\], not 0"),
        ({"scale_floor": 1.5}, r"scale_floor must be in \(0, 1\]"),
        ({"scale_floor": "a"}, r"scale_floor must be"),
        ({"max_states": 0}, "max_states must be an int >= 1"),
        ({"refresh_every": -1}, "refresh_every must be an int >= 0, not -1"),
        ({"refresh_every": 2.0}, "refresh_every must be an int >= 0"),
        ({"dense_above": 1.5}, r"dense_above must be in \[0, 1\] or None, not 1.5"),
        ({"dense_above": True}, r"dense_above must be in \[0, 1\] or None, not True"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(InvalidOptionError, match=message) as caught:
        deltafx.compile(small(), **options)
    assert isinstance(caught.value, (DeltafxError, ValueError))


def test_a_config_cannot_be_changed():
    config = deltafx.Config(thresholds={"a": 0.1})
    with pytest.raises(AttributeError):
        config.threshold = 0.2  # type: ignore[misc]
    with pytest.raises(TypeError):
        config.thresholds["a"] = 0.2  # type: ignore[index]


def test_no_module():
    with pytest.raises(InvalidInputError, match=r"not function; wrap a function"):
        deltafx.compile(lambda x: x)


def test_train_mode():
    model = small()
    model[2].train()
    with pytest.raises(TrainModeError, match=r"'2'\): call model.eval\(\)"):
        deltafx.compile(model)
    compiled = deltafx.compile(model.eval())
    with pytest.raises(TrainModeError, match="for inference"):
        compiled.train()
    assert compiled.eval() is compiled
    assert compiled(frames()[0]).shape == (1, 4, 12, 13)


def test_an_example_compiles_at_once():
    compiled = deltafx.compile(small(), example_inputs=(frames()[0],))
    assert [n.name for n in compiled.explain()] == ["input_0_encoded", "m_0", "m_2"]
    assert compiled.stats().macs == 0


def test_an_example_that_does_not_fit():
    with pytest.raises(InvalidInputError):
        deltafx.compile(small(), example_inputs=())
    with pytest.raises(InvalidInputError, match="tuple"):
        deltafx.compile(small(), example_inputs=torch.zeros(1, 3, 8, 8))
    with pytest.raises(RuntimeError, match="5 channels"):  # the model's own error
        deltafx.compile(small(), example_inputs=(torch.zeros(1, 5, 8, 8),))
