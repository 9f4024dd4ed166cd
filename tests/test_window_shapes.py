"""Windows whose attributes contradict each other, or say more than one thing of sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator
from onnx_models import FLOAT, model_of
from test_native_operators import RNG, constant, node

from headrace.errors import HeadraceError
from headrace.networks.network import network_of


def _model(op: str, shape: tuple[int, ...], w: tuple[int, ...], opset: int, **of: Any) -> Any:
    window = [node(op, "x w" if w else "x", "p", **of), node("Relu", "p")]
    constants = {"w": constant(*w)} if w else {}
    return model_of(window, {"x": (FLOAT, list(shape))}, ["y"], constants, opset)


def _same(model: Any, shape: tuple[int, ...]) -> None:
    """As onnxruntime does, which changes nothing of the graph before."""
    x = RNG.standard_normal(shape).astype(np.float32)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    (right,) = session.run(None, {"x": x})
    with network_of(model, threads=1) as network:
        found = network({"x": x})["y"]
    assert found.shape == right.shape
    np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("opset", [11, 22])
@pytest.mark.parametrize(
    ("op", "attributes"),
    [
        ("MaxPool", {"kernel_shape": [2, 3]}), ("AveragePool", {"kernel_shape": [3, 2]}),
        ("AveragePool", {"kernel_shape": [3, 2], "count_include_pad": 1, "ceil_mode": 1}),
    ],
)  # fmt: skip
def test_pads_where_nothing_is_padded(op: str, attributes: dict[str, Any], opset: int) -> None:
    of = {"auto_pad": "VALID", "pads": [1, 0, 1, 1], **attributes}
    _same(_model(op, (2, 3, 9, 8), (), opset, **of), (2, 3, 9, 8))


def test_pads_of_a_convolution_where_nothing_is_padded() -> None:
    """What onnxruntime refuses is what onnx says that it is: no pads."""
    x = RNG.standard_normal((2, 3, 9, 8)).astype(np.float32)
    model = _model("Conv", x.shape, (5, 3, 2, 3), 11, auto_pad="VALID", pads=[1, 0, 1, 1])
    (right,) = ReferenceEvaluator(model).run(None, {"x": x})
    with network_of(model, threads=1) as network:
        np.testing.assert_allclose(network({"x": x})["y"], right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool", "LpPool"])
def test_dilations_where_pads_keep_the_size(op: str) -> None:
    of = {"auto_pad": "SAME_LOWER", "kernel_shape": [4, 1], "dilations": [2, 1]}
    _same(_model(op, (1, 16, 8, 7), (), 22, **of), (1, 16, 8, 7))


@pytest.mark.parametrize(
    ("shape", "w", "attributes"),
    [
        ((1, 3, 12, 11), (3, 2, 3, 3), {"auto_pad": "SAME_UPPER", "output_shape": [11, 12]}),
        ((1, 3, 9, 13), (3, 8, 2, 2),
         {"auto_pad": "SAME_UPPER", "strides": [2, 2], "output_padding": [1, 0]}),
        ((2, 6, 11), (6, 8, 1), {"strides": [1], "group": 2, "output_shape": [10]}),
    ],
)  # fmt: skip
def test_sizes_of_transposed_convolutions(
    shape: tuple[int, ...], w: tuple[int, ...], attributes: dict[str, Any]
) -> None:
    _same(_model("ConvTranspose", shape, w, 11, **attributes), shape)


def test_windows_larger_than_the_image_are_refused() -> None:
    """The size of what they make is rounded up to one, by onnx."""
    of = {"strides": [2, 3], "dilations": [2, 3]}
    model = _model("Conv", (1, 3, 13, 5), (4, 3, 2, 3), 13, **of)
    x = np.zeros((1, 3, 13, 5), np.float32)
    with pytest.raises(HeadraceError), network_of(model, threads=1) as network:
        network({"x": x})


def test_windows_larger_than_all_there_is() -> None:
    """Nothing, where sizes are rounded up; and beside a pool that divides by its size."""
    shape = (1, 4, 1, 5)
    _same(_model("MaxPool", shape, (), 24, kernel_shape=[4, 5], strides=[3, 2], ceil_mode=1), shape)
    shape = (1, 16, 2, 1)
    _same(_model("MaxPool", shape, (), 17, kernel_shape=[5, 2], pads=[2, 1, 0, 1]), shape)


def test_windows_whose_dilations_pads_do_not_count() -> None:
    shape = (3, 32, 2, 7)
    of = {"kernel_shape": [3, 2], "dilations": [2, 3], "count_include_pad": 1}
    _same(_model("AveragePool", shape, (), 23, auto_pad="SAME_LOWER", **of), shape)


def test_pools_and_norms_of_nothing_are_refused_or_nothing() -> None:
    """onnxruntime ends the process."""
    window = node("LpPool", "x", "p", kernel_shape=[5, 3])
    x = RNG.standard_normal((1, 16, 2, 6)).astype(np.float32)
    for nodes in (
        [window, node("GlobalAveragePool", "p")],
        [window, node("InstanceNormalization", "p w w")],
    ):
        constants = {"w": constant(16)}
        model = model_of(nodes, {"x": (FLOAT, list(x.shape))}, ["y"], constants, 17)
        try:
            with network_of(model, threads=1) as network:
                assert network({"x": x})["y"].shape in ((1, 16, 0, 4), (1, 16, 1, 1))
        except HeadraceError:
            pass
