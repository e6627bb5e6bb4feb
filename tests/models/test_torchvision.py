"""Every image model of torchvision at threshold 0: as exact as the dense model, and all delta.

Random weights from a seed, batch norm statistics from real frames; small frames of two streams,
with a static frame, a cut to another clip, a frame with NaNs and one after it among them.
"""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn

import deltafx
from deltafx.models_zoo import Preprocessing, calibrate_batch_norm, clip_path
from deltafx.video import VideoReader
from tests.exactness import Oracle

CLASSIFICATION = torchvision.models.list_models(module=torchvision.models)
SEGMENTATION = torchvision.models.list_models(module=torchvision.models.segmentation)

SPREAD = {
    "alexnet", "squeezenet1_1", "resnet18", "mobilenet_v2", "mobilenet_v3_small", "densenet121",
    "shufflenet_v2_x0_5", "mnasnet0_5", "regnet_y_400mf", "lraspp_mobilenet_v3_large",
}  # fmt: skip
"""Ten families for `make test`; the rest are slow."""

TRANSFORMERS = ("vit_", "swin_", "maxvit")
DELTA = {
    "conv2d", "conv_transpose2d", "batch_norm", "layer_norm", "relu", "relu_", "relu6", "hardswish",
    "hardsigmoid", "hardtanh", "silu", "gelu", "sigmoid", "max_pool2d", "avg_pool2d",
    "adaptive_avg_pool2d", "adaptive_max_pool2d", "mean", "upsample_bilinear2d", "add", "mul",
    "cat", "upsample_nearest2d", "linear",
}  # fmt: skip
"""What must not be left dense in a plain CNN."""


def parameters():
    for name in CLASSIFICATION + SEGMENTATION:
        yield pytest.param(name, marks=[] if name in SPREAD else pytest.mark.slow)


def size_of(name: str) -> tuple[int, int]:
    """The smallest frame that is still one."""
    if name.startswith(TRANSFORMERS):
        return 224, 224
    if name == "inception_v3":
        return 107, 139
    return 96, 128


def load(name: str, size: tuple[int, int]) -> nn.Module:
    torch.manual_seed(0)
    extra = {}
    if name in ("googlenet", "inception_v3"):
        extra = {"init_weights": False}
    if name in SEGMENTATION:
        extra = {"weights_backbone": None}
    model = torchvision.models.get_model(name, weights=None, **extra).eval()
    return calibrate_batch_norm(
        model, torch.cat([clip("vtest", size, 2), clip("carphone", size, 2)])
    )


def clip(name: str, size: tuple[int, int], count: int) -> Tensor:
    """Frames [count, 3, H, W] of a shipped clip, as the models take them."""
    frames = []
    with VideoReader(str(clip_path(name)), size=size) as reader:
        for frame in reader:
            frames.append(Preprocessing()(frame).contiguous())
            if len(frames) == count:
                return torch.cat(frames)
    raise AssertionError(f"{name} has fewer than {count} frames")


def scene(size: tuple[int, int]) -> list[Tensor]:
    """Eight frames of two streams; the second stream runs behind the first one's clip."""
    one, two = clip("vtest", size, 6), clip("carphone", size, 4)
    nan = torch.stack([one[2], two[1]])
    nan[0, :, 10:30, 40:70] = float("nan")
    return [
        torch.stack(pair)
        for pair in [
            (one[0], two[0]), (one[1], two[1]), (one[1], two[1]), nan.unbind(), (one[3], two[2]),
            (two[3], one[4]), (two[3], one[5]), (two[2], one[5]),
        ]
    ]  # fmt: skip


@pytest.mark.parametrize("name", parameters())
def test_as_exact_as_the_dense_model(name: str, device: torch.device) -> None:
    size = size_of(name)
    model = load(name, size).to(device)
    compiled = deltafx.compile(model, threshold=0)
    oracle = Oracle(model)
    for i, frame in enumerate(scene(size)):
        frame = frame.to(device)
        oracle.compare(compiled(frame), frame)
        if i == 2:
            encodes = {n.name for n in compiled.explain() if n.op == "encode"}
            nodes = compiled.stats().nodes
            assert all(n.candidates == 0 for k, n in nodes.items() if k not in encodes)
    oracle.check()
    if not name.startswith(TRANSFORMERS):
        dense = {n.name: n.op for n in compiled.explain() if n.kind == "dense"}
        left = {k: op for k, op in dense.items() if op.split(".")[0] in DELTA}
        assert not left, f"dense nodes: {left}"
        assert compiled.explain().delta_share == 1.0


def test_all_are_there() -> None:
    assert len(CLASSIFICATION) == 80
    assert len(SEGMENTATION) == 6
    assert set(CLASSIFICATION + SEGMENTATION) >= SPREAD
