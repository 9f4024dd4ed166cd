"""Addresses in an executable that is not linked yet: a symbol and an offset, as one number."""

from __future__ import annotations

from collections.abc import Mapping

from headrace.families.decoder import Matrix
from headrace.memory import offsets_of
from headrace.placing import padded16
from headrace.plan import PREFILL
from headrace.sparse.format import TILE_ROWS
from headrace.stack import BlockAt
from headrace.targets.ir_text import Place
from headrace.weights import Part

DATA, BUFFERS, KV = "headrace_data", "headrace_buffers", "headrace_kv"

# Each symbol has a region of numbers that no size, count or stride comes near.
_REGION = 1 << 44
_SYMBOLS = (DATA, BUFFERS, KV)


def number_of(place: Place) -> int:
    """A place as a number with which one can reckon."""
    return (_SYMBOLS.index(place.symbol) + 1) * _REGION + place.offset


def place_of(number: int) -> Place | None:
    """The place that a number means; None if it is just a number."""
    region, offset = divmod(number, _REGION)
    return Place(_SYMBOLS[region - 1], offset) if region > 0 else None


class ProgramPlaces:
    """`headrace.steps.Places` in an executable.

    Args:
        constants: bytes of each piece of the file of constants: "matrix NAME", "head NAME",
            "vector NAME", "table NAME" and others.
        buffers: bytes of each buffer.
        embedding: name of the matrix that has the embedding.
    """

    def __init__(
        self, constants: Mapping[str, int], buffers: Mapping[str, int], embedding: str
    ) -> None:
        self._embedding = embedding
        self.constants, self.constant_bytes = offsets_of(constants)
        self._buffers, self.buffer_bytes = offsets_of(buffers)

    def constant(self, name: str) -> int:
        """Address of a piece of the file of constants."""
        return number_of(Place(DATA, self.constants[name]))

    def embedding(self) -> int:
        """Address of the tiled embedding."""
        return self.constant(f"matrix {self._embedding}")

    def parts(self, matrix: Matrix) -> list[Part]:
        """A matrix lies there whole."""
        n_tiles = padded16(matrix.rows) // TILE_ROWS
        return [Part(0, n_tiles, self.constant(f"matrix {matrix.name}"))]

    def blocks(self, matrix: Matrix) -> list[BlockAt]:
        """There are no stacks."""
        raise AssertionError("an executable has no stack of blocks")

    def head(self, matrix: Matrix) -> int:
        """Address of the head of a group-sparse matrix."""
        return self.constant(f"head {matrix.name}")

    def directory(self, mixture: int) -> int:
        """Executables have no experts."""
        raise AssertionError("mixtures of experts are refused")

    def cache(self) -> None:
        """Nor a cache of them."""

    def staging(self, turn: int) -> int:
        """Nothing is streamed."""
        raise AssertionError("an executable has all of its weights in memory")

    def vector(self, name: str) -> int:
        """Address of a padded float32 vector."""
        return self.constant(f"vector {name}")

    def table(self, name: str) -> int:
        """Address of a rotary embedding's table."""
        return self.constant(f"table {name}")

    def buffer(self, name: str, large: bool) -> int:
        """Address of a buffer; `large`: of the one for long chunks, where there are two."""
        if large and PREFILL + name in self._buffers:
            name = PREFILL + name
        return number_of(Place(BUFFERS, self._buffers[name]))

    def kv(self) -> int:
        """Address of the KV cache."""
        return number_of(Place(KV))
