"""lower_ops: operators on the state, dense calls on accumulators, safe outputs."""

import pytest
import torch
from torch import fx, nn

from deltafx.ops import delta_op
from deltafx.passes.lower_ops import lower_ops
from deltafx.passes.plan_state import plan_state
from deltafx.state import allocate
from deltafx.verify import verify
from tests.passes.graphs import Tiny, assert_same, before, whole

pytestmark = pytest.mark.usefixtures("on_device")


def lowered(net, x):
    """The lowered graph, what it computes on a fresh state, and the attributes it ran on."""
    gm, context = before(plan_state, net, x)
    plan_state(gm, context)
    graph, constants = lower_ops(gm, context)
    verify(graph, "lowered", context.plan)
    operators = [n for n in gm.graph.nodes if delta_op(n) and n.meta.get("delta")]
    assert context.counts["lower_ops"] == len(operators)
    state = allocate(context.plan)
    module = fx.GraphModule(nn.Module(), fx.Graph())
    for name, tensor in {**constants, **state}.items():
        module.register_buffer(name, tensor)
    module.graph = graph
    with torch.no_grad():
        return graph, module, state


def net():
    return Tiny(
        lambda m, x: m.b(torch.cat([m.a(x).relu(), x.sign()], 1)),
        a=nn.Conv2d(2, 2, 3, padding=1), b=nn.Conv2d(4, 3, 1),
    )  # fmt: skip


def test_the_lowered_graph_computes_what_the_model_computes():
    model, x = net(), whole(2, 2, 5, 6)
    _, module, _ = lowered(model, x)
    with torch.no_grad():
        assert_same(list(module(x)), [model(x)])
        other = whole(2, 2, 5, 6)
        assert_same(list(module(other)), [model(other)])


def test_a_second_lowering_gives_the_same_graph():
    model, x = net(), whole(1, 2, 4, 4)
    gm, context = before(plan_state, model, x)
    plan_state(gm, context)
    first, _ = lower_ops(gm, context)
    second, _ = lower_ops(gm, context)
    assert str(first) == str(second)


def test_the_masks_are_cleared_first():
    graph, _, _ = lowered(net(), whole(1, 2, 4, 4))
    first = next(n for n in graph.nodes if n.op == "call_function")
    assert first.target == torch.ops.deltafx.clear_masks.default
    assert [a.target for a in first.args] == ["masks", "counts"]


def test_a_graph_without_state_has_no_masks():
    graph, _, _ = lowered(Tiny(lambda m, x: x.sign()), whole(1, 2, 4, 4))
    assert [n.target for n in graph.nodes if n.op == "call_function"] == [
        torch.ops.aten.sign.default
    ]


@pytest.mark.parametrize(
    "f",
    [
        lambda m, x: m.a(x),
        lambda m, x: m.a(x)[:, 1:],
        lambda m, x: m.a(x).view(-1),
        lambda m, x: m.a(x).transpose(1, 2)[0],
        lambda m, x: m.a(x).unbind(0),
        lambda m, x: m.a(x).reshape(2, 2, -1).contiguous(),
        lambda m, x: torch.cat([m.a(x), m.a(x)], 1),
        lambda m, x: x,
        lambda m, x: x[:, :1],
        lambda m, x: x.view(-1),
        lambda m, x: m.a.bias,
        lambda m, x: (m.a(x).sign(), m.a(x)),
    ],
)
def test_outputs_share_no_memory_with_the_state_the_weights_or_the_frame(f):
    model, x = Tiny(f, a=nn.Conv2d(2, 2, 1)), whole(1, 2, 4, 4)
    _, module, state = lowered(model, x)
    with torch.no_grad():
        outputs = module(x)
    ours = {t.untyped_storage().data_ptr() for t in [*state.values(), *module.buffers(), x]}
    ours |= {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert outputs
    for out in outputs:
        assert out.untyped_storage().data_ptr() not in ours


@pytest.mark.parametrize(
    ("first", "second"),
    [("conv", "conv_pre"), ("body", "body_act"), ("mask", "weight"), ("acc", "acc_weight")],
)
def test_names_that_could_meet_do_not(first, second):
    """`conv` has a constant pre_scale, `conv_pre` a constant scale: two of one name?"""
    modules = {
        first: nn.Conv2d(2, 2, 3, padding=1), second: nn.Conv2d(2, 2, 1), "norm": nn.BatchNorm2d(2),
        "prelu": nn.PReLU(2), f"{first}_pre": nn.BatchNorm2d(2), f"{first}_act": nn.Conv2d(2, 2, 1),
    }  # fmt: skip

    def f(m, x):
        pre, act = getattr(m, f"{first}_pre"), getattr(m, f"{first}_act")
        y = getattr(m, first)(m.norm(x).relu())
        z = pre(m.prelu(getattr(m, second)(x)))
        return m.prelu(y) * z.sign(), act(z), pre(x.sign())

    model, x = Tiny(f, **modules), whole(1, 2, 4, 4)
    _, module, _ = lowered(model, x)
    with torch.no_grad():
        assert_same(list(module(x)), list(model(x)))
