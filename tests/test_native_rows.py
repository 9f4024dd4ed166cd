"""Softmax, and products of two values that come at run time, on kernels of ours."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper
from onnx_models import FLOAT, model_of
from test_native_operators import check, constant, node

from headrace.networks.network import Network, network_of
from headrace.networks.operators import softmax


def ours(network: Network, inputs: dict[str, Any]) -> bool:
    return [on for on, _ in network.plan(inputs).where()] == ["headrace"]


def softmax_network(shape: tuple[int, ...], axis: int, opset: int = 21) -> Network:
    node = helper.make_node("Softmax", ["x"], ["y"], axis=axis)
    return network_of(model_of([node], {"x": (FLOAT, shape)}, ["y"], opset=opset), threads=2)


def exact(x: np.ndarray, axis: int) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        e = np.exp(x.astype(np.float64) - x.max(axis, keepdims=True))
    found: np.ndarray = e / e.sum(axis, keepdims=True)
    return found


@pytest.mark.parametrize(
    ("shape", "axis", "opset"),
    [((5, 37), -1, 21), ((2, 3, 50), 2, 13), ((2, 21, 3, 5), 1, 21), ((4, 9), 1, 11),
     ((2, 7, 1, 1), 1, 11)],
)  # fmt: skip
@pytest.mark.parametrize("cache", [softmax.CACHE, 1])
def test_softmax(
    shape: tuple[int, ...], axis: int, opset: int, cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In three passes, and in two as if rows were long."""
    monkeypatch.setattr(softmax, "CACHE", cache)
    network = softmax_network(shape, axis, opset)
    for spread in (1, 30, 1e6):
        x = (np.random.default_rng(1).normal(size=shape) * spread).astype(np.float32)
        np.testing.assert_allclose(network({"x": x})["y"], exact(x, axis), rtol=5e-5, atol=1e-36)
    assert ours(network, {"x": x})


@pytest.mark.parametrize("cache", [softmax.CACHE, 1])
def test_softmax_of_what_is_no_number(cache: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax, "CACHE", cache)
    x = np.random.default_rng(2).normal(size=(6, 40)).astype(np.float32)
    x[0, 3] = x[1, 39] = -np.inf  # of no weight
    x[2, 0] = x[3, 39] = np.inf
    x[4, 17] = np.nan
    x[5] = -np.inf
    y = softmax_network(x.shape, -1)({"x": x})["y"]
    np.testing.assert_allclose(y[:2], exact(x[:2], -1), rtol=1e-5)
    assert np.isnan(y[2:]).all()


def test_a_long_row_adds_up_to_one() -> None:
    x = np.random.default_rng(3).normal(size=(1, softmax.CACHE + 5)).astype(np.float32) * 300
    y = softmax_network(x.shape, -1)({"x": x})["y"]
    assert abs(y.astype(np.float64).sum() - 1) < 1e-4
    np.testing.assert_allclose(y, exact(x, -1), rtol=1e-3, atol=1e-36)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((2, 3, 5), 1),
        ((4, 5), 0),
        ((3, 2, 21), 0),
        ((2, 3, 4, 5), 3),
        ((2, 17, 4, 5), 2),
        ((3, 2, 4, 5), 0),
    ],
)
def test_softmax_of_other_dimensions(shape: tuple[int, ...], axis: int) -> None:
    network = softmax_network(shape, axis)
    for spread in (1, 30, 1e6):
        x = (np.random.default_rng(1).normal(size=shape) * spread).astype(np.float32)
        np.testing.assert_allclose(network({"x": x})["y"], exact(x, axis), rtol=5e-5, atol=1e-36)
    assert ours(network, {"x": x})
    x = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    x.reshape(-1)[0], x.reshape(-1)[-1] = np.nan, -np.inf
    np.testing.assert_allclose(network({"x": x})["y"], exact(x, axis), rtol=1e-5)


def test_softmax_of_several_dimensions_is_the_hosts() -> None:
    network = softmax_network((2, 3, 5), 1, 11)
    x = np.random.default_rng(4).normal(size=(2, 3, 5)).astype(np.float32)
    expected = exact(x.reshape(2, -1), 1).reshape(x.shape)
    np.testing.assert_allclose(network({"x": x})["y"], expected, rtol=1e-5)
    assert not ours(network, {"x": x})


@pytest.mark.parametrize(
    ("a", "b"),
    [((21, 37), (37, 50)), ((3, 9, 20), (3, 20, 33)), ((1, 5, 16), (4, 16, 16)),
     ((4, 5, 3), (3, 7)), ((2, 3), (4, 3, 40))],
)  # fmt: skip
def test_products_of_values(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    node = helper.make_node("MatMul", ["a", "b"], ["y"])
    model = model_of([node], {"a": (FLOAT, a), "b": (FLOAT, b)}, ["y"])
    random = np.random.default_rng(5)
    inputs = {
        name: random.normal(size=shape).astype(np.float32) for name, shape in (("a", a), ("b", b))
    }
    found = []
    for threads in (1, 2):
        with network_of(model, threads=threads) as network:
            found.append(network(inputs)["y"])
            assert ours(network, inputs)
    assert np.array_equal(*found), "threads change results"
    left, right = inputs["a"].astype(np.float64), inputs["b"]
    bound = np.abs(left) @ np.abs(right) * (a[-1] + 1) * 2.0**-24
    assert (np.abs(found[0] - left @ right) <= bound).all()


def test_a_value_times_itself() -> None:
    node = helper.make_node("MatMul", ["x", "x"], ["y"])
    network = network_of(model_of([node], {"x": (FLOAT, [18, 18])}, ["y"]))
    x = np.random.default_rng(6).normal(size=(18, 18)).astype(np.float32)
    np.testing.assert_allclose(network({"x": x})["y"], x @ x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("a", "b"), [((2, 3, 4, 5), (2, 3, 5, 6)), ((4,), (4, 3))])
def test_products_of_other_ranks_are_the_hosts(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    node = helper.make_node("MatMul", ["a", "b"], ["y"])
    network = network_of(model_of([node], {"a": (FLOAT, a), "b": (FLOAT, b)}, ["y"]))
    inputs = {"a": np.ones(a, np.float32), "b": np.ones(b, np.float32)}
    np.testing.assert_allclose(network(inputs)["y"], inputs["a"] @ inputs["b"])
    assert not ours(network, inputs)


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Max"])
@pytest.mark.parametrize("first", [True, False])
def test_constant_rows_of_each_of_a_batch(op: str, first: bool) -> None:
    # Embeddings of segments that are all the same, as exporters expand them to batch and tokens.
    random = np.random.default_rng(7)
    row = random.normal(size=(1, 1, 20)).astype(np.float32)
    names = ["rows", "x"] if first else ["x", "rows"]
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Expand", ["row", "shape"], ["spread"]),
        helper.make_node("Mul", ["spread", "each"], ["rows"]),
        helper.make_node(op, names, ["y"]),
    ]
    each = random.normal(size=(3, 5, 1)).astype(np.float32)
    model = model_of(nodes, {"x": (FLOAT, ["n", 5, 20])}, ["y"], {"row": row, "each": each})
    x = random.normal(size=(3, 5, 20)).astype(np.float32)
    compute = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Max": np.maximum}[op]
    with network_of(model, threads=2) as network:
        wanted = compute(row * each, x) if first else compute(x, row * each)
        assert np.array_equal(network({"x": x})["y"], wanted)
        assert ours(network, {"x": x}) == (op == "Add")


@pytest.mark.parametrize("n", [9, 17])
def test_layer_norm_of_rows_that_fill_no_vector(n: int) -> None:
    """What is in front makes something of pads."""
    rng = np.random.default_rng(n)
    w, g = rng.standard_normal((24, n)).astype(np.float32), rng.standard_normal(n)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node("Sigmoid", ["m"], ["s"]),
        helper.make_node("LayerNormalization", ["s", "g"], ["y"]),
    ]
    constants = {"w": w, "g": g.astype(np.float32)}
    x = rng.standard_normal((3, 5, 24)).astype(np.float32)
    with network_of(model_of(nodes, {"x": (FLOAT, x.shape)}, ["y"], constants)) as network:
        assert ours(network, {"x": x})
        s = 1 / (1 + np.exp(-(x.astype(np.float64) @ w)))
        s -= s.mean(-1, keepdims=True)
        expected = s / np.sqrt(np.square(s).mean(-1, keepdims=True) + 1e-5) * g
        np.testing.assert_allclose(network({"x": x})["y"], expected, atol=2e-5)


@pytest.mark.parametrize("name", ["ConvNeXt", "images alone", "what goes both ways"])
def test_between_turned_images(name: str) -> None:
    """LayerNormalization, products and GELU of [images, rows, columns, channels] are of rows."""
    turn, back = [0, 2, 3, 1], [0, 3, 1, 2]
    constants = {
        "d": constant(20, 1, 3, 3), "w": constant(20) , "b": constant(20), "w1": constant(20, 40),
        "b1": constant(40), "w2": constant(40, 20), "b2": constant(20), "s": constant(20),
        "root": np.array(np.sqrt(2), np.float32), "one": np.array(1, np.float32),
        "half": np.array(0.5, np.float32),
    }  # fmt: skip
    if name == "images alone":
        nodes = [
            node("Transpose", "x", "t", perm=turn), node("LayerNormalization", "t w b", "l"),
            node("Transpose", "l", "u", perm=back), node("Relu", "u"),
        ]  # fmt: skip
        check(nodes, {"x": (FLOAT, [2, 20, 5, 7])}, constants=constants)
        return
    nodes = [
        node("Conv", "x d", "c", group=20, pads=[1, 1, 1, 1]),
        node("Transpose", "c", "t", perm=turn), node("LayerNormalization", "t w b", "l"),
        node("MatMul", "l w1", "p"), node("Add", "b1 p", "q"), node("Div", "q root", "e0"),
        node("Erf", "e0", "e1"), node("Add", "e1 one", "e2"), node("Mul", "q e2", "e3"),
        node("Mul", "e3 half", "g"), node("MatMul", "g w2", "r"), node("Add", "b2 r", "m"),
        node("Mul", "m s", "n"), node("Transpose", "n", "u", perm=back), node("Add", "u x"),
    ]  # fmt: skip
    if name == "what goes both ways":
        nodes[-1] = node("Add", "u x", "z")
        nodes += [
            node("Transpose", "z", "v", perm=turn), node("LayerNormalization", "v w b", "f"),
            node("Add", "f v", "a"), node("Transpose", "a", "o", perm=back), node("Add", "o z"),
        ]  # fmt: skip
    check(nodes, {"x": (FLOAT, [2, 20, 5, 7])}, constants=constants)


@pytest.mark.parametrize("shape", [(1, 49, 37), (2, 5, 64), (3, 33, 16)])
def test_rows_and_channels_change_places(shape: tuple[int, int, int]) -> None:
    """Mixers: products over tokens, between transpositions that move."""
    _, tokens, channels = shape
    constants = {
        "w": constant(channels), "b": constant(channels), "m": constant(tokens, 20),
        "k": constant(20, tokens), "c": constant(channels, 8), "one": np.array([1], np.int64),
    }  # fmt: skip
    nodes = [
        node("LayerNormalization", "x w b", "l"), node("Transpose", "l", "t", perm=[0, 2, 1]),
        node("MatMul", "t m", "p"), node("Relu", "p", "r"), node("MatMul", "r k", "q"),
        node("Transpose", "q", "u", perm=[0, 2, 1]), node("Add", "u x", "s"),
        node("ReduceMean", "s one", "a", keepdims=0), node("MatMul", "a c"),
    ]  # fmt: skip
    run = check(nodes, {"x": (FLOAT, shape)}, constants=constants)
    made = [one.kernel for one in run.operations]
    assert made.count("images_gather") == 2 and "images_mean" in made


def test_rows_that_become_images() -> None:
    """Pyramids: tokens are put in rows and columns again for a convolution; nothing moves."""
    sizes = {"i": (2, 20, 5, 7), "r": (2, 20, 35)}
    constants = {name: np.array(of, np.int64) for name, of in sizes.items()}
    constants |= {"w": constant(20), "b": constant(20), "k": constant(20, 20, 3, 3)}
    nodes = [
        node("LayerNormalization", "x w b", "l"), node("Transpose", "l", "t", perm=[0, 2, 1]),
        node("Reshape", "t i", "m"), node("Conv", "m k", "c", pads=[1, 1, 1, 1]),
        node("Reshape", "c r", "f"), node("Transpose", "f", "u", perm=[0, 2, 1]),
        node("LayerNormalization", "u w b"),
    ]  # fmt: skip
    run = check(nodes, {"x": (FLOAT, (2, 35, 20))}, constants=constants)
    assert "images_gather" not in [one.kernel for one in run.operations]


@pytest.mark.parametrize("axes", [[1], [2], [0], [1, 2], [0, 1]])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_means_of_rows(axes: list[int], keepdims: int) -> None:
    shapes = {"x": (FLOAT, (2, 5, 37))}
    mean = node("ReduceMean", "x a", keepdims=keepdims)
    model = model_of([mean], shapes, ["y"], {"a": np.array(axes, np.int64)})
    x = np.random.default_rng(2).standard_normal((2, 5, 37)).astype(np.float32)
    with network_of(model, threads=1) as network:
        found = network({"x": x})["y"]
        assert ours(network, {"x": x}) == (axes == [1])
    right = x.mean(tuple(axes), keepdims=bool(keepdims))
    np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-6)


def test_batch_norm_of_rows() -> None:
    """Heads of networks that have several."""
    names = ("s", "b", "m", "v")
    constants = {name: np.abs(constant(37)) + 0.1 for name in names}
    nodes = [node("BatchNormalization", "x s b m v"), node("Relu", "y", "z")]
    check(nodes, {"x": (FLOAT, (5, 37))}, ["y", "z"], constants)


def test_taps_far_apart_on_small_images() -> None:
    """Most are outside (atrous pyramids): no border is copied for them."""
    conv = node("Conv", "x w", dilations=[12, 12], pads=[12, 12, 12, 12])
    run = check([conv], {"x": (FLOAT, (1, 64, 6, 6))}, constants={"w": constant(32, 64, 3, 3)})
    assert "images_border" not in [one.kernel for one in run.operations]
