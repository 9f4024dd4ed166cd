"""GroupNorm, InstanceNorm and ConvNeXt V2's response norm, as exporters write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper
from onnx_models import FLOAT, model_of
from onnx_references import check_alone
from test_native_operators import node

from headrace.networks.network import network_of

SHAPES = [(2, 20, 7, 9), (1, 64, 13, 10), (3, 6, 1, 1), (1, 48, 1, 200)]
NORM = ["images_moments", "moments_normalise", "images_scale"]


def image(shape: tuple[int, ...], away: float = 1.0) -> np.ndarray:
    """Channels of different sizes, far from zero, one of them the same everywhere."""
    rng = np.random.default_rng(sum(shape))
    spread = rng.uniform(0.2, 3, (1, shape[1], *[1] * (len(shape) - 2)))
    x = rng.standard_normal(shape) * spread + away
    x[:, 1] = -7.25
    return x.astype(np.float32)


def weights(channels: int) -> tuple[np.ndarray, np.ndarray]:
    found = np.random.default_rng(channels).standard_normal((2, channels)).astype(np.float32)
    return found[0], found[1]


def group_norm(x: np.ndarray, groups: int, weight: Any, bias: Any, epsilon: float) -> np.ndarray:
    """In float64."""
    n, channels, *sizes = x.shape
    apart = x.astype(np.float64).reshape(n, groups, -1)
    apart = apart - apart.mean(-1, keepdims=True)
    found = (apart / np.sqrt((apart**2).mean(-1, keepdims=True) + epsilon)).reshape(x.shape)
    spread = (channels, *[1] * len(sizes))
    y: np.ndarray = found * weight.reshape(spread) + bias.reshape(spread)
    return y


def bound(x: np.ndarray, groups: int, weight: np.ndarray, epsilon: float) -> np.ndarray:
    """Means are off by units of the values, in proportion to the spread of a group."""
    apart = x.reshape(*x.shape[:1], groups, -1).astype(np.float64)
    unit = np.abs(apart).max(-1, keepdims=True) * 2.0**-24 * 16
    narrow = 1 / np.sqrt(apart.var(-1, keepdims=True) + epsilon)
    off = (unit * narrow * (1 + np.abs(apart - apart.mean(-1, keepdims=True)) * narrow)) + 1e-6
    sizes = [1] * (x.ndim - 2)
    found: np.ndarray = off.reshape(x.shape) * (np.abs(weight).reshape(-1, *sizes) + 1)
    return found


def spelled(shape: tuple[int, ...], groups: int, *, constant: bool) -> tuple[list[Any], Any]:
    """Nodes of PyTorch's exporters for x, and their constants; `y` is made."""
    weight, bias = weights(shape[1])
    spread = (shape[1], *[1] * (len(shape) - 2))
    constants = {
        "apart": np.array([0, groups, -1]), "ones": np.ones(groups, np.float32),
        "zeros": np.zeros(groups, np.float32), "w": weight.reshape(spread),
        "b": bias.reshape(spread),
    }  # fmt: skip
    nodes = [
        node("Reshape", "x apart", "x1"),
        node("InstanceNormalization", "x1 ones zeros", "x2", epsilon=1e-5),
    ]
    if constant:
        constants["whole"] = np.array(shape)
    else:
        nodes.append(node("Shape", "x", "whole"))
    nodes += [node("Reshape", "x2 whole", "x3"), node("Mul", "x3 w", "x4"), node("Add", "x4 b")]
    return nodes, constants


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("away", [0.0, 1e3])
def test_instance_norm(shape: Any, away: float, tmp_path: Path) -> None:
    weight, bias = weights(shape[1])
    nodes = [node("InstanceNormalization", "x w b", epsilon=1e-5)]
    model = model_of(nodes, {"x": (FLOAT, list(shape))}, ["y"], {"w": weight, "b": bias}, 17)
    x = image(shape, away)
    expected = group_norm(x, shape[1], weight, bias, 1e-5)
    within = bound(x, shape[1], weight, 1e-5)
    assert check_alone(model, {"x": x}, tmp_path, expected, within) == NORM


def test_instance_norm_of_one_dimension(tmp_path: Path) -> None:
    weight, bias = weights(21)
    taps = np.random.default_rng(0).standard_normal((21, 5, 3)).astype(np.float32)
    nodes = [
        node("Conv", "x w", "a", pads=[1, 1]), node("InstanceNormalization", "a s b", "c"),
        node("Conv", "c v"),
    ]  # fmt: skip
    more = np.random.default_rng(1).standard_normal((4, 21, 1)).astype(np.float32)
    constants = {"w": taps, "s": weight, "b": bias, "v": more}
    model = model_of(nodes, {"x": (FLOAT, [2, 5, 77])}, ["y"], constants, 17)
    assert NORM[1] in check_alone(model, {"x": image((2, 5, 77))}, tmp_path, within=1e-5)


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [*((shape, shape[1] // 2) for shape in SHAPES), ((2, 33, 9, 9), 1), ((1, 96, 20, 20), 6)],
    ids=str,
)
def test_group_norm(shape: Any, groups: int, constant: bool, tmp_path: Path) -> None:
    nodes, constants = spelled(shape, groups, constant=constant)
    model = model_of(nodes, {"x": (FLOAT, list(shape))}, ["y"], constants, 17)
    x = image(shape, 30.0 if constant else 0.0)
    weight, bias = weights(shape[1])
    expected = group_norm(x, groups, weight, bias, 1e-5)
    within = bound(x, groups, weight, 1e-5)
    assert check_alone(model, {"x": x}, tmp_path, expected, within) == NORM


@pytest.mark.parametrize("opset", [18, 21])
def test_group_normalization(opset: int, tmp_path: Path) -> None:
    shape, groups = (2, 36, 8, 5), 4
    weight, bias = weights(groups if opset == 18 else 36)
    nodes = [node("GroupNormalization", "x w b", num_groups=groups, epsilon=1e-3)]
    model = model_of(nodes, {"x": (FLOAT, list(shape))}, ["y"], {"w": weight, "b": bias}, opset)
    x = image(shape)
    weight, bias = (a.repeat(36 // a.size) for a in (weight, bias))
    expected = group_norm(x, groups, weight, bias, 1e-3)
    within = bound(x, groups, weight, 1e-3)
    assert check_alone(model, {"x": x}, tmp_path, expected, within) == NORM


@pytest.mark.parametrize("last", ["Relu", "SiLU", "none"])
def test_what_follows_is_the_last_step(last: str, tmp_path: Path) -> None:
    """An activation, or a sum with another value and bounds."""
    shape = (2, 40, 6, 11)
    nodes, constants = spelled(shape, 8, constant=True)
    nodes[-1].output[0] = "norm"
    if last == "SiLU":
        nodes += [node("Sigmoid", "norm", "gate"), node("Mul", "norm gate", "a")]
        nodes.append(node("Add", "a x"))
    elif last == "Relu":
        nodes += [node("Add", "x norm", "a"), node("Relu", "a")]
    else:
        nodes.append(node("Add", "norm x"))
    model = model_of(nodes, {"x": (FLOAT, list(shape))}, ["y"], constants, 17)
    x = image(shape)
    expected = group_norm(x, 8, *weights(40), 1e-5)
    if last == "SiLU":
        expected = expected / (1 + np.exp(-expected))
    expected = np.maximum(expected + x, 0) if last == "Relu" else expected + x
    within = 2 * bound(x, 8, weights(40)[0], 1e-5) + 1e-5
    assert check_alone(model, {"x": x}, tmp_path, expected, within) == NORM


def test_factors_of_channels_behind_a_norm_stay_factors(tmp_path: Path) -> None:
    """Of a norm that is not made of reshapes, and where activations are in front of them."""
    weight, bias = weights(20)
    nodes = [
        node("InstanceNormalization", "x w b", "a"), node("Tanh", "a", "c"), node("Mul", "c s"),
    ]  # fmt: skip
    constants = {"w": weight, "b": bias, "s": np.abs(weights(20)[1]).reshape(1, 20, 1, 1)}
    model = model_of(nodes, {"x": (FLOAT, [2, 20, 5, 5])}, ["y"], constants, 17)
    x = image((2, 20, 5, 5))
    expected = np.tanh(group_norm(x, 20, weight, bias, 1e-5)) * constants["s"]
    check_alone(model, {"x": x}, tmp_path, expected, bound(x, 20, weight, 1e-5) * 4)


def test_what_is_no_number_makes_its_channel_none(tmp_path: Path) -> None:
    weight, bias = weights(20)
    nodes = [node("InstanceNormalization", "x w b")]
    constants = {"w": weight, "b": bias}
    model = model_of(nodes, {"x": (FLOAT, [1, 20, 9, 9])}, ["y"], constants, 17)
    x = image((1, 20, 9, 9))
    x[0, 3, 4, 4], x[0, 7, 8, 8] = np.nan, np.inf
    within = np.full(x.shape, 1e-4)
    check_alone(model, {"x": x}, tmp_path, None, within)
    with network_of(model, threads=1) as network:
        assert np.isnan(network({"x": x})["y"]).any((0, 2, 3)).nonzero()[0].tolist() == [3, 7]


@pytest.mark.parametrize("last", [False, True], ids=["channels second", "channels last"])
@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("shape", [(2, 20, 7, 9), (1, 160, 14, 14)], ids=str)
def test_response_norm(shape: Any, last: bool, older: bool, tmp_path: Path) -> None:
    channels = shape[1]
    spread = (1, 1, 1, channels) if last else (1, channels, 1, 1)
    weight, bias = weights(channels)
    constants = {
        "w": weight.reshape(spread), "b": bias.reshape(spread), "one": np.ones(1, np.float32),
        "epsilon": np.array(1e-6, np.float32), "pixels": np.array([1, 2] if last else [2, 3]),
        "channels": np.array([-1 if last else 1]),
    }  # fmt: skip
    x, made = ("rows", "all") if last else ("x", "y")
    nodes = [
        node("ReduceL2", f"{x} pixels", "length", keepdims=1),
        node("ReduceMean", "length channels", "mean", keepdims=1),
        node("Add", "mean epsilon", "total"), node("Div", "length total", "share"),
        node("Mul", f"{x} share", "a"), node("Mul", "w a", "c"),
    ]  # fmt: skip
    if older:
        nodes.append(node("Mul", "c one", "d"))
    nodes += [node("Add", "b d" if older else "b c", "e"), node("Add", f"{x} e", made)]
    if last:
        nodes.insert(0, node("Transpose", "x", "rows", perm=[0, 2, 3, 1]))
        nodes.append(node("Transpose", "all", perm=[0, 3, 1, 2]))
    model = model_of(nodes, {"x": (FLOAT, list(shape))}, ["y"], constants, 18)
    x = image(shape)
    x[0, 2] *= 1e3
    length = np.sqrt((x.astype(np.float64) ** 2).sum((2, 3), keepdims=True))
    share = length / (length.mean(1, keepdims=True) + 1e-6)
    sizes = (1, channels, 1, 1)
    expected = x + x * share * weight.reshape(sizes) + bias.reshape(sizes)
    within = (np.abs(x) * (1 + np.abs(share * weight.reshape(sizes))) + 1) * 2e-6
    kernels = check_alone(model, {"x": x}, tmp_path, expected, within)
    assert "moments_respond" in kernels


def test_other_sums_are_no_response_norm(tmp_path: Path) -> None:
    """Lengths of another value, or over other axes."""
    constants = {
        "epsilon": np.array(1e-6, np.float32), "pixels": np.array([2, 3]), "one": np.array([1]),
        "rows": np.array([2]), "w": weights(20)[0].reshape(1, 20, 1, 1),
    }  # fmt: skip
    for of, axes in (("z", "pixels"), ("x", "rows")):
        nodes = [
            node("Relu", "x", "z"), node("ReduceL2", f"{of} {axes}", "length"),
            node("ReduceMean", "length one", "mean"), node("Add", "mean epsilon", "total"),
            helper.make_node("Div", ["length", "total"], ["share"]), node("Mul", "x share", "a"),
            node("Mul", "a w", "b"), node("Add", "x b", "c"), node("Relu", "c"),
        ]  # fmt: skip
        model = model_of(nodes, {"x": (FLOAT, [1, 20, 6, 6])}, ["y"], constants, 18)
        with network_of(model, threads=1) as network:
            runs = network.plan({"x": image((1, 20, 6, 6))}).natives
            assert not any(o.kernel == "moments_respond" for r in runs for o in r.operations)
