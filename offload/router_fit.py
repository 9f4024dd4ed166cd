"""Routers that say earlier what mixtures will choose, fitted to what those say of a text.

The router of a later layer, run on what an earlier one reads (pre-gating without training), does
not know what lies between. Ridge regression of its logits from what the earlier layer reads does,
as far as that is linear. After Pre-gated MoE (2308.12066), which trains such routers with the
model. What the last layers read says which token comes next, and so what its first layers choose:
the embedding counts as a place between the last mixture and the next token's first one.
"""

from __future__ import annotations

import numpy as np

from headrace.sparse.format import Floats

DISTANCES = 4  # mixtures ahead
TOKENS = 8192  # that are looked at, at most
FITTED_BYTES = 64 << 20  # what takes more is fitted for fewer mixtures ahead
_RIDGE = 1e-3  # of the mean of the inputs' squares


class RouterFit:
    """Least squares over mixtures, which come one after the other with all rows of each.

    What comes before the first mixture is number -1.
    """

    def __init__(self) -> None:
        self._tokens = self._distances = self._current = 0
        self._inputs: dict[int, np.ndarray] = {}  # float16 [tokens, width + 1] of the last mixtures
        self._squares: dict[int, Floats] = {}
        self._crossed: dict[int, Floats] = {}  # of the current mixture, by distance
        self._first_logits: dict[int, np.ndarray] = {}  # float16 [tokens, experts]
        self.fitted = np.zeros((0, 0, 0, 0), np.float16)

    def begin(self, mixtures: int, experts: int, width: int, tokens: int) -> int:
        """Take no memory yet; say how many bytes this will take at most.

        Args:
            mixtures, experts, width: of the model; experts of the mixture that has most.
            tokens: rows that will come.
        """
        each = 2 * mixtures * experts * (width + 1)
        self._distances = max(1, min(DISTANCES, FITTED_BYTES // each))
        self._tokens = min(tokens, TOKENS)
        self.fitted = np.zeros((mixtures, self._distances, experts, width + 1), np.float16)
        self._current = -1
        held = 2 * self._tokens * (width + 1 + experts) + 4 * (width + 1) ** 2
        return self.fitted.nbytes + (self._distances + 1) * held + 16 * (width + 1) ** 2

    def add(self, number: int, first: int, inputs: Floats, logits: Floats | None) -> None:
        """Take some rows of a mixture.

        Args:
            first: the first one's number.
            inputs: float32 [rows, width], normalised as the mixture reads them.
            logits: float32 [rows, experts] of its router; None: there is none before the first.
        """
        if number != self._current:
            self.end()
            self._current = number
        rows = slice(first, min(first + len(inputs), self._tokens))
        n, width = max(0, rows.stop - first), inputs.shape[1]
        if n == 0:
            return
        if number not in self._inputs:
            self._inputs[number] = np.zeros((self._tokens, width + 1), np.float16)
            self._squares[number] = np.zeros((width + 1, width + 1), np.float32)
        here = np.ones((n, width + 1), np.float32)
        here[:, :width] = inputs[:n]
        self._inputs[number][rows] = np.clip(here, -65504, 65504)
        self._squares[number] += here.T @ here
        if logits is None:
            return
        if number < self._distances - 1:
            shape = self._tokens, logits.shape[1]
            kept = self._first_logits.setdefault(number, np.zeros(shape, np.float16))
            kept[rows] = np.clip(logits[:n], -65504, 65504)
        for distance in range(1, self._distances + 1):
            if number - distance in self._inputs:
                earlier = self._inputs[number - distance][rows].astype(np.float32)
                cross = earlier.T @ logits[:n]
                self._crossed[distance] = self._crossed.get(distance, np.float32(0)) + cross

    def end(self) -> None:
        """All rows of the current mixture have come."""
        self._fit_next_token()
        for distance, cross in self._crossed.items():
            self._solve(self._current - distance, self._current, distance, cross)
        self._crossed = {}
        for old in [m for m in self._inputs if m <= self._current - self._distances]:
            del self._inputs[old], self._squares[old]

    def _solve(self, number: int, later: int, distance: int, cross: Floats) -> None:
        """Fit what says, of what one mixture reads, what a later one will choose."""
        square = self._squares[number].astype(np.float64)
        square[np.diag_indices_from(square)] += _RIDGE * np.trace(square) / len(square)
        solved = np.linalg.solve(square, cross.astype(np.float64))
        to = self.fitted[later, distance - 1, : cross.shape[1]]
        to[:] = np.clip(solved.T, -65504, 65504)

    def _fit_next_token(self) -> None:
        """Fit routers of the next token's first mixtures to what the current one reads."""
        mixtures, distances = self.fitted.shape[:2]
        for later, logits in self._first_logits.items():
            distance = mixtures + 1 + later - self._current
            if not later + 1 < distance <= distances or self._current < 0:
                continue
            # A text has many tokens for each window whose last one is followed by another text.
            earlier = self._inputs[self._current][: len(logits) - 1].astype(np.float32)
            cross = earlier.T @ logits[1:].astype(np.float32)
            self._solve(self._current, later, distance, cross)
