"""A GPU that is too old is refused in words."""

import pytest
import torch

from deltafx.cuda_graph import check_capability
from deltafx.errors import UnsupportedDeviceError


def test_old_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(UnsupportedDeviceError, match=r"compute capability 7\.5.* need 8\.0"):
        check_capability(torch.device("cuda", 0))


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_newer_ones_are_taken(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    check_capability(torch.device("cuda", 0))
