"""Graphs that are easily read as something else give what onnxruntime does, or are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnx_models import FLOAT, model_of, save

from headrace.errors import ModelFileError, UnsupportedError
from headrace.micro.arithmetic import computed
from headrace.micro.plan import plan_network
from headrace.micro.ports import from_chip, to_chip
from headrace.micro.reading import read_network
from headrace.targets.target import microcontrollers

CHIP = microcontrollers()["cortex-m55"]
RNG = np.random.default_rng(5)
node = helper.make_node
CONSTANTS: dict[str, np.ndarray] = {
    "w": RNG.standard_normal((4, 4, 1, 1)).astype(np.float32) / 2,
    "k": RNG.standard_normal((4, 1, 1)).astype(np.float32),
    "scale": np.array(0.0625, np.float32),
    "other": np.array(0.125, np.float32),
    "zero": np.array(3, np.int8),
    "pixels": np.array([1, 1, 1, 4]),
    "rows": np.array([1, 4, 1]),
    "image": np.array([1, 4, 1, 1]),
    "axes": np.array([2, 3]),
    "middle": np.array(128, np.uint8),
    "around": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    "half": np.array(0.5, np.float32),
    "true": np.array(True),
}
CONV = node("Conv", ["x", "w"], ["c"])
MEAN = node("GlobalAveragePool", ["x"], ["m"])
UNSIGNED = node("QuantizeLinear", ["x", "scale", "middle"], ["q"])
QUANTIZE = node("QuantizeLinear", ["x", "scale", "zero"], ["q"])


def model(nodes: list[Any], outputs: list[str], elem_type: int = FLOAT) -> Any:
    return model_of(nodes, {"x": (elem_type, [1, 4, 4, 6])}, outputs, CONSTANTS)


@pytest.mark.parametrize(
    ("nodes", "outputs"),
    [
        ([CONV, node("Dropout", ["c"], ["d"]), node("Relu", ["d"], ["y"])], ["y", "c"]),
        ([CONV, node("Dropout", ["c"], ["d"]), node("Add", ["d", "k"], ["y"])], ["y", "c"]),
        (
            [
                CONV,
                node("Dropout", ["c"], ["d"]),
                node("Relu", ["d"], ["r"]),
                node("Add", ["r", "c"], ["y"]),
            ],
            ["y"],
        ),
    ],
    ids=["bounds", "a constant", "read again"],
)
def test_a_layer_takes_in_nothing_that_others_see(
    nodes: list[Any], outputs: list[str], tmp_path: Path
) -> None:
    """A value that has two names."""
    same(model(nodes, outputs), RNG.standard_normal((1, 4, 4, 6)).astype(np.float32), tmp_path)


def same(made: Any, x: np.ndarray, tmp_path: Path) -> None:
    network = read_network(save(made, tmp_path / "x.onnx"))
    found = from_chip(network, computed(network, CHIP, to_chip(network, {"x": x})))
    session = onnxruntime.InferenceSession(made.SerializeToString())
    for output, expected in zip(session.get_outputs(), session.run(None, {"x": x}), strict=True):
        assert found[output.name].dtype == expected.dtype
        # Halves have 11 bits, and the sums are of few products.
        np.testing.assert_allclose(found[output.name], expected, rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize("kind", ["GlobalAveragePool", "ReduceMean", "MaxPool", "Concat"])
def test_channels_that_become_pixels(kind: str, tmp_path: Path) -> None:
    reads, more = {
        "GlobalAveragePool": (["t"], {}), "ReduceMean": (["t", "axes"], {}),
        "MaxPool": (["t"], {"kernel_shape": [1, 2]}), "Concat": (["t", "t"], {"axis": 1}),
    }[kind]  # fmt: skip
    nodes = [MEAN, node("Reshape", ["m", "pixels"], ["t"]), node(kind, reads, ["y"], **more)]
    same(model(nodes, ["y"]), RNG.standard_normal((1, 4, 4, 6)).astype(np.float32), tmp_path)


@pytest.mark.parametrize("axes", [[], [0, 2, -1], [3, 1, 2]])
def test_a_mean_of_dimensions_of_one_besides(axes: list[int], tmp_path: Path) -> None:
    """Of one channel; no axes are all."""
    nodes = [node("Conv", ["x", "w1"], ["c"]), node("ReduceMean", ["c", "axes"], ["y"])]
    constants = {"w1": CONSTANTS["w"][:1], "axes": np.array(axes, np.int64)}
    made = model_of(nodes, {"x": (FLOAT, [1, 4, 4, 6])}, ["y"], constants)
    same(made, RNG.standard_normal((1, 4, 4, 6)).astype(np.float32), tmp_path)


@pytest.mark.parametrize("kind", ["Softmax", "Sigmoid", "LeakyRelu"])
def test_channels_that_stay_last(kind: str, tmp_path: Path) -> None:
    nodes = [CONV, node("Transpose", ["c"], ["t"], perm=[0, 2, 3, 1]), node(kind, ["t"], ["y"])]
    same(model(nodes, ["y"]), RNG.standard_normal((1, 4, 4, 6)).astype(np.float32), tmp_path)


@pytest.mark.parametrize("kind", ["Softmax", "Sigmoid"])
def test_channels_of_one_pixel(kind: str, tmp_path: Path) -> None:
    """Of a row that became an image."""
    more = {"axis": 1} if kind == "Softmax" else {}
    nodes = [
        MEAN, node("Flatten", ["m"], ["f"]), node("Reshape", ["f", "image"], ["t"]),
        node(kind, ["t"], ["s"], **more), node("Mul", ["x", "s"], ["y"]),
    ]  # fmt: skip
    same(model(nodes, ["y"]), RNG.standard_normal((1, 4, 4, 6)).astype(np.float32), tmp_path)


@pytest.mark.parametrize("elem_type", [TensorProto.INT8, TensorProto.UINT8])
def test_codes_without_a_zero_point(elem_type: int, tmp_path: Path) -> None:
    """It is 0 of the type that the codes have."""
    dtype = helper.tensor_dtype_to_np_dtype(elem_type)
    codes = np.resize(np.arange(256), (1, 4, 4, 6)).astype(np.uint8).view(dtype)
    back = node("DequantizeLinear", ["x", "scale"], ["d"])
    same(model([back, node("Relu", ["d"], ["y"])], ["y"], elem_type), codes, tmp_path)
    numbers = (RNG.standard_normal((1, 4, 4, 6)) * 4).astype(np.float32)
    codes_of = node("QuantizeLinear", ["x", "scale"], ["q"], output_dtype=elem_type)
    nodes = [codes_of, node("DequantizeLinear", ["q", "scale"], ["y"])]
    same(model(nodes, ["y", "q"]), numbers, tmp_path)


def test_inputs_become_codes_as_in_onnxruntime(tmp_path: Path) -> None:
    """Also halfway between two."""
    scale = np.float32(2.7 / 255)
    halfway = (np.arange(-1000, 1000) / 2).astype(np.float32) * scale
    x = np.append(halfway, np.float32([1e38, -np.inf, 0, 1e-40])).reshape(1, -1)
    pair = {"scale": scale, "zero": np.array(3, np.int8)}
    nodes = [
        node("QuantizeLinear", ["x", *pair], ["q"]),
        node("DequantizeLinear", ["q", *pair], ["y"]),
    ]
    made = model_of(nodes, {"x": (FLOAT, list(x.shape))}, ["y"], pair)
    (expected,) = onnxruntime.InferenceSession(made.SerializeToString()).run(None, {"x": x})
    network = read_network(save(made, tmp_path / "x.onnx"))
    found = from_chip(network, computed(network, CHIP, to_chip(network, {"x": x})))
    np.testing.assert_array_equal(found["y"], expected)
    with pytest.raises(ValueError, match="x has NaN, which no code stands for"):
        to_chip(network, {"x": x * np.nan})


def of_codes(op: str, reads: list[str], scale: float, weights: float = 0.01) -> Any:
    """A model of an operator of codes of a scale of 0.0625, which makes codes of another scale."""
    pair, made = ["scale", "zero"], ["made", "zero"]
    nodes = [
        QUANTIZE,
        node("DequantizeLinear", ["q", *pair], ["d"]),
        node("DequantizeLinear", ["codes", "each"], ["v"], axis=0),
        node(op, reads, ["r"]),
        node("QuantizeLinear", ["r", *made], ["p"]),
        node("DequantizeLinear", ["p", *made], ["y"]),
    ]
    constants = CONSTANTS | {
        "made": np.array(scale, np.float32),
        "codes": np.ones((4, 4, 1, 1), np.int8),
        "each": np.array([0.01, weights, 0.01, 0.01], np.float32),
    }
    return model_of(nodes, {"x": (FLOAT, [1, 4, 4, 6])}, ["y"], constants)


@pytest.mark.parametrize("scale", [1e-6, 1e-9, 1e-12, 1e-30, 1e30])
def test_codes_of_far_smaller_scales(scale: float, tmp_path: Path) -> None:
    """All but 0 are at an end."""
    x = RNG.standard_normal((1, 4, 4, 6)).astype(np.float32)
    made = of_codes("Relu", ["d"], scale)
    network = read_network(save(made, tmp_path / "x.onnx"))
    found = from_chip(network, computed(network, CHIP, to_chip(network, {"x": x})))["y"]
    (expected,) = onnxruntime.InferenceSession(made.SerializeToString()).run(None, {"x": x})
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_scales_that_no_sum_holds(tmp_path: Path) -> None:
    conv = of_codes("Conv", ["d", "v"], 0.1, 1e20)
    mean = of_codes("GlobalAveragePool", ["d"], 1e-9)
    for made, words in ((conv, "more than 32 bits hold"), (mean, "codes of scale 1e-09 of such")):
        network = read_network(save(made, tmp_path / "x.onnx"))
        with pytest.raises(UnsupportedError, match=words):
            plan_network(network, CHIP)


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        (
            [
                CONV,
                MEAN,
                node("Reshape", ["m", "rows"], ["f"]),
                node("Mul", ["c", "f"], ["y"]),
            ],
            "a factor for each channel",
        ),
        ([QUANTIZE, node("Cast", ["q"], ["y"], to=FLOAT)], "become numbers by DequantizeLinear"),
        (
            [
                QUANTIZE,
                node("QuantizeLinear", ["x", "other", "zero"], ["p"]),
                node("Concat", ["q", "p"], ["y"], axis=1),
            ],
            "codes that mean different numbers",
        ),
        (
            [
                node(
                    "AveragePool", ["x"], ["y"], kernel_shape=[2, 2], auto_pad="SAME_UPPER",
                    count_include_pad=1,
                ),
            ],
            "counts pads of auto_pad",
        ),
        (
            [node("Conv", ["x", "w"], ["y"], auto_pad="SAME_UPPER", strides=[2, 3])],
            "leave pixels out",
        ),
        ([UNSIGNED, node("Pad", ["q", "around"], ["y"])], "zeros around rows and columns"),
        ([node("Relu", ["x"], ["\0"]), node("Relu", ["\0"], ["y"])], "name with a zero byte"),
        ([node("Dropout", ["x", "half", "true"], ["y"])], "training_mode is not false"),
        ([node("MaxPool", ["x"], ["y"], kernel_shape=[1, 1], pads=[1, 0, 0, 0])], "pads alone"),
        ([node("Conv", ["x", "w"], ["y"], strides=[1 << 62, 1])], r"strides \[4611686018427387904"),
        ([node("ReduceMean", ["x"], ["y"])], r"a mean of axes \[0, 1, 2, 3\]"),
    ],
    ids=[
        "rows", "cast", "two scales", "pads behind", "fewer pads than none",
        "codes of 0", "zero byte", "learning", "nothing in a window",
        "a stride of 2^62", "a mean of all",
    ],
)  # fmt: skip
def test_what_would_be_wrong_is_refused(nodes: Any, words: str, tmp_path: Path) -> None:
    """Factors of rows that are as many as channels; codes as numbers; codes of 0 as the number."""
    with pytest.raises(UnsupportedError, match=rf"x\.onnx: .*{words}"):
        read_network(save(model(nodes, ["y"]), tmp_path / "x.onnx"))


def lacking(op: str, reads: list[str], **attributes: Any) -> list[Any]:
    return [CONV, node(op, reads, ["y"], **attributes)]


@pytest.mark.parametrize(
    "nodes",
    [
        lacking("Add", ["c"]), lacking("Concat", []), lacking("Identity", []),
        lacking("Relu", []), lacking("QuantizeLinear", ["c"]), lacking("MaxPool", ["c"]),
        lacking("Softmax", ["c"], axis=[1]), lacking("Conv", ["c"]),
        [node("DequantizeLinear", ["x"], ["y"])],
    ],
    ids=lambda nodes: nodes[-1].op_type,
)  # fmt: skip
def test_nodes_that_lack_something(nodes: list[Any], tmp_path: Path) -> None:
    elem_type = TensorProto.INT8 if nodes[0] is not CONV else FLOAT
    op = nodes[-1].op_type
    with pytest.raises(ModelFileError, match=rf"x\.onnx: (.*{op}( y|\) has)|its input)"):
        read_network(save(model(nodes, ["y"], elem_type), tmp_path / "x.onnx"))


def test_a_bias_that_is_computed(tmp_path: Path) -> None:
    nodes = [
        QUANTIZE, node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        node("DequantizeLinear", ["codes", "scale"], ["dw"]), node("Conv", ["d", "dw", "d"], ["y"]),
    ]  # fmt: skip
    constants = CONSTANTS | {"codes": np.ones((4, 4, 1, 1), np.int8)}
    made = model_of(nodes, {"x": (FLOAT, [1, 4, 4, 6])}, ["y"], constants)
    with pytest.raises(UnsupportedError, match=r"x\.onnx: Conv y: 'd' is no constant"):
        read_network(save(made, tmp_path / "x.onnx"))


def test_a_batch_norm_without_variance(tmp_path: Path) -> None:
    reads = ["c", "half4", "half4", "half4", "below"]
    below = np.array([1, 1, -1, 1], np.float32)
    constants = CONSTANTS | {"half4": np.full(4, 0.5, np.float32), "below": below}
    nodes = [CONV, node("BatchNormalization", reads, ["y"])]
    made = model_of(nodes, {"x": (FLOAT, [1, 4, 4, 6])}, ["y"], constants)
    with pytest.raises(UnsupportedError, match=r"a variance of -1; it has to be above 0"):
        read_network(save(made, tmp_path / "x.onnx"))
