"""torchvision's detectors, with weights that make their boxes comparable, and when they are alike.

Random weights from a seed would give scores that differ in the last places only, and what is the
best of them would be luck; so the layers that tell the classes are scaled until the scores differ.
What is left of luck (two scores or overlaps that rounding swaps) the dense model shows itself: it
runs in both memory formats, and in float64.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from deltafx import Explanation
from tests.exactness import Oracle
from tests.models.case import Case
from tests.models.frames import PLAIN, clip

DETECTORS = torchvision.models.list_models(module=torchvision.models.detection)

CLASSES = re.compile(
    r"(cls_logits|cls_score|kps_score_lowres|classification_head\.module_list\.\d+(\.1)?)$"
)

Found = dict[str, Tensor]


class DetectorCase(Case):
    """A detector of torchvision; it scales pictures by itself, to the sizes that it was made for.

    The share of its multiply-adds is of those before the RoI heads: what they compute on is
    cut-outs, others in every frame.
    """

    preprocessing = PLAIN

    def load(self) -> nn.Module:
        """The model with scores that differ."""
        return spread_scores(super().load(), self.some_pictures()[:1])

    def arguments(self, pictures: Tensor) -> tuple[Any, ...]:
        """A list of pictures."""
        return (list(pictures),)

    def frames(self) -> list[tuple[Any, ...]]:
        """Two frames, one again, two more, and a cut to another clip."""
        one, two = clip("vtest", self.size, 4, PLAIN), clip("carphone", self.size, 1, PLAIN)
        pictures = (one[0], one[1], one[1], one[2], one[3], two[0])
        return [self.arguments(picture[None]) for picture in pictures]

    def oracle(self, model: nn.Module) -> Oracle:
        """One that compares detections."""
        return DetectionOracle(model)

    def share(self, explanation: Explanation) -> float:
        """Of what comes before the RoI heads."""
        before = tuple(n for n in explanation if not n.name.startswith("roi_heads"))
        return dataclasses.replace(explanation, nodes=before).delta_share

    def at(self, size: tuple[int, int]) -> DetectorCase:
        """A detector that scales pictures of that size by 4/3."""
        return detector_case(self.name, size)


def detector_case(name: str, size: tuple[int, int] = (96, 128)) -> DetectorCase:
    """A detector for pictures of a size, or made for another one (SSD)."""
    options: dict[str, Any] = {"weights": None, "weights_backbone": None}
    if not name.startswith("ssd"):
        options |= {"min_size": 4 * min(size) // 3, "max_size": 2 * min(size)}
    if "rcnn" in name:
        options |= {"box_score_thresh": 0.02, "box_detections_per_img": 40}
        options |= {"rpn_pre_nms_top_n_test": 100, "rpn_post_nms_top_n_test": 60}
        if name.startswith("keypoint"):  # of one class, so most boxes overlap another
            options |= {"box_score_thresh": 0.001, "box_nms_thresh": 0.8}
    else:
        options |= {"score_thresh": 0.02, "detections_per_img": 40, "topk_candidates": 60}
    build = partial(torchvision.models.get_model, name, **options)
    return DetectorCase(name, "torchvision", build, size)


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


@dataclasses.dataclass(frozen=True)
class Tally:
    """How far one run of a model is from the float64 model's, over a clip."""

    missed: int = 0
    squares: float = 0.0

    def add(self, found: list[Found], exact: list[Found]) -> Tally:
        """The same with another frame."""
        missed, squares = self.missed, self.squares
        for ours, theirs in zip(found, exact, strict=True):
            assert ours.keys() == theirs.keys()
            pairs = match(ours, theirs)
            missed += len(theirs["boxes"]) + len(ours["boxes"]) - 2 * len(pairs)
            for i, j in pairs:
                for key in theirs.keys() - {"labels"}:
                    squares += float((ours[key][i] - theirs[key][j]).square().sum())
        return Tally(missed, squares)


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


class DetectionOracle(Oracle):
    """The same detections: no more missed than by the dense model, and no farther away.

    The error is the L2 distance of all that is told of the pairs (boxes in pixels, scores, masks,
    key points), not a relative one.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        self.found = Tally()
        self.dense_found = (Tally(), Tally())

    @torch.no_grad()
    def reference(self, *args: Any) -> Any:
        """The detections of a frame: in float64, and by the model in both memory formats."""
        (pictures,) = args
        expected = self.exact([picture.double() for picture in pictures])
        assert all(len(found["boxes"]) >= 5 for found in expected), "too little to compare"
        return expected, [self.dense(pictures), self.last(pictures)]

    def take(self, outputs: list[Found], reference: Any) -> None:
        """Adds a frame."""
        expected, (one, two) = reference
        self.found = self.found.add(outputs, expected)
        first, second = self.dense_found
        self.dense_found = (first.add(one, expected), second.add(two, expected))

    @property
    def error(self) -> float:
        """Ours."""
        return self.found.squares**0.5

    @property
    def bound(self) -> float:
        """Twice the dense model's."""
        return 2 * max(t.squares for t in self.dense_found) ** 0.5

    @property
    def holds(self) -> bool:
        """Whether it finds what the dense model finds."""
        return super().holds and self.found.missed <= max(t.missed for t in self.dense_found)
