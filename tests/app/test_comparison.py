"""The error measure, and one stream through both models."""

import numpy as np
import torch
from torch import nn

from deltafx.comparison import Comparison, relative_error
from deltafx.models_zoo import Preprocessing, ZooModel


def test_relative_error_is_that_of_all_floats() -> None:
    expected = {
        "a": torch.tensor([3.0, 0.0]),
        "b": [torch.tensor([4.0])],
        "label": torch.tensor([7]),
    }
    ours = {"a": torch.tensor([3.0, 3.0]), "b": [torch.tensor([8.0])], "label": torch.tensor([9])}
    assert relative_error(ours, expected) == 1.0  # sqrt(9 + 16) / sqrt(9 + 16)
    assert relative_error(expected, expected) == 0.0


def test_relative_error_of_what_cannot_be_compared() -> None:
    assert relative_error(torch.zeros(2), torch.zeros(3)) is None
    assert relative_error([torch.zeros(2)], [torch.zeros(2), torch.zeros(2)]) is None
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_error(torch.ones(2), torch.zeros(2)) == float("inf")


def test_a_stream_through_both_models() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()).eval()
    weight = net[0].weight.detach().clone()
    model = ZooModel("net", net, Preprocessing(), "here")
    frame = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    moved = frame.copy()
    moved[4:8, 10:15] ^= 255
    comparison = Comparison(model, frame, threshold=0.0)
    records = [comparison.step(f) for f in (frame, frame, moved)]
    assert all(r.error is not None and r.error < 1e-5 for r in records)
    assert all(r.dense_ms is not None and r.dense_ms > 0 < r.ours_ms for r in records)
    assert records[1].flop_fraction == 0.0
    assert 0.0 < records[2].flop_fraction < 0.2
    expected = np.zeros((24, 32), bool)
    expected[4:8, 10:15] = True
    assert np.array_equal(comparison.mask(), expected)
    assert torch.equal(net[0].weight, weight)


def test_without_the_dense_model_there_is_no_error() -> None:
    model = ZooModel("net", nn.Conv2d(3, 4, 1).eval(), Preprocessing(), "here")
    frame = np.zeros((8, 8, 3), np.uint8)
    record = Comparison(model, frame, compare=False).step(frame)
    assert record.dense_ms is None
    assert record.error is None
