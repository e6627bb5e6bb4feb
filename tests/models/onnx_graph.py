"""An ONNX graph such as face detectors for the edge have, built node by node.

Inverted residuals with clips, a top-down path of transposed convolutions, a resize and a
concatenation, and four heads.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class _Builder:
    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(0)

    def constant(self, values: np.ndarray) -> str:
        name = f"constant_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def weight(self, *shape: int) -> str:
        fan_in = max(1, int(np.prod(shape[1:])))
        values = self.random.standard_normal(shape) / np.sqrt(fan_in)
        return self.constant(values.astype(np.float32))

    def add(self, kind: str, *inputs: str, name: str | None = None, **attributes: object) -> str:
        name = name or f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def conv(
        self, x: str, i: int, o: int, kernel: int = 1, stride: int = 1, groups: int = 1
    ) -> str:
        pad = kernel // 2
        y = self.add(
            "Conv", x, self.weight(o, i // groups, kernel, kernel),
            kernel_shape=[kernel, kernel], strides=[stride, stride], pads=[pad] * 4, group=groups,
        )  # fmt: skip
        rows = [self.weight(o), self.weight(o), self.weight(o)]
        variance = self.constant(self.random.uniform(0.5, 2, o).astype(np.float32))
        return self.add("BatchNormalization", y, *rows, variance, epsilon=1e-5)

    def clip(self, x: str) -> str:
        low, high = (self.constant(np.float32(v)) for v in (0, 6))
        return self.add("Clip", x, low, high)

    def inverted_residual(self, x: str, i: int, o: int, stride: int) -> str:
        y = self.clip(self.conv(x, i, 4 * i))
        y = self.clip(self.conv(y, 4 * i, 4 * i, 3, stride, groups=4 * i))
        y = self.conv(y, 4 * i, o)
        return self.add("Add", x, y) if stride == 1 and i == o else y


def face_detector() -> onnx.ModelProto:
    """Input [N, 3, H, W], H and W multiples of 8; outputs at a quarter of the resolution."""
    b = _Builder()
    x = b.clip(b.conv("frames", 3, 8, 3, stride=2))
    fine = b.inverted_residual(x, 8, 12, 2)
    middle = b.inverted_residual(b.inverted_residual(fine, 12, 12, 1), 12, 16, 2)
    coarse = b.inverted_residual(b.inverted_residual(middle, 16, 16, 1), 16, 24, 2)
    up = b.add("ConvTranspose", coarse, b.weight(24, 16, 2, 2), kernel_shape=[2, 2], strides=[2, 2])
    joined = b.add("Relu", b.add("Add", up, middle))
    factors = b.constant(np.array([1, 1, 2, 2], np.float32))
    nearest = b.add(
        "Resize", joined, "", factors, mode="nearest", nearest_mode="floor",
        coordinate_transformation_mode="asymmetric",
    )  # fmt: skip
    features = b.clip(b.conv(b.add("Concat", nearest, fine, axis=1), 28, 24, 3))
    heat = b.add("Sigmoid", b.conv(features, 24, 1), name="heatmap")
    heads = {
        name: b.add("Identity", b.conv(features, 24, channels), name=name)
        for name, channels in (("scale", 2), ("offset", 2), ("landmarks", 10))
    }
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 4)
        for name in (heat, *heads)
    ]
    frames = helper.make_tensor_value_info("frames", TensorProto.FLOAT, ["n", 3, "h", "w"])
    graph = helper.make_graph(b.nodes, "face_detector", [frames], outputs, b.weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    return model
