"""LLM-FP4: 4-bit floats for weights and activations, whose exponents have real-valued biases.

A number of E bits of exponent and M of mantissa is `k * 2^(max(e, 1) - M - b)`; with a bias b that
is no integer the grid is stretched to what it shall hold. Each row of a matrix (output) has one.
Activations have one real bias for all inputs and an integer for each ("pre-shifted exponent bias"):
a power of two, which weights take over. Biases and splits are searched, one side at a time, for the
smallest error of what the matrix puts out.

Source: Liu et al., "LLM-FP4" (2310.16836), and the authors' code: biases are tried at 0.01 to 1.2
times the one with which the largest number just fits.

`multiply` computes W4A4 as such hardware would; nothing here runs it fast. `encode` gives weights
of this kind to our kernels, whose activations are 8-bit integers (W4A8).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from headrace.sparse.format import Bytes, Floats
from headrace.sparse.fp4 import MAGNITUDES, pack

SPLITS = {"e2m1": (2, 1), "e1m2": (1, 2), "e3m0": (3, 0)}
GROUP = 128  # of the format that holds such weights
FACTORS = np.linspace(0.01, 1.2, 101)
ROUNDS = 3


def largest(split: str, bias: Floats) -> Floats:
    """The largest number."""
    e, m = SPLITS[split]
    found: Floats = (2 - 2.0**-m) * 2.0 ** (2**e - 1 - bias)
    return found


def fitting_bias(split: str, peak: Floats) -> Floats:
    """The bias with which a magnitude is the largest number; 0 is taken for 1."""
    e, m = SPLITS[split]
    found: Floats = 2**e - np.log2(np.where(peak > 0, peak, 1.0)) + np.log2(2 - 2.0**-m) - 1
    return found


def round_to(x: Floats, split: str, bias: Floats) -> Floats:
    """The nearest numbers, float64, ties to even; what is beyond the largest becomes that."""
    _, m = SPLITS[split]
    top = largest(split, bias)
    x = np.clip(x.astype(np.float64), -top, top)
    with np.errstate(divide="ignore"):
        # A magnitude at a power of two may be off by a rounding of its logarithm: it is one of the
        # numbers on both sides.
        exponent = np.floor(np.log2(np.abs(x)) + bias)
    step = 2.0 ** (np.maximum(exponent, 1) - m - bias)
    found: Floats = np.rint(x / step) * step
    return found


def pre_shifted(bias: Floats, split: str) -> tuple[float, Floats]:
    """Biases [n] as one real number and integers [n], as many as the exponent has values."""
    e, _ = SPLITS[split]
    base = float(bias.min())
    first = np.rint(base)
    return base, np.clip(np.rint(bias), first, first + 2**e - 1) - first


@dataclass(frozen=True)
class Choice:
    """What a matrix and its inputs are rounded to.

    Args:
        weight, activation: splits.
        rows: bias of each row [rows].
        base, shifts: the bias of an input is base + shifts [n], an integer.
    """

    weight: str
    rows: Floats
    activation: str
    base: float
    shifts: Floats

    def weights(self, w: Floats) -> Floats:
        """The weights, rounded."""
        return round_to(w, self.weight, self.rows[:, None])

    def activations(self, x: Floats) -> Floats:
        """Activations [tokens, n], rounded."""
        return round_to(x, self.activation, self.base + self.shifts)


def multiply(choice: Choice, w: Floats, x: Floats) -> Floats:
    """W4A4, float64 [tokens, rows]: activations have one bias, and weights the powers of two."""
    powers = 2.0**choice.shifts
    coded = round_to(x * powers, choice.activation, np.array(choice.base))
    found: Floats = coded @ (choice.weights(w) / powers).T
    return found


def start(w: Floats, x: Floats, weight: str = "e2m1", activation: str = "e2m1") -> Choice:
    """Biases with which the largest of each row and of each input fit."""
    rows = fitting_bias(weight, np.abs(w).max(axis=1))
    base, shifts = pre_shifted(fitting_bias(activation, np.abs(x).max(axis=0)), activation)
    return Choice(weight, rows, activation, base, shifts)


def search(w: Floats, x: Floats, splits: Iterable[str] = tuple(SPLITS)) -> Choice:
    """The splits and biases with which x W^T is off least.

    Args:
        w: float32 [rows, n].
        x: what the matrix is multiplied by on some text, float32 [tokens, n].
    """
    splits = tuple(splits)
    exact = x.astype(np.float64) @ w.T.astype(np.float64)
    choice = start(w, x, splits[0], splits[0])
    for _ in range(ROUNDS):
        choice = _best_weights(choice, w, x, exact, [choice.weight])
        choice = _best_activations(choice, w, x, exact, [choice.activation])
        choice = _best_weights(choice, w, x, exact, splits)
        choice = _best_activations(choice, w, x, exact, splits)
    return choice


def error(choice: Choice, w: Floats, x: Floats, exact: Floats) -> Floats:
    """The sum of squares by which each row is off: [rows]."""
    off = choice.activations(x) @ choice.weights(w).T - exact
    found: Floats = np.einsum("ij,ij->j", off, off)
    return found


def _best_weights(
    now: Choice, w: Floats, x: Floats, exact: Floats, splits: Iterable[str]
) -> Choice:
    coded, peak = now.activations(x), np.abs(w).max(axis=1)

    def off(split: str, rows: Floats) -> Floats:
        rest = coded @ round_to(w, split, rows[:, None]).T - exact
        found: Floats = np.einsum("ij,ij->j", rest, rest)
        return found

    best, least = now, float(off(now.weight, now.rows).sum())
    for split in splits:
        fitting = fitting_bias(split, peak)
        rows = now.rows if split == now.weight else fitting
        errors = off(split, rows)
        for factor in FACTORS:
            tried = fitting * factor
            found = off(split, tried)
            rows = np.where(found < errors, tried, rows)
            errors = np.minimum(found, errors)
        if errors.sum() < least:
            best, least = replace(now, weight=split, rows=rows), float(errors.sum())
    return best


def _best_activations(
    now: Choice, w: Floats, x: Floats, exact: Floats, splits: Iterable[str]
) -> Choice:
    known, peak = now.weights(w).T, np.abs(x).max(axis=0)

    def off(choice: Choice) -> float:
        return float(((choice.activations(x) @ known - exact) ** 2).sum())

    return _first_least(now, off, _activation_choices(now, peak, splits))


def _activation_choices(now: Choice, peak: Floats, splits: Iterable[str]) -> Iterable[Choice]:
    for split in splits:
        fitting = fitting_bias(split, peak)
        for factor in FACTORS:
            base, shifts = pre_shifted(fitting * factor, split)
            yield replace(now, activation=split, base=base, shifts=shifts)


def _first_least(now: Choice, off: Callable[[Choice], float], others: Iterable[Choice]) -> Choice:
    best, least = now, off(now)
    for other in others:
        found = off(other)
        if found < least:
            best, least = other, found
    return best


def encode(choice: Choice, w: Floats) -> Bytes:
    """The weights as raw rows of the format "<split>_g128", all groups of a row with one scale.

    The scale is a float16, so that a weight may be off by 2^-11 of itself.
    """
    _, m = SPLITS[choice.weight]
    unit = 2.0 ** (1 - m - choice.rows)
    magnitudes = np.rint(np.abs(choice.weights(w)) / unit[:, None])
    codes = np.searchsorted(MAGNITUDES[choice.weight], magnitudes).astype(np.uint8)
    d = np.repeat(unit[:, None], w.shape[1] // GROUP, axis=1)
    return pack(codes | (w < 0).astype(np.uint8) << 3, d.astype(np.float32), GROUP)
