"""Routers that were fitted to say ahead what mixtures choose, in memory."""

from __future__ import annotations

import numpy as np

from headrace.memory import Arena
from headrace.placing import padded16
from headrace.sparse import f16


def fitted_bytes(fitted: np.ndarray) -> int:
    """Bytes that they take: see `FittedRouters`."""
    mixtures, distances, experts, columns = map(int, fitted.shape)
    return mixtures * distances * padded16(experts) * (2 * (columns - 1) + 4)


class FittedRouters:
    """Weights and biases as kernels read them: tiled float16, and float32.

    Args:
        fitted: float16 [mixtures, distances, experts, width + 1], biases behind weights; of what
            lies further before a mixture than the embedding, in the token before; only zeros: there
            is none.

    Attributes:
        addresses: of weights and of bias, by mixture and distance.

    Raises:
        BudgetError: the system gives no memory for them.
    """

    def __init__(self, fitted: np.ndarray) -> None:
        mixtures, distances, experts, columns = fitted.shape
        rows = padded16(experts)
        shape = mixtures, distances
        self._arena = Arena(
            {"weights": int(np.prod(shape)) * 2 * rows * (columns - 1),
             "biases": int(np.prod(shape)) * 4 * rows}, huge=False,
        )  # fmt: skip
        weights = self._arena.view("weights").reshape(*shape, -1)
        biases = self._arena.view("biases", "f4").reshape(*shape, rows)
        self.addresses: dict[tuple[int, int], tuple[int, int]] = {}
        for mixture, i in np.ndindex(shape):
            if not fitted[mixture, i].any():
                continue
            padded = np.zeros((rows, columns - 1), np.float32)
            padded[:experts] = fitted[mixture, i, :, :-1]
            weights[mixture, i] = f16.tile(f16.encode(padded)).reshape(-1)
            biases[mixture, i, :experts] = fitted[mixture, i, :, -1]
            self.addresses[mixture, i + 1] = (
                weights[mixture, i].ctypes.data, biases[mixture, i].ctypes.data,
            )  # fmt: skip
