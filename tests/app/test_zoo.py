"""Names, weights, preprocessing and clips of the zoo."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import models
from torchvision.transforms import functional as TF

from deltafx.errors import InvalidOptionError, UnknownModelError, VideoError
from deltafx.models_zoo import (
    Preprocessing,
    calibrate_batch_norm,
    clip_path,
    list_clips,
    list_models,
    load,
)
from deltafx.models_zoo.postprocessing import Detections, TopClasses
from deltafx.video import VideoReader


def first_frames(clip: str, count: int) -> np.ndarray:
    with VideoReader(str(clip_path(clip))) as reader:
        return np.stack([frame for _, frame in zip(range(count), reader, strict=False)])


KINDS = (models, models.segmentation, models.detection, models.video, models.optical_flow)


def test_every_model_of_torchvision_is_listed() -> None:
    names = list_models()
    assert names[0] == "mobilenet_v2_trunk"
    assert len(names) == len(set(names))
    assert set(names[1:]) == {name for kind in KINDS for name in models.list_models(module=kind)}
    assert not any(name.startswith("quantized_") for name in names)


@pytest.mark.parametrize(
    ("name", "task", "frames"),
    [
        ("squeezenet1_1", "classification", 1),
        ("lraspp_mobilenet_v3_large", "segmentation", 1),
        ("ssdlite320_mobilenet_v3_large", "detection", 1),
        ("mc3_18", "video", 16),
        ("raft_small", "optical_flow", 2),
    ],
)
def test_from_pictures_to_results(name: str, task: str, frames: int) -> None:
    model = load(name, weights="random")
    assert (model.task, model.frames) == (task, frames)
    size = 32 if task == "video" else 128
    pictures = [model.preprocessing(np.full((size, size, 3), i, np.uint8)) for i in range(3)]
    arguments = model.arguments(pictures)
    with torch.inference_mode():
        result = model.postprocessing(model.module(*arguments))
    if task in ("classification", "video"):
        (best,) = result
        assert len(best) == 5
        assert best[0][1] >= best[-1][1] >= 0
        assert isinstance(best[0][0], str)
    elif task == "segmentation":
        assert result.shape == (1, 128, 128)
        assert result.max() < len(model.postprocessing.categories) == 21
    elif task == "detection":
        (found,) = result
        assert set(found) == {"boxes", "labels", "scores", "names"}
        assert len(found["names"]) == len(found["boxes"])
    else:
        assert result.shape == (1, 2, 128, 128)


def test_the_last_pictures_make_a_clip() -> None:
    model = load("mc3_18", weights="random")
    pictures = [torch.full((2, 3, 8, 9), float(i)) for i in range(20)]
    (clip,) = model.arguments(pictures)
    assert clip.shape == (2, 3, 16, 8, 9)
    assert clip[0, 0, :, 0, 0].tolist() == list(range(4, 20))
    (clip,) = model.arguments(pictures[:3])
    assert clip[0, 0, :, 0, 0].tolist() == [0] * 13 + [0, 1, 2]


def test_results_are_chosen_and_named() -> None:
    classes = TopClasses(("cat", "dog", "cow"), count=2)
    ((best, second),) = classes(torch.tensor([[0.0, 2.0, 1.0]]))
    assert (best[0], second[0]) == ("dog", "cow")
    assert best[1] == pytest.approx(0.6652, abs=1e-4)
    found = {
        "boxes": torch.tensor([[0.0, 0, 1, 1], [0, 0, 2, 2]]),
        "labels": torch.tensor([1, 2]),
        "scores": torch.tensor([0.2, 0.9]),
        "masks": torch.zeros(2, 1, 4, 4),
    }
    (sure,) = Detections(("none", "cat", "dog"))([found])
    assert sure["names"] == ["dog"]
    assert sure["boxes"].tolist() == [[0, 0, 2, 2]]
    assert sure["masks"].shape == (1, 1, 4, 4)


@pytest.mark.parametrize(
    "name", ["resnet18", "googlenet", "inception_v3", "lraspp_mobilenet_v3_large"]
)
def test_torchvision_models_are_built_offline(name: str) -> None:
    model = load(name, weights="random", seed=3)
    assert not model.module.training
    assert not model.trained
    size = 96 if name == "inception_v3" else 64
    with torch.inference_mode():
        model.module(torch.zeros(1, 3, size, size))


def test_a_seed_decides_the_weights_and_leaves_the_global_state() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first, second, third = (
        load("squeezenet1_1", weights="random", seed=seed).module.state_dict() for seed in (1, 1, 2)
    )
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], third[key]) for key in first)


def test_fixed_sizes_are_known() -> None:
    assert load("vit_b_32", weights="random").input_size == (224, 224)
    assert load("resnet18", weights="random").input_size is None


def test_detectors_normalise_for_themselves() -> None:
    model = load("ssdlite320_mobilenet_v3_large", weights="random")
    assert model.preprocessing == Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def test_an_unknown_name_gets_near_ones() -> None:
    with pytest.raises(UnknownModelError, match="resnet50"):
        load("resnet5O")


def test_a_state_dict_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    saved = load("squeezenet1_1", weights="random", seed=5).module.state_dict()
    torch.save(saved, path)
    loaded = load("squeezenet1_1", weights=str(path))
    assert loaded.trained
    assert all(torch.equal(saved[key], value) for key, value in loaded.module.state_dict().items())


def test_missing_and_wrong_state_dicts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidOptionError, match="random"):
        load("squeezenet1_1", weights=str(tmp_path / "none.pt"))
    torch.save({"a": torch.zeros(1)}, tmp_path / "wrong.pt")
    with pytest.raises(InvalidOptionError, match="do not fit"):
        load("mobilenet_v2_trunk", weights=str(tmp_path / "wrong.pt"))


def test_the_shipped_weights_are_trained_ones() -> None:
    """Trained features tell two scenes apart far better than two moments of one scene."""
    model = load("mobilenet_v2_trunk")
    assert model.trained
    size = (224, 224)
    with torch.inference_mode():
        street, later = (
            model.module(
                torch.nn.functional.interpolate(model.preprocessing(frame), size, mode="bilinear")
            ).mean((2, 3))
            for frame in (first_frames("vtest", 9)[0], first_frames("vtest", 9)[8])
        )
        face = model.module(
            torch.nn.functional.interpolate(
                model.preprocessing(first_frames("carphone", 1)[0]), size, mode="bilinear"
            )
        ).mean((2, 3))
    assert street.shape == (1, 1280)
    assert float(torch.cosine_similarity(street, later)) > 0.95
    assert float(torch.cosine_similarity(street, face)) < 0.6


def test_the_trunk_is_torchvisions_own() -> None:
    ours = load("mobilenet_v2_trunk").module
    reference = models.mobilenet_v2(weights=None).features
    assert str(ours) == str(reference)
    assert [p.shape for p in ours.parameters()] == [p.shape for p in reference.parameters()]


def test_preprocessing_is_that_of_torchvision() -> None:
    frames = first_frames("carphone", 2)
    preprocessing = load("resnet18", weights="random").preprocessing
    batch = preprocessing(frames)
    assert batch.shape == (2, 3, 144, 176)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    preset = models.ResNet18_Weights.DEFAULT.transforms()
    for got, frame in zip(batch, frames, strict=True):
        expected = TF.normalize(TF.to_tensor(frame), preset.mean, preset.std)
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)
    assert torch.equal(preprocessing(frames[0]), batch[:1])


def test_preprocessing_refuses_what_is_no_frame() -> None:
    with pytest.raises(ValueError, match="uint8 RGB"):
        Preprocessing()(np.zeros((3, 8, 8), np.uint8))
    with pytest.raises(ValueError, match="uint8 RGB"):
        Preprocessing()(np.zeros((8, 8, 3), np.float32))


def test_calibration_brings_activations_to_scale() -> None:
    model = load("resnet18", weights="random")
    frames = model.preprocessing(first_frames("carphone", 4))
    features = torch.nn.Sequential(*list(model.module.children())[:6])
    calibrate_batch_norm(model.module, frames)
    assert not any(part.training for part in model.module.modules())
    norm = model.module.layer1[0].bn1
    with torch.inference_mode():
        inside = model.module.relu(model.module.bn1(model.module.conv1(frames)))
        inside = norm(model.module.layer1[0].conv1(model.module.maxpool(inside)))
        assert 0.5 < float(inside.std()) < 2
        assert 0.1 < float(features(frames).std()) < 10


def test_calibration_needs_two_frames() -> None:
    with pytest.raises(ValueError, match="two frames"):
        calibrate_batch_norm(torch.nn.BatchNorm2d(3), torch.zeros(1, 3, 4, 4))


def test_clips_are_small_and_real() -> None:
    assert list_clips() == ["carphone", "vtest"]
    assert clip_path("vtest").stat().st_size <= 1_000_000
    frames = first_frames("vtest", 3)
    assert frames.shape == (3, 576, 768, 3)
    assert (frames[0] != frames[1]).any()
    with pytest.raises(VideoError, match="carphone"):
        clip_path("nothing")


def test_everything_shipped_tells_its_origin() -> None:
    zoo = clip_path("vtest").parents[1]
    for folder in ("clips", "weights"):
        origin = (zoo / folder / "ORIGIN.md").read_text()
        for path in (zoo / folder).iterdir():
            if path.name != "ORIGIN.md":
                assert path.name in origin
