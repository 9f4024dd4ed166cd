"""Group sparsity (GQS): whole groups of 1 x G weights of a row are left out, the rest has 4 bits.

G is 16, 32 or 64; every row keeps as many groups as it likes. Row r has a float32 scale `d`, and a
group of it an integer scale `s` of 0..127 and offset `o` of -128..127: a weight is
`d * (s * code + 16 * o)`, code 0..15, whose integer part has 13 bits. Groups that are not stored
are zero. Source of the idea: GQSA, arXiv 2412.17560; of scales in two grains: DGQ, arXiv
2310.04836. The layout is ours.

The groups of a row lie in units of 128 weights, P = 128 / G groups, in the order of their columns;
a row's last unit is filled up with groups of zero bytes. A matrix of R rows:
    bytes                     what
    0 .. 4R+3                 first[r]: uint32, the unit where row r begins; first[R] units in all
    4R+4 .. 8R+3              d of row r, float32
    up to a multiple of 64    zero
    then 64 + 4P each         the units

A unit; group p of it:
    bytes                     what
    2p                        s
    2p+1                      o, int8
    2P + 2p, 2P + 2p+1        uint16: the input of the group's first weight, divided by 4
    4P + 2j, 4P + 2j+1        uint16, j of 0..31: nibble k is the code of weight 32k + j of the unit

So a load of 64 bytes gives 32 weights in 16-bit integers with a shift and a mask. Bits per stored
weight: 4 + 32 / G, and what the last units lack.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from headrace.errors import ModelFileError
from headrace.sparse.format import Bytes, Floats

GROUPS = (16, 32, 64)
UNIT = 128  # weights
CODE_BYTES = 64  # of a unit
MOST_INPUTS = 1 << 18
ALIGNMENT = 64
SMALLEST = 1e-37  # scale of a row that is not taken for zero

Mask: TypeAlias = NDArray[np.bool_]
Wrong: TypeAlias = Callable[[int, str], ModelFileError]  # a byte of the matrix, what is wrong


@dataclass(frozen=True)
class GroupFormat:
    """The format of matrices with groups of `group` weights; how large one is, its bytes say.

    Attributes:
        activation: what kernels multiply the weights by; see `headrace.sparse.gqs_kernels`.
        ggml_type: GGML has no such type.
    """

    group: int
    activation: str = "x16"
    ggml_type: None = None

    @property
    def name(self) -> str:
        """Ours."""
        return f"gqs_g{self.group}"

    @property
    def per_unit(self) -> int:
        """Groups in a unit."""
        return UNIT // self.group

    @property
    def unit_bytes(self) -> int:
        """Bytes of a unit."""
        return unit_bytes(self.group)


GROUP_FORMATS = {fmt.name: fmt for fmt in map(GroupFormat, GROUPS)}


@dataclass(frozen=True)
class Head:
    """What comes before the units of a matrix.

    Attributes:
        first: the unit where each row begins, and how many there are: uint32 [rows + 1].
        row_scales: float32 [rows].
    """

    first: NDArray[np.uint32]
    row_scales: Floats


@dataclass(frozen=True)
class Groups:
    """The surviving groups of a matrix, row after row.

    Attributes:
        counts: groups of each row, int64 [rows].
        row_scales: d of each row, float32 [rows].
        columns: of each group, in groups, increasing in a row, int64 [groups].
        scales: s of each group, uint8 [groups], 0..127.
        offsets: o of each group, int8 [groups].
        codes: uint8 [groups, G], 0..15.
    """

    counts: NDArray[np.int64]
    row_scales: Floats
    columns: NDArray[np.int64]
    scales: Bytes
    offsets: NDArray[np.int8]
    codes: Bytes


def unit_bytes(group: int) -> int:
    """Bytes of a unit of groups of `group` weights."""
    return CODE_BYTES + 4 * (UNIT // group)


def units_offset(rows: int) -> int:
    """Where the units of a matrix of so many rows begin."""
    return -(-(8 * rows + 4) // ALIGNMENT) * ALIGNMENT


def columns_of(n: int, group: int) -> int:
    """Groups in a whole row of `n` weights.

    Raises:
        ValueError: such rows have no such groups.
    """
    if group not in GROUPS:
        raise ValueError(f"groups have 16, 32 or 64 weights, not {group}")
    if n % group or not 0 < n <= MOST_INPUTS:
        raise ValueError(f"a row of {n} weights is no multiple of {group} up to {MOST_INPUTS}")
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
    first, units = pack_units(groups, group)
    return np.concatenate([pack_head(first, groups.row_scales), units])


def pack_head(first: NDArray[Any], row_scales: Floats) -> Bytes:
    """What comes before the units: uint8 [n]."""
    rows = len(row_scales)
    head = np.zeros(units_offset(rows), np.uint8)
    head[: 4 * rows + 4] = first.astype("<u4").view(np.uint8)
    head[4 * rows + 4 : 8 * rows + 4] = row_scales.astype("<f4").view(np.uint8)
    return head


def pack_units(groups: Groups, group: int) -> tuple[NDArray[np.int64], Bytes]:
    """Where rows begin, in units, and the bytes of the units: int64 [rows + 1], uint8 [n]."""
    per_unit = UNIT // group
    first, place = _places(groups.counts, per_unit)
    units = np.zeros((int(first[-1]), unit_bytes(group)), np.uint8)
    words = units.view("<u2")
    for at, values in (
        (0, groups.scales | groups.offsets.view(np.uint8).astype(np.uint16) << 8),
        (per_unit, groups.columns * (group // 4)),
    ):
        field = np.zeros(len(units) * per_unit, np.uint16)
        field[place] = values
        words[:, at : at + per_unit] = field.reshape(-1, per_unit)
    codes = np.zeros((len(units) * per_unit, group), np.uint16)
    codes[place] = groups.codes
    nibbles = codes.reshape(-1, 4, 32)
    for k in range(4):
        words[:, 2 * per_unit :] |= nibbles[:, k] << np.uint16(4 * k)
    return first, units.reshape(-1)


def _nameless(at: int, what: str) -> ModelFileError:
    return refusal(at, what)


def refusal(at: int, what: str, **where: Any) -> ModelFileError:
    """The error of a matrix whose byte `at` breaks the layout; `where` is its tensor."""
    if "offset" in where:
        where["offset"] += at
    return ModelFileError(
        f"group-sparse weights, byte {at} of the matrix: {what}; make or fetch the file again",
        **where,
    )


def check_size(rows: int, n: int, group: int, n_bytes: int, wrong: Wrong = _nameless) -> None:
    """Refuse a matrix of `rows` x `n` weights that can have no such number of bytes.

    Raises:
        ModelFileError: that.
    """
    begin = units_offset(rows)
    if group not in GROUPS or n % group or not 0 < n <= MOST_INPUTS:
        raise wrong(0, f"rows of {n} weights have no groups of {group}")
    if n_bytes < begin:
        raise wrong(n_bytes, f"{rows} rows begin with {begin} bytes, {n_bytes} are there")
    most = rows * -(-n // UNIT)
    units, left = divmod(n_bytes - begin, unit_bytes(group))
    if left or units > most:
        raise wrong(
            begin, f"0 to {most} units take {unit_bytes(group)} bytes each: found {n_bytes - begin}"
        )


def check_head(
    raw: Bytes, rows: int, n: int, group: int, n_bytes: int, wrong: Wrong = _nameless
) -> Head:
    """What the first `units_offset(rows)` bytes of a matrix of `n_bytes` say.

    Raises:
        ModelFileError: they break the layout.
    """
    check_size(rows, n, group, n_bytes, wrong)
    begin = units_offset(rows)
    first = raw[: 4 * rows + 4].view("<u4").astype(np.uint32)
    row_scales = raw[4 * rows + 4 : 8 * rows + 4].view("<f4").astype(np.float32)
    if raw[8 * rows + 4 : begin].any():
        raise wrong(8 * rows + 4, "bytes before the first unit must be zero")
    if not np.isfinite(row_scales).all():
        at = int(np.argmin(np.isfinite(row_scales)))
        raise wrong(4 * rows + 4 + 4 * at, f"the scale of row {at} is not finite")
    most = -(-n // UNIT)
    counts = np.diff(first.astype(np.int64))
    if first[0] or (counts < 0).any() or (counts > most).any():
        bad = 0 if first[0] else int(np.argmax((counts < 0) | (counts > most))) + 1
        raise wrong(
            4 * bad, f"rows begin at unit 0, and each has 0 to {most} units: found {first[bad]}"
        )
    size = int(first[-1]) * unit_bytes(group)
    if n_bytes - begin != size:
        raise wrong(begin, f"{first[-1]} units take {size} bytes, {n_bytes - begin} are there")
    return Head(first, row_scales)


def _codes(words: NDArray[Any], per_unit: int) -> Bytes:
    """Codes of units, given as words: uint8 [units * groups in one, weights of a group]."""
    nibbles = [words[:, 2 * per_unit :] >> np.uint16(4 * k) & 15 for k in range(4)]
    return np.stack(nibbles, axis=1).astype(np.uint8).reshape(-1, UNIT // per_unit)


def check_units(
    raw: Bytes, first: NDArray[Any], n: int, group: int, at: int, wrong: Wrong = _nameless
) -> Mask:
    """Which places for groups the units of some rows use: bool [units * groups in one].

    Args:
        raw: the units.
        first: where rows begin, and the end of the last: units, integers [rows + 1].
        at: the byte of the matrix where `raw` begins.

    Raises:
        ModelFileError: they break the layout.
    """
    per_unit = UNIT // group
    words = raw.reshape(-1, unit_bytes(group)).view("<u2")
    both = words[:, :per_unit].reshape(-1)
    inputs = words[:, per_unit : 2 * per_unit].reshape(-1).astype(np.int32) * 4

    def of_group(bad: Mask, what: str) -> None:
        if bad.any():
            unit, p = divmod(int(np.argmax(bad)), per_unit)
            raise wrong(at + unit * unit_bytes(group) + 2 * p, what)

    of_group(both & 0xFF > 127, "a group's scale is above 127")
    of_group((inputs % group != 0) | (inputs >= n), f"a group does not begin in {n} inputs")
    counts = np.diff(first.astype(np.int64))
    begins = np.zeros(len(inputs) + per_unit, bool)
    begins[(first[:-1].astype(np.int64) - int(first[0])) * per_unit] = True
    begins = begins[: len(inputs)]
    # What comes behind a larger input is filling: zero bytes, in a row's last unit, to its end.
    filling = np.zeros(len(inputs), bool)
    filling[1:] = ~begins[1:] & (inputs[1:] <= inputs[:-1])
    filling[1:] |= ~begins[1:] & filling[:-1] & (inputs[1:] == 0)
    if not filling.any():
        return ~filling
    some = filling.reshape(-1, per_unit).any(axis=1)
    codes = np.zeros(len(inputs), bool)
    codes.reshape(-1, per_unit)[some] = (
        _codes(words[some], per_unit).any(axis=1).reshape(-1, per_unit)
    )
    of_group(
        filling & ((inputs != 0) | (both != 0) | codes),
        "groups must lie in the order of their inputs",
    )
    after = np.zeros(len(inputs), bool)
    after[1:] = filling[:-1] & ~begins[1:] & ~filling[1:]
    of_group(after, "a group follows the filling of a row's last unit")
    last = np.zeros(len(words), bool)
    last[(first[1:].astype(np.int64) - int(first[0]))[counts > 0] - 1] = True
    of_group(filling & ~np.repeat(last, per_unit), "only a row's last unit may be filled up")
    return ~filling


def unpack(raw: Bytes, rows: int, n: int, group: int, wrong: Wrong = _nameless) -> Groups:
    """The groups of a matrix of `rows` x `n` weights, every byte of it checked.

    Raises:
        ModelFileError: it breaks the layout above; kernels must not see it.
    """
    check_size(rows, n, group, len(raw), wrong)
    begin = units_offset(rows)
    head = check_head(raw[:begin], rows, n, group, len(raw), wrong)
    keep = check_units(raw[begin:], head.first, n, group, begin, wrong)
    return groups_of(raw[begin:], head, group, keep)


def groups_of(raw: Bytes, head: Head, group: int, keep: Mask) -> Groups:
    """The groups in units that `check_units` has looked at."""
    per_unit = UNIT // group
    words = raw.reshape(-1, unit_bytes(group)).view("<u2")
    both = words[:, :per_unit].reshape(-1)[keep]
    inputs = words[:, per_unit : 2 * per_unit].reshape(-1)[keep].astype(np.int64) * 4
    counts: NDArray[Any] = np.diff(head.first.astype(np.int64))
    row = np.repeat(np.arange(len(counts)), counts * per_unit)[keep]
    return Groups(
        np.bincount(row, minlength=len(counts)).astype(np.int64), head.row_scales,
        inputs // group, (both & 0xFF).astype(np.uint8),
        (both >> 8).astype(np.uint8).view(np.int8), _codes(words, per_unit)[keep],
    )  # fmt: skip


def decode(raw: Bytes, rows: int, n: int, group: int, wrong: Wrong = _nameless) -> Floats:
    """The float32 weights [rows, n] of a matrix, which is checked; see `unpack`."""
    return dense(unpack(raw, rows, n, group, wrong), n, group)


def dense(found: Groups, n: int, group: int) -> Floats:
    """The float32 weights [rows, n] of groups."""
    rows = len(found.counts)
    out = np.zeros((rows, columns_of(n, group), group), np.float32)
    row = np.repeat(np.arange(rows), found.counts)
    out[row, found.columns] = whole_numbers(found) * found.row_scales[row][:, None]
    return out.reshape(rows, n)


def whole_numbers(groups: Groups) -> Floats:
    """The weights of every group in units of its row's scale: float32 [groups, G], integers."""
    codes = groups.codes.astype(np.float32) * groups.scales[:, None]
    return codes + 16 * groups.offsets[:, None].astype(np.float32)


def row_scales(weights: Floats, row: NDArray[Any], rows: int) -> Floats:
    """d of each row, float32 [rows], for float32 groups [k, G] of rows `row` [k].

    A row's widest group gets a scale of 127, or its farthest one an offset that is in range.
    """
    low, high = weights.min(axis=1), weights.max(axis=1)
    widest, farthest = np.zeros(rows, np.float32), np.zeros(rows, np.float32)
    np.maximum.at(widest, row, (high - low) / 15)
    np.maximum.at(farthest, row, np.abs(low))
    return np.maximum(widest / 127, farthest / (16 * 127)).astype(np.float32)


def in_steps(weights: Floats, scales: Floats) -> Floats:
    """float32 [k, G] divided by [k]; by what has no finite inverse, zeros."""
    some = scales > SMALLEST
    return weights * np.where(some, 1 / np.where(some, scales, 1), 0).astype(np.float32)[:, None]


def codes_of(w: Floats, scales: Bytes, offsets: NDArray[np.int8]) -> Floats:
    """The nearest codes of weights [k, m] in units of their rows' scales."""
    s, o = scales[:, None].astype(np.float32), offsets[:, None].astype(np.float32)
    return np.rint((w - 16 * o) / np.maximum(s, 1)).clip(0, 15)


def fit(w: Floats) -> tuple[Bytes, NDArray[np.int8]]:
    """Scales and offsets [k] of groups [k, G] in units of their rows' scales.

    Of the whole numbers around a group's range, those with the least squared error.
    """
    low, high = w.min(axis=1), w.max(axis=1)
    best = np.full(len(w), np.inf, np.float32)
    scales, offsets = np.zeros(len(w), np.uint8), np.zeros(len(w), np.int8)
    for up in (0, 1):
        o = (np.floor(low / 16) + up).clip(-128, 127).astype(np.int8)
        exact = (high - 16 * o.astype(np.float32)) / 15
        for more in (-1, 0, 1):
            s = (np.floor(exact) + more).clip(1, 127).astype(np.uint8)
            found = codes_of(w, s, o) * s[:, None] + 16 * o[:, None].astype(np.float32)
            error = ((found - w) ** 2).sum(axis=1)
            better = error < best
            best[better], scales[better], offsets[better] = error[better], s[better], o[better]
    return scales, offsets


def pack_weights(weights: Floats, keep: Mask, group: int) -> Bytes:
    """Code float32 [rows, n]; of the groups, those that `keep` [rows, n / G] names are stored."""
    return pack(code(weights, keep, group), group)


def code(weights: Floats, keep: Mask, group: int) -> Groups:
    """The groups of float32 [rows, n] that `keep` names, each weight at the nearest code."""
    rows, n = weights.shape
    blocks = np.ascontiguousarray(weights, np.float32).reshape(rows, columns_of(n, group), group)
    row, column = np.nonzero(keep)
    kept = blocks[row, column]
    d = row_scales(kept, row, rows)
    w = in_steps(kept, d[row])
    scales, offsets = fit(w)
    codes = codes_of(w, scales, offsets).astype(np.uint8)
    counts = np.bincount(row, minlength=rows).astype(np.int64)
    return Groups(counts, d, column, scales, offsets, codes)
