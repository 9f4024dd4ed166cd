"""Which products a mixture's experts take, and the directory that says so to kernels.

Experts of a layer may have formats of their own: a visit to an expert runs through the products of
all formats that gates, ups and downs of the layer have, and those that are not the expert's
multiply no tile. Experts without a gate have no products of gates: the directory says -1. Experts
without a feed-forward have no products at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from headrace.families.decoder import Experts, FeedForward, Matrix, ZeroComputation
from headrace.kernels.experts import DIRECTORY_SLOTS, MATRICES, PRODUCTS, TILE_COUNTS
from headrace.placing import Placed, padded16
from headrace.sparse.format import TILE_ROWS

GATE, UP, DOWN = range(MATRICES)


@dataclass(frozen=True)
class ExpertProducts:
    """The products of a mixture.

    Attributes:
        matrices: a matrix for each format of the gates, then of the ups, then of the downs.
        own: of each expert, the numbers of its gate (-1: it has none), up and down among them.
    """

    matrices: tuple[tuple[Matrix, ...], ...]
    own: tuple[tuple[int, ...], ...]

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(map(len, self.matrices))


def roles_of(one: FeedForward | ZeroComputation) -> Iterator[tuple[int, Matrix]]:
    """The matrices of an expert by their role, in the order in which a pass reads them."""
    return zip(
        (GATE, UP, DOWN)[MATRICES - len(list(one.matrices())) :], one.matrices(), strict=True
    )


def products_of(mixture: Experts, placed: Mapping[str, Placed]) -> ExpertProducts:
    """The products of a mixture whose matrices have the formats of `placed`."""
    numbers: list[dict[str, int]] = [{} for _ in range(MATRICES)]
    matrices: list[list[Matrix]] = [[] for _ in range(MATRICES)]
    for one in mixture.each:
        for role, matrix in roles_of(one):
            name = placed[matrix.name].format.name
            if name not in numbers[role]:
                numbers[role][name] = len(matrices[role])
                matrices[role].append(matrix)
    first = [sum(map(len, matrices[:role])) for role in range(MATRICES)]
    own = []
    for one in mixture.each:
        found = [-1] * MATRICES
        for role, matrix in roles_of(one):
            found[role] = first[role] + numbers[role][placed[matrix.name].format.name]
        own.append(tuple(found))
    return ExpertProducts(tuple(map(tuple, matrices)), tuple(own))


def directory_of(
    mixture: Experts, placed: Mapping[str, Placed], places: Callable[[int], list[int]]
) -> np.ndarray:
    """The directory of a mixture (`headrace.kernels.experts`).

    Args:
        places: where the matrices of an expert lie: addresses, or bytes of its slot.
    """
    entries = np.zeros((len(mixture.each), DIRECTORY_SLOTS), np.int64)
    own = products_of(mixture, placed).own
    for i, (entry, one) in enumerate(zip(entries, mixture.each, strict=True)):
        for (role, _), place in zip(roles_of(one), places(i), strict=True):
            entry[role] = place
        entry[PRODUCTS : PRODUCTS + MATRICES] = own[i]
        if isinstance(one, FeedForward):
            entry[TILE_COUNTS] = padded16(one.up.rows) // TILE_ROWS
            entry[TILE_COUNTS + 1] = padded16(one.down.rows) // TILE_ROWS
    return entries
