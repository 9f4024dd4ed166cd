"""Group sparsity (GQS): whole groups of 1 x G weights of a row are left out, the rest has 4 bits.

A group has a float16 scale `s` and a zero point `z` of 0..15: a weight is `s * (code - z)`. Groups
that are not stored are zero. G is 16, 32 or 64; every row keeps as many groups as it likes.
Source of the idea: GQSA, arXiv 2412.17560; the layout is ours.

The groups of a row lie in units of 128 weights, P = 128 / G groups, in the order of their columns;
a row's last unit is filled up with groups of zero bytes. A matrix of R rows:
    bytes                     what
    0 .. 4R+3                 first[r]: uint32, the unit at which row r begins; first[R] units in all
    up to a multiple of 64    zero
    then 64 + 4P each         the units

A unit; group p of it:
    bytes                     what
    2p, 2p+1                  s, float16
    2P + 2p, 2P + 2p+1        uint16: z in the low 4 bits, the group's column (in groups) above
    4P + 2j, 4P + 2j+1        uint16, j of 0..31: nibble k is the code of weight 32k + j of the unit

So a load of 64 bytes gives 32 weights in 16-bit integers with a shift and a mask. Bits per stored
weight: 4 + 32 / G, and what the last units lack.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from headrace.errors import ModelFileError
from headrace.sparse.format import Bytes, Floats

GROUPS = (16, 32, 64)
UNIT = 128  # weights
CODE_BYTES = 64  # of a unit
MOST_COLUMNS = 1 << 12  # groups in a row
ALIGNMENT = 64

Mask: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True)
class Groups:
    """The surviving groups of a matrix, row after row.

    Attributes:
        counts: groups of each row, int64 [rows].
        columns: of each group, in groups, increasing in a row, int64 [groups].
        scales: float16 [groups].
        zeros: uint8 [groups], 0..15.
        codes: uint8 [groups, G], 0..15.
    """

    counts: NDArray[np.int64]
    columns: NDArray[np.int64]
    scales: NDArray[np.float16]
    zeros: Bytes
    codes: Bytes


def unit_bytes(group: int) -> int:
    """Bytes of a unit of groups of `group` weights."""
    return CODE_BYTES + 4 * (UNIT // group)


def units_offset(rows: int) -> int:
    """Where the units of a matrix of so many rows begin."""
    return -(-4 * (rows + 1) // ALIGNMENT) * ALIGNMENT


def columns_of(n: int, group: int) -> int:
    """Groups in a whole row of `n` weights.

    Raises:
        ValueError: such rows have no such groups.
    """
    if group not in GROUPS:
        raise ValueError(f"groups have 16, 32 or 64 weights, not {group}")
    if n % group or not 0 < n // group <= MOST_COLUMNS:
        raise ValueError(
            f"a row of {n} weights is not 1 to {MOST_COLUMNS} groups of {group}"
        )
    return n // group


def _places(counts: NDArray[np.int64], per_unit: int) -> tuple[Any, Any]:
    """Where each row's units begin, and the place of each group among all places of groups."""
    first = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(-(-counts // per_unit), out=first[1:])
    before = np.cumsum(counts) - counts
    place = np.repeat(first[:-1] * per_unit - before, counts) + np.arange(counts.sum())
    return first, place


def pack(groups: Groups, group: int) -> Bytes:
    """The bytes of a matrix: uint8 [n]."""
    per_unit = UNIT // group
    first, place = _places(groups.counts, per_unit)
    units = np.zeros((int(first[-1]), unit_bytes(group)), np.uint8)
    words = units.view("<u2")
    scales = np.zeros(len(units) * per_unit, np.uint16)
    scales[place] = groups.scales.view(np.uint16)
    words[:, :per_unit] = scales.reshape(-1, per_unit)
    heads = np.zeros_like(scales)
    heads[place] = groups.columns << 4 | groups.zeros
    words[:, per_unit : 2 * per_unit] = heads.reshape(-1, per_unit)
    codes = np.zeros((len(scales), group), np.uint16)
    codes[place] = groups.codes
    nibbles = codes.reshape(-1, 4, 32)
    for k in range(4):
        words[:, 2 * per_unit :] |= nibbles[:, k] << np.uint16(4 * k)
    head = np.zeros(units_offset(len(groups.counts)), np.uint8)
    head[: 4 * len(first)] = first.astype("<u4").view(np.uint8)
    return np.concatenate([head, units.reshape(-1)])


def unpack(raw: Bytes, rows: int, n: int, group: int, name: str = "a matrix") -> Groups:
    """The groups of a matrix of `rows` x `n` weights, every byte of it checked.

    Raises:
        ModelFileError: it breaks the layout above; kernels must not see it.
    """
    per_unit, columns = UNIT // group, columns_of(n, group)

    def wrong(at: int, what: str) -> ModelFileError:
        return ModelFileError(
            f"{name}: group-sparse weights, byte {at}: {what}; make or fetch the file again"
        )

    begin = units_offset(rows)
    if len(raw) < begin:
        raise wrong(len(raw), f"{rows} rows begin with {begin} bytes, {len(raw)} are there")
    first = raw[: 4 * (rows + 1)].view("<u4").astype(np.int64)
    if raw[4 * (rows + 1) : begin].any():
        raise wrong(4 * (rows + 1), "bytes before the first unit must be zero")
    most = -(-columns // per_unit)
    counts = np.diff(first)
    if first[0] or (counts < 0).any() or (counts > most).any():
        bad = 0 if first[0] else int(np.argmax((counts < 0) | (counts > most))) + 1
        raise wrong(
            4 * bad, f"rows begin at unit 0, and each has 0 to {most} units: found {first[bad]}"
        )
    if len(raw) - begin != first[-1] * unit_bytes(group):
        raise wrong(
            begin,
            f"{first[-1]} units of {unit_bytes(group)} bytes expected, {len(raw) - begin} bytes found",
        )
    words = raw[begin:].reshape(-1, unit_bytes(group)).view("<u2")
    scales = words[:, :per_unit].reshape(-1).view(np.float16)
    heads = words[:, per_unit : 2 * per_unit].reshape(-1)
    column, zeros = (heads >> 4).astype(np.int64), (heads & 15).astype(np.uint8)
    nibbles = [words[:, 2 * per_unit :] >> np.uint16(4 * k) & 15 for k in range(4)]
    codes = np.stack(nibbles, axis=1).astype(np.uint8).reshape(-1, group)

    def of_group(bad: NDArray[np.bool_], what: str) -> None:
        if bad.any():
            at = int(np.argmax(bad))
            unit, p = divmod(at, per_unit)
            raise wrong(begin + unit * unit_bytes(group) + 2 * p, what)

    of_group(~np.isfinite(scales), "a scale is not finite")
    of_group(column >= columns, f"a group's column is beyond the row's {columns} groups")
    # Only a group of zero bytes may follow a column that is not smaller: from there on it is filling.
    row = np.repeat(np.arange(rows), counts * per_unit)
    begins = np.r_[True, np.diff(row) > 0] if len(row) else np.zeros(0, bool)
    blank = (heads == 0) & (scales.view(np.uint16) == 0) & ~codes.any(axis=1)
    filling = blank & ~begins
    stays = ~begins & (column <= np.r_[-1, column[:-1]])[: len(column)]
    of_group(stays & ~filling, "columns must increase in a row")
    after = np.r_[False, filling[:-1]][: len(filling)] & ~begins & ~filling
    of_group(after, "a group follows the filling of a row's last unit")
    ends = np.zeros(len(words), bool)
    ends[first[1:][counts > 0] - 1] = True
    of_group(filling & ~np.repeat(ends, per_unit), "only a row's last unit may be filled up")
    keep = ~filling
    return Groups(
        np.bincount(row[keep], minlength=rows).astype(np.int64),
        column[keep], scales[keep], zeros[keep], codes[keep],
    )  # fmt: skip


def decode(raw: Bytes, rows: int, n: int, group: int, name: str = "a matrix") -> Floats:
    """The float32 weights [rows, n] of a matrix, which is checked; see `unpack`."""
    found = unpack(raw, rows, n, group, name)
    out = np.zeros((rows, columns_of(n, group), group), np.float32)
    shifted = found.codes.astype(np.float32) - found.zeros[:, None]
    row = np.repeat(np.arange(rows), found.counts)
    out[row, found.columns] = shifted * found.scales.astype(np.float32)[:, None]
    return out.reshape(rows, n)


def quantize(weights: Floats) -> tuple[NDArray[np.float16], Bytes, Bytes]:
    """Scales [k], zero points [k] and codes [k, G] of float32 groups [k, G].

    s = (max - min) / 15 with zero between them, z = round(-min / s).
    """
    low = np.minimum(weights.min(axis=1), 0)
    high = np.maximum(weights.max(axis=1), 0)
    scales = ((high - low) / 15).clip(0, 65504).astype(np.float16)
    step = scales.astype(np.float32)
    inverse = np.where(step > 0, 1 / np.where(step > 0, step, 1), 0).astype(np.float32)
    zeros = np.rint(-low * inverse).clip(0, 15).astype(np.uint8)
    codes = np.rint(weights * inverse[:, None]) + zeros[:, None]
    return scales, zeros, codes.clip(0, 15).astype(np.uint8)


def pack_weights(weights: Floats, keep: Mask, group: int) -> Bytes:
    """Code float32 [rows, n]; of the groups, those that `keep` [rows, n / G] names are stored."""
    rows, n = weights.shape
    blocks = np.ascontiguousarray(weights, np.float32).reshape(rows, columns_of(n, group), group)
    row, column = np.nonzero(keep)
    scales, zeros, codes = quantize(blocks[row, column])
    counts = np.bincount(row, minlength=rows).astype(np.int64)
    return pack(Groups(counts, column.astype(np.int64), scales, zeros, codes), group)
