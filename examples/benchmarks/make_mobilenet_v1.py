"""Write an ONNX file of the shape of MobileNetV1 (Howard et al., 1704.04861) with random weights.

    python make_mobilenet_v1.py mobilenet_v1.onnx [--width 1.0] [--size 224]

For speed alone: it has learned nothing. Batch normalisation is in the weights, as exporters leave
it. With `headrace compress mobilenet_v1.onnx sparse.onnx --sparsity 0.3 --pattern 4x1` and
`onnx_pair.py` it gives the setting of SparseByteNN (2310.20509).
"""

from __future__ import annotations

import argparse

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

# Channels and stride of each depthwise convolution and the 1x1 one behind it.
BLOCKS = (
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1), (512, 1), (512, 1),
    (512, 1), (512, 1), (1024, 2), (1024, 1),
)  # fmt: skip


def build(width: float, size: int) -> onnx.ModelProto:
    """The model."""
    random = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    bounds = {"low": np.float32(0), "high": np.float32(6)}
    constants = [numpy_helper.from_array(np.array(v), name) for name, v in bounds.items()]

    def weights(name: str, *shape: int) -> str:
        fan = float(np.prod(shape[1:]))
        w = random.normal(size=shape) * (2 / fan) ** 0.5
        constants.append(numpy_helper.from_array(w.astype(np.float32), name))
        return name

    def conv(x: str, name: str, out: int, read: int, taps: int, stride: int, group: int) -> str:
        bias = numpy_helper.from_array(np.full(out, 0.1, np.float32), f"{name}_bias")
        constants.append(bias)
        pad = taps // 2
        inputs = [x, weights(f"{name}_weight", out, read // group, taps, taps), bias.name]
        nodes.append(
            helper.make_node(
                "Conv",
                inputs,
                [f"{name}_sum"],
                name,
                strides=[stride] * 2,
                pads=[pad] * 4,
                group=group,
            )
        )
        nodes.append(helper.make_node("Clip", [f"{name}_sum", "low", "high"], [name]))
        return name

    channels = int(32 * width)
    x = conv("input", "stem", channels, 3, 3, 2, 1)
    for i, (out, stride) in enumerate(BLOCKS):
        x = conv(x, f"depthwise_{i}", channels, channels, 3, stride, channels)
        x = conv(x, f"pointwise_{i}", int(out * width), channels, 1, 1, 1)
        channels = int(out * width)
    nodes.append(helper.make_node("GlobalAveragePool", [x], ["mean"]))
    nodes.append(helper.make_node("Flatten", ["mean"], ["flat"]))
    inputs = ["flat", weights("classifier_weight", 1000, channels)]
    nodes.append(helper.make_node("Gemm", inputs, ["output"], "classifier", transB=1))
    graph = helper.make_graph(
        nodes, "mobilenet_v1",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, size, size])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, 1000])], constants,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def main() -> None:
    """Write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--size", type=int, default=224)
    args = parser.parse_args()
    onnx.save(build(args.width, args.size), args.path)


if __name__ == "__main__":
    main()
