"""Weights as kernels want them, in memory that plans of a network share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from headrace.memory import Arena
from headrace.networks.operation import Weight


class WeightStore:
    """Memory of weights; each goes with the last that holds it."""

    def __init__(self) -> None:
        self._shared: WeakValueDictionary[Any, Arena] = WeakValueDictionary()

    def placed(self, weight: Weight) -> Arena:
        """Memory that begins with the weight.

        Raises:
            BudgetError: the system gives no memory.
            ModelFileError: the weight cannot be read.
        """
        found = None if weight.key is None else self._shared.get(weight.key)
        if found is None:
            found = _filled(weight.n_bytes, weight.parts())
            if weight.key is not None:
                self._shared[weight.key] = found
        return found


def _filled(n_bytes: int, parts: Iterable[tuple[int, np.ndarray]]) -> Arena:
    arena = Arena({"weight": n_bytes})
    whole = arena.view("weight")
    for at, part in parts:
        data = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
        whole[at : at + data.size] = data
    return arena
