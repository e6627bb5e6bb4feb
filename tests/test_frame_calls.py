"""FrameCalls: frames of delta ops alone as a list of calls, and frames that were cut short."""

import pytest
import torch
from torch import nn

import deltafx
from deltafx.frame_calls import FrameCalls, is_delta_only


class Net(nn.Module):
    """Two inputs, two outputs; one of them through a dense op, if wanted."""

    def __init__(self, dense: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.dense = dense

    def forward(self, x, y):
        a = self.a(x).relu()
        b = self.b(a + self.a(y))
        return {"a": a, "b": b.cumsum(2) if self.dense else b}


def frames(seed=0):
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, 9, 11, generator=gen) for _ in range(2)]


def compiled(dense, **options):
    torch.manual_seed(0)
    model = Net(dense).eval()
    return model, deltafx.compile(model, **{"threshold": 0, **options})


@pytest.mark.parametrize("dense", [False, True])
def test_it_is_used_for_delta_ops_alone(dense):
    _, ours = compiled(dense)
    ours(*frames())
    assert is_delta_only(ours.graph) is not dense
    assert isinstance(ours._current.run, FrameCalls) is not dense


@pytest.mark.parametrize("dense", [False, True])
def test_either_input_may_stand_still(dense):
    model, ours = compiled(dense)
    (x, y), (u, v) = frames(), frames(1)
    for pair in [(x, y), (x, y), (u, y), (u, y), (u, v), (u, v), (x, v)]:
        with torch.no_grad():
            expected = model(*pair)
        got = ours(*pair)
        for key in expected:
            assert torch.allclose(got[key], expected[key], atol=1e-5)


def test_a_still_frame_does_no_work_and_counts_none():
    _, ours = compiled(False)
    x, y = frames()
    first = ours(x, y)
    assert ours.stats().flop_fraction == 1
    second = ours(x, y)
    assert ours.stats().flop_fraction == 0
    assert not ours.update_mask("b").any()
    second["b"].fill_(7)  # outputs are the caller's
    assert torch.equal(ours(x, y)["b"], first["b"])


@pytest.mark.parametrize("dense", [False, True])
def test_a_frame_that_was_cut_short_is_made_good(dense, monkeypatch):
    """An exception between two ops leaves half a frame behind; the next frame must not show it."""
    model, ours = compiled(dense)
    (x, y), (u, v) = frames(), frames(1)
    ours(x, y)
    current = ours._current
    whole = current.run

    def cut(module, *inputs):
        whole(module, *inputs)
        current.buffers["acc_b"].fill_(3.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(current, "run", cut)
    with pytest.raises(KeyboardInterrupt):
        ours(u, v)
    monkeypatch.setattr(current, "run", whole)
    with torch.no_grad():
        expected = model(u, v)
    got = ours(u, v)
    for key in expected:
        assert torch.allclose(got[key], expected[key], atol=1e-5)
