"""What a dense run takes at its peak: against a run whose tensors are followed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from deltafx.passes.live_bytes import live_bytes
from tests.passes.graphs import Tiny, normalized, whole

CHANNEL = 4 * 8 * 8
"""Bytes of one of its channels, of one stream."""


class _Followed(fx.Interpreter):
    """Frees what nobody reads any more but its inputs, and keeps the most bytes that there were."""

    def __init__(self, gm: fx.GraphModule, *inputs: Tensor) -> None:
        super().__init__(gm)
        self.inputs, self.most = inputs, 0

    def run_node(self, n: fx.Node) -> object:
        made = super().run_node(n)
        held = [*self.inputs, made, *(t for m, t in self.env.items() if m.op != "get_attr")]
        tensors = [t for t in held if isinstance(t, Tensor)] if n.op != "get_attr" else []
        sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        self.most = max(self.most, sum(sizes.values()))
        return made


def test_a_row_of_convolutions():
    net = Tiny(
        lambda m, x: m.c(m.b(m.a(x))),
        a=nn.Conv2d(2, 8, 1),
        b=nn.Conv2d(8, 4, 1),
        c=nn.Conv2d(4, 1, 1),
    )
    assert live_bytes(normalized(net, whole(3, 2, 8, 8)).graph) == 3 * CHANNEL * (2 + 8 + 4)


@pytest.mark.parametrize(
    "f",
    [
        lambda m, x: m.b(m.a(x)) + x,
        lambda m, x: m.b(m.a(x) + m.a(x.flip(2))),
        lambda m, x: m.b(m.a(x).view(1, 4, 64).transpose(1, 2).transpose(1, 2).view(1, 4, 8, 8)),
        lambda m, x: torch.cat([m.a(x), m.a(x).relu()]).sum(0, keepdim=True) * x[:, :1],
    ],
)
def test_what_is_read_again_stays(f):
    net = Tiny(f, a=nn.Conv2d(2, 4, 1), b=nn.Conv2d(4, 2, 1))
    gm, x = normalized(net, whole(1, 2, 8, 8)), whole(1, 2, 8, 8)
    run = _Followed(gm, x)
    with torch.no_grad():
        run.run(x)
    assert live_bytes(gm.graph) == run.most
