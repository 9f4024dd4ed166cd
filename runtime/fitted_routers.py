"""Routers that were fitted to say ahead what mixtures choose, in memory."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from headrace.memory import Arena
from headrace.placing import padded16
from headrace.sparse import f16
from headrace.sparse.format import Floats

Fitted = Mapping[tuple[int, int], tuple[Floats, Floats]]


class FittedRouters:
    """Weights [experts, width] and biases [experts] by (mixture, distance), as kernels read them.

    Raises:
        BudgetError: the system gives no memory for them.
    """

    def __init__(self, fitted: Fitted) -> None:
        sizes = {}
        for (mixture, distance), (weights, _) in fitted.items():
            rows = padded16(len(weights))
            sizes[f"weights {mixture} {distance}"] = 2 * rows * weights.shape[1]
            sizes[f"bias {mixture} {distance}"] = 4 * rows
        self._arena = Arena(sizes, huge=False)
        self.addresses: dict[tuple[int, int], tuple[int, int]] = {}
        for (mixture, distance), (weights, bias) in fitted.items():
            names = f"weights {mixture} {distance}", f"bias {mixture} {distance}"
            padded = np.zeros((padded16(len(weights)), weights.shape[1]), np.float32)
            padded[: len(weights)] = weights
            self._arena.view(names[0])[:] = f16.tile(f16.encode(padded)).reshape(-1)
            self._arena.view(names[1], "f4")[: len(bias)] = bias
            self.addresses[mixture, distance] = (
                self._arena.address(names[0]), self._arena.address(names[1]),
            )  # fmt: skip
