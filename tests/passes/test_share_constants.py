"""share_constants: what is equal is held once, but never what is a weight itself."""

import gc
import weakref

import pytest
import torch

from deltafx.passes.share_constants import ConstantPool, share_constants

pytestmark = pytest.mark.usefixtures("on_device")


def test_equal_constants_are_one():
    a = torch.randn(3, 4)
    near = a.clone()
    near[2, 3] += 1e-6
    constants = {
        "a": a, "again": a.clone(), "near": near, "shape": a.reshape(4, 3).clone(),
        "dtype": a.double(), "layout": a.t().contiguous().t(),
    }  # fmt: skip
    shared = share_constants(constants, [], ConstantPool())
    assert shared["a"] is shared["again"] is a
    assert all(shared[k] is constants[k] for k in ("near", "shape", "dtype", "layout"))
    assert shared.keys() == constants.keys()


def test_weights_are_left_alone():
    """Whoever shared one would not be told when it changes."""
    weight, pool = torch.randn(6), ConstantPool()
    packed = weight.clone()
    first = share_constants({"weight": weight, "part": weight[:3]}, [weight], pool)
    assert first["weight"] is weight
    second = share_constants({"packed": packed, "part": weight[:3].clone()}, [], pool)
    assert second["packed"] is packed
    assert second["part"].data_ptr() != weight.data_ptr()


def test_a_pool_keeps_nothing_alive():
    pool = ConstantPool()
    constants = share_constants({"a": torch.ones(3), "b": torch.ones(3)}, [], pool)
    held = weakref.ref(constants["a"])
    assert held() is constants["b"]
    del constants
    gc.collect()
    assert held() is None
    fresh = torch.ones(3)
    assert pool.share(fresh) is fresh
