"""Every detector of torchvision at threshold 0: what the dense model finds, in every frame.

Random weights from a seed would give scores that differ in the last places only, and what is the
best of them would be luck; so the layers that tell the classes are scaled until the scores differ.
What is left of luck (two scores or overlaps that rounding swaps) the dense model shows itself: it
runs in both memory formats, and in float64.
"""

from __future__ import annotations

import copy
import dataclasses
import re

import pytest
import torch
import torchvision
from torch import Tensor, nn

import deltafx
from deltafx.models_zoo import calibrate_batch_norm
from tests.models.frames import PLAIN, clip

NAMES = torchvision.models.list_models(module=torchvision.models.detection)
FAST = {"fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large"}
"""For `make test`; the rest are slow."""

CLASSES = re.compile(
    r"(cls_logits|cls_score|kps_score_lowres|classification_head\.module_list\.\d+(\.1)?)$"
)
SIZE = (96, 128)

Found = dict[str, Tensor]


def load(name: str) -> nn.Module:
    torch.manual_seed(0)
    options = {"weights": None, "weights_backbone": None}
    if not name.startswith("ssd"):
        options |= {"min_size": 128, "max_size": 192}
    if "rcnn" in name:
        options |= {"box_score_thresh": 0.02, "box_detections_per_img": 40}
        options |= {"rpn_pre_nms_top_n_test": 100, "rpn_post_nms_top_n_test": 60}
        if name.startswith("keypoint"):  # of one class, so most boxes overlap another
            options |= {"box_score_thresh": 0.001, "box_nms_thresh": 0.8}
    else:
        options |= {"score_thresh": 0.02, "detections_per_img": 40, "topk_candidates": 60}
    model = torchvision.models.get_model(name, **options).eval()
    frames = torch.cat([clip("vtest", SIZE, 2, PLAIN), clip("carphone", SIZE, 2, PLAIN)])
    calibrate_batch_norm(model, frames)
    return spread_scores(model, frames[:1])


@torch.no_grad()
def spread_scores(model: nn.Module, frame: Tensor) -> nn.Module:
    """Scales the layers that tell the classes, so that a standard deviation of theirs is 3."""

    def scale(layer: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
        factor = 3 / float((out - out.mean()).std()) if out.numel() > 1 else 1.0
        layer.weight.mul_(factor)
        return layer.forward(*args)

    layers = [
        m for path, m in model.named_modules() if CLASSES.search(path) and hasattr(m, "weight")
    ]
    assert layers
    hooks = []
    for layer in layers:
        handle = layer.register_forward_hook(scale)
        hooks.append(handle)
    model(list(frame))
    for handle in hooks:
        handle.remove()
    return model


def scene() -> list[list[Tensor]]:
    """Six frames: two, one again, two more, and a cut to another clip."""
    one, two = clip("vtest", SIZE, 4, PLAIN), clip("carphone", SIZE, 1, PLAIN)
    return [[frame] for frame in (one[0], one[1], one[1], one[2], one[3], two[0])]


@dataclasses.dataclass
class Tally:
    """How far one run of a model is from the float64 model's, over a clip."""

    missed: int = 0
    squares: float = 0.0

    def add(self, found: list[Found], exact: list[Found]) -> None:
        for ours, theirs in zip(found, exact, strict=True):
            assert ours.keys() == theirs.keys()
            pairs = match(ours, theirs)
            self.missed += len(theirs["boxes"]) + len(ours["boxes"]) - 2 * len(pairs)
            for i, j in pairs:
                for key in theirs.keys() - {"labels"}:
                    self.squares += float((ours[key][i] - theirs[key][j]).square().sum())


def match(found: Found, expected: Found) -> list[tuple[int, int]]:
    """Pairs of detections of one label, score (to 1 %) and box (to a tenth of a pixel)."""
    pairs = []
    free = set(range(len(expected["boxes"])))
    for i in range(len(found["boxes"])):
        for j in sorted(free):
            same = found["labels"][i] == expected["labels"][j]
            near = (found["boxes"][i] - expected["boxes"][j]).abs().max() < 0.1
            if same and near and (found["scores"][i] - expected["scores"][j]).abs() < 0.01:
                pairs.append((i, j))
                free.discard(j)
                break
    return pairs


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in NAMES]
)
@torch.no_grad()
def test_finds_what_the_dense_model_finds(name: str) -> None:
    model = load(name)
    compiled = deltafx.compile(model, threshold=0)
    exact = copy.deepcopy(model).double()
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    ours, own = Tally(), (Tally(), Tally())
    for i, frame in enumerate(scene()):
        expected = exact([picture.double() for picture in frame])
        assert all(len(found["boxes"]) >= 5 for found in expected), "too little to compare"
        ours.add(compiled(frame), expected)
        own[0].add(model(frame), expected)
        own[1].add(last(frame), expected)
        if i == 2:
            nodes = compiled.stats().nodes
            assert all(n.candidates == 0 for n in nodes.values() if n.dense_macs)
    assert ours.missed <= max(t.missed for t in own)
    assert ours.squares <= 4 * max(t.squares for t in own)
    explained = compiled.explain()
    before_head = [n for n in explained if not n.name.startswith("roi_heads")]
    delta = sum(n.dense_macs for n in before_head if n.kind == "delta")
    assert delta >= 0.95 * sum(n.dense_macs for n in before_head)
    assert {n.kind for n in explained if n.name.startswith("roi_heads")} <= {"dense"}
    if "rcnn" in name:
        assert list(compiled.regions) == ["backbone", "rpn.head"]
    else:
        assert list(compiled.regions) == ["backbone", "head"]


@torch.no_grad()
def test_pictures_of_changing_sizes() -> None:
    model = load("fasterrcnn_mobilenet_v3_large_320_fpn")
    compiled = deltafx.compile(model, threshold=0, max_states=3)
    exact = copy.deepcopy(model).double()
    ours, own = Tally(), Tally()
    sizes = [(96, 128), (128, 96), (96, 96), (96, 128), (64, 160), (96, 128)]
    for i, size in enumerate(sizes):
        frame = list(clip("vtest", size, i + 1, PLAIN)[-1:])
        if i == 4:
            frame += list(clip("carphone", (96, 112), 1, PLAIN))  # two streams, of two sizes
        expected = exact([picture.double() for picture in frame])
        ours.add(compiled(frame), expected)
        own.add(model(frame), expected)
    assert ours.missed <= own.missed
    assert ours.squares <= 4 * own.squares
    assert all(len(region._cache) == 3 for region in compiled.regions.values())


def test_all_are_there() -> None:
    assert len(NAMES) == 12
    assert set(NAMES) >= FAST
