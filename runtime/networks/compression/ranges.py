"""Ranges of activations: what loses least when it is cut into 255 steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from headrace.errors import UnsupportedError
from headrace.networks.compression.float_model import observe
from headrace.networks.compression.samples import Sample

BINS = 2048
STEPS = 255
_SHARES = np.linspace(0.3, 1, 36)  # of either end that are tried


class Histogram:
    """How often values lie where, between the least and the most."""

    def __init__(self, least: float, most: float) -> None:
        self.least, self.most = min(least, 0.0), max(most, 0.0)
        self.counts = np.zeros(BINS, np.int64)

    def add(self, values: np.ndarray) -> None:
        """Count values."""
        if self.most > self.least:
            self.counts += np.histogram(values, BINS, (self.least, self.most))[0]

    def range(self) -> tuple[float, float]:
        """The ends, zero among what is between them, with the least squared error.

        What is beyond an end is moved to it; what is between is off by a step squared over 12.
        """
        if self.most <= self.least:
            return 0.0, 1.0
        width = (self.most - self.least) / BINS
        centres = self.least + width * (np.arange(BINS) + 0.5)
        best = (np.inf, self.least, self.most)
        lows = np.unique(self.least * _SHARES)
        highs = np.unique(self.most * _SHARES)
        for low in lows:
            below = np.where(centres < low, centres - low, 0)
            for high in highs:
                step = (high - low) / STEPS
                if step <= 0:
                    continue
                beyond = below + np.where(centres > high, centres - high, 0)
                inside = self.counts[(centres >= low) & (centres <= high) & (centres != 0)].sum()
                error = float(self.counts @ beyond**2) + inside * step**2 / 12
                if error < best[0]:
                    best = (error, float(low), float(high))
        return best[1], best[2]


def ranges(
    model: Any, names: Sequence[str], samples: Sequence[Sample]
) -> dict[str, tuple[float, float]]:
    """Of values of a float32 model, from what they are for samples.

    Raises:
        UnsupportedError: onnxruntime does not run it, or a value has no range.
    """
    ends: dict[str, tuple[float, float]] = {}

    def widen(values: dict[str, np.ndarray]) -> None:
        for name, value in values.items():
            low, high = ends.get(name, (0.0, 0.0))
            low = float(np.minimum(low, value.min(initial=0)))  # no number stays none
            high = float(np.maximum(high, value.max(initial=0)))
            if not np.isfinite((low, high)).all():
                raise UnsupportedError(
                    f"{name} has values that are no numbers for these inputs, so it has no range"
                )
            ends[name] = (low, high)

    observe(model, names, samples, widen)
    counted = {name: Histogram(*pair) for name, pair in ends.items()}

    def count(values: dict[str, np.ndarray]) -> None:
        for name, value in values.items():
            counted[name].add(value)

    observe(model, names, samples, count)
    return {name: one.range() for name, one in counted.items()}
