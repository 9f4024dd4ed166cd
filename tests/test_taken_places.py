"""Pad, Slice, Gather and Concat of pixels on our kernels; nodes that give what they read go."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper
from onnx_models import FLOAT, model_of
from test_native_operators import check, constant, expected, node

from headrace.errors import HeadraceError
from headrace.networks.network import network_of

IMAGES = {"x": (FLOAT, [2, 20, 5, 7])}
ROWS = {"x": (FLOAT, [2, 6, 37])}


def whole(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
@pytest.mark.parametrize(
    ("shapes", "pads", "kernel"),
    [
        (IMAGES, (0, 0, 1, 2, 0, 0, 3, 0), "images_take"), (ROWS, (0, 0, 5, 0, 0, 9), "rows_take"),
        (ROWS, (1, 2, 0, 0, 1, 0), "images_take"), ({"x": (FLOAT, [1, 50])}, (0, 0, 0, 49),
         "rows_take"),
    ],
)  # fmt: skip
def test_pads(mode: str, shapes: Any, pads: tuple[int, ...], kernel: str) -> None:
    more = {"p": whole(*pads), "v": np.array(2.5, np.float32)}
    inputs = "x p v" if mode == "constant" else "x p"
    constants = {name: more[name] for name in inputs.split()[1:]}
    check([node("Pad", inputs, mode=mode)], shapes, constants=constants, kernels=[kernel])


def test_pads_of_some_axes_and_of_old_files() -> None:
    constants = {"p": whole(1, 2), "axes": whole(-2)}
    check([helper.make_node("Pad", ["x", "p", "", "axes"], ["y"])], IMAGES, constants=constants)
    old = node("Pad", "x", pads=[0, 0, 1, 0, 0, 0, 0, 2], value=1.5)
    check([old], IMAGES, opset=10, kernels=["images_take"])


@pytest.mark.parametrize(
    ("pads", "mode"),
    [((0, 0, 5, 0, 0, 0, 0, 0), "reflect"), ((0, 0, -1, 0, 0, 0, 0, 0), "constant"),
     ((0, 1, 0, 1, 0, 0, 0, 0), "constant")],
)  # fmt: skip
def test_other_pads_are_the_hosts(pads: tuple[int, ...], mode: str) -> None:
    model = model_of([node("Pad", "x p", mode=mode)], IMAGES, ["y"], {"p": whole(*pads)})
    x = np.random.default_rng(0).standard_normal((2, 20, 5, 7)).astype(np.float32)
    with network_of(model, threads=1) as network:
        assert [on for on, _ in network.plan({"x": x}).where()] == ["onnxruntime"]


SLICES = [
    (IMAGES, (1, 0), (4, 7), (2, 3), (2, 3)), (IMAGES, (-1,), (-99,), (3,), (-2,)),
    (IMAGES, (1,), (2,), (0,), (1,)), (ROWS, (3,), (99,), (-1,), (4,)),
    (ROWS, (-5, 1), (-1, 2), (1, 0), (1, 1)), (ROWS, (36,), (-38,), (2,), (-1,)),
    (ROWS, (4,), (21,), (2,), (1,)),
]  # fmt: skip


@pytest.mark.parametrize(("shapes", "starts", "ends", "axes", "steps"), SLICES)
def test_slices(shapes: Any, starts: Any, ends: Any, axes: Any, steps: Any) -> None:
    numbers = {"s": starts, "e": ends, "a": axes, "t": steps}
    constants = {name: whole(*of) for name, of in numbers.items()}
    check([node("Slice", "x s e a t")], shapes, constants=constants)


@pytest.mark.parametrize(
    ("shapes", "axis", "ids"),
    [(IMAGES, 2, [4, 0, 0, -1]), (IMAGES, 1, [19, 3]), (ROWS, 0, 1), (ROWS, 1, -2),
     (ROWS, 1, [5]), (ROWS, 2, [36, 0])],
)  # fmt: skip
def test_constant_numbers_of_rows(shapes: Any, axis: int, ids: Any) -> None:
    check([node("Gather", "x i", axis=axis)], shapes, constants={"i": np.array(ids)})


def test_numbers_whose_channels_are_others_are_the_hosts() -> None:
    """What is left has as many channels, which were another dimension."""
    shapes = {"x": (FLOAT, [2, 9, 7, 9])}
    model = model_of([node("Gather", "x i", axis=0)], shapes, ["y"], {"i": np.array(1)})
    x = np.random.default_rng(0).standard_normal((2, 9, 7, 9)).astype(np.float32)
    with network_of(model, threads=1) as network:
        np.testing.assert_array_equal(network({"x": x})["y"], x[1])
        assert [on for on, _ in network.plan({"x": x}).where()] == ["onnxruntime"]


@pytest.mark.parametrize(
    ("first", "second", "axis"),
    [([1, 3, 20], [1, 2, 20], 1), ([2, 3, 20], [1, 3, 20], 0), ([1, 20, 3, 4], [1, 20, 2, 4], 2),
     ([2, 20], [5, 20], 0)],
)  # fmt: skip
def test_pixels_one_behind_the_other(first: Any, second: Any, axis: int) -> None:
    shapes = {"x": (FLOAT, first), "z": (FLOAT, second)}
    check([node("Concat", "x z", axis=axis)], shapes, kernels=["images_copy"] * 2)


@pytest.mark.parametrize(
    ("between", "perm"),
    [((2, 4, 5, 5, 7), (0, 2, 1, 3, 4)), ((2, 2, 10, 35), (0, 2, 1, 3)),
     ((2, 2, 2, 5, 5, 7), (0, 3, 2, 1, 4, 5))],
)  # fmt: skip
def test_channels_of_groups_are_mixed(between: Any, perm: Any) -> None:
    constants = {"a": whole(*between), "b": whole(2, 20, 5, 7)}
    nodes = [
        node("Abs", "x", "z"), node("Reshape", "z a", "g"), node("Transpose", "g", "t", perm=perm),
        node("Reshape", "t b", "s"), node("Relu", "s"),
    ]  # fmt: skip
    run = check(nodes, IMAGES, constants=constants)
    assert [one.kernel for one in run.operations][:2] == ["images_map", "rows_take"]


def test_images_that_are_mixed_are_the_hosts() -> None:
    constants = {"a": whole(2, 20, 35), "b": whole(2, 20, 5, 7)}
    nodes = [
        node("Reshape", "x a", "g"), node("Transpose", "g", "t", perm=(1, 0, 2)),
        node("Reshape", "t b"),
    ]  # fmt: skip
    x = np.random.default_rng(0).standard_normal((2, 20, 5, 7)).astype(np.float32)
    with network_of(model_of(nodes, IMAGES, ["y"], constants), threads=1) as network:
        found = network({"x": x})["y"]
    right = x.reshape(2, 20, 35).transpose(1, 0, 2).reshape(2, 20, 5, 7)
    np.testing.assert_array_equal(found, right)


@pytest.mark.parametrize("op", ["Sqrt", "Tanh", "Abs"])
def test_of_single_values(op: str) -> None:
    check([node("Abs", "x", "z"), node(op, "z")], IMAGES, kernels=["images_map"] * 2)


def test_powers() -> None:
    constants = {"two": np.array(2, np.float32), "half": np.array([0.5], np.float32)}
    nodes = [node("Pow", "x two", "a"), node("Add", "a a", "b"), node("Pow", "b half")]
    check(nodes, IMAGES, constants=constants, kernels=["images_map", "images_add", "images_map"])


@pytest.mark.parametrize(
    ("taps", "stride", "length"), [(16, 5, 50), (1, 1, 17), (256, 128, 640), (7, 9, 33)]
)
def test_windows_of_samples(taps: int, stride: int, length: int) -> None:
    """A Conv of one channel reads its samples where they are."""
    constants = {"one": whole(1), "w": constant(20, 1, taps), "b": constant(20)}
    nodes = [
        node("Unsqueeze", "x one", "a"), node("Conv", "a w b", "c", strides=[stride]),
        node("Relu", "c"),
    ]  # fmt: skip
    shapes = {"x": (FLOAT, [1, length])}
    run = check(nodes, shapes, constants=constants)
    assert [one.kernel for one in run.operations][-1] == "convolution_f32"
    assert run.arena_bytes < 64 * length + 8192  # no samples with 15 pads each


def test_a_detector_of_voices() -> None:
    """What silero-vad is made of: a spectrum, its magnitude, convolutions, and a state."""
    rng = np.random.default_rng(4)

    def weights(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / 8).astype(np.float32)

    constants = {
        "p": whole(0, 0, 0, 16), "one": whole(1), "basis": weights(34, 1, 32),
        "w": weights(32, 17, 3), "zero": whole(0), "half": whole(17), "all": whole(99),
        "two": np.array(2, np.float32),
        "last": whole(-1), "first": np.array(0), "second": np.array(1),
        "wi": weights(1, 128, 32), "wh": weights(1, 128, 32), "v": weights(1, 32, 1),
    }  # fmt: skip
    nodes = [
        node("Pad", "x p", "a", mode="reflect"), node("Unsqueeze", "a one", "b"),
        node("Conv", "b basis", "c0", strides=[16]), node("Slice", "c0 zero all one", "c"),
        node("Slice", "c zero half one", "d"), node("Slice", "c half all one", "e"),
        node("Cast", "d", "d1", to=1), node("Pow", "d1 two", "f"), node("Pow", "e two", "g"),
        node("Add", "f g", "h"), node("Sqrt", "h", "i"),
        node("Conv", "i w", "j", pads=[1, 1], strides=[5]), node("Relu", "j", "k"),
        node("Squeeze", "k last", "l"), node("Gather", "s first", "h0"),
        node("Gather", "s second", "c1"), node("Unsqueeze", "l zero", "m"),
        node("Unsqueeze", "h0 zero", "h1"), node("Unsqueeze", "c1 zero", "c2"),
        helper.make_node("LSTM", ["m", "wi", "wh", "", "", "h1", "c2"], ["", "n", "o"],
                         hidden_size=32),
        node("Squeeze", "n zero", "q"), node("Unsqueeze", "q last", "q1"), node("Relu", "q1", "r"),
        node("Conv", "r v", "t"), node("Sigmoid", "t", "u"), node("Squeeze", "u last", "u1"),
        node("ReduceMean", "u1 one", "u2", keepdims=0), node("Unsqueeze", "u2 one", "u3"),
        node("Identity", "u3", "y"), node("Concat", "n o", "state", axis=0),
    ]  # fmt: skip
    shapes = {"x": (FLOAT, [1, 80]), "s": (FLOAT, [2, 1, 32])}
    for threads in (1, 2):
        check(nodes, shapes, ("y", "state"), constants, threads=threads)


def test_names_that_are_wanted_stay() -> None:
    """Nodes that give what they read, of an input, of an output, and in front of a branch."""
    nodes = [
        node("Identity", "x", "a"), node("Cast", "a", "b", to=1), node("Relu", "b", "c"),
        node("Identity", "c", "d"), node("Identity", "d", "y"), node("Identity", "d", "z"),
    ]  # fmt: skip
    model = model_of(nodes, ROWS, ["y", "z", "a"])
    x = np.random.default_rng(0).standard_normal((2, 6, 37)).astype(np.float32)
    with network_of(model, threads=1) as network:
        found = network({"x": x})
        left = [one.op for one in network.plan({"x": x}).graph.nodes]
    for name, right in zip(("y", "z", "a"), expected(model, {"x": x}), strict=True):
        np.testing.assert_array_equal(found[name], right)
    assert sorted(left) == ["Identity", "Identity", "Identity", "Relu"]


def test_pads_beyond_all_memory_are_the_hosts_to_refuse() -> None:
    constants = {"p": whole(0, 1 << 40, 0, 0)}
    network = network_of(model_of([node("Pad", "x p")], {"x": (FLOAT, [2, 4])}, ["y"], constants))
    with pytest.raises(HeadraceError, match="Pad"):
        network({"x": np.zeros((2, 4), np.float32)})


def test_other_names_of_weights() -> None:
    """Exporters write weights that are equal once, with Identity for the others."""
    constants = {"w": constant(20, 20, 1, 1), "b": constant(20)}
    nodes = [
        node("Identity", "w", "v"), node("Identity", "v", "u"), node("Conv", "x w b", "z"),
        node("Conv", "z u b"),
    ]  # fmt: skip
    check(nodes, IMAGES, constants=constants, kernels=["convolution_f32"] * 2)


def test_another_name_of_a_weight_may_be_wanted() -> None:
    nodes = [node("Identity", "w", "v"), node("Conv", "x v")]
    model = model_of(nodes, IMAGES, ["y", "v"], {"w": constant(20, 20, 1, 1)})
    x = np.random.default_rng(0).standard_normal((2, 20, 5, 7)).astype(np.float32)
    with network_of(model, threads=1) as network:
        found = network({"x": x})
    for name, right in zip(("y", "v"), expected(model, {"x": x}), strict=True):
        np.testing.assert_allclose(found[name], right, rtol=1e-5, atol=1e-4)


def test_all_elements_in_order_are_the_value_itself() -> None:
    """As PyTorch's newer exporter has means of pixels, which it flattens and takes apart again."""
    every = np.arange(20).reshape(1, 20, 1, 1)
    nodes = [
        node("GlobalAveragePool", "x", "a"), node("Reshape", "a all", "b"),
        node("Gather", "b i", "c"), node("Relu", "c"),
    ]  # fmt: skip
    x = {"x": np.random.default_rng(0).standard_normal((1, 20, 5, 7)).astype(np.float32)}
    for ids in (every, every[:, ::-1]):
        shapes = {"x": (FLOAT, [1, 20, 5, 7])}
        model = model_of(nodes, shapes, ["y"], {"i": ids.copy(), "all": whole(-1)})
        with network_of(model, threads=1) as network:
            np.testing.assert_allclose(network(x)["y"], expected(model, x)[0], 1e-5, 1e-6)
            left = [one.op for one in network.plan(x).graph.nodes]
        assert ("Gather" in left) == (ids is not every)
