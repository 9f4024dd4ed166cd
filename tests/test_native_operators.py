"""Operators of convolutional networks on kernels of ours, against onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import helper
from onnx_models import FLOAT, model_of

from headrace.networks.native import NativeRegion
from headrace.networks.network import Network, network_of

X = {"x": (FLOAT, [2, 20, 7, 9])}
RNG = np.random.default_rng(5)


def constant(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) + 0.1).astype(np.float32)


def expected(model: Any, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found: list[np.ndarray] = session.run(None, inputs)
    return found


def region(network: Network, inputs: dict[str, Any]) -> NativeRegion:
    (run,) = network.plan(inputs).runs
    assert isinstance(run, NativeRegion)
    return run


def check(
    nodes: Any, shapes: Any, outputs: Any = ("y",), constants: Any = None, *, opset: int = 21,
    kernels: list[str] | None = None, threads: int = 2,
) -> NativeRegion:  # fmt: skip
    """Run on our kernels alone, and as onnxruntime does; `kernels` are those wanted."""
    model = model_of(nodes, shapes, list(outputs), constants, opset)
    random = np.random.default_rng(3)
    inputs = {
        name: (random.standard_normal(shape) * 3).astype(np.float32)
        for name, (_, shape) in shapes.items()
    }
    with network_of(model, threads=threads) as network:
        found = network(inputs)
        run = region(network, inputs)
        for name, right in zip(outputs, expected(model, inputs), strict=True):
            size = float(np.abs(right).max())
            np.testing.assert_allclose(found[name], right, rtol=2e-5, atol=2e-5 + size * 3e-6)
        made = [one.kernel for one in run.operations if one.kernel != "images_border"]
        assert kernels is None or made == kernels
    return run


def node(op: str, inputs: str, outputs: str = "y", **attributes: Any) -> Any:
    return helper.make_node(op, inputs.split(), outputs.split(), **attributes)


@pytest.mark.parametrize(
    ("op", "attributes"),
    [
        ("Sigmoid", {}), ("HardSigmoid", {"alpha": 0.3, "beta": 0.4}), ("HardSwish", {}),
        ("LeakyRelu", {"alpha": 0.2}), ("GlobalAveragePool", {}),
        ("MaxPool", {"kernel_shape": [5, 5], "pads": [2, 2, 2, 2]}),
        ("MaxPool", {"kernel_shape": [2, 2], "auto_pad": "SAME_LOWER"}),
        ("MaxPool", {"kernel_shape": [3, 2], "dilations": [2, 3], "pads": [1, 1, 2, 0]}),
        ("AveragePool", {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
        ("AveragePool",
         {"kernel_shape": [3, 2], "pads": [1, 1, 1, 0], "count_include_pad": 1}),
        ("MaxPool", {"kernel_shape": [3, 3], "strides": [2, 3], "ceil_mode": 1}),
        ("AveragePool", {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
        ("AveragePool",
         {"kernel_shape": [2, 3], "strides": [3, 2], "pads": [1, 0, 0, 1], "ceil_mode": 1}),
    ],
)  # fmt: skip
def test_of_one_value(op: str, attributes: dict[str, Any]) -> None:
    check([node(op, "x", **attributes)], X)


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div"])
@pytest.mark.parametrize("shape", [(), (1,), (20, 1, 1), (1, 20, 1, 1)], ids=str)
@pytest.mark.parametrize("order", ["x c", "c x"])
def test_with_a_constant(op: str, shape: tuple[int, ...], order: str) -> None:
    if op == "Div" and order == "c x":
        order = "x c"  # the other way it is the host's
    check([node(op, order)], X, constants={"c": constant(*shape)}, kernels=["images_map"])


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Max", "Min"])
@pytest.mark.parametrize("shape", [[2, 20, 7, 9], [2, 20, 1, 1], [1, 20, 1, 1]], ids=str)
def test_of_two_values(op: str, shape: list[int]) -> None:
    shapes = X | {"z": (FLOAT, shape)}
    check([node(op, "x z", "a"), node(op, "z x", "b"), node("Add", "a b")], shapes)


@pytest.mark.parametrize(
    ("op", "given", "names"),
    [
        ("Conv", {"w": (20, 20, 1, 1)}, "weights bias"),
        ("Conv", {"w": (20, 1, 3, 3)}, "weights bias"),
        ("LayerNormalization", {"w": (9,)}, "weight bias"),
        ("Slice", {}, "images rows columns fill table"),
        ("Resize", {}, "rows columns"),
        ("Add", {"w": (7, 9)}, "constant"),
        ("Mul", {"w": (20, 1, 1)}, "scales shifts"),
    ],
)  # fmt: skip
def test_values_that_are_called_as_weights_of_kernels_are(op: str, given: Any, names: str) -> None:
    """A kernel read its weights in place of the value."""
    constants = {name: constant(*shape) for name, shape in given.items()}
    for name in names.split():
        shape = [2, 7, 9] if op == "LayerNormalization" else [2, 20, 7, 9]
        more: dict[str, Any] = {}
        if op == "Conv":
            more["group"] = 20 // constants["w"].shape[1]
        made, more = node(op, " ".join([name, *constants]), **more), {}
        if op == "Resize":
            made.input.extend(["", "by"])
            more = {"by": np.array([1, 1, 2, 2], np.float32)}
        if op == "Slice":
            made.input.extend(["starts", "ends", "axes", "steps"])
            axis = 1 if name == "table" else 2
            held = {"starts": 0, "ends": 7, "axes": axis, "steps": 2}
            more = {key: np.array([value]) for key, value in held.items()}
        check([made], {name: (FLOAT, shape)}, constants=constants | more)


def test_batch_normalisation() -> None:
    names = ("scale", "summand", "mean", "variance")
    constants = {name: constant(20) for name in names}
    constants["variance"] = np.abs(constants["variance"])
    norm = node("BatchNormalization", "x " + " ".join(names), epsilon=1e-3)
    check([norm], X, constants=constants, kernels=["images_map"])
    constants["w"] = constant(20, 20, 3, 3) / 10
    for group, kernel in ((1, "convolution_f32"), (20, "depthwise_f32")):
        constants["w"] = constant(20, 20 // group, 3, 3) / 10
        conv = node("Conv", "x w", "c", pads=[1, 1, 1, 1], group=group)
        norm = node("BatchNormalization", "c " + " ".join(names), epsilon=1e-3)
        check([conv, norm, node("Relu", "y", "z")], X, ["z"], constants, kernels=[kernel])


@pytest.mark.parametrize(
    ("groups", "read", "written"), [(2, 20, 32), (5, 20, 20), (4, 20, 8), (20, 20, 40)]
)
def test_convolutions_in_groups(groups: int, read: int, written: int) -> None:
    w = constant(written, read // groups, 3, 3)
    conv = node("Conv", "x w b", "c", group=groups, pads=[1, 0, 1, 1], strides=[2, 1])
    constants = {"w": w, "b": constant(written)}
    check([conv, node("Sigmoid", "c")], X, constants=constants, kernels=["convolution_f32"])


@pytest.mark.parametrize(
    ("taps", "strides", "pads"),
    [((2, 2), (2, 2), [0] * 4), ((4, 4), (2, 2), [1] * 4), ((3, 2), (1, 2), [1, 0, 1, 0]),
     ((6, 4), (2, 2), [2, 1, 2, 1]), ((5, 3), (3, 3), [1, 0, 1, 0])],
)  # fmt: skip
@pytest.mark.parametrize("channels", [18, 3, 1])
def test_transposed_convolutions(taps: Any, strides: Any, pads: Any, channels: int) -> None:
    constants = {"w": constant(20, channels, *taps), "b": constant(channels)}
    constants["c"] = constant(1, channels, 1, 1)
    nodes = [
        node("ConvTranspose", "x w b", "t", strides=strides, pads=pads),
        node("Mul", "t c", "m"), node("Relu", "m", "r"), node("Add", "r r"),
    ]  # fmt: skip
    kernels = ["convolution_f32", "images_add"]
    if channels < 9:
        kernels = ["convolution_f32", "images_spread", "images_add", "images_add"]
    check(nodes, X, constants=constants, kernels=kernels)


@pytest.mark.parametrize("height", [8, 7])
def test_a_map_of_one_channel(height: int) -> None:
    """It is written as ONNX has it, if it fills vectors."""
    constants = {"w": constant(20, 1, 2, 2), "b": constant(1, 1, 1, 1)}
    nodes = [
        node("ConvTranspose", "x w", "a", strides=[2, 2]), node("Add", "a b", "c"),
        node("Sigmoid", "c"),
    ]  # fmt: skip
    kernels = ["convolution_f32", "images_spread"]
    run = check(nodes, {"x": (FLOAT, [1, 20, height, 9])}, constants=constants, kernels=kernels)
    assert ("y" in run.layout.given) == (height == 8)


# ---- what becomes the last step of a convolution --------------------------------------------


def silu(x: str, y: str) -> list[Any]:
    return [node("Sigmoid", x, f"{y}_s"), node("Mul", f"{x} {y}_s", y)]


def hard_swish(form: int, x: str, y: str) -> list[Any]:
    if form == 0:
        return [node("HardSwish", x, y)]
    if form == 1:
        return [node("HardSigmoid", x, f"{y}_g", alpha=1 / 6), node("Mul", f"{y}_g {x}", y)]
    gate = [node("Add", f"{x} three", f"{y}_a"), node("Clip", f"{y}_a zero six", f"{y}_c")]
    if form == 2:
        return [*gate, node("Mul", f"{x} {y}_c", f"{y}_m"), node("Div", f"{y}_m six", y)]
    return [*gate, node("Div", f"{y}_c six", f"{y}_d"), node("Mul", f"{y}_d {x}", y)]


SCALARS = {name: np.float32(v) for name, v in (("zero", 0), ("three", 3), ("six", 6))}


@pytest.mark.parametrize("form", range(4))
@pytest.mark.parametrize("group", [1, 20])
def test_hard_swish_however_it_is_spelt(form: int, group: int) -> None:
    constants = {"w": constant(20, 20 // group, 3, 3), "a": np.float32(0.7), "b": constant(1)}
    nodes = [
        node("Conv", "x w", "c", group=group, pads=[1] * 4), *hard_swish(form, "c", "h"),
        node("Mul", "a h", "m"), node("Add", "m b"),
    ]  # fmt: skip
    kernel = "convolution_f32" if group == 1 else "depthwise_f32"
    check(nodes, X, constants=constants | SCALARS, kernels=[kernel])


def test_silu_and_then_a_sum() -> None:
    constants = {"w": constant(20, 20, 1, 1), "v": constant(20, 1, 3, 3)}
    nodes = [
        node("Conv", "x w", "c"), *silu("c", "d"), node("Add", "x d", "e"),
        node("Conv", "e v", "f", group=20, pads=[1] * 4), *silu("f", "g"),
        node("Add", "g e", "h"), node("Clip", "h zero six"),
    ]  # fmt: skip
    kernels = ["convolution_f32", "depthwise_f32"]
    check(nodes, X, constants=constants | SCALARS, kernels=kernels)


def test_what_is_clamped_or_added_to_takes_no_activation() -> None:
    constants = {"w": constant(20, 20, 1, 1), "k": constant(20, 1, 1)}
    nodes = [
        node("Conv", "x w", "c"), node("Relu", "c", "r"), node("Sigmoid", "r", "s"),
        node("Conv", "s w", "d"), node("Add", "d x", "e"), node("Sigmoid", "e", "f"),
        node("Conv", "f w", "g"), node("Sigmoid", "g", "h"), node("Mul", "h k"),
    ]  # fmt: skip
    kernels = ["convolution_f32", "images_map", "convolution_f32", "images_map",
               "convolution_f32", "images_map"]  # fmt: skip
    check(nodes, X, constants=constants, kernels=kernels)


def test_squeeze_and_excitation() -> None:
    constants = {"w": constant(20, 20, 1, 1) / 9, "v": constant(20, 20, 1, 1) / 9}
    nodes = [
        node("GlobalAveragePool", "x", "m"), node("Conv", "m w", "a"), node("Relu", "a", "r"),
        node("Conv", "r v", "b"), node("HardSigmoid", "b", "s"), node("Mul", "x s", "z"),
        node("Add", "x z"),
    ]  # fmt: skip
    kernels = ["images_mean", "convolution_f32", "convolution_f32", "images_combine"]
    check(nodes, X, constants=constants, kernels=kernels)


def test_activations_give_no_denormal_numbers() -> None:
    """Such take CPUs a hundred times as long; a deep SiLU would be full of them."""
    nodes = [node("Sigmoid", "x"), *silu("x", "z")]
    model = model_of(nodes, {"x": (FLOAT, [1, 16, 40, 40])}, ["y", "z"])
    x = -np.linspace(0, 200, 16 * 1600, dtype=np.float32).reshape(1, 16, 40, 40)
    with network_of(model, threads=1) as network:
        found = network({"x": x})
        assert isinstance(region(network, {"x": x}), NativeRegion)
    for one in found.values():
        assert np.abs(one).min() < 1e-25 and not (np.abs(one[one != 0]) < 1.2e-38).any()


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("shape", [(3, 20, 5, 4), (2, 7, 33), (6, 18)])
def test_constants_beside_values(shape: tuple[int, ...], axis: int) -> None:
    """A class token among tokens, and the like: pixels of constants, in every image of a batch."""
    channels = 1 if len(shape) == 4 else len(shape) - 1
    if axis >= len(shape) or axis == channels:
        pytest.skip("these are channels")
    sizes = [(*shape[:axis], n, *shape[axis + 1 :]) for n in (1, 3)]
    constants = {"c": constant(*sizes[0]), "d": constant(*sizes[1]), "k": np.float32(2)}
    nodes = [node("Mul", "x k", "a"), node("Concat", "c a d a", "b", axis=axis), node("Relu", "b")]
    run = check(nodes, {"x": (FLOAT, list(shape))}, ("y",), constants, threads=2)
    assert len(run.nodes) == 3


# ---- values [images, channels, pixels] ------------------------------------------------------


def head(channels: int = 4, bins: int = 16) -> tuple[list[Any], dict[str, np.ndarray]]:
    """The head of YOLOv8: what two sizes of pixels have, boxes out of distances, and classes."""
    wide = channels * bins
    constants = {
        "w": constant(wide + 18, 20, 1, 1), "all": np.array([1, wide + 18, -1]),
        "parts": np.array([wide, 18]), "grouped": np.array([1, channels, bins, -1]),
        "bins": np.arange(bins, dtype=np.float32).reshape(1, bins, 1, 1),
        "sides": np.array([1, channels, -1]), "zero": np.array([0]), "two": np.array([2]),
        "four": np.array([4]), "axis": np.array([1]), "centres": constant(1, 2, 75),
        "sizes": constant(1, 75), "half": np.array(2, np.float32),
    }  # fmt: skip
    nodes = [
        node("Conv", "x w", "large"), node("Reshape", "large all", "a"),
        node("MaxPool", "x", "pooled", kernel_shape=[2, 2], strides=[2, 3], pads=[0, 0, 1, 1]),
        node("Conv", "pooled w", "small"), node("Reshape", "small all", "b"),
        node("Concat", "a b", "c", axis=2), node("Split", "c parts", "d e", axis=1),
        node("Sigmoid", "e", "scores"), node("Reshape", "d grouped", "f"),
        node("Transpose", "f", "g", perm=[0, 2, 1, 3]), node("Softmax", "g", "h", axis=1),
        node("Conv", "h bins", "i"), node("Reshape", "i sides", "distances"),
        node("Slice", "distances zero two axis", "near"),
        node("Slice", "distances two four axis", "far"), node("Sub", "centres near", "low"),
        node("Add", "centres far", "high"), node("Add", "low high", "sum"),
        node("Div", "sum half", "middle"), node("Sub", "high low", "size"),
        node("Concat", "middle size", "box", axis=1), node("Mul", "box sizes", "scaled"),
        node("Concat", "scaled scores", axis=1),
    ]  # fmt: skip
    return nodes, constants


@pytest.mark.parametrize("threads", [1, 3])
def test_the_head_of_a_detector(threads: int) -> None:
    nodes, constants = head()
    run = check(nodes, {"x": (FLOAT, [1, 20, 7, 9])}, ("y", "scores"), constants, threads=threads)
    kernels = [one.kernel for one in run.operations]
    assert kernels.count("images_softmax_mean") == 1 and len(run.nodes) == 19


def test_bins_that_fill_no_vector_are_the_hosts() -> None:
    nodes, constants = head(bins=8)
    model = model_of(nodes, {"x": (FLOAT, [1, 20, 7, 9])}, ["y"], constants)
    x = RNG.standard_normal((1, 20, 7, 9)).astype(np.float32)
    with network_of(model, threads=1) as network:
        found = network({"x": x})["y"]
        assert {kind for kind, _ in network.plan({"x": x}).where()} >= {"onnxruntime"}
    (right,) = expected(model, {"x": x})
    np.testing.assert_allclose(found, right, rtol=2e-5, atol=2e-4)


def test_rows_stay_rows() -> None:
    """Pixels in one dimension that a matrix multiplies are no channels-first value for anybody."""
    constants = {"w": constant(16, 20, 1, 1), "flat": np.array([2, 16, -1]), "m": constant(63, 8)}
    nodes = [
        node("Conv", "x w", "a"), node("Reshape", "a flat", "b"), node("Sigmoid", "b", "c"),
        node("MatMul", "c m"),
    ]  # fmt: skip
    model = model_of(nodes, X, ["y"], constants)
    x = RNG.standard_normal((2, 20, 7, 9)).astype(np.float32)
    with network_of(model, threads=2) as network:
        found = network({"x": x})["y"]
        assert network.plan({"x": x}).graph.channels_first == frozenset()
    (right,) = expected(model, {"x": x})
    np.testing.assert_allclose(found, right, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Max", "Min"])
@pytest.mark.parametrize("shape", [(7, 9), (2, 1, 7, 9), (2, 20, 7, 9), (20, 1, 1)])
def test_constants_of_pixels(op: str, shape: tuple[int, ...]) -> None:
    for inputs in ("r c", "c r"):
        nodes = [node("Conv", "x w", "s"), node("Sigmoid", "s", "r"), node(op, inputs)]
        check(nodes, X, constants={"w": constant(20, 20, 1, 1) / 99, "c": constant(*shape)})


# ---- places ---------------------------------------------------------------------------------


def stage(channels: int) -> tuple[list[Any], dict[str, np.ndarray]]:
    """A stage of YOLOv8: halves of a value, and what is made of one of them, side by side."""
    half = channels // 2
    constants = {"w": constant(channels, 20, 1, 1), "v": constant(half, half, 3, 3) / 9,
                 "halves": np.array([half, half])}  # fmt: skip
    constants["u"] = constant(8, channels + half, 1, 1) / 9
    nodes = [
        node("Conv", "x w", "c"), *silu("c", "d"), node("Split", "d halves", "d0 d1", axis=1),
        node("Conv", "d1 v", "e", pads=[1] * 4), *silu("e", "f"), node("Add", "d1 f", "g"),
        node("Concat", "d0 d1 g", "h", axis=1), node("Conv", "h u"),
    ]  # fmt: skip
    return nodes, constants


def test_concatenations_are_places() -> None:
    nodes, constants = stage(32)
    run = check(nodes, X, constants=constants, kernels=["convolution_f32"] * 3)
    assert set(run.layout.places) == {"d", "d0", "d1", "g"}


def test_what_does_not_begin_at_a_vector_is_copied() -> None:
    nodes, constants = stage(40)
    run = check(nodes, X, constants=constants)
    kernels = [one.kernel for one in run.operations]
    # d0 is read where it lies, d1 is not; in the concatenation nothing but its begin fits.
    assert kernels.count("images_copy") == 4 and kernels.count("convolution_f32") == 3


@pytest.mark.parametrize("threads", [1, 3])
def test_values_in_several_places(threads: int) -> None:
    """One that is in two concatenations, one twice in one, one that is asked for, a nested one."""
    constants = {"w": constant(16, 20, 1, 1), "v": constant(32, 48, 1, 1) / 9}
    pool = {"kernel_shape": [3, 3], "pads": [1] * 4}
    nodes = [
        node("Conv", "x w", "a"), node("MaxPool", "a", "b", **pool), node("Sigmoid", "b", "c"),
        node("Concat", "a b c", "d", axis=1), node("Concat", "c d c", "e", axis=1),
        node("Conv", "d v", "f"), node("Concat", "f e x", "g", axis=1),
        node("Slice", "g begin end axis", "h"),
    ]  # fmt: skip
    constants |= {"begin": np.array([-20]), "end": np.array([999]), "axis": np.array([1])}
    check(nodes, X, ["d", "e", "g", "h"], constants, threads=threads)


def test_upsampled_and_pooled_values_are_written_side_by_side() -> None:
    constants = {"w": constant(32, 20, 1, 1), "scales": np.array([1, 1, 2, 2], np.float32)}
    constants["v"] = constant(8, 80, 1, 1) / 9
    resized = node("Resize", "p", "q", mode="nearest")
    resized.input.extend(["", "scales"])
    nodes = [
        node("Conv", "x w", "a"), node("MaxPool", "a", "p", kernel_shape=[2, 2], strides=[2, 2]),
        resized, node("MaxPool", "a", "s", kernel_shape=[2, 2], pads=[0, 0, 1, 1]),
        node("Slice", "s begin end axis", "t"), node("Concat", "q s t", "u", axis=1),
        node("Conv", "u v"),
    ]  # fmt: skip
    constants |= {"begin": np.array([16]), "end": np.array([32]), "axis": np.array([1])}
    run = check(nodes, {"x": (FLOAT, [1, 20, 8, 6])}, constants=constants)
    assert [one.kernel for one in run.operations].count("images_copy") == 1  # t lies in s


def test_constants_that_are_nodes() -> None:
    w = constant(64, 20, 3, 3)  # larger than what is computed ahead
    held = helper.make_node(
        "Constant", [], ["w"], value=helper.make_tensor("w", FLOAT, w.shape, w.reshape(-1))
    )
    check([held, node("Conv", "x w")], X, kernels=["convolution_f32"])


# ---- borders --------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
def test_borders_are_made_once(threads: int) -> None:
    """Of a value that is read as ONNX has it, and of one that two convolutions read."""
    constants = {"w": constant(32, 3, 3, 3), "v": constant(24, 32, 3, 3) / 9,
                 "u": constant(24, 32, 3, 3) / 9, "t": constant(8, 24, 5, 3) / 9}  # fmt: skip
    nodes = [
        node("Conv", "x w", "a", pads=[1, 1, 0, 2], strides=[2, 2]),
        node("Conv", "a v", "b", pads=[1] * 4), node("Conv", "a u", "c", pads=[1] * 4),
        node("Add", "b c", "d"),
        node("Conv", "d t", "y", pads=[4, 2, 4, 2], dilations=[2, 2]),
    ]  # fmt: skip
    run = check(nodes, {"x": (FLOAT, [2, 3, 17, 23])}, constants=constants, threads=threads)
    kernels = [one.kernel for one in run.operations]
    assert kernels.count("images_border") == 3 and kernels.count("convolution_f32") == 4
    assert run.operations[0].plain == ["x"] and "x" not in run.layout.images


def test_what_is_added_behind_another_convolution_is_no_plane() -> None:
    """As in networks that find what to add to an image."""
    constants = {"w": constant(20, 20, 3, 3) / 9, "v": constant(20, 20, 3, 3) / 9}
    nodes = [
        node("Conv", "x w", "a", pads=[1] * 4), node("Conv", "a v", "b", pads=[1] * 4),
        node("Add", "b x"),
    ]  # fmt: skip
    run = check(nodes, X, constants=constants)
    assert run.operations[-1].adds == "x" and "x" in run.layout.images


def test_an_input_that_others_read_is_gathered() -> None:
    constants = {"w": constant(16, 3, 3, 3), "v": constant(16, 3, 1, 1)}
    nodes = [
        node("Conv", "x w", "a", pads=[1] * 4), node("Conv", "x v", "b"), node("Add", "a b"),
    ]  # fmt: skip
    run = check(nodes, {"x": (FLOAT, [1, 3, 6, 10])}, constants=constants)
    assert "x" in run.layout.images and not any(one.plain for one in run.operations)


def test_threads_change_no_bit() -> None:
    nodes, constants = stage(40)
    constants["w2"], constants["u2"] = constant(8, 1, 2, 2), constant(16, 4, 3, 3)
    nodes += [
        node("MaxPool", "y", "p", kernel_shape=[3, 3], pads=[1] * 4),
        node("Conv", "p u2", "q", group=2, pads=[1] * 4), node("GlobalAveragePool", "q", "s"),
        node("Mul", "q s", "t"), node("ConvTranspose", "p w2", "o", strides=[2, 2]),
    ]  # fmt: skip
    model = model_of(nodes, X, ["t", "o"], constants)
    x = np.random.default_rng(1).standard_normal(X["x"][1]).astype(np.float32)
    found = []
    for threads in (1, 2, 3):
        with network_of(model, threads=threads) as network:
            assert region(network, {"x": x})
            found.append([value.tobytes() for value in network({"x": x}).values()])
    assert found[0] == found[1] == found[2]


def test_what_stands_for_others_runs_elsewhere_as_these() -> None:
    """A few of our nodes behind the host's are the host's too, however they were put together."""
    constants = {"w": constant(20, 20, 1, 1) / 9}
    nodes: list[Any] = []
    last = "x"
    for i in range(12):
        nodes += [node("Conv", f"{last} w", f"c{i}"), *silu(f"c{i}", f"d{i}")]
        last = f"d{i}"
    nodes += [node("Sin", last, "s"), *silu("s", "t"), node("Sin", "t", "y")]
    model = model_of(nodes, X, ["y"], constants)
    x = np.random.default_rng(1).standard_normal(X["x"][1]).astype(np.float32) / 9
    with network_of(model, threads=1) as network:
        kinds = [(kind, len(nodes)) for kind, nodes in network.plan({"x": x}).where()]
        assert kinds == [("headrace", 36), ("onnxruntime", 4)]
        np.testing.assert_allclose(network({"x": x})["y"], expected(model, {"x": x})[0], atol=1e-4)
