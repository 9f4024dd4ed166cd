"""Matrices of one file turned into tiled bytes of another format, some rows at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from headrace.errors import BudgetError, ModelFileError, UnsupportedError
from headrace.finite import check_matrix
from headrace.loaders.gguf import TensorReader
from headrace.placing import Placed, PlacedMatrix
from headrace.pruning import PrunedMatrix, choosing_bytes, prune
from headrace.recipe import Recipe
from headrace.rows import raw_rows
from headrace.share import share
from headrace.sizes import format_size
from headrace.sparse.format import TILE_ROWS, Floats, Format
from headrace.sparse.gptq import further, gptq, inverse_factor, largest_first, unmade
from headrace.sparse.gqs_pruning import Hessian, group_costs
from headrace.sparse.reach import beyond
from headrace.sparse.registry import FORMATS

Write = Callable[[int, np.ndarray], None]  # offset in the tensor, bytes

# What rounding takes for each weight at a time: float32, temporaries, what allocators keep.
_BYTES_PER_WEIGHT = 96
_PORTION = 1 << 19  # weights that a thread rounds at once, where memory allows
_GPTQ_ROWS = 512  # at least, where memory allows: the work on one input is then worth a call


@dataclass(frozen=True)
class Inputs:
    """What the inputs of a matrix were like on some text.

    Args:
        h: sum of x x^T, float32 [n, n].
        held: bytes of all statistics that are in memory with these.
    """

    h: Floats
    held: int = 0

    @property
    def importance(self) -> Floats:
        """The mean square of each input, the largest being 1: float32 [n]."""
        diagonal: Floats = np.maximum(np.diag(self.h), 0)
        found: Floats = diagonal / max(float(diagonal.max()), np.finfo(np.float32).tiny)
        return found


def factor_bytes(columns: int, held: int) -> int:
    """What `Factors` takes at least, with `held` bytes of statistics."""
    return held + 12 * columns * columns


class Factors:
    """What GPTQ makes of statistics, in `room` bytes (None: no limit); the last one is kept.

    Several matrices read the same, one after the other.
    """

    def __init__(self, room: int | None) -> None:
        self._room = room
        self._last: tuple[Floats, bool, Floats] | None = None

    def of(self, name: str, inputs: Inputs, ordered: bool = False) -> Floats:
        """`headrace.sparse.gptq.inverse_factor` of what a matrix reads.

        Args:
            ordered: whether its inputs come largest first.

        Raises:
            BudgetError: the work does not fit.
            ModelFileError: the statistics are of no use.
        """
        if self._last is None or self._last[0] is not inputs.h or self._last[1] != ordered:
            self._last = None
            n = len(inputs.h)
            double = 3 * 8 * n * n
            room = double if self._room is None else self._room - inputs.held
            if room < double // 2:
                raise too_little(name, double // 2, room)
            try:
                dtype = np.float64 if room >= double else np.float32
                order = largest_first(inputs.h) if ordered else None
                self._last = inputs.h, ordered, inverse_factor(inputs.h, dtype, order)
            except np.linalg.LinAlgError as error:
                raise ModelFileError(
                    "what this matrix reads on the calibration text has no usable statistics "
                    f"({error}): use another text, or do without --calibrate", tensor=name,
                ) from error  # fmt: skip
        return self._last[2]


class Rounder:
    """Rounds matrices on `n_threads` threads in `room` bytes of memory (None: no limit).

    Attributes:
        unmoved: rows that GPTQ did not move, of the matrices that have some.
    """

    def __init__(self, reader: TensorReader, n_threads: int, room: int | None) -> None:
        self._reader = reader
        self._threads = n_threads
        self._room = room
        self._factors = Factors(room)
        self.unmoved: dict[str, int] = {}
        self._lock = threading.Lock()

    def remarks(self) -> list[str]:
        """What could not be done as it was asked for, a line for each kind."""
        if not self.unmoved:
            return []
        rows, most = sum(self.unmoved.values()), max(self.unmoved, key=self.unmoved.__getitem__)
        return [
            f"{rows:,} row{'s' * (rows > 1)} rounded to nearest, as what gptq moves there brings "
            "their outputs further from the source's on the text; matrices with such rows: "
            f"{len(self.unmoved)}, most of them in {most}"
        ]

    def forget(self, name: str) -> int:
        """The rows of a matrix that GPTQ did not move so far, which no remark counts any more."""
        return self.unmoved.pop(name, 0)

    def remember(self, name: str, rows: int) -> None:
        """Count rows that GPTQ did not move in `remarks`."""
        if rows:
            with self._lock:
                self.unmoved[name] = self.unmoved.get(name, 0) + rows

    def least_bytes(self, recipe: Recipe, held: int) -> int:
        """What rounding a matrix takes at least, with `held` bytes of statistics."""
        columns = recipe.placed.matrix.columns
        rounding = self._taken(recipe, held) + self._least(recipe)
        factor = factor_bytes(columns, held) if recipe.method == "gptq" else 0
        return max(rounding, factor)

    def round(
        self, recipe: Recipe, inputs: Inputs | None, write: Write, instead: Floats | None = None
    ) -> None:
        """Write a matrix in its new format; `write` is called from several threads at once.

        Without `inputs`, GPTQ becomes a search for scales.

        Args:
            instead: other weights than the file's, float32 [rows, columns], of a dense matrix.

        Raises:
            BudgetError: not even the least that this takes fits.
            ModelFileError: it cannot be read, or a weight is no finite number.
            UnsupportedError: a weight is beyond what the format can hold.
        """
        if inputs is None and recipe.method == "gptq":  # an expert that few tokens have chosen
            recipe = replace(recipe, method="search")
        placed = recipe.placed
        if isinstance(placed, PrunedMatrix):
            self._prune(placed, recipe, inputs, write)
            return
        assert isinstance(placed, PlacedMatrix)
        rows, columns = placed.matrix.rows, placed.matrix.columns
        encode, portion = self._encoder(placed, recipe, inputs), _PORTION
        if recipe.method == "gptq":
            portion = max(portion, _GPTQ_ROWS * columns)
        step = self._step(recipe, portion, inputs)
        fmt = placed.format
        as_floats = replace(placed, format=FORMATS["f32"])

        def work(first: int) -> None:
            last = min(first + step, rows)
            raw = raw_rows(self._reader, as_floats, first, last).view(np.float32)
            if instead is not None:
                raw[: last - first] = instead[first:last]
            data = fmt.tile(encode(raw))
            write(fmt.tiled_bytes(first, columns), data.reshape(-1))

        share(range(0, rows, step), work, self._threads, lambda: None)

    def _prune(
        self, wanted: PrunedMatrix, recipe: Recipe, inputs: Inputs | None, write: Write
    ) -> None:
        m = wanted.matrix
        portion, cost, hessian = _PORTION, None, self._hessian(recipe, inputs)
        if hessian is not None:
            cost = group_costs(hessian.upper, wanted.format.group)
            portion = max(portion, _GPTQ_ROWS * m.columns)
        elif recipe.method == "search" and inputs is not None:
            cost = inputs.importance
        as_floats = PlacedMatrix(m, wanted.info, FORMATS["f32"])

        def read(first: int, last: int) -> Floats:
            found = raw_rows(self._reader, as_floats, first, last).view(np.float32)
            rows: Floats = found[: last - first]
            if not np.isfinite(rows).all():
                check_matrix(self._reader, m, wanted.info)
            return rows

        step = self._step(recipe, portion, inputs)
        unmoved = prune(wanted, read, step, self._threads, write, cost, hessian)
        self.remember(m.name, unmoved)

    def _hessian(self, recipe: Recipe, inputs: Inputs | None) -> Hessian | None:
        """Of what a matrix reads, if its method takes that."""
        if recipe.method != "gptq":
            return None
        name = recipe.placed.matrix.name
        if inputs is None:
            raise AssertionError(f"no statistics of the inputs of {name}")
        return Hessian(inputs.h, self._factors.of(name, inputs, _ordered(recipe.placed)))

    def _step(self, recipe: Recipe, portion: int, inputs: Inputs | None) -> int:
        """Rows that a thread takes at a time: equal shares, in whole tiles, for all threads."""
        rows, columns = recipe.placed.matrix.rows, recipe.placed.matrix.columns
        taken = self._taken(recipe, 0 if inputs is None else inputs.held)
        step = max(TILE_ROWS, self._portion(recipe, portion, taken) // columns)
        step = min(step, max(1, -(-rows // self._threads)))
        return -(-step // TILE_ROWS) * TILE_ROWS

    def _portion(self, recipe: Recipe, portion: int, taken: int) -> int:
        if self._room is None:
            return portion
        most = (self._room - taken) // (_BYTES_PER_WEIGHT * self._threads)
        needed = taken + self._least(recipe)
        if self._room < needed:
            raise too_little(recipe.placed.matrix.name, needed, self._room)
        return min(portion, most)

    def _least(self, recipe: Recipe) -> int:
        """Bytes with which each thread rounds a tile of rows."""
        return TILE_ROWS * recipe.placed.matrix.columns * _BYTES_PER_WEIGHT * self._threads

    @staticmethod
    def _taken(recipe: Recipe, held: int) -> int:
        """Bytes that are taken while a matrix is rounded, beside what threads take."""
        placed = recipe.placed
        choosing = 0
        if isinstance(placed, PrunedMatrix):
            choosing = choosing_bytes(placed.matrix, placed.format.group)
        factor = 4 * placed.matrix.columns**2 if recipe.method == "gptq" else 0
        return held + choosing + factor

    def _encoder(
        self, placed: PlacedMatrix, recipe: Recipe, inputs: Inputs | None
    ) -> Callable[[Floats], np.ndarray]:
        fmt, info = placed.format, placed.info
        importance = None if inputs is None else inputs.importance
        hessian = self._hessian(recipe, inputs)

        searched = recipe.method != "rtn" and fmt.searched

        def nearest(x: Floats) -> np.ndarray:
            return _searched(fmt, x, None) if searched else fmt.encode(x)

        def encode(x: Floats) -> np.ndarray:
            if not np.isfinite(x).all():
                check_matrix(self._reader, placed.matrix, info)
            most = beyond(x, fmt, nearest)
            if most is not None:
                raise UnsupportedError(
                    f"a weight of {most:.6g} is beyond what {fmt.name} holds; use bf16 or f32",
                    path=info.path,
                    tensor=info.name,
                )
            with np.errstate(all="ignore"):  # scales that are tried may be beyond float16
                if not searched:
                    return fmt.encode(x)
                if hessian is None:
                    return _searched(fmt, x, importance)
                raw, unmoved = _fitted(fmt, x, hessian, importance, _ordered(placed))
            self.remember(info.name, unmoved)
            return raw

        return encode


def _ordered(placed: Placed | PrunedMatrix) -> bool:
    """Whether GPTQ takes a matrix's inputs largest first.

    It does of experts, where few neurons may be far larger than the others for some tokens: rounded
    last, nothing is left that makes good what they lose.
    """
    return isinstance(placed, PlacedMatrix) and placed.expert and placed.format.pattern is None


def _searched(fmt: Format, x: Floats, importance: Floats | None) -> np.ndarray:
    """Raw bytes of a format that is `searched`, each weight for itself."""
    if fmt.pattern is not None:
        return fmt.pattern.encode(x, importance)
    assert fmt.grid is not None
    return fmt.grid.round(x, fmt.grid.fit(x, importance))


def _fitted(
    fmt: Format, x: Floats, hessian: Hessian, importance: Floats | None, ordered: bool
) -> tuple[np.ndarray, int]:
    """Raw bytes of a format that is `searched`, by GPTQ; and in how many rows that is no use."""
    order = None
    if ordered:
        order, importance = largest_first(hessian.h), np.empty(len(hessian.h), np.float32)
        importance[order] = unmade(hessian.upper)
    if fmt.pattern is not None:
        nearest = fmt.pattern.encode(x, importance)
        raw = fmt.pattern.encode_fitted(x, hessian, importance)
    else:
        assert fmt.grid is not None
        scales = fmt.grid.fit(x, importance)
        nearest = fmt.grid.round(x, scales)
        raw = gptq(x, fmt.grid, hessian.upper, scales, order=order)
    back = further(x, hessian.h, fmt.decode(raw), fmt.decode(nearest))
    raw[back] = nearest[back]
    return raw, int(back.sum())


def too_little(what: str, needed: int, room: int) -> BudgetError:
    """The error of a budget too small for the work on one tensor."""
    return BudgetError(
        f"{what} takes {format_size(needed)} of memory beside what the process has, and "
        f"{format_size(max(0, room))} of --memory are left; give more, or use fewer --threads",
        needed_bytes=needed,
    )
