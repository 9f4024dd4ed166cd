"""Networks as exporters of frameworks with channels last write them: turned around convolutions."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper
from onnx_models import FLOAT, model_of
from test_native_operators import node

from headrace.errors import HeadraceError
from headrace.networks.network import network_of

CHANNELS, SIZE = 12, (6, 5)
TO_ROWS, TO_IMAGES = {"perm": [0, 2, 3, 1]}, {"perm": [0, 3, 1, 2]}


class Builder:
    """Nodes and constants, and the shapes of values that have channels last."""

    def __init__(self, rng: np.random.Generator, opset: int) -> None:
        self.rng, self.opset = rng, opset
        self.nodes: list[Any] = []
        self.constants: dict[str, np.ndarray] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def add(self, op: str, inputs: list[str], shape: Any = None, **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], **attributes))
        if shape is not None:
            self.shapes[name] = tuple(shape)
        return name

    def put(self, array: Any, dtype: Any = np.float32) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = np.asarray(array, dtype)
        return name

    def floats(self, *shape: int) -> str:
        return self.put(self.rng.standard_normal(shape))

    def conv(self, x: str, channels: int, made: int, turned: bool) -> str:
        """Of images; `turned`: of what has channels last, as such exporters write it."""
        x = self.add("Transpose", [x], **TO_IMAGES) if turned else x
        weights = self.put(self.rng.standard_normal((made, channels, 1, 1)) * channels**-0.5)
        return self.add("Conv", [x, weights])


def _each(b: Builder, x: str) -> str:
    op = str(
        b.rng.choice(["Relu", "Sigmoid", "Tanh", "Abs", "Neg", "Clip", "LeakyRelu", "Softplus"])
    )
    bounds = [b.put(-0.5), b.put(1.25)] if op == "Clip" else []
    return b.add(op, [x, *bounds], b.shapes[x])


def _with_constant(b: Builder, x: str) -> str:
    _, h, w, c = b.shapes[x]
    spread = [(), (1,), (c,), (1, c), (w, 1), (h, 1, 1), (h, w, c), (1, 1, 1, c), (1, h, w, 1)]
    other = b.floats(*spread[b.rng.integers(len(spread))])
    pair = [x, other] if b.rng.integers(2) else [other, x]
    return b.add(str(b.rng.choice(["Add", "Sub", "Mul", "Max", "Min"])), pair, b.shapes[x])


def _with_itself(b: Builder, x: str) -> str:
    return b.add("Mul", [x, b.add("Sigmoid", [x], b.shapes[x])], b.shapes[x])


def _weighted(b: Builder, x: str) -> str:
    """By a number for each channel, made of all pixels."""
    n, _, _, c = b.shapes[x]
    axes = [1, 2] if b.rng.integers(2) else [-2, -3]
    op = str(b.rng.choice(["ReduceMean", "ReduceMax"]))
    given: dict[str, Any] = {"axes": axes} if b.opset < 18 else {}
    more = [] if given else [b.put(axes, np.int64)]
    mean = b.add(op, [x, *more], (n, 1, 1, c), keepdims=1, **given)
    if b.rng.integers(2):
        mean = b.add("Transpose", [b.conv(mean, c, c, True)], (n, 1, 1, c), **TO_ROWS)
    return b.add("Mul", [x, b.add("Sigmoid", [mean], (n, 1, 1, c))], b.shapes[x])


def _padded(b: Builder, x: str) -> str:
    n, h, w, c = b.shapes[x]
    top, left, bottom, right, more = (int(v) for v in b.rng.integers(0, 3, 5))
    pads = b.put([0, top, left, 0, 0, bottom, right, more], np.int64)
    return b.add("Pad", [x, pads], (n, h + top + bottom, w + left + right, c + more))


def _joined(b: Builder, x: str) -> str:
    n, h, w, c = b.shapes[x]
    other = b.add("Relu", [x], b.shapes[x])
    axis = int(b.rng.choice([3, -1, 1]))
    shape = (n, 2 * h, w, c) if axis == 1 else (n, h, w, 2 * c)
    return b.add("Concat", [x, other], shape, axis=axis)


def _part(b: Builder, x: str) -> str:
    n, h, w, c = b.shapes[x]
    if c < 4:
        return x
    sizes = b.put([c - 2, 2], np.int64)
    first, second = f"v{len(b.nodes)}", f"v{len(b.nodes)}_rest"
    b.nodes.append(
        helper.make_node("Split", [x, sizes], [first, second], axis=int(b.rng.choice([3, -1])))
    )
    b.shapes[first] = (n, h, w, c - 2)
    return first


STEPS = (_each, _with_constant, _with_itself, _weighted, _padded, _joined, _part)


def random_model(seed: int) -> tuple[Any, dict[str, np.ndarray]]:
    """Convolutions, and some of these steps between them; all values at their ends are outputs."""
    rng = np.random.default_rng(seed)
    b = Builder(rng, int(rng.choice([13, 17, 18])))
    n, outputs, channels = 2, [], CHANNELS
    x = b.conv("x", channels, channels, False)
    shape: tuple[int, ...] = (n, *SIZE, channels)
    for _ in range(2):
        x = b.add("Transpose", [x], shape, **TO_ROWS)
        for step in rng.integers(0, len(STEPS), rng.integers(1, 5)):
            x = STEPS[step](b, x)
            if rng.integers(6) == 0:
                outputs.append(x)
        n, h, w, channels = b.shapes[x]
        shape = (n, h, w, channels)
        last, x = x, b.conv(x, channels, channels, True)
    if rng.integers(2):
        axes = [1, 2]
        more = [b.put(axes, np.int64)] if b.opset >= 18 else []
        given: dict[str, Any] = {} if more else {"axes": axes}
        flat = b.add("ReduceMean", [last, *more], keepdims=0, **given)
        outputs.append(b.add("MatMul", [flat, b.floats(channels, 7)]))
    outputs.append(x)
    size = [n, CHANNELS, *SIZE]
    model = model_of(
        b.nodes, {"x": (FLOAT, size)}, list(dict.fromkeys(outputs)), b.constants, opset=b.opset
    )
    return model, {"x": rng.standard_normal(size).astype(np.float32)}


def _all_outputs(model: Any, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [one.name for one in session.get_outputs()]
    return dict(zip(names, session.run(None, inputs), strict=True))


@pytest.mark.parametrize("seed", range(40))
def test_what_is_between_turns_is_the_same(seed: int) -> None:
    model, inputs = random_model(seed)
    right = _all_outputs(model, inputs)
    with network_of(model, threads=2) as network:
        found = network(inputs)
    for name, expected in right.items():
        scale = float(np.abs(expected).max())
        np.testing.assert_allclose(
            found[name], expected, rtol=1e-5, atol=1e-5 * scale, err_msg=name
        )
        assert found[name].shape == expected.shape


def test_a_network_of_such_an_exporter_is_ours() -> None:
    """But for the first turn, of the images that come in."""
    rng = np.random.default_rng(3)
    b = Builder(rng, 17)
    b.shapes["x"] = (1, *SIZE, CHANNELS)
    n, h, w, c = b.shapes["x"]
    x = b.add("Transpose", [b.conv("x", c, c, True)], (n, h, w, c), **TO_ROWS)
    first = x
    x = b.add("Add", [x, b.floats(c)], (n, h, w, c))
    gate = b.add("Clip", [b.add("Add", [x, b.put(3)]), b.put(0), b.put(6)], (n, h, w, c))
    x = b.add("Mul", [b.add("Mul", [x, gate]), b.put(1 / 6)], (n, h, w, c))
    x = _padded(b, x)
    mean = b.add("ReduceMean", [x], axes=[1, 2], keepdims=1)
    channels = b.shapes[x][3]
    inner = b.add("Transpose", [b.conv(mean, channels, 4, True)], **TO_ROWS)
    outer = b.add("Transpose", [b.conv(b.add("Relu", [inner]), 4, channels, True)], **TO_ROWS)
    x = b.add("Mul", [x, b.add("Sigmoid", [outer])], b.shapes[x])
    x = b.add("Transpose", [b.conv(x, channels, c, True)], **TO_ROWS)
    flat = b.add("ReduceMean", [b.add("Relu", [x])], axes=[1, 2], keepdims=0)
    y = b.add("MatMul", [flat, b.floats(c, 7)])
    assert first != y
    model = model_of(b.nodes, {"x": (FLOAT, [1, h, w, c])}, [y], b.constants, opset=17)
    inputs = {"x": rng.standard_normal((1, h, w, c)).astype(np.float32)}
    right = _all_outputs(model, inputs)[y]
    with network_of(model, threads=1) as network:
        where = [(kind, len(nodes)) for kind, nodes in network.plan(inputs).where()]
        assert [kind for kind, _ in where] == ["onnxruntime", "headrace"]
        assert where[0][1] == 1
        np.testing.assert_allclose(network(inputs)[y], right, rtol=1e-5, atol=1e-5)


def test_bytes_between_turns() -> None:
    """Codes and numbers with one scale go through as well."""
    rng = np.random.default_rng(4)
    nodes = [
        node("Transpose", "x", "t", **TO_ROWS), node("QuantizeLinear", "t scale zero", "q"),
        node("DequantizeLinear", "q scale zero", "d"), node("Mul", "d each", "m"),
        node("Transpose", "m", "b", **TO_IMAGES), node("Conv", "b w"),
    ]  # fmt: skip
    constants: dict[str, Any] = {
        "scale": np.float32(0.02), "zero": np.uint8(128),
        "each": rng.standard_normal(CHANNELS).astype(np.float32),
        "w": rng.standard_normal((8, CHANNELS, 3, 3)).astype(np.float32),
    }  # fmt: skip
    size = [1, CHANNELS, *SIZE]
    model = model_of(nodes, {"x": (TensorProto.FLOAT, size)}, ["y"], constants, opset=13)
    inputs = {"x": rng.standard_normal(size).astype(np.float32)}
    right = _all_outputs(model, inputs)["y"]
    with network_of(model, threads=1) as network:
        np.testing.assert_allclose(network(inputs)["y"], right, rtol=1e-4, atol=1e-4)


BETWEEN = (
    "Concat",
    "Flatten",
    "Pad",
    "QuantizeLinear",
    "ReduceMean",
    "Reshape",
    "Resize",
    "Split",
    "Where",
)


@pytest.mark.parametrize("op", BETWEEN)
def test_nodes_between_turns_that_lack_something(op: str) -> None:
    """Or have axes and sizes that there are none of."""
    rng = np.random.default_rng(5)
    given = (["t"], ["t", "t"], ["t", ""], ["t", "w"], ["t", "axes"], ["t", "far"], ["", "t"])
    for inputs, perm, axis in product(
        given, (TO_ROWS, {}, {"perm": [0, 1]}), (None, 3, 9, [9], "a")
    ):
        attributes = {} if axis is None else {"axes" if op == "ReduceMean" else "axis": axis}
        nodes = [
            node("Transpose", "x", "t", **TO_ROWS),
            helper.make_node(op, inputs, ["b"], **attributes),
            node("Transpose", "b", "y", **perm),
        ]  # fmt: skip
        constants = {
            "w": rng.standard_normal((3, 3)).astype(np.float32), "axes": np.array([1, 2]),
            "far": np.array([0, 9, -9, 2**40]),
        }  # fmt: skip
        size = [1, CHANNELS, *SIZE]
        model = model_of(nodes, {"x": (FLOAT, size)}, ["y"], constants, opset=17)
        inputs_of = {"x": rng.standard_normal(size).astype(np.float32)}
        try:
            with network_of(model, threads=1) as network:
                found = network(inputs_of)["y"]
        except HeadraceError:
            continue
        try:
            right = _all_outputs(model, inputs_of)["y"]
        except Exception:  # attributes that the operator does not have
            continue
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-5)
