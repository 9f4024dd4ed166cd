"""Layers of int8 codes: numpy against TensorFlow Lite Micro, chips against numpy."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tflite_micro_networks import MICRO, micro_network

from headrace.errors import UnsupportedError
from headrace.micro import fixed_point
from headrace.micro.arithmetic import computed
from headrace.micro.int8 import LOWERED, activation, convolution, pool, softmax
from headrace.micro.network import Activation, Codes, Convolution, Pool, Softmax, Value, Windows
from headrace.micro.reading import read_network
from headrace.targets.target import microcontrollers

CHIP = microcontrollers()["cortex-m55"]
GOLDENS = Path(__file__).parent / "data" / "tflm_goldens.npz"


@cache
def goldens() -> dict[str, np.ndarray]:
    with np.load(GOLDENS) as found:
        return dict(found)


@pytest.mark.parametrize("case", ["residual", *MICRO])
def test_every_code_as_in_tensorflow_lite_micro(case: str, tmp_path: Path) -> None:
    content, inputs = micro_network(case)
    path = tmp_path / f"{case.replace(' ', '-')}.tflite"
    path.write_bytes(content)
    network = read_network(path)
    (given,), (made) = network.inputs, network.outputs[0]
    for one, expected in zip(inputs, goldens()[case], strict=True):
        x = one.transpose(0, 2, 3, 1) if given.channels_first else one
        values = computed(network, CHIP, {given.value.name: x.reshape(given.value.shape)})
        found = values[made.value.name]
        if made.channels_first:
            found = found.transpose(2, 0, 1)
        # Exponentials of numbers are within 2 units of float32's last place, and so are theirs.
        tolerance = 5e-7 if expected.dtype == np.float32 else 0
        np.testing.assert_allclose(found.reshape(expected.shape), expected, rtol=tolerance)


@given(st.floats(2.0**-30, 2.0**10), st.integers(-(2**20), 2**20))
def test_products_with_quantised_multipliers_are_near_the_real_ones(real: float, x: int) -> None:
    multiplier, shift = fixed_point.quantised_multiplier(real)
    assert multiplier == 0 or 2**30 <= multiplier < 2**31
    if abs(x * real) < 2**30:
        found = int(fixed_point.multiplied(x, multiplier, shift))
        assert abs(found - x * real) <= 1 + abs(x * real) * 2.0**-30


@given(st.integers(-(2**31) + 1, 2**31 - 1), st.integers(0, 31))
def test_a_rounding_shift_takes_of_two_the_one_farther_from_zero(x: int, by: int) -> None:
    sign = 1 if x >= 0 else -1
    assert int(fixed_point.rounding_shift(x, by)) == sign * ((2 * abs(x) + 2**by) // 2 ** (by + 1))


@pytest.mark.parametrize("bits", [4, 5])
def test_functions_of_fractions(bits: int) -> None:
    a = np.linspace(-(2.0**bits) + 0.01, 0, 1001)
    codes = np.rint(a * 2 ** (31 - bits)).astype(np.int64)
    exps = fixed_point.exp_of_negatives(codes, bits) / 2**31
    np.testing.assert_allclose(exps, np.exp(a), atol=3e-7)
    if bits == 4:
        codes = np.concatenate([codes, -codes])
        a = np.concatenate([a, -a])
        logistic = fixed_point.logistic(codes, bits) / 2**31
        np.testing.assert_allclose(logistic, 1 / (1 + np.exp(-a)), atol=3e-7)
        np.testing.assert_allclose(fixed_point.tanh(codes, bits) / 2**31, np.tanh(a), atol=3e-7)


@given(st.integers(1, 2**31 - 1))
def test_reciprocals(x: int) -> None:
    scale, bits = fixed_point.reciprocal(x, 12)
    found = float(scale) / 2**31 * 2.0 ** -int(bits)
    assert found == pytest.approx(1 / (x / 2**19), rel=1e-7)


def layer(bias: int = 0, scale: float = 0.1, weight: int = 3) -> Convolution:
    read, made = Value("x", (8,), Codes(0.1, -5)), Value("y", (2,), Codes(scale, 3))
    weights = np.full((2, 1, 1, 8), weight, np.int8)
    biases = np.array([bias, 0], np.int32)
    return Convolution("fc", (read,), made, weights, biases, np.array([0.01, 0.02]), Windows())


def test_sums_that_32_bits_do_not_hold() -> None:
    x = np.zeros(8, np.int8)
    with pytest.raises(UnsupportedError, match="layer fc: its sums may be from"):
        convolution.computed(layer(2**31 - 10), CHIP, x)
    with pytest.raises(UnsupportedError, match="more than 32 bits hold"):
        LOWERED[Convolution](layer(2**20, 1e-7), CHIP)
    # A channel without weights has any bias.
    assert convolution.computed(layer(-(2**31), weight=0), CHIP, x)[0] == -128


def function(kind: str, codes: Codes | None) -> Activation:
    read, made = Value("x", (8,), Codes(0.1, 0)), Value("y", (8,), codes, wide=codes is None)
    of: Any = kind
    return Activation("f", (read,), made, of)


FUNCTIONS: dict[str, Any] = {
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "hard_swish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    "hard_sigmoid": lambda x: np.clip(x / 6 + 0.5, 0, 1),
}


@pytest.mark.parametrize(
    ("kind", "scale", "zero"),
    [
        ("sigmoid", 0.0037, -128), ("tanh", 1 / 128, 3), ("hard_swish", 1e-4, 0),
        ("hard_sigmoid", 1 / 255, -128),
    ],
)  # fmt: skip
def test_functions_of_other_scales_are_rounded_from_the_real_number(
    kind: str, scale: float, zero: int
) -> None:
    x = np.arange(-128, 128) * 0.1
    expected = np.clip(FUNCTIONS[kind](x) / scale + zero, -128, 127)
    found = activation.table(function(kind, Codes(scale, zero)))
    assert np.abs(found - expected).max() <= 0.5 + 1e-5
    numbers = activation.table(function(kind, None))
    assert numbers.dtype == np.float32
    np.testing.assert_allclose(numbers, FUNCTIONS[kind](x), rtol=1e-6)


@pytest.mark.parametrize(
    ("scale", "zero"), [(1 / 256, -128), (1 / 255, -128), (0.002, -7), (1.0, 0), (1e-5, -128)]
)
def test_softmax_of_other_scales(scale: float, zero: int) -> None:
    read, made = Value("x", (40, 7), Codes(0.05, 3)), Value("y", (40, 7), Codes(scale, zero))
    x = np.random.default_rng(0).integers(-128, 128, read.shape).astype(np.int8)
    powers = np.exp(x * 0.05)
    exact = powers / powers.sum(1, keepdims=True) / scale + zero
    found = softmax.computed(Softmax("s", (read,), made), CHIP, x)
    # Sums of exponentials have 19 bits behind the point, each rounded.
    assert (np.abs(found - np.clip(exact, -128, 127)) <= 0.51 + 2e-5 / scale).all()


def test_a_softmax_of_too_small_a_scale() -> None:
    read, made = Value("x", (7,), Codes(0.05, 3)), Value("y", (7,), Codes(1e-10, 0))
    with pytest.raises(UnsupportedError, match="layer s: softmax makes codes of scale 1e-10"):
        LOWERED[Softmax](Softmax("s", (read,), made), CHIP)


def test_means_that_are_too_large() -> None:
    codes = Codes(0.1, 0)
    read, made = Value("x", (64, 64, 1), codes), Value("y", (1, 1, 1), codes)
    one = Pool("p", (read,), made, "mean", Windows((64, 64)))
    with pytest.raises(UnsupportedError, match="the mean of 4096 pixels"):
        pool.mean_of(one)
    other = replace(one, makes=Value("y", (8, 8, 1), Codes(0.2, 0)), windows=Windows((8, 8)))
    with pytest.raises(UnsupportedError, match="are done of whole images only"):
        pool.mean_of(other)


@given(st.integers(1, 2048), st.data())
def test_every_mean_is_rounded_away_from_zero(count: int, data: st.DataObject) -> None:
    codes = Codes(0.1, 0)
    read, made = Value("x", (1, count, 1), codes), Value("y", (1, 1, 1), codes)
    of = pool.mean_of(Pool("p", (read,), made, "mean", Windows((1, count))))
    total = data.draw(st.integers(-128 * count, 127 * count))
    half = count // 2
    expected = (abs(total) + half) // count * (1 if total > 0 else -1)
    assert int(fixed_point.doubling_high(total, of.multipliers[count])) == expected
