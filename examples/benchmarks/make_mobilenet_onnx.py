"""Write MobileNetV2 with random weights as an ONNX file: what it takes is that of trained ones.

    python make_mobilenet_onnx.py mobilenet_v2.onnx [--width 1.0] [--size 224] [--classes 1000]

Source: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (2018), table 2;
batch normalisation is in the weights, which have the variance that keeps that of activations.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

# Expansion, channels, blocks, stride of the first one.
BLOCKS = (
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
    (6, 320, 1, 1),
)  # fmt: skip


def divisible(channels: float) -> int:
    """To a multiple of 8, at most a tenth less."""
    found = max(8, int(channels + 4) // 8 * 8)
    return found + 8 if found < 0.9 * channels else found


class Builder:
    """Nodes and weights of the network, one behind the other."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def constant(self, name: str, value: np.ndarray) -> str:
        """A weight."""
        self.weights.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
        return name

    def node(self, op: str, inputs: list[str], **given: Any) -> str:
        """An operator; gives the name of what it makes."""
        name = f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name, **given))
        return name

    def conv(
        self, x: str, read: int, written: int, taps: int, stride: int = 1, *, bound: bool = True,
        group: int = 1,
    ) -> str:  # fmt: skip
        """A convolution with bias, and ReLU6 behind it."""
        shape = (written, read // group, taps, taps)
        deviation = np.sqrt((2 if bound else 1) / np.prod(shape[1:]))
        name = f"conv_{len(self.nodes)}"
        w = self.constant(f"{name}_weight", self.random.standard_normal(shape) * deviation)
        b = self.constant(f"{name}_bias", self.random.standard_normal(written) * 0.1)
        pad = taps // 2
        given = {"strides": [stride] * 2, "pads": [pad] * 4, "group": group}
        y = self.node("Conv", [x, w, b], kernel_shape=[taps, taps], **given)
        return self.node("Clip", [y, "zero", "six"]) if bound else y


def mobilenet(width: float, size: int, classes: int, seed: int = 0) -> Any:
    """The model: input [1, 3, size, size], output [1, classes]."""
    net = Builder(seed)
    net.constant("zero", np.array(0))
    net.constant("six", np.array(6))
    channels = divisible(32 * width)
    x = net.conv("input", 3, channels, 3, 2)
    for expansion, base, count, first in BLOCKS:
        for i in range(count):
            written, stride = divisible(base * width), first if i == 0 else 1
            inner, y = channels * expansion, x
            if expansion > 1:
                y = net.conv(y, channels, inner, 1)
            y = net.conv(y, inner, inner, 3, stride, group=inner)
            y = net.conv(y, inner, written, 1, bound=False)
            x = net.node("Add", [x, y]) if stride == 1 and written == channels else y
            channels = written
    last = divisible(1280 * max(1.0, width))
    x = net.conv(x, channels, last, 1)
    x = net.node("Flatten", [net.node("GlobalAveragePool", [x])])
    w = net.constant("classes_weight", net.random.standard_normal((classes, last)) / last**0.5)
    b = net.constant("classes_bias", np.zeros(classes))
    net.nodes.append(helper.make_node("Gemm", [x, w, b], ["logits"], "classes", transB=1))
    types = {"input": [1, 3, size, size], "logits": [1, classes]}
    infos = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in types.items()]
    graph = helper.make_graph(net.nodes, "mobilenet_v2", infos[:1], infos[1:], net.weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--classes", type=int, default=1000)
    args = parser.parse_args()
    onnx.save(mobilenet(args.width, args.size, args.classes), args.path)
    print(args.path)


if __name__ == "__main__":
    main()
