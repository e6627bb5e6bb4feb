"""A model small enough that the command line can be tested whole, on real frames."""

from pathlib import Path

import pytest

MODEL = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
    )

def not_a_model():
    return 7
"""


@pytest.fixture
def small_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The `module:factory` name of a small user model in the current directory."""
    (tmp_path / "app_test_net.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return "app_test_net:make"
