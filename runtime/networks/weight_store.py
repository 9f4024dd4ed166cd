"""Weights as kernels want them, in memory that plans of a network share."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from headrace.memory import Arena
from headrace.networks.operation import Weight


class Held:
    """A weight in memory, whose pages the system gets back when nobody holds this any more.

    Attributes:
        base: its address.
        n_bytes: of it.
    """

    def __init__(self, arena: Arena, name: str, weight: Weight) -> None:
        self.base, self.n_bytes = arena.address(name), weight.n_bytes
        whole = arena.view(name)
        for at, part in weight.parts():
            data = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
            whole[at : at + data.size] = data
        weakref.finalize(self, arena.release, name, 0, weight.n_bytes).atexit = False


class WeightStore:
    """Memory of weights; each goes with the last that holds it."""

    def __init__(self) -> None:
        self._shared: weakref.WeakValueDictionary[Any, Held] = weakref.WeakValueDictionary()

    def placed(self, weights: Sequence[Weight]) -> list[Held]:
        """Memory of each of them.

        What nobody had before lies in one mapping: few weights alone would fill huge pages, and
        reading through small ones is up to a third slower.

        Raises:
            BudgetError: the system gives no memory.
            ModelFileError: a weight cannot be read.
        """
        keys: list[Hashable] = [i if w.key is None else (w.key,) for i, w in enumerate(weights)]
        found = {key: held for key in keys if (held := self._shared.get(key)) is not None}
        new = {key: w for key, w in zip(keys, weights, strict=True) if key not in found}
        arena = Arena({str(i): weight.n_bytes for i, weight in enumerate(new.values())})
        for i, (key, weight) in enumerate(new.items()):
            found[key] = Held(arena, str(i), weight)
            if weight.key is not None:
                self._shared[key] = found[key]
        return [found[key] for key in keys]
