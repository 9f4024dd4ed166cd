"""LLM-FP4: numbers with real-valued biases, and what searching them gains."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from headrace.sparse import llm_fp4
from headrace.sparse.fp4 import MAGNITUDES
from headrace.sparse.llm_fp4 import SPLITS
from headrace.sparse.registry import FORMATS

N, ROWS, TOKENS = 256, 24, 40


def layer(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and inputs of which a few are far larger than the others."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((ROWS, N)).astype(np.float32) * np.exp(rng.standard_normal((ROWS, 1)))
    x = rng.standard_normal((TOKENS, N)).astype(np.float32)
    x[:, ::32] *= 60
    return w.astype(np.float32), x


def test_e2m1_is_the_standard_one() -> None:
    x = np.linspace(-7, 7, 4001).astype(np.float32)
    expected = x.astype(ml_dtypes.float4_e2m1fn).astype(np.float64)
    assert np.array_equal(llm_fp4.round_to(x, "e2m1", np.float64(1)), expected)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("bias", [-3.0, 0.0, 1.37, 9.81])
def test_numbers_of_a_split(split: str, bias: float) -> None:
    unit = 2.0 ** (1 - SPLITS[split][1] - bias)
    numbers = np.array(MAGNITUDES[split]) * unit
    np.testing.assert_allclose(llm_fp4.largest(split, np.float64(bias)), numbers[-1], rtol=1e-12)
    np.testing.assert_allclose(llm_fp4.fitting_bias(split, numbers[-1]), bias, atol=1e-12)
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.uniform(-1.2, 1.2, 5000) * numbers[-1], numbers * 1.0000001])
    found = llm_fp4.round_to(x, split, np.float64(bias))
    both = np.concatenate([-numbers[::-1], numbers])
    nearest = np.abs(np.clip(x, both[0], both[-1])[:, None] - both).min(axis=1)
    np.testing.assert_allclose(np.abs(np.clip(x, both[0], both[-1]) - found), nearest, atol=1e-12)
    assert np.abs(found[:, None] - both).min(axis=1).max() < 1e-12 * numbers[-1]


@pytest.mark.parametrize("split", SPLITS)
def test_shifts_are_powers_of_two(split: str) -> None:
    _, x = layer()
    bias = llm_fp4.fitting_bias(split, np.abs(x).max(axis=0))
    base, shifts = llm_fp4.pre_shifted(bias, split)
    assert shifts.min() == 0
    assert shifts.max() <= 2 ** SPLITS[split][0] - 1
    assert (shifts == np.rint(shifts)).all()
    apart = llm_fp4.round_to(x, split, base + shifts)
    together = llm_fp4.round_to(x * 2.0**shifts, split, np.float64(base)) / 2.0**shifts
    np.testing.assert_allclose(apart, together, rtol=1e-12)


def test_a_search_gains_and_beats_integers() -> None:
    w, x = layer()
    exact = x.astype(np.float64) @ w.T.astype(np.float64)
    first = llm_fp4.start(w, x)
    found = llm_fp4.search(w, x)

    def off(y: np.ndarray) -> float:
        return float(((y - exact) ** 2).sum() / (exact**2).sum())

    def whole(v: np.ndarray, axis: int | None) -> np.ndarray:
        step = np.abs(v).max(axis=axis, keepdims=True) / 7
        return np.asarray(np.rint(v / step) * step, np.float64)

    integers = off(whole(x, None) @ whole(w, 1).T)
    chosen = off(llm_fp4.multiply(found, w, x))
    assert chosen < 0.9 * off(llm_fp4.multiply(first, w, x))
    assert chosen < 0.5 * integers
    assert np.isclose(chosen, llm_fp4.error(found, w, x, exact).sum() / (exact**2).sum())


@pytest.mark.parametrize("split", SPLITS)
def test_weights_go_to_our_kernels(split: str) -> None:
    w, x = layer()
    choice = llm_fp4.search(w, x[:8], [split])
    fmt = FORMATS[f"{split}_g128"]
    raw = llm_fp4.encode(choice, w)
    assert raw.shape == (ROWS, fmt.row_bytes(N))
    np.testing.assert_allclose(fmt.decode(raw), choice.weights(w), rtol=2.0**-11)
