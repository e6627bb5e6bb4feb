"""assign_regions: what is delta, where dense tensors are encoded, who truncates."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deltafx.config import Config
from deltafx.ops import delta_op
from deltafx.ops.encode import encode
from deltafx.passes.assign_regions import assign_regions
from tests.passes.graphs import Tiny, TinyPair, before, calls, node, rewritten, whole

pytestmark = pytest.mark.usefixtures("on_device")


def encodes(gm):
    return [n for n in gm.graph.nodes if n.target is encode]


def tiny(f):
    return Tiny(
        f, a=nn.Conv2d(2, 2, 3, padding=1), b=nn.Conv2d(2, 2, 1),
        depth=nn.Conv2d(2, 2, 3, padding=1, groups=2),
    )  # fmt: skip


def test_the_frame_is_encoded_once_in_blocks():
    gm, count = rewritten(assign_regions, tiny(lambda m, x: m.a(x) * m.b(x)), whole(1, 2, 5, 5))
    assert count == 4
    assert node(gm, "encode").kwargs["block"] == Config().input_block
    assert node(gm, "encode").name == "input_0_encoded"


def test_dense_results_are_encoded_site_by_site():
    net = tiny(lambda m, x: m.b(m.a(x).sign()))
    gm, count = rewritten(assign_regions, net, whole(1, 2, 5, 5))
    assert count == 4
    assert [e.kwargs["block"] for e in encodes(gm)] == [Config().input_block, 1]
    assert not node(gm, "sign").meta.get("delta")


def test_dense_readers_take_accumulators_as_they_are():
    gm, _ = rewritten(assign_regions, tiny(lambda m, x: m.a(x).sign()), whole(1, 2, 5, 5))
    assert node(gm, "sign").args[0] is node(gm, "conv2d")


def test_constants_before_the_inputs():
    gm, _ = rewritten(
        assign_regions, TinyPair(lambda m, x, y: (x + y, x)), *2 * [whole(1, 2, 3, 3)]
    )
    assert len(encodes(gm)) == 2


def test_regions_are_the_connected_parts():
    net = tiny(lambda m, x: m.b(m.b(m.a(x)).sign()))
    gm, _ = rewritten(assign_regions, net, whole(1, 2, 5, 5))
    regions = {n.name: n.meta["region"] for n in gm.graph.nodes if "region" in n.meta}
    assert len(set(regions.values())) == 2
    assert regions["a"] == regions["b"] == regions["input_0_encoded"]
    assert regions["b_1"] == regions["sign_encoded"] != regions["a"]


def test_an_expansion_does_not_truncate_before_its_depthwise_convolution():
    net = tiny(lambda m, x: m.b(m.depth(m.b(x))))
    gm, _ = rewritten(assign_regions, net, whole(1, 2, 5, 5))
    truncates = {n.name: n.meta["truncates"] for n in gm.graph.nodes if delta_op(n)}
    assert truncates.pop("depth", False) is False  # a node of its own where it is not fused
    assert truncates == {"input_0_encoded": True, "b": False, "b_1": True}


def test_an_expansion_does_not_truncate_before_a_depthwise_convolution_by_itself():
    net = tiny(lambda m, x: m.depth(m.b(x)).sigmoid() * 2)
    gm, _ = rewritten(assign_regions, net, whole(1, 2, 5, 5))
    truncates = {n.name: n.meta["truncates"] for n in gm.graph.nodes if delta_op(n)}
    assert truncates["b"] is False
    assert truncates["depth"] is True


def test_an_expansion_that_others_read_too_truncates():
    net = tiny(lambda m, x: (lambda y: m.depth(y) * y)(m.b(x)))
    gm, _ = rewritten(assign_regions, net, whole(1, 2, 5, 5))
    assert all(n.meta["truncates"] for n in gm.graph.nodes if delta_op(n))


def test_copies_do_not_truncate():
    gm, _ = rewritten(assign_regions, tiny(lambda m, x: F.pad(m.a(x), (1, 1))), whole(1, 2, 5, 5))
    assert node(gm, "pad2d").meta["truncates"] is False


def test_views_of_dense_tensors_are_dense():
    gm, context = before(assign_regions, Tiny(lambda m, x: x[:, 1:].sign()), whole(1, 2, 3, 3))
    assert assign_regions(gm, context) == 0
    assert context.refusals[node(gm, "slice_channels")] == "all its inputs are dense"


def test_a_concatenation_of_delta_and_dense_encodes_the_dense_part():
    net = tiny(lambda m, x: torch.cat([m.a(x), x.sign()], 1))
    gm, count = rewritten(assign_regions, net, whole(1, 2, 5, 5))
    assert count == 4
    assert "concat" in calls(gm)
    assert [e.name for e in encodes(gm)] == ["input_0_encoded", "sign_encoded"]
