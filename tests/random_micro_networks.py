"""Random small ONNX networks of what microcontrollers run, in floats or as QDQ codes of 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper
from onnx_models import FLOAT, model_of

Pick = Callable[[Sequence[Any]], Any]
_INT8, _UINT8 = np.dtype(np.int8), np.dtype(np.uint8)


@dataclass
class Drawn:
    """A network of floats, as it is drawn.

    Attributes:
        shapes: of values that a layer may read, without the batch.
        nodes: with their activations: what is between two of them has codes of its own.
    """

    pick: Pick
    rng: np.random.Generator
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    nodes: list[Any] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    last: str = "x"

    def weights(self, *shape: int, spread: float = 1.0) -> str:
        name = f"w{len(self.constants)}"
        scale = spread / max(1.0, np.prod(shape[1:])) ** 0.5
        self.constants[name] = (self.rng.standard_normal(shape) * scale).astype(np.float32)
        return name

    def add(self, op: str, reads: Sequence[str], shape: tuple[int, ...], **attributes: Any) -> None:
        made = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(reads), [made], **attributes))
        self.shapes[made] = shape
        self.last = made


def _windows(
    of: Drawn, most: int, pads: bool, gaps: bool = False
) -> tuple[dict[str, Any], tuple[int, int]] | None:
    """Attributes of windows, and rows and columns that they make; None: none fit."""
    _, *image = of.shapes[of.last]
    taps = [of.pick(range(1, min(most, n) + 1)) for n in image]
    strides = [of.pick((1, 2)) for _ in image]
    # Chips have no columns with gaps between where numbers are halves.
    apart = [of.pick((1, 1, 2)) if gaps else 1, 1]
    reach = [(t - 1) * d + 1 for t, d in zip(taps, apart, strict=True)]
    found = {"kernel_shape": taps, "strides": strides}
    if gaps:
        found["dilations"] = apart
    auto = of.pick(("SAME_UPPER", "SAME_LOWER", None, None, None)) if pads else None
    made = [-(-n // stride) for n, stride in zip(image, strides, strict=True)]
    short = [(made[i] - 1) * strides[i] + reach[i] - n for i, n in enumerate(image)]
    if auto and apart == [1, 1] and min(short) >= 0:
        return found | {"auto_pad": auto}, (made[0], made[1])
    around = [of.pick(range(t + (2 if gaps else 0))) if pads else 0 for t in (*taps, *taps)]
    made = [
        (n + around[i] + around[i + 2] - reach[i]) // strides[i] + 1 for i, n in enumerate(image)
    ]
    return (found | {"pads": around}, (made[0], made[1])) if min(made) > 0 else None


def _convolution(of: Drawn) -> None:
    found = _windows(of, 4, pads=True, gaps=True)
    if found is None:
        return
    attributes, made = found
    channels = of.shapes[of.last][0]
    wide = of.pick((1, 2, 3, 5, 8, 13))
    if of.pick((False, True)):  # depthwise
        wide, attributes["group"] = channels * of.pick((1, 1, 2)), channels
        weights = of.weights(wide, 1, *attributes["kernel_shape"])
    else:
        weights = of.weights(wide, channels, *attributes["kernel_shape"])
    reads = [of.last, weights, *([of.weights(wide, spread=0.5)] if of.pick((True, False)) else [])]
    of.add("Conv", reads, (wide, *made), **attributes)


def _pool(of: Drawn) -> None:
    found = _windows(of, 3, pads=of.pick((False, True)))
    if found is not None:
        attributes, made = found
        op = of.pick(("MaxPool", "AveragePool"))
        if op == "AveragePool" and "pads" in attributes:
            attributes["count_include_pad"] = of.pick((0, 1))
        of.add(op, [of.last], (of.shapes[of.last][0], *made), **attributes)


def _padded(of: Drawn) -> None:
    """Zeros around an image."""
    channels, *image = of.shapes[of.last]
    around = [of.pick(range(3)) for _ in range(4)]
    name = f"p{len(of.constants)}"
    of.constants[name] = np.array([0, 0, *around[:2], 0, 0, *around[2:]])
    made = [n + around[i] + around[i + 2] for i, n in enumerate(image)]
    of.add("Pad", [of.last, name], (channels, *made))


def _moved(of: Drawn) -> None:
    """Another name, and what reads both."""
    before, shape = of.last, of.shapes[of.last]
    if of.pick((True, False)):
        of.add(of.pick(("Identity", "Dropout")), [before], shape)
    else:
        of.add("Transpose", [before], (), perm=[0, 2, 3, 1])
        of.shapes.pop(of.last)
        of.add("Transpose", [of.last], shape, perm=[0, 3, 1, 2])
    if of.pick((True, False)):
        moved = of.last
        of.add("Relu", [moved], shape)
        of.add("Add", [of.last, of.pick((before, moved))], shape)


def _joined(of: Drawn) -> None:
    """A value and an earlier one, along an axis in which they may differ."""
    before, shape = of.last, of.shapes[of.last]
    axis = of.pick((0, 1, 2))
    like = [
        name
        for name, one in of.shapes.items()
        if len(one) == 3 and all(one[i] == shape[i] for i in range(3) if i != axis)
    ]
    names = [before, *(of.pick(like) for _ in range(of.pick((1, 2))))]
    made = list(shape)
    made[axis] = sum(of.shapes[name][axis] for name in names)
    of.add("Concat", names[:: of.pick((1, -1))], tuple(made), axis=axis + 1)


def _activation(of: Drawn) -> None:
    kinds = ["Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSwish"]
    op, more, reads = of.pick(kinds), {}, [of.last]
    if op == "Clip":
        of.constants |= {"zero": np.float32(0), "six": np.float32(6)}
        reads += of.pick((["zero", "six"], ["zero"], ["", "zero"], ["", "six"]))
    if op == "LeakyRelu":
        more["alpha"] = 0.1
    of.add(op, reads, of.shapes[of.last], **more)


def _norm(of: Drawn) -> None:
    """A convolution of pixels with a batch norm behind it."""
    channels, *image = of.shapes[of.last]
    of.add("Conv", [of.last, of.weights(channels, channels, 1, 1)], (channels, *image))
    names = [of.weights(channels, spread=0.5) for _ in range(4)]
    of.constants[names[3]] = np.abs(of.constants[names[3]]) + np.float32(0.5)  # the variance
    of.add("BatchNormalization", [of.last, *names], (channels, *image))


def _residual(of: Drawn) -> None:
    before, (channels, *image) = of.last, of.shapes[of.last]
    of.add("Conv", [of.last, of.weights(channels, channels, 1, 1)], (channels, *image))
    pair = (before, of.last) if of.pick((True, False)) else (of.last, before)
    of.add("Add", pair, (channels, *image))
    if of.pick((True, False)):
        of.add("Relu", [of.last], (channels, *image))


_LAYERS: dict[str, Callable[[Drawn], None]] = {
    "convolution": _convolution, "pool": _pool, "activation": _activation, "residual": _residual,
    "norm": _norm, "padded": _padded, "moved": _moved, "joined": _joined,
}  # fmt: skip


def random_network(pick: Pick, seed: int, *, norms: bool = True) -> tuple[Any, np.ndarray]:
    """A model of floats with the input x [1, channels, rows, columns], and an input.

    Args:
        norms: whether there may be batch norms, which quantised networks have no more.
    """
    of = Drawn(pick, np.random.default_rng(seed))
    shape = (pick((1, 3, 4, 9, 17)), pick((1, 2, 5, 8, 11, 19)), pick((1, 3, 4, 7, 10)))
    of.shapes["x"] = shape
    _convolution(of)
    for _ in range(pick(range(1, 5))):
        kinds = ["convolution", "convolution", *(one for one in _LAYERS if one != "norm")]
        kind = pick([*kinds, "norm"] if norms else kinds)
        _LAYERS[kind](of)
    if not of.nodes:
        of.add("Relu", ["x"], shape)
    end = pick(("image", "mean", "flat"))
    channels, *image = of.shapes[of.last]
    if end == "mean":
        of.add("GlobalAveragePool", [of.last], (channels, 1, 1))
        image = [1, 1]
    if end != "image":
        count = channels * image[0] * image[1]
        of.add("Flatten", [of.last], (count,))
        wide = pick((1, 4, 10))
        reads = [of.last, of.weights(wide, count), of.weights(wide, spread=0.3)]
        of.add("Gemm", reads, (wide,), transB=1)
        if pick((True, False)):
            of.add("Softmax", [of.last], (wide,), axis=-1)
    images = [name for name, one in of.shapes.items() if len(one) == 3]
    middle = [name for name in images if name not in ("x", of.last)]
    outputs = [of.last, *([pick(middle)] if middle and pick((True, False, False)) else [])]
    model = model_of(of.nodes, {"x": (FLOAT, [1, *shape])}, outputs, of.constants)
    return model, of.rng.standard_normal((1, *shape)).astype(np.float32)


def all_values(model: Any, x: np.ndarray) -> dict[str, np.ndarray]:
    """What onnxruntime computes for each value of a model, without fusing anything."""
    names = [name for node in model.graph.node for name in node.output]
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    del whole.graph.output[:]
    whole.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(whole.SerializeToString(), options)
    return dict(zip(names, session.run(names, {"x": x}), strict=True))


# What makes the codes that it reads.
_SAME = ("MaxPool", "AveragePool", "Flatten", "Pad", "Identity", "Dropout", "Transpose")
_FIXED = {"Softmax": (1 / 256, -128), "Sigmoid": (1 / 256, -128), "Tanh": (1 / 128, 0)}


def quantised(model: Any, x: np.ndarray, pick: Pick) -> Any:
    """The same with codes between its layers: pairs of QuantizeLinear and DequantizeLinear.

    Activations have int8 or uint8 codes, weights int8 for each channel or for all.
    """
    dtype = pick((_INT8, _UINT8))
    per_channel = pick((True, False))
    values = {"x": x, **all_values(model, x)}
    arrays = {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}
    constants: dict[str, np.ndarray] = {}
    nodes: list[Any] = []
    scales: dict[str, tuple[np.float32, int]] = {}

    def codes(name: str, of: tuple[np.float32, int]) -> str:
        scales[name] = of
        constants[f"{name}/scale"] = np.float32(of[0])
        constants[f"{name}/zero"] = np.array(of[1], dtype)
        pair = [f"{name}/scale", f"{name}/zero"]
        nodes.append(helper.make_node("QuantizeLinear", [name, *pair], [f"{name}/codes"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}/codes", *pair], [f"{name}/d"]))
        return f"{name}/d"

    def range_of(name: str) -> tuple[np.float32, int]:
        low, high = (float(f(values[name])) for f in (np.min, np.max))
        low, high = min(low, 0.0), max(high, 0.0, low + 1e-2)
        scale = np.float32((high - low) / 255)
        least = np.iinfo(dtype).min
        return scale, int(np.clip(round(least - low / float(scale)), least, least + 255))

    def of_weights(name: str, axis: int) -> str:
        array = arrays[name]
        over = tuple(i for i in range(array.ndim) if i != axis) if per_channel else None
        most = np.maximum(np.abs(array).max(over), 1e-3)
        scale = (most / 127).astype(np.float32)
        spread = scale.reshape([-1 if i == axis else 1 for i in range(array.ndim)]) if per_channel \
            else scale  # fmt: skip
        constants[f"{name}/codes"] = np.rint(array / spread).clip(-127, 127).astype(np.int8)
        constants[f"{name}/scale"] = scale
        constants[f"{name}/zero"] = np.zeros_like(scale, np.int8)
        reads = [f"{name}/{part}" for part in ("codes", "scale", "zero")]
        more = {"axis": axis} if per_channel else {}
        nodes.append(helper.make_node("DequantizeLinear", reads, [f"{name}/d"], **more))
        scales[name] = (scale, 0)
        return f"{name}/d"

    def of_bias(name: str, by: np.ndarray) -> str:
        scale = np.asarray(by, np.float32)
        constants[f"{name}/codes"] = np.rint(arrays[name] / scale).astype(np.int32)
        constants[f"{name}/scale"] = scale
        constants[f"{name}/zero"] = np.zeros_like(scale, np.int32)
        reads = [f"{name}/{part}" for part in ("codes", "scale", "zero")]
        more = {"axis": 0} if scale.ndim else {}
        nodes.append(helper.make_node("DequantizeLinear", reads, [f"{name}/d"], **more))
        return f"{name}/d"

    # A convolution or sum has no codes of its own where an activation alone reads it.
    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    together, outputs = pick((True, False)), [one.name for one in model.graph.output]

    def is_bounded(node: Any) -> bool:
        behind = readers.get(node.output[0], [])
        return (
            together and node.op_type in ("Conv", "Add", "Gemm") and len(behind) == 1
            and behind[0].op_type in ("Relu", "Clip") and node.output[0] not in outputs
        )  # fmt: skip

    known = {"x": codes("x", range_of("x"))}
    for node in model.graph.node:
        first, *rest = node.input
        reads = [known[first]]
        for i, name in enumerate(rest):
            if name in known:
                reads.append(known[name])
            elif node.op_type in ("Clip", "Pad"):
                constants |= {name: arrays[name]} if name else {}
                reads.append(name)
            elif i == 0:
                reads.append(of_weights(name, 0))
            else:
                reads.append(of_bias(name, scales[first][0] * scales[rest[0]][0]))
        (made,) = node.output
        new = onnx.NodeProto()
        new.CopyFrom(node)
        del new.input[:]
        new.input.extend(reads)
        nodes.append(new)
        if is_bounded(node):
            known[made] = made
            continue
        if node.op_type in _FIXED:
            scale, zero = _FIXED[node.op_type]
            own = np.float32(scale), zero + 128 * (dtype == _UINT8)
        else:
            own = scales[first] if node.op_type in _SAME else range_of(made)
        known[made] = codes(made, own)
    shape = [one.dim_value for one in model.graph.input[0].type.tensor_type.shape.dim]
    return model_of(nodes, {"x": (FLOAT, shape)}, [known[name] for name in outputs], constants)
