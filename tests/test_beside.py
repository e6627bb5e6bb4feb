"""The forks of a captured frame: every call waits for what it touches, and for no more."""

import dataclasses
import importlib

import pytest
import torch
from torch import fx, nn

from deltafx.beside import BesideInterpreter
from deltafx.cuda_graph import split_frame, without_output_copies
from deltafx.passes.list_ahead import AHEAD, list_ahead
from deltafx.passes.lower_ops import lower_ops
from deltafx.passes.run_beside import BESIDE, run_beside
from deltafx.state import allocate
from tests.passes.graphs import Tiny, before, whole
from tests.tangled_net import TangledNet

list_ahead_module = importlib.import_module("deltafx.passes.list_ahead")


class Capture:
    """A stream that captures: each call depends on what it was told, and takes its place.

    Attributes:
        before: By call, all calls that are certain to be done when it starts.
        last: The calls that the next one depends on.
    """

    def __init__(self):
        self.before = {}
        self.last = frozenset()

    def done(self):
        """What is done when the next call starts."""
        return frozenset().union(self.last, *(self.before[n] for n in self.last))

    def launch(self, call):
        self.before[call] = self.done()
        self.last = frozenset([call])

    def here(self):
        return CapturedPoint(self, self.last)


@dataclasses.dataclass
class CapturedPoint:
    capture: Capture
    last: frozenset

    def go_back(self):
        assert self.last, "there is nothing to go back to"
        self.capture.last = self.last

    def join(self):
        self.capture.last |= self.last


class Simulated(BesideInterpreter):
    """Runs calls as ever, and notes them as captured."""

    def __init__(self, module, capture):
        super().__init__(module, capture.here)
        self.capture = capture

    def launch(self, node, args, kwargs):
        self.capture.launch(node)
        if node.target is torch.ops.deltafx.find_candidates.default:
            return None  # there is none on the CPU, where nobody reads lists
        return super().launch(node, args, kwargs)


def accesses(node, tensors):
    """The memory that a call reads, and that it writes: by address, in bytes of the state."""
    reads, writes = set(), set()
    arguments = getattr(getattr(node.target, "_schema", None), "arguments", ())
    for i, arg in enumerate(node.args):
        if isinstance(arg, fx.Node) and arg.op == "get_attr":
            t = tensors[arg.target]
            spots = set((t.data_ptr() + t.element_size() * _offsets(t)).tolist())
            is_state = arg.target.startswith(("acc_", "mask", "counts", "list_"))
            if i < len(arguments) and arguments[i].is_write:
                writes |= spots
            elif is_state:
                reads |= spots
    return reads, writes


def _offsets(t):
    offsets = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(t.shape, t.stride(), strict=True):
        offsets = offsets[..., None] + torch.arange(size) * stride
    return offsets.flatten()


def bodies(net, x):
    """A net's body for a device with lists, its attributes, and the masks that it wants set."""
    with torch.device("cpu"), torch.no_grad():
        gm, context = before(run_beside, net, x)
        context.plan = dataclasses.replace(context.plan, lists=(1,))
        run_beside(gm, context)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(list_ahead_module, "bears_list", lambda *args, **options: True)
            list_ahead(gm, context)
        graph, constants = lower_ops(gm, context)
        tensors = {**constants, **allocate(context.plan)}
    parts = split_frame(without_output_copies(graph))
    fx.GraphModule(tensors, parts.head)(x)
    return parts.body, tensors, gm


def check(net, x):
    """Simulates the capture of a body; asserts that no two calls that meet run beside each other.

    Returns the interpreter, with its capture.
    """
    body, tensors, gm = bodies(net, x)
    capture = Capture()
    simulated = Simulated(fx.GraphModule(tensors, body), capture)
    with torch.no_grad():
        outputs = simulated.run(x)
        expected = net(x)
    expected = [expected] if isinstance(expected, torch.Tensor) else expected
    for got, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3, equal_nan=True)
    calls = [n for n in body.nodes if n.op == "call_function"]
    assert set(capture.before) == set(calls)
    assert capture.last | capture.done() == set(calls), "the end waits for all"
    marked = [n for n in calls if BESIDE in n.meta]
    wanted = sum((BESIDE in n.meta) + (AHEAD in n.meta) for n in gm.graph.nodes)
    assert simulated.count == len(marked) == wanted
    touched = {n: accesses(n, tensors) for n in calls}
    for i, call in enumerate(calls):
        for earlier in calls[:i]:
            if earlier in capture.before[call]:
                continue
            (reads, writes), (read, wrote) = touched[call], touched[earlier]
            assert not writes & wrote, (earlier, call)
            assert not writes & read, (earlier, call)
            assert not reads & wrote, (earlier, call)
    for side in marked:
        meanwhile = [n for n in calls if n not in capture.before[side] and n is not side]
        assert any(side not in capture.before[n] for n in meanwhile), "nothing runs beside it"
    return simulated


def test_a_block_with_a_shortcut():
    def block(m, x):
        x = m.stem(x).relu()
        y = m.three(m.two(m.one(x).relu()).relu())
        return (y + m.down(x)).relu()

    net = Tiny(
        block, stem=nn.Conv2d(2, 2, 3, padding=1), one=nn.Conv2d(2, 2, 1),
        two=nn.Conv2d(2, 2, 3, padding=1), three=nn.Conv2d(2, 2, 1), down=nn.Conv2d(2, 2, 1),
    )  # fmt: skip
    before_ = check(net, whole(2, 2, 6, 7)).capture.before
    by_name = {n.meta.get("lowered_from", "list"): n for n in before_}
    names = {n: name for name, n in by_name.items()}
    found = {name: {names[n] for n in before_[by_name[name]]} for name in by_name}
    assert found == {
        "stem": set(), "down": {"stem"}, "list": {"stem"}, "one": {"stem"},
        "two": {"stem", "one", "list"}, "three": {"stem", "one", "list", "two", "down"},
    }  # fmt: skip


def test_outputs_that_nothing_waits_for_are_waited_for_at_the_end():
    net = Tiny(
        lambda m, x: (lambda y: (m.a(y), m.b(y), m.c(y)))(m.stem(x)),
        stem=nn.Conv2d(2, 2, 3, padding=1), a=nn.Conv2d(2, 2, 1), b=nn.Conv2d(2, 3, 1),
        c=nn.Conv2d(2, 2, 3, padding=1),
    )  # fmt: skip
    simulated = check(net, whole(1, 2, 6, 7))
    assert simulated.count == 2
    assert len(simulated.capture.last) == 3


@pytest.mark.parametrize("seed", range(30))
def test_of_any_net(seed):
    check(TangledNet(seed), torch.randn(1, 3, 5, 6))


def test_such_nets_have_much_that_runs_beside_other_things():
    counts = [check(TangledNet(seed), torch.randn(1, 3, 4, 4)).count for seed in range(8)]
    assert sum(counts) >= 16


def test_what_is_captured_needs_a_capture():
    point = getattr(torch.classes.deltafx, "CapturePoint", None)
    if point is None:
        pytest.skip("built for the CPU alone")
    assert not point.supported(torch.device("cpu"))
    with pytest.raises(ValueError, match="no captures on cpu"):
        point.here(torch.zeros(1))
