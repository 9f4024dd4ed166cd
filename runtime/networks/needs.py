"""What a network's plan takes in memory, and which of its weights stay there under a budget.

The number is for the network, beside the process that it runs in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from headrace.errors import BudgetError
from headrace.networks.operation import Operation, Table, Weight
from headrace.offload.budget import round_up
from headrace.offload.pieces import (
    LEAST_SLOTS,
    Cuttable,
    Piece,
    Residency,
    cut,
    keep,
    least_bytes,
)
from headrace.sizes import format_size

LEAST_BYTES = 32 << 10  # smaller weights stay in memory: they are not worth a read
LARGE_BYTES = 1 << 20  # pieces need not be larger
TILES = 2  # of a piece, for each thread at least
# The window may take this part of what weights have: less than in language models' budgets, and the
# few slots that fit are too few reads in flight (a third slower for MiniLM in 15 MB).
WINDOW_SHARE = 4
OPERATION_BYTES = 16_000  # of an operation in Python, as far as planning goes, and its call
STEP_BYTES = 2000  # of one more call's argument block, and of a read
OTHERS = "other shapes"  # a part of what a network takes
# Stacks of the threads that read, the heaps that they get where they wait for each other, and what
# says what is where.
READER_BYTES = 5 << 19


@dataclass(frozen=True)
class Streamable:
    """A weight that may be read from a file for every run.

    Attributes:
        operation: that has it.
        name: among the operation's weights.
        weight: itself; it has a key.
        tiles: of the product; 0: it is not cut.
        unit: tiles that stay together.
    """

    operation: Operation
    name: str
    weight: Weight
    tiles: int
    unit: int

    def cuttable(self, name: str) -> Cuttable:
        """For `headrace.offload.pieces`."""
        n_bytes, of = self.weight.n_bytes, self.operation.cut
        if not self.tiles:
            return Cuttable(name, 1, n_bytes, n_bytes, n_bytes, True)
        if of is not None and of.begins:
            begins = [*of.begins[: -1 : self.unit], n_bytes]
            return Cuttable(name, len(begins) - 1, 0, 0, n_bytes, True, begins)
        unit_bytes = n_bytes // self.tiles * self.unit
        units = -(-self.tiles // self.unit)
        return Cuttable(name, units, unit_bytes, unit_bytes, n_bytes, True)

    def tiles_of(self, piece: Piece) -> tuple[int, int]:
        """The first tile of a piece, and how many it has; none where it is not cut."""
        first = piece.tile * self.unit
        return first, max(0, min(piece.tiles * self.unit, self.tiles - first))


@dataclass(frozen=True)
class Rows:
    """A table whose rows may be read from a file as ids choose them; at most `count` in a run."""

    operation: Operation
    table: Table
    weight: Weight
    count: int

    @property
    def n_bytes(self) -> int:
        """Of the rows of a run, and of their numbers."""
        return self.count * (self.table.row_bytes + 8)


@dataclass(frozen=True)
class Needs:
    """What a plan takes.

    Attributes:
        fixed: bytes by what they are for, but for weights.
        stay: bytes of weights that are in memory in any case.
        making_stay: that making one of these takes at most, or a plan that looks at weights.
        making: the same of all weights.
        streamable: those that need not be, in the order of a run.
        tables: of which rows may be read.
    """

    fixed: dict[str, int]
    stay: int
    making_stay: int
    making: int
    streamable: Sequence[Streamable]
    tables: Sequence[Rows]

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return (
            self.stay
            + sum(one.weight.n_bytes for one in self.streamable)
            + sum(one.weight.n_bytes for one in self.tables)
        )

    @property
    def row_bytes(self) -> int:
        """Of what a run reads of tables, at most."""
        return sum(one.n_bytes for one in self.tables)

    @cached_property
    def pieces(self) -> list[Piece]:
        """What can be streamed, cut; a piece's `matrix` is the index of its weight."""
        return cut([one.cuttable(str(i)) for i, one in enumerate(self.streamable)])


@dataclass(frozen=True)
class NetworkMemory:
    """What a network takes of memory for inputs of certain shapes, beside the process.

    Attributes:
        budget: that was asked for; None: none was.
        parts: bytes by what they are for.
        least: the smallest budget that works.
        whole: with which nothing is read from files.
        residency: which weights stay and which are read for each run; None: all stay.
        from_file: whether rows of tables are read, too.
        row_bytes: at most, of these in a run.
    """

    budget: int | None
    parts: dict[str, int]
    least: int
    whole: int
    residency: Residency | None = None
    from_file: bool = False
    row_bytes: int = 0

    @property
    def n_bytes(self) -> int:
        """All of it."""
        return sum(self.parts.values())

    @property
    def streamed_bytes(self) -> int:
        """That a run reads from files, at most."""
        return (self.residency.streamed_bytes if self.residency else 0) + self.row_bytes


def needs_of(
    operations: Iterable[Operation], threads: int, fixed: dict[str, int], *, files: bool
) -> Needs:
    """What operations take, and `fixed` bytes beside them.

    Args:
        threads: that compute.
        files: whether the network came as a file, so that its weights can be read from one.
    """
    own = {id(one.weights): one for one in operations}
    shared = Counter(id(one.weights) for one in operations)
    shared_keys = Counter(
        _key(w) for one in own.values() for w in one.weights.values() if isinstance(w, Weight)
    )
    stay, making, making_stay = 0, 0, 0
    streamable, tables = list[Streamable](), list[Rows]()
    placed = set[str]()  # keys of what stays and is one for several operations
    for one in own.values():
        stay += sum(part.nbytes for part in one.affine or ())
        for name, weight in one.weights.items():
            if isinstance(weight, np.ndarray):
                stay += weight.nbytes
                continue
            making = max(making, weight.making_bytes)
            if weight.planned_by:
                making_stay = max(making_stay, weight.making_bytes)
            key = _key(weight)
            if one.table is not None and name == one.table.weight:
                rows = _rows(one, one.table, weight)
                if rows is not None and files:
                    tables.append(rows)
                    continue
            # What several operations read (those of patches among them) is better kept.
            alone = shared[id(one.weights)] == 1 and shared_keys[key] == 1
            only = not any(found.operation is one for found in streamable)
            large = weight.key is not None and weight.n_bytes >= LEAST_BYTES
            if large and alone and only and files:
                streamable.append(_streamable(one, name, weight, threads))
            elif weight.key is None or key not in placed:
                stay += weight.n_bytes
                making_stay = max(making_stay, weight.making_bytes)
                placed.add(key)
    return Needs(fixed, stay, making_stay, making, streamable, tables)


def _key(weight: Weight) -> str:
    return repr(weight.key)


def _streamable(one: Operation, name: str, weight: Weight, threads: int) -> Streamable:
    if one.cut is None or name != "weights":
        return Streamable(one, name, weight, 0, 1)
    together = one.cut.together
    unit = -(-threads * TILES // together) * together
    if weight.n_bytes // one.cut.tiles * unit > LARGE_BYTES:
        unit = together
    return Streamable(one, name, weight, one.cut.tiles, unit)


def _rows(one: Operation, table: Table, weight: Weight) -> Rows | None:
    """None: reading rows saves nothing."""
    found = Rows(one, table, weight, min(table.rows, table.entries))
    known = weight.key is not None and weight.n_bytes >= LEAST_BYTES
    return found if known and 2 * found.n_bytes < weight.n_bytes else None


def decide(
    needs: Needs, budget: int | None, reserved: Mapping[str, int], name: str, others: int = 0
) -> NetworkMemory:
    """Everything in memory if that fits, else as much of the weights as does.

    Args:
        budget: bytes that the network may take; None: as many as it does.
        reserved: bytes for parts, where other plans take more than this one: so that the weights
            that stay are the same ones.
        name: of the network, for messages.
        others: bytes that plans of other shapes keep while this one has its turn.

    Raises:
        BudgetError: not even the least fits.
    """
    fixed = needs.fixed | {OTHERS: others}
    fixed = {part: max(n, reserved.get(part, 0)) for part, n in fixed.items()}
    kept = needs.stay + sum(one.weight.n_bytes for one in needs.streamable)
    rows = needs.row_bytes and max(needs.row_bytes, reserved.get("rows", 0))
    pieces = needs.pieces
    whole = fixed | {"weights": needs.weights, "making weights": needs.making}
    with_rows = fixed | {"weights": kept, "making weights": needs.making, "rows": rows}
    base = fixed | {"weights": needs.stay, "making weights": needs.making_stay}
    base |= {"rows": rows, "readers": READER_BYTES}
    base["steps"] = fixed["steps"] + len(pieces) * STEP_BYTES
    totals = [sum(whole.values()), sum(with_rows.values())]
    # They are packed before there is a window, or anything that stays.
    window = None
    if len(pieces) >= LEAST_SLOTS:
        window = max(least_bytes(pieces), needs.making - needs.making_stay)
        totals.append(sum(base.values()) + window)
    least = min(totals)
    found = NetworkMemory(budget, whole, least, totals[0])
    if budget is None or totals[0] <= budget:
        return found
    if totals[1] <= budget:
        return replace(found, parts=with_rows, from_file=True, row_bytes=needs.row_bytes)
    room = budget - sum(base.values())
    residency = keep(pieces, room, WINDOW_SHARE) if window is not None and window <= room else None
    if residency is None:
        smallest = (whole, with_rows, base | {"reading weights": window or 0})[totals.index(least)]
        listed = ", ".join(f"{part} {format_size(n)}" for part, n in smallest.items() if n)
        raise BudgetError(
            f"{name} does not fit in {format_size(budget)} (`memory`): the least that works is "
            f"{format_size(round_up(least))} beside the process ({listed}). Allow that",
            needed_bytes=round_up(least),
        )
    parts = base | {"window": residency.window_bytes}
    parts["weights"] += residency.kept_bytes
    return replace(
        found, parts=parts, residency=residency, from_file=bool(needs.tables),
        row_bytes=needs.row_bytes,
    )  # fmt: skip
