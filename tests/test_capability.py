"""A GPU that is too old is refused in words."""

import pytest
import torch

from deltafx.cuda_graph import check_capability
from deltafx.errors import UnsupportedDeviceError


def test_old_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    with pytest.raises(UnsupportedDeviceError, match=r"compute capability 6\.1.* need 7\.0"):
        check_capability(torch.device("cuda", 0))


@pytest.mark.parametrize("capability", [(7, 0), (7, 5), (8, 0), (8, 9), (9, 0), (12, 0)])
def test_newer_ones_are_taken(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    check_capability(torch.device("cuda", 0))
