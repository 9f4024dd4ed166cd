"""Tables of what experts were chosen after which others, as kernels read them."""

from __future__ import annotations

from typing import Literal

import numpy as np

from headrace.memory import Arena
from headrace.offload.route_statistics import RouteStatistics

# What asks for experts ahead: routers fitted for that, or else as "gates"; the routers of later
# mixtures; tables of two mixtures or of one; nothing.
Predictor = Literal["fitted", "gates", "pairs", "affinity", "none"]


def _width(experts: int) -> int:
    return -(-experts // 16) * 16


def table_bytes(learned: RouteStatistics | None, predictor: Predictor) -> int:
    """Bytes of the tables of a predictor; 0 of those that have none."""
    if learned is None or predictor not in ("pairs", "affinity"):
        return 0
    mixtures, e = learned.frequency.shape
    rows: int = mixtures * e ** (2 if predictor == "pairs" else 1)
    return 2 * rows * _width(e)


class Recall:
    """The tables in memory: float16, a row for each expert, or pair of experts, chosen before.

    Attributes:
        both: whether rows are for pairs.
        experts: rows of one kind; a pair's is the earlier one times this, plus the later one.
        width: values of a row, with zeros behind those of the experts.
    """

    def __init__(self, learned: RouteStatistics, predictor: Predictor) -> None:
        self.both = predictor == "pairs"
        source = learned.pairs if self.both else learned.affinity
        mixtures, self.experts = learned.frequency.shape
        self.width = _width(self.experts)
        self._bytes: int = 2 * self.width * self.experts ** (2 if self.both else 1)
        self._arena = Arena({"tables": mixtures * self._bytes}, huge=False)
        tables = self._arena.view("tables").view(np.float16).reshape(*source.shape[:-1], self.width)
        tables[..., : self.experts] = source

    def address(self, mixture: int) -> int:
        """Of the table that says what a mixture chooses."""
        return self._arena.address("tables") + mixture * self._bytes
