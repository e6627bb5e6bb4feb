"""Every video and optical flow model of torchvision at threshold 0, over six frames.

The video CNNs are delta; of the transformers attention runs dense, which `explain` tells. RAFT's
encoders and its update block, call by call, are delta regions.
"""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor

import deltafx
from deltafx.models_zoo import calibrate_batch_norm
from tests.exactness import Oracle, floats
from tests.models.frames import clip

VIDEO = torchvision.models.list_models(module=torchvision.models.video)
FLOW = torchvision.models.list_models(module=torchvision.models.optical_flow)

FAST = {"r3d_18", "raft_small"}
"""For `make test`; the rest are slow."""

FULL_SIZE = ("mvit_", "s3d")


def marked(names: list[str]) -> list:
    return [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in names]


def shape_of(name: str) -> tuple[int, tuple[int, int]]:
    """Pictures of a clip and their size: the smallest that a model takes."""
    return (16, (224, 224)) if name.startswith(FULL_SIZE) else (6, (48, 64))


def windows(name: str) -> list[Tensor]:
    """Clips [1, 3, T, H, W] that move on by a picture, one of them twice, and a cut."""
    length, size = shape_of(name)
    pictures = clip("vtest", size, length + 3)
    found = [pictures[i : i + length] for i in (0, 1, 1, 2, 3)]
    found.append(clip("carphone", size, length))
    return [w.transpose(0, 1)[None].contiguous() for w in found]


@pytest.mark.parametrize("name", marked(VIDEO))
def test_video_models(name: str) -> None:
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    frames = windows(name)
    calibrate_batch_norm(model, torch.cat(frames[:2]))
    compiled = deltafx.compile(model, threshold=0)
    oracle = Oracle(model)
    for frame in frames:
        oracle.compare(compiled(frame), frame)
    oracle.check()
    told = compiled.explain()
    if name.startswith(("mvit", "swin3d")):
        assert "there is no delta op for it" in str(told)
    else:
        assert told.delta_share >= 0.95


@pytest.mark.parametrize("name", marked(FLOW))
@torch.no_grad()
def test_flow_models(name: str) -> None:
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    pictures = clip("vtest", (128, 160), 5)
    frames = [pictures[i : i + 1] for i in (0, 1, 2, 2, 2, 3)]
    calibrate_batch_norm(model.context_encoder, pictures)
    compiled = deltafx.compile(model, threshold=0)
    ours = own = norm = 0.0
    for i, pair in enumerate(zip(frames, [*frames[1:], pictures[4:]], strict=True)):
        # RAFT fixes coordinates to float32, so float64 cannot judge; the other layout does.
        expected = floats(model(*pair))
        found = floats(compiled(*pair))
        other = floats(model(*(p.to(memory_format=torch.channels_last) for p in pair)))
        assert len(found) == len(expected) == 12
        for a, b, c in zip(found, expected, other, strict=True):
            ours += float((a - b).double().square().sum())
            own += float((c - b).double().square().sum())
            norm += float(b.double().square().sum())
        if i == 3:
            nodes = compiled.stats().nodes.values()
            assert sum(n.candidates for n in nodes if n.dense_macs) == 0, "nothing has changed"
    assert ours**0.5 <= max(2 * own**0.5, torch.finfo(torch.float32).eps * norm**0.5)
    assert {"feature_encoder", "context_encoder", "update_block", "update_block[11]"} <= set(
        compiled.regions
    )
    assert compiled.explain().delta_share >= 0.95


def test_all_are_there() -> None:
    assert (len(VIDEO), len(FLOW)) == (9, 2)
    assert set(VIDEO + FLOW) >= FAST
