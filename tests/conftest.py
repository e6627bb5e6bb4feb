"""The option --device, the markers, and a seed for every test."""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption(
        "--device", default="cpu", help="the device that the operators run on (cpu, cuda)"
    )


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def device(request):
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
