"""`headrace compress` on graphs that are put together oddly: files run everywhere, and are near.

Whatever a weight or a bias is besides, and whoever reads a value, only products become others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_models import FLOAT, model_of

import headrace
from headrace.errors import HeadraceError, UnsupportedError
from headrace.networks.compression.compress import compress_network
from headrace.networks.compression.names import NewNames, reads

Values = dict[str, np.ndarray]
N = helper.make_node
# How far from the source: of sparsity that leaves nothing out, only sums' order.
WAYS: dict[str, tuple[dict[str, Any], float]] = {
    "int8": ({"format": "int8", "calibrate": True}, 0.03),
    "int8-dynamic": ({"format": "int8-dynamic"}, 0.03),
    "i4_g32": ({"format": "i4_g32"}, 0.2),
    "i4a_g64, calibrated": ({"format": "i4a_g64", "calibrate": True}, 0.2),
    "nothing left out": ({"sparsity": 1e-9, "ends": True, "calibrate": True}, 1e-5),
    "an order of channels": ({"sparsity": 1e-9, "ends": True, "pattern": "4x1"}, 1e-5),
    "sparse int8": ({"format": "int8", "sparsity": 0.1, "calibrate": True}, 0.3),
}


def _floats(*shape: int) -> np.ndarray:
    scale = shape[0] ** -0.5 if len(shape) == 2 else 1
    seed = sum(n * 7**i for i, n in enumerate(shape))
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def _of(*shapes: str, **more: np.ndarray) -> Values:
    """Constants: `w:32,32` is one, of random numbers."""
    found = {}
    for text in shapes:
        name, _, sizes = text.partition(":")
        found[name] = _floats(*map(int, sizes.split(",")))
        found[name] += np.float32(0.01 * len(found))  # no two alike
    return found | more


def _inner(nodes: list[Any], output: str) -> Any:
    return helper.make_graph(
        nodes, "inner", [], [helper.make_tensor_value_info(output, FLOAT, None)]
    )


def _branches() -> tuple[list[Any], list[str], Values]:
    """Both branches read weights, a bias and values of the graph around them."""
    then = _inner([N("Gemm", ["r", "w", "b"], ["t"])], "t")
    other = _inner([N("Gemm", ["a", "w2", "b"], ["u"])], "u")
    nodes = [
        N("Gemm", ["x", "w", "b"], ["a"]), N("Relu", ["a"], ["r"]),
        N("Gemm", ["r", "w2"], ["c"]), N("Relu", ["c"], ["e"]), N("Gemm", ["e", "w3", "b"], ["f"]),
        N("ReduceMax", ["x"], ["most"], keepdims=0), N("Greater", ["most", "zero"], ["is"]),
        N("If", ["is"], ["i"], then_branch=then, else_branch=other), N("Add", ["f", "i"], ["y"]),
    ]  # fmt: skip
    constants = _of("w:32,32", "w2:32,32", "w3:32,32", "b:32", zero=np.float32(0))
    return nodes, ["y"], constants


def _loop() -> tuple[list[Any], list[str], Values]:
    """A product of rows whose number is not known, with a bias behind it."""
    body = helper.make_graph(
        [N("MatMul", ["v", "w"], ["p"]), N("Tanh", ["p"], ["o"]), N("Identity", ["c"], ["d"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("d", TensorProto.BOOL, []),
            helper.make_tensor_value_info("o", FLOAT, None),
        ],
    )
    nodes = [
        N("MatMul", ["x", "w"], ["a"]), N("Relu", ["a"], ["r"]),
        N("Loop", ["three", "", "r"], ["l"], body=body), N("MatMul", ["l", "w2"], ["m"]),
        N("Add", ["m", "b"], ["s"]), N("Relu", ["s"], ["t"]), N("MatMul", ["t", "w3"], ["y"]),
    ]  # fmt: skip
    return nodes, ["y"], _of("w:32,32", "w2:32,32", "w3:32,32", "b:32", three=np.int64(3))


def _chain(first: list[str], second: list[str], *outputs: str, **of: Any) -> Any:
    nodes = [
        N("Gemm", ["x", *first], ["a"], **of), N("Relu", ["a"], ["r"]),
        N("Gemm", ["r", *second], ["y"]),
    ]  # fmt: skip
    return nodes, ["y", *outputs]


GRAPHS: dict[str, tuple[list[Any], list[str], Values]] = {
    "weights of two": (
        [*_chain(["w", "b"], ["w", "b"])[0], N("Gemm", ["y", "v", "b"], ["z"])],
        ["y", "z"],
        _of("w:32,32", "v:32,32", "b:32"),
    ),
    "weights and biases that are outputs": (
        *_chain(["w", "b"], ["v"], "b", "v"), _of("w:32,32", "v:32,32", "b:32"),
    ),
    "weights that are inputs": (*_chain(["w", "b"], ["v"]), _of("w:32,32", "v:32,32", "b:32")),
    "ai.onnx": (*_chain(["w", "b"], ["v"]), _of("w:32,32", "v:32,32", "b:32")),
    "sparse initialisers": (*_chain(["w", "b"], ["v"]), _of("w:32,32", "v:32,32", "b:32")),
    "factors": (
        *_chain(["w", "b"], ["v", "b"], alpha=0.5, beta=2.0), _of("w:32,32", "v:32,32", "b:32"),
    ),
    "a bias of each row": (
        *_chain(["w", "b"], ["v", "c"]), _of("w:32,32", "v:32,32", "b:6,1", "c:6,32"),
    ),
    "no outputs": (
        [*_chain(["w", "b"], ["v"])[0], N("MatMul", ["r", "none"], ["n"])],
        ["y", "n"],
        _of("w:32,32", "v:32,32", "b:32", none=np.zeros((32, 0), np.float32)),
    ),
    "our own names": (
        [
            N("Gemm", ["x", "y_weight", "x_scale"], ["x_quantized"]),
            N("Relu", ["x_quantized"], ["x_dequantized"]),
            N("Gemm", ["x_dequantized", "y_weight_n4", "y_weight_scale"], ["y_bias"]),
            N("Relu", ["y_bias"], ["x_zero_point"]), N("Gemm", ["x_zero_point", "v"], ["y_int32"]),
            N("Relu", ["y_int32"], ["y_float"]), N("Gemm", ["y_float", "y_weight_scales"], ["y"]),
        ],
        ["y"],
        _of("y_weight:32,32", "x_scale:32", "y_weight_n4:32,32", "y_weight_scale:32", "v:32,32",
            "y_weight_scales:32,32"),
    ),
    "biases behind products": (
        [
            N("Unsqueeze", ["x", "at"], ["x3"]), N("MatMul", ["x3", "w"], ["a"]),
            N("Add", ["a", "b"], ["s"]), N("Relu", ["s"], ["r"]), N("MatMul", ["r", "v"], ["m"]),
            N("Add", ["c", "m"], ["t"]), N("Tanh", ["t"], ["u"]), N("MatMul", ["u", "q"], ["y"]),
        ],
        ["y"],
        _of("w:32,32", "v:32,32", "q:32,32", "b:32", "c:32", at=np.array([0], np.int64)),
    ),
    "floats behind products": (
        [
            N("MatMul", ["x", "w"], ["a"]), N("Relu", ["a"], ["r"]), N("MatMul", ["r", "v"], ["m"]),
            N("Relu", ["m"], ["s"]), N("Softmax", ["s"], ["y"]),
        ],
        ["y"],
        _of("w:32,32", "v:32,32"),
    ),
    "means far from zero": (
        *_chain(["w", "b"], ["v", "b"]), _of("w:32,32", "v:32,32", b=np.full(32, 1e4, np.float32)),
    ),
    "branches": _branches(),
    "a loop": _loop(),
}  # fmt: skip


def _model(name: str) -> Any:
    nodes, outputs, constants = GRAPHS[name]
    model = model_of(nodes, {"x": (FLOAT, [6, 32])}, outputs, constants, opset=17)
    if name == "weights that are inputs":
        model.graph.input.extend(
            helper.make_tensor_value_info(n, FLOAT, list(constants[n].shape)) for n in ("w", "b")
        )
    if name == "ai.onnx":
        for node in model.graph.node:
            node.domain = "ai.onnx"
    if name == "sparse initialisers":
        for held in list(model.graph.initializer)[:2]:
            model.graph.sparse_initializer.append(
                _sparse(held, len(model.graph.sparse_initializer))
            )
            model.graph.initializer.remove(held)
    return model


def _sparse(held: Any, in_axes: int) -> Any:
    """Without its negative weights; places are numbers, or one for each axis."""
    dense = numpy_helper.to_array(held)
    places = np.argwhere(dense > 0) if in_axes else np.flatnonzero(dense > 0)
    return helper.make_sparse_tensor(
        numpy_helper.from_array(dense[dense > 0], held.name),
        numpy_helper.from_array(places.astype(np.int64), f"{held.name}_places"), list(dense.shape),
    )  # fmt: skip


def _expected(path: Path, x: np.ndarray) -> Values:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options)
    assert [one.name for one in session.get_inputs()] == ["x"]
    names = [one.name for one in session.get_outputs()]
    return dict(zip(names, session.run(names, {"x": x}), strict=True))


def _off(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    size = float(np.linalg.norm(expected))
    return float(np.linalg.norm(found - expected)) / size if size else 0.0


def _inputs(folder: Path, count: int = 12) -> Path:
    rng = np.random.default_rng(3)
    folder.mkdir()
    for i in range(count):
        np.save(folder / f"{i}.npy", rng.standard_normal((6, 32)).astype(np.float32))
    return folder


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("graph", GRAPHS)
def test_odd_graphs(graph: str, way: str, tmp_path: Path) -> None:
    source, target = tmp_path / "a.onnx", tmp_path / "b.onnx"
    onnx.save(_model(graph), source)
    options, limit = WAYS[way]
    inputs = _inputs(tmp_path / "inputs")
    given = options | ({"calibrate": inputs} if "calibrate" in options else {})
    try:
        done = compress_network(source, target, **given, evaluate=inputs)
    except UnsupportedError as error:  # others read its weights, or rows have biases of their own
        assert "has no" in str(error) and not target.exists()
        return
    x = np.random.default_rng(4).standard_normal((6, 32)).astype(np.float32)
    expected, found = _expected(source, x), _expected(target, x)
    assert list(found) == list(expected)
    assert done.price is not None
    errors = done.price["outputs"]
    for name, array in expected.items():
        assert _off(found[name], array) <= limit, name
        assert (errors[name]["relative_error"] or 0) <= limit
    with headrace.load(target, threads=1) as network:
        assert [port.name for port in network.inputs] == ["x"]
        here = network({"x": x})
    for name, array in found.items():
        assert _off(here[name], array) < 1e-5, name
    for name in set(expected) & set(GRAPHS[graph][2]):
        np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.parametrize("way", [{"format": "int8"}, {"sparsity": 0.5, "ends": True}])
@pytest.mark.parametrize("number", ["inf", "nan"])
def test_values_that_are_no_numbers(number: str, way: dict[str, Any], tmp_path: Path) -> None:
    constants = _of("w:32,32", "v:32,32", n=np.float32(number))
    nodes = [
        N("Gemm", ["x", "w"], ["a"]), N("Mul", ["a", "n"], ["m"]), N("Gemm", ["m", "v"], ["y"]),
    ]  # fmt: skip
    onnx.save(model_of(nodes, {"x": (FLOAT, [6, 32])}, ["y"], constants), tmp_path / "a.onnx")
    with pytest.raises(UnsupportedError, match=r"m.* number"):
        compress_network(
            tmp_path / "a.onnx", tmp_path / "b.onnx", calibrate=_inputs(tmp_path / "in"), **way
        )


def test_inputs_that_are_single_numbers_and_outputs_of_any_shape(tmp_path: Path) -> None:
    nodes = [
        N("Gemm", ["x", "w"], ["a"]), N("Clip", ["a", "", "most"], ["c"]),
        N("Gemm", ["c", "v"], ["y"]), N("Greater", ["y", "zero"], ["is"]),
        N("NonZero", ["is"], ["found"]),
    ]  # fmt: skip
    model = model_of(
        nodes, {"x": (FLOAT, ["n", 32]), "most": (FLOAT, [])}, ["y", "found"],
        _of("w:32,32", "v:32,32", zero=np.float32(0)),
    )  # fmt: skip
    onnx.save(model, tmp_path / "a.onnx")
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(5)
    for i in range(8):
        x = rng.standard_normal((1, 32)).astype(np.float32)
        np.savez(tmp_path / "in" / f"{i}.npz", x=x, most=np.float32(i))
    done = compress_network(
        tmp_path / "a.onnx", tmp_path / "b.onnx", format="int8", calibrate=tmp_path / "in",
        evaluate=tmp_path / "in",
    )  # fmt: skip
    assert done.price is not None
    assert 0 < done.price["outputs"]["y"]["relative_error"] < 0.05
    assert set(done.price["outputs"]["found"]) <= {"relative_error"}


def test_operator_sets_that_are_not_brought_up_to_date(tmp_path: Path) -> None:
    nodes = [N("Upsample", ["x"], ["u"], scales=[1.0, 2.0]), N("MatMul", ["u", "w"], ["y"])]
    model = model_of(nodes, {"x": (FLOAT, [6, 32])}, ["y"], _of("w:64,32"), opset=7)
    onnx.save(model, tmp_path / "a.onnx")
    try:
        compress_network(tmp_path / "a.onnx", tmp_path / "b.onnx", format="int8-dynamic")
    except HeadraceError as error:
        assert "operator set 7" in str(error)


def test_weights_are_read_by_what_is_named() -> None:
    """Inner graphs count, and what they make themselves does not."""
    model = _model("branches")
    found = reads(model)
    assert (found["w"], found["w2"], found["b"], found["r"], found["t"]) == (2, 2, 3, 2, 0)
    names = NewNames(model)
    assert [names.like(n) for n in ("t", "t", "new", "new")] == ["t_", "t__", "new", "new_"]
