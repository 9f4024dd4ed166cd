"""Small classifiers as exporters write them, and the ways in which people quantise these."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper
from onnx_models import FLOAT, model_of, save
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from headrace.networks.compression.compress import compress_network

IMAGE = (1, 3, 12, 10)


class Classifier:
    """A graph of ONNX, node by node; `last` is what the last one makes."""

    def __init__(self, *shape: int) -> None:
        self.rng = np.random.default_rng(0)
        self.shape, self.last = shape or IMAGE, "x"
        self.nodes: list[Any] = []
        self.constants: dict[str, np.ndarray] = {}

    def constant(self, array: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = np.asarray(array)
        return name

    def weights(self, *shape: int, scale: float = 0.0) -> str:
        scale = scale or 1.4 / np.sqrt(np.prod(shape[1:]))
        return self.constant((scale * self.rng.standard_normal(shape)).astype(np.float32))

    def then(self, op: str, *more: str, **attributes: Any) -> Classifier:
        return self.of(op, self.last, *more, **attributes)

    def of(self, op: str, *inputs: str, **attributes: Any) -> Classifier:
        self.last = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [self.last], **attributes))
        return self

    def conv(self, made: int, read: int, taps: int = 3, **attributes: Any) -> Classifier:
        rank = len(self.shape) - 2
        read //= attributes.get("group", 1)
        attributes = {"pads": [taps // 2] * 2 * rank, **attributes}
        weights = self.weights(made, read, *[taps] * rank)
        return self.then("Conv", weights, self.weights(made, scale=0.1), **attributes)

    def norm(self, channels: int) -> Classifier:
        scale, variance = (self.rng.uniform(0.5, 1.5, channels).astype("f") for _ in range(2))
        moved = [self.weights(channels, scale=0.2) for _ in range(2)]
        names = [self.constant(scale), *moved, self.constant(variance)]
        return self.then("BatchNormalization", *names)

    def bounds(self, *ends: float) -> Classifier:
        return self.then("Clip", *(self.constant(np.float32(end)) for end in ends))

    def linear(self, made: int, read: int) -> Classifier:
        return self.then("Gemm", self.weights(made, read), self.weights(made, scale=0.1), transB=1)

    def model(self) -> Any:
        self.nodes[-1].output[0] = "y"
        model = model_of(self.nodes, {"x": (FLOAT, self.shape)}, ["y"], self.constants, opset=17)
        model.ir_version = 8
        return onnx.shape_inference.infer_shapes(model)


def plain() -> Any:
    """A pool first, then convolutions, a mean and a softmax."""
    of = Classifier().then("MaxPool", kernel_shape=[2, 2], strides=[2, 2])
    of.conv(8, 3).norm(8).then("Relu").conv(12, 8, strides=[2, 2]).then("Relu")
    of.then("GlobalAveragePool").then("Flatten").linear(7, 12)
    return of.then("Softmax", axis=-1).model()


def normed() -> Any:
    """Batch norms first and behind an activation, zeros around an image, functions."""
    of = Classifier().norm(3).then("Pad", "pads")
    of.constants["pads"] = np.array([0, 0, 1, 0, 0, 0, 1, 2], np.int64)
    of.conv(8, 3, pads=[0] * 4).then("LeakyRelu", alpha=0.1).then("Relu").norm(8)
    of.conv(8, 8).then("Tanh").then("MaxPool", kernel_shape=[2, 2], strides=[2, 2])
    of.then("Pad", "pads").conv(6, 8, 1).then("Sigmoid").then("GlobalAveragePool").then("Flatten")
    return of.linear(7, 6).then("Softmax", axis=-1).model()


def joined() -> Any:
    """Ways of several kinds that are joined by their channels; a sigmoid of each class."""
    of = Classifier().conv(8, 3).then("Relu")
    before, ways = of.last, []
    for taps in (3, 1):
        of.last = before
        ways.append(of.conv(4 + taps, 8, taps).then("Relu").last)
    of.last = before
    more = {"kernel_shape": [3, 3], "pads": [1] * 4, "count_include_pad": 1}
    ways += [of.then("AveragePool", kernel_shape=[3, 3], pads=[1] * 4).last]
    of.last = before
    ways += [of.then("AveragePool", **more).last]
    of.of("Concat", *ways, axis=1).then("MaxPool", kernel_shape=[2, 2], strides=[2, 2])
    of.conv(9, 28).then("Relu").then("ReduceMean", axes=[2, 3], keepdims=0).linear(6, 9)
    return of.then("Sigmoid").model()


def gated() -> Any:
    """Squeeze and excitation, h-swish, sums and products of constants, MatMul and Add."""
    of = Classifier().conv(8, 3, strides=[2, 2]).then("HardSwish")
    of.conv(8, 8, group=8).bounds(0, 6)
    image = of.last
    of.then("GlobalAveragePool").conv(4, 8, 1).then("Relu").conv(8, 4, 1).then("Sigmoid")
    of.of("Mul", image, of.last).then("Mul", of.weights(8, 1, 1, scale=0.7))
    of.then("Add", of.constant(np.float32(0.25))).conv(12, 8, 1)
    x = of.last
    of.then("Sigmoid").of("Mul", x, of.last).then("GlobalAveragePool").then("Flatten")
    return of.then("MatMul", of.weights(12, 7)).then("Add", of.weights(7, scale=0.1)).model()


def rows() -> Any:
    """Convolutions of one dimension."""
    of = Classifier(1, 3, 40).conv(8, 3, 5, strides=[2]).then("Relu")
    of.then("MaxPool", kernel_shape=[2], strides=[2]).conv(8, 8, group=8).then("Relu")
    of.conv(6, 8).then("Relu").then("GlobalAveragePool").then("Flatten").linear(5, 6)
    return of.then("Softmax", axis=-1).model()


CLASSIFIERS: dict[str, Callable[[], Any]] = {
    one.__name__: one for one in (plain, normed, joined, gated, rows)
}


class _Samples(CalibrationDataReader):
    def __init__(self, samples: list[np.ndarray]) -> None:
        self._left = iter([{"x": one} for one in samples])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._left, None)


def samples_of(model: Any, count: int, seed: int) -> list[np.ndarray]:
    """Inputs."""
    shape = [one.dim_value for one in model.graph.input[0].type.tensor_type.shape.dim]
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for _ in range(count)]


def _compressed(path: Path, samples: list[np.ndarray]) -> Path:
    inputs, to = path.with_suffix(".inputs"), path.with_suffix(".int8.onnx")
    inputs.mkdir()
    for i, one in enumerate(samples):
        np.save(inputs / f"{i}.npy", one)
    compress_network(path, to, format="int8", calibrate=inputs)
    return to


def _static(per_channel: bool, activations: Any, weights: Any = QuantType.QInt8) -> Any:
    def quantise(path: Path, samples: list[np.ndarray]) -> Path:
        to = path.with_suffix(".static.onnx")
        quantize_static(
            path, to, _Samples(samples), quant_format=QuantFormat.QDQ, per_channel=per_channel,
            activation_type=activations, weight_type=weights,
        )  # fmt: skip
        return to

    return quantise


WAYS: dict[str, Callable[[Path, list[np.ndarray]], Path]] = {
    "floats": lambda path, samples: path,
    "compressed": _compressed,
    "signed": _static(False, QuantType.QInt8),
    "signed by channel": _static(True, QuantType.QInt8),
    "unsigned": _static(False, QuantType.QUInt8),
    "unsigned weights": _static(False, QuantType.QUInt8, QuantType.QUInt8),
}


def quantised(name: str, way: str, folder: Path) -> Path:
    """A classifier's file."""
    model = CLASSIFIERS[name]()
    return WAYS[way](save(model, folder / f"{name}.onnx"), samples_of(model, 8, 1))


def exact(path: Path, x: np.ndarray) -> np.ndarray:
    """What onnxruntime computes, node by node."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    (found,) = onnxruntime.InferenceSession(path, options).run(None, {"x": x})
    return found
