"""split_volumes: a volume is a list of planes, a 3-D convolution one of 2-D ones."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import deltafx
from deltafx.ops.base import constant
from deltafx.passes.split_volumes import LONGEST, split_volumes
from tests.exactness import exact_over
from tests.passes.graphs import Tiny, TinyPair, calls, rewritten, whole

pytestmark = pytest.mark.usefixtures("on_device")


def net(f):
    torch.manual_seed(0)
    made = Tiny(
        f, conv=nn.Conv3d(2, 3, 3, padding=1), one=nn.Conv3d(2, 2, 1), norm=nn.BatchNorm3d(3),
        act=nn.PReLU(3), drop=nn.Dropout3d(), gate=nn.Conv3d(3, 3, 1, bias=False),
    )  # fmt: skip
    made.act.weight.data = torch.tensor([0.5, -2.0, 0.25])
    made.scale = nn.Parameter(whole(3, 1, 1, 1))
    return made


def clip(length=4, channels=2):
    return whole(2, channels, length, 4, 8)


def conv(*shape, **kwargs):
    return Tiny(lambda m, x: m.conv(x), conv=nn.Conv3d(2, 3, shape, **kwargs))


def volume_calls(gm):
    """Calls on or with results of five dimensions, but for taking apart and putting together."""
    nodes = [n for n in gm.graph.nodes if n.op == "call_function"]
    found = [n for n in nodes if any(v.meta["val"].dim() == 5 for v in (n, *n.all_input_nodes))]
    return [c for c in (n.target.__name__.split(".")[0] for n in found) if c != "select"]


CONVS = {
    "3x3x3": {"shape": (3, 3, 3), "padding": 1},
    "no padding": {"shape": (3, 3, 3)},
    "of a picture": {"shape": (1, 3, 3), "padding": (0, 1, 1)},
    "over time": {"shape": (3, 1, 1), "padding": (1, 0, 0)},
    "even": {"shape": (2, 2, 2), "stride": 2},
    "strided": {"shape": (3, 3, 3), "stride": (3, 2, 1), "padding": (1, 0, 1)},
    "with gaps": {"shape": (3, 1, 1), "stride": (4, 1, 1), "padding": (1, 0, 0)},
    "dilated": {"shape": (3, 2, 2), "dilation": (2, 2, 1), "padding": (2, 0, 0)},
    "wide in time": {"shape": (7, 1, 1), "padding": (3, 0, 0)},
    "without a bias": {"shape": (3, 3, 3), "bias": False},
    "same": {"shape": (3, 5, 1), "padding": "same"},
    "valid": {"shape": (2, 1, 3), "padding": "valid"},
}


LEAST = {"no padding": 3, "without a bias": 3, "even": 2, "valid": 2}
"""Pictures of a clip, where one is too few for any output."""


@pytest.mark.parametrize(
    ("name", "length"),
    [(name, t) for name in CONVS for t in (1, 2, 3, 7) if t >= LEAST.get(name, 1)],
)
def test_convolutions(name, length):
    kwargs = dict(CONVS[name])
    model, x = conv(*kwargs.pop("shape"), **kwargs), clip(length)
    gm, count = rewritten(split_volumes, model, x)
    assert count == 1
    assert calls(gm).count("conv2d") == model(x).shape[2]
    assert volume_calls(gm) == ["stack"]


def test_groups_within_a_picture():
    model = Tiny(lambda m, x: m.a(x), a=nn.Conv3d(2, 4, (1, 3, 3), groups=2))
    gm, count = rewritten(split_volumes, model, clip())
    assert (count, calls(gm).count("conv2d")) == (1, 4)


def test_a_window_is_a_slice_of_planes_side_by_side():
    gm, _ = rewritten(split_volumes, conv(3, 3, 3, padding=1), clip(5))
    assert calls(gm) == [
        *["select"] * 5, *["encode"] * 5, "cat", *["slice", "conv2d"] * 5, "stack"
    ]  # fmt: skip
    found = [n for n in gm.graph.nodes if "slice" in str(n.target)]
    assert [n.args[1:] for n in found] == [(1, 0, 4), (1, 0, 6), (1, 2, 8), (1, 4, 10), (1, 6, 10)]
    convs = [n for n in gm.graph.nodes if "conv2d" in str(n.target)]
    weights = [n.args[1] for n in convs]
    assert weights[1] is weights[2] is weights[3]
    assert [tuple(constant(w).shape) for w in (weights[0], weights[1], weights[4])] == [
        (3, 4, 3, 3), (3, 6, 3, 3), (3, 4, 3, 3)
    ]  # fmt: skip
    assert [n.name for n in convs] == [f"conv_t{t}" for t in range(5)]


def test_dilated_windows_are_slices_too():
    kwargs = {"padding": (2, 0, 0), "dilation": (2, 1, 1)}
    gm, _ = rewritten(split_volumes, conv(3, 1, 1, **kwargs), clip(6))
    planes = next(n for n in gm.graph.nodes if "cat" in str(n.target))
    assert [p.name for p in planes.args[0]] == [f"input_0_t{t}_encoded" for t in (0, 2, 4, 1, 3, 5)]


def test_planes_are_joined_once():
    model = Tiny(lambda m, x: (m.a(x), m.b(x)), a=nn.Conv3d(2, 3, 3), b=nn.Conv3d(2, 2, (2, 1, 1)))
    gm, count = rewritten(split_volumes, model, clip())
    assert (count, calls(gm).count("cat"), calls(gm).count("select")) == (2, 1, 4)


WITH_CONV = {
    "norm": lambda m, y, x: m.norm(y),
    "relu": lambda m, y, x: F.relu(y),
    "prelu": lambda m, y, x: m.act(y),
    "dropout": lambda m, y, x: m.drop(y).relu(),
    "add": lambda m, y, x: y + y.relu(),
    "add a volume from elsewhere": lambda m, y, x: y + x[:, :1],
    "add a number": lambda m, y, x: y + 1,
    "number minus": lambda m, y, x: 1 - y,
    "per channel": lambda m, y, x: y * m.scale,
    "per row": lambda m, y, x: y * torch.arange(8.0),
    "a gate": lambda m, y, x: y * m.gate(F.adaptive_avg_pool3d(y, 1)),
    "the larger one": lambda m, y, x: torch.maximum(y, 1 - y),
    "cast": lambda m, y, x: y.bfloat16() + 1,
    "channels": lambda m, y, x: y[:, 1:],
    "channels from behind": lambda m, y, x: y[:, -2:],
    "chunks": lambda m, y, x: torch.cat(y.chunk(3, 1)[::-1], 1),
    "cat": lambda m, y, x: torch.cat([y, x], 1),
    "cat from behind": lambda m, y, x: torch.cat([x, y], -4),
    "cat over time": lambda m, y, x: torch.cat([y, y[:, :, :1]], 2),
    "every second": lambda m, y, x: y[:, :, ::2],
    "the last ones": lambda m, y, x: y[:, :, -2:],
    "a picture": lambda m, y, x: y[:, :, -1],
    "a picture as a volume": lambda m, y, x: y[:, :, :1].squeeze(2),
    "maximum of sites": lambda m, y, x: F.max_pool3d(y, (1, 3, 3), 1, (0, 1, 1)),
    "maximum": lambda m, y, x: F.max_pool3d(y, 3, 2, 1),
    "maximum over time": lambda m, y, x: F.max_pool3d(y, (3, 1, 1), 1, (1, 0, 0)),
    "dilated maximum": lambda m, y, x: F.max_pool3d(y, (2, 1, 1), 1, dilation=(2, 1, 1)),
    "maximum over the end": lambda m, y, x: F.max_pool3d(y, 2, (3, 2, 2), ceil_mode=True),
    "mean of sites": lambda m, y, x: F.avg_pool3d(y, (1, 2, 2)),
    "mean": lambda m, y, x: F.avg_pool3d(y, 2, 2),
    "mean over the end": lambda m, y, x: F.avg_pool3d(y, 2, (3, 2, 2), ceil_mode=True),
    "mean over padding": lambda m, y, x: F.avg_pool3d(y, (4, 2, 2), 2, (2, 1, 1)),
    "mean without padding": lambda m, y, x: F.avg_pool3d(
        y[:, :, :2], (2, 2, 2), 1, (1, 1, 1), count_include_pad=False
    ),
    "sum": lambda m, y, x: F.avg_pool3d(y, (3, 2, 2), divisor_override=1),
    "adaptive": lambda m, y, x: F.adaptive_avg_pool3d(y, (2, 4, 2)),
    "over all": lambda m, y, x: F.adaptive_avg_pool3d(y, 1).flatten(1),
    "mean over all": lambda m, y, x: y.mean((2, 3, 4)),
    "mean over sites": lambda m, y, x: y.mean((-2, -1), keepdim=True),
    "mean over time": lambda m, y, x: y.mean(2),
    "mean over time as a volume": lambda m, y, x: y.mean(-3, keepdim=True).relu(),
    "one picture, flat": lambda m, y, x: y[:, :, :1].reshape(2, -1),
}


@pytest.mark.parametrize("name", WITH_CONV)
def test_what_follows_goes_plane_by_plane(name):
    f = WITH_CONV[name]
    gm, count = rewritten(split_volumes, net(lambda m, x: f(m, m.conv(x), m.one(x))), clip())
    assert count >= 2
    assert set(volume_calls(gm)) <= {"stack"}


def test_a_gate_serves_all_planes():
    model = net(lambda m, x: m.one(x) * x[:, :, :1, :1, :1])
    gm, count = rewritten(split_volumes, model, clip())
    found = [n for n in gm.graph.nodes if "mul" in str(n.target)]
    assert (count, len(found), len({n.args[1] for n in found})) == (2, 4, 1)


STAYS = {
    "computed weight": (
        lambda m, x: F.conv3d(x, m.one.weight * x.amax()), "computed by the model"
    ),
    "groups over time": (
        lambda m, x: F.conv3d(x, m.one.weight.expand(2, 2, 3, 1, 1)[:, :1], groups=2), "in groups"
    ),
    "uneven": (
        lambda m, x: F.conv3d(x, m.conv.weight[:, :, :2], padding="same"), "not symmetric"
    ),
    "beyond the clip": (lambda m, x: F.conv3d(x, m.conv.weight, padding=(3, 0, 0)), "no picture"),
    "a long clip": (lambda m, x: m.one(x.repeat(1, 1, 17, 1, 1)), "more than 64 pictures"),
    "without a batch": (lambda m, x: m.one(x[0]), "not [N, C, T, H, W]"),
    "double": (lambda m, x: F.conv3d(x.double(), m.one.weight.double()), "no delta op"),
    "batch statistics": (
        lambda m, x: F.batch_norm(m.one(x), None, None, training=True) * 0, "of the batch"
    ),
    "a picture of its own": (
        lambda m, x: m.one(x) * torch.arange(4.0).reshape(4, 1, 1), "from picture to picture"
    ),
    "another rank": (lambda m, x: m.one(x) + x[0, 0], "an operand"),
    "no volume before": (lambda m, x: F.max_pool3d(x, 2), "no delta op"),
    "a shuffle of time": (lambda m, x: m.one(x).flip(2), "no delta op"),
}  # fmt: skip


@pytest.mark.parametrize("name", STAYS)
def test_refused_with_a_reason(name):
    f, reason = STAYS[name]
    rewritten(split_volumes, net(f), clip())
    compiled = deltafx.compile(net(f), threshold=0)
    compiled(clip())
    dense = [n.reason for n in compiled.explain() if n.kind == "dense"]
    assert any(reason in r for r in dense), dense


@pytest.mark.parametrize(("length", "count"), [(LONGEST, 1), (LONGEST + 1, 0)])
def test_long_clips_stay(length, count):
    assert rewritten(split_volumes, conv(2, 1, 1), whole(1, 2, length, 1, 1))[1] == count


def test_maps_of_other_ranks_stay():
    model = TinyPair(
        lambda m, x, y: (m.a(x) + x.mean(2, keepdim=True), y.relu()), a=nn.Conv2d(2, 2, 1)
    )
    assert rewritten(split_volumes, model, whole(1, 2, 4, 4), whole(1, 2, 4))[1] == 0


def test_a_volume_is_put_together_under_its_name():
    model = net(lambda m, x: (m.conv(x).cumsum(2), m.norm(m.conv(x))))
    gm, _ = rewritten(split_volumes, model, clip())
    stacks = [n for n in gm.graph.nodes if "stack" in str(n.target)]
    assert [n.name for n in stacks] == ["conv", "norm"]


class Video(nn.Module):
    """A residual block with a pool and a head, as video CNNs have them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv3d(3, 8, (3, 5, 5), padding=(1, 2, 2), bias=False), nn.BatchNorm3d(8), nn.ReLU()
        )
        self.a = nn.Conv3d(8, 8, 3, padding=1)
        self.b = nn.Conv3d(8, 8, (3, 1, 1), padding=(1, 0, 0))
        self.pool = nn.MaxPool3d(3, 2, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        x = self.pool(F.relu(self.b(self.a(x)) + x))
        x = torch.cat([x, x.relu()], 1)
        return self.fc(F.adaptive_avg_pool3d(x, 1).flatten(1))


@pytest.fixture
def video():
    return Video().eval()


def test_they_follow_the_weights(video):
    compiled = deltafx.compile(video, threshold=0)
    frames = [torch.randn(2, 3, 5, 9, 8) for _ in range(2)]
    exact_over(video, compiled, frames)
    assert compiled.explain().delta_share == 1
    with torch.no_grad():
        video.a.weight.mul_(2)
        video.stem[1].running_var.add_(1)
    exact_over(video, compiled, frames)


def test_every_picture_is_gated_like_a_frame(video):
    compiled = deltafx.compile(video, threshold=0, input_threshold=0.5)
    compiled(torch.randn(1, 3, 4, 32, 32))
    assert [compiled.thresholds[f"input_0_t{t}_encoded"] for t in range(4)] == [0.5] * 4


def test_a_picture_that_changes_costs_its_surroundings(video, device):
    compiled = deltafx.compile(video, threshold=0)
    x = torch.randn(1, 3, 8, 40, 40)
    compiled(x)
    x[:, :, 2, 10, 10] += 1
    compiled(x)
    nodes = compiled.stats().nodes
    together = device.type == "cuda"  # a part of a concatenation has the active sites of all of it
    active = [nodes[f"input_0_t{t}_encoded"].active for t in range(8)]
    assert active == [int(together or t == 2) for t in range(8)]
    assert nodes["stem_0_t1"].active == nodes["stem_0_t3"].active == 25
    assert nodes["stem_0_t7"].candidates == 25
    assert nodes["stem_0_t7"].active == (25 if together else 0)


def test_torch_compile(video):
    torch.compiler.reset()
    compiled = torch.compile(video, backend="deltafx", options={"threshold": 0}, fullgraph=True)
    exact_over(video, compiled, [torch.randn(1, 3, 5, 9, 8) for _ in range(3)])
    (region,) = deltafx.modules(compiled)
    assert region.explain().delta_share == 1
    torch.compiler.reset()


def test_autocast(video):
    frames = [torch.randn(1, 3, 4, 9, 8) for _ in range(2)]
    compiled = deltafx.compile(video, threshold=0)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for frame in frames:
            torch.testing.assert_close(compiled(frame), video(frame), rtol=0.05, atol=0.05)
    assert compiled.explain().delta_share > 0.99


def test_export(video):
    frames = [torch.randn(1, 3, 4, 9, 8) for _ in range(3)]
    compiled = deltafx.compile(torch.export.export(video, (frames[0],)), threshold=0)
    exact_over(video, compiled, frames)
    program = torch.export.export(compiled.frame_program(), (frames[0],)).module()
    for frame in frames:
        torch.testing.assert_close(program(frame), compiled(frame))
