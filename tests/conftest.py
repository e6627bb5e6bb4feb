"""The option --device, the markers, and the same conditions for every test."""

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


@pytest.fixture(scope="session")
def device(request):
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def on_device(device):
    """Tensors and modules that a test makes lie on the device of --device."""
    with device:
        yield


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def exact_float32():
    """Convolutions in fp32 are that, and not tf32, unless a test says otherwise."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before
