"""Products of many tokens with group-sparse weights: see `headrace.sparse.gqs` for the layout.

Each kept group is multiplied by 16 tokens in the lanes of a vector, several vectors at a time, and
nothing is done for groups that are left out. Activations ("columns") are those of "q8", 8 bits with
a scale for 32 inputs, but lie word by word: for each 16 tokens and each 32 inputs
    word            what, 4 bytes of each of the 16 tokens
    0 .. 7          codes of inputs 4i .. 4i + 3, int8
    8               scale, float32
    9               sum of the codes, as float32
    10, 11          sums of the first 16 codes and of the last 16, as float32

A thread unpacks the groups of some rows once for all tokens, to records of at most 32 weights:
    head, bytes     what
    0 .. 3          uint32, where the codes of these inputs begin in a group of tokens
    4 .. 7          uint32, where their block of 32 inputs begins
    8 .. 15         scale and 16 times the offset, float32
and as many bytes of codes. Then all rows pass over a panel of the inputs, which stays in the first
cache, before the next panel comes.

A record's sum, scale * (sum of codes * activations) + 16 * offset * (sum of activations), is an
integer below 2^24, so exact in float32. It is multiplied by the scale of the activations and added
to those before it: every target gives the same bits, whatever the number of tokens and of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from headrace.sparse.gqs import CODE_BYTES, GROUPS, UNIT, units_offset, unpack
from headrace.sparse.gqs_kernels import example, first_row
from headrace.targets.simd import (
    arg_int,
    arg_ptr,
    bcast_f32,
    bcast_i8x4,
    dot8_lanes,
    dot_init,
    dot_result,
    f32,
    fma,
    get_f32,
    get_i8,
    get_i32,
    get_i64,
    get_u8,
    get_u16,
    get_u32,
    larger,
    load_f32,
    load_i32,
    load_u8,
    put_f32,
    put_i64,
    repeat,
    shr,
    smaller,
    splat_f32,
    splat_i32,
    store_f32,
    store_i16,
    store_words,
    to_f32,
    transpose16,
    zeros_f32,
)
from headrace.targets.table import Case, Kernel, KernelFunction
from headrace.targets.target import Target

if TYPE_CHECKING:
    import numpy as np

COLUMNS = 16  # tokens side by side
WORD_BYTES = 4 * COLUMNS
BLOCK_BYTES = 12 * WORD_BYTES  # of 32 inputs
VECTORS = {64: 4}  # of 16 tokens that are multiplied at once, by the bytes of a register; else 2
MOST_VECTORS = 4
PANEL = 24 << 10  # bytes of the activations of the tokens that are multiplied at once
HEAD_BYTES = 16
ROWS = 64  # at once
UNITS = 1024  # of them, if 16 rows have no more: their records stay in the second cache
NOTHING = 0xFFFFFFFF  # where a record without inputs says that they begin: behind all others


def scratch_bytes(inputs: int, group: int) -> int:
    """Bytes of a thread's scratch in products of rows of so many inputs."""
    wide = min(group, 32)
    records = max(UNITS, 16 * -(-inputs // UNIT)) * (UNIT // wide) + ROWS
    return records * (HEAD_BYTES + wide) + ROWS * (WORD_BYTES * MOST_VECTORS + 16)


def to_columns(row: Any, n: Any, out: Any, token: Any, group: Any) -> None:
    """Put "q8" entries, one for each 128 bytes of `row`, in their places: see above."""
    for block in range(n // 32):
        entry = row + block * 128
        at = out + (block * BLOCK_BYTES + token * 4)
        store_words(at, load_i32(entry, 1, 0), 9, WORD_BYTES)  # codes and scale
        total, first = 0 - get_i32(entry + 40), 0 - get_i32(entry + 44)
        put_f32(at + 9 * WORD_BYTES, f32(total))
        put_f32(at + 10 * WORD_BYTES, f32(first))
        put_f32(at + 11 * WORD_BYTES, f32(total - first))


def _unpack(group: int) -> Any:
    """The function that makes records of the units of a row, and one behind them for no input."""
    per_unit, wide = UNIT // group, min(group, 32)
    parts = group // wide
    bytes_per_unit = CODE_BYTES + 4 * per_unit

    def unpack_row(w: Any, n: Any, inputs: Any, head: Any, codes: Any) -> Any:
        before = -1
        for _ in range(n):
            v = load_i32(w + 4 * per_unit, 1, 0)
            mask = splat_i32(0x000F000F)
            a, b, c, d = v & mask, shr(v, 4) & mask, shr(v, 8) & mask, shr(v, 12) & mask
            store_i16(codes, a | shr(a, 8), 0)
            store_i16(codes + 32, b | shr(b, 8), 0)
            store_i16(codes + 64, c | shr(c, 8), 0)
            store_i16(codes + 96, d | shr(d, 8), 0)
            for p in range(per_unit):
                begin = get_u16(w + (2 * per_unit + 2 * p)) * 4
                scale, offset = f32(get_u8(w + 2 * p)), f32(16 * get_i8(w + (2 * p + 1)))
                filling = begin <= before
                before = begin
                begin = smaller(begin, inputs - group)  # what streams is not checked
                for part in range(parts):
                    at = begin + part * wide
                    block = at // 32 * BLOCK_BYTES
                    first = block + at % 32 // 16 * (4 * WORD_BYTES)
                    if filling:
                        first = NOTHING
                    put_i64(head, first | block << 32)
                    put_f32(head + 8, scale)
                    put_f32(head + 12, offset)
                    head = head + HEAD_BYTES
            w = w + bytes_per_unit
            codes = codes + UNIT
        put_i64(head, NOTHING)

    return unpack_row


def _record(group: int, vectors: int) -> Any:
    """The function that adds a record's product with 16 tokens in each of some vectors."""
    halves = group == 16

    def record(acc: Any, head: Any, codes: Any, x: Any, stride: Any) -> Any:
        first = x + get_u32(head)
        block = x + get_u32(head + 4)
        total = dot_init(repeat(splat_i32(0), vectors), 1)
        total = dot8_lanes(
            total, bcast_i8x4(codes, 1, 0), bcast_i8x4(codes + 4, 1, 0),
            load_u8(first, vectors, stride), load_u8(first + 64, vectors, stride), 4,
        )  # fmt: skip
        total = dot8_lanes(
            total, bcast_i8x4(codes + 8, 1, 0), bcast_i8x4(codes + 12, 1, 0),
            load_u8(first + 128, vectors, stride), load_u8(first + 192, vectors, stride), 4,
        )  # fmt: skip
        if halves:
            # The two halves' codes are 4 words apart, their sums one.
            added = block + (10 * WORD_BYTES + (get_u32(head) - get_u32(head + 4)) // 4)
        else:
            added = block + 9 * WORD_BYTES
            total = dot8_lanes(
                total, bcast_i8x4(codes + 16, 1, 0), bcast_i8x4(codes + 20, 1, 0),
                load_u8(first + 256, vectors, stride), load_u8(first + 320, vectors, stride), 4,
            )  # fmt: skip
            total = dot8_lanes(
                total, bcast_i8x4(codes + 24, 1, 0), bcast_i8x4(codes + 28, 1, 0),
                load_u8(first + 384, vectors, stride), load_u8(first + 448, vectors, stride), 4,
            )  # fmt: skip
        scale = repeat(bcast_f32(head + 8, 1, 0), vectors)
        offsets = load_f32(added, vectors, stride) * bcast_f32(head + 12, 1, 0)
        whole = fma(to_f32(dot_result(total, 4)), scale, offsets)
        return acc + whole * load_f32(block + 8 * WORD_BYTES, vectors, stride)

    return record


def _product(group: int, vectors: int) -> Any:
    """The function that multiplies some unpacked rows by 16 tokens in each of some vectors."""
    wide = min(group, 32)
    record = _record(group, vectors)
    panel = PANEL // (BLOCK_BYTES * vectors) * BLOCK_BYTES

    def product(
        x: Any, stride: Any, end: Any, rows: Any, heads: Any, codes: Any, firsts: Any, sums: Any
    ) -> None:
        # Of each row: the record where it begins, the one that comes next.
        nexts = firsts + 8 * ROWS
        for r in range(rows):
            put_i64(nexts + r * 8, get_i64(firsts + r * 8))
            store_f32(sums + r * (vectors * WORD_BYTES), zeros_f32(vectors), WORD_BYTES)
        limit = 0
        while limit < end:
            limit += panel
            for r in range(rows):
                i = get_i64(nexts + r * 8)
                acc = load_f32(sums + r * (vectors * WORD_BYTES), vectors, WORD_BYTES)
                while get_u32(heads + i * HEAD_BYTES) < limit:
                    acc = record(acc, heads + i * HEAD_BYTES, codes + i * wide, x, stride)
                    i += 1
                put_i64(nexts + r * 8, i)
                store_f32(sums + r * (vectors * WORD_BYTES), acc, WORD_BYTES)

    return product


def _finish(vectors: int) -> Any:
    """The function that writes y = start + sums by the scales of the rows."""

    def finish(sums: Any, rows: Any, scales: Any, bias: Any, y: Any, y_stride: Any) -> None:
        whole = rows // 16 * 16
        for v in range(vectors):
            to = y + v * COLUMNS * y_stride
            for r in range(0, whole, 16):
                at = sums + (r * vectors + v) * WORD_BYTES
                found = transpose16(load_f32(at, 16, vectors * WORD_BYTES))
                scale, start = load_f32(scales + r * 4, 1, 0), load_f32(bias + r * 4, 1, 0)
                store_f32(to + r * 4, found * scale + start, y_stride)
            for r in range(whole, rows):
                found = load_f32(sums + (r * vectors + v) * WORD_BYTES, 1, 0)
                scale, start = splat_f32(get_f32(scales + r * 4)), splat_f32(get_f32(bias + r * 4))
                store_words(to + r * 4, found * scale + start, COLUMNS, y_stride)

    return finish


def _columns(group: int, target: Target) -> KernelFunction:
    """y[token, row] = bias[row] + sum over stored groups of w * x, for any number of tokens.

    Slots: 0 first units of the rows, 1 scales of the rows, 2 units, from that of the first row on,
    3 "columns" activations, 4 y, 5 rows, 6 address of the token count, 7 inputs, 8 bytes between
    tokens of y, 9 bias (float32), 10 bytes between groups of 16 tokens of the activations,
    11 scratch, 12 its bytes a thread. Rows of y up to the end of the last group are written.

    Threads share the units: each takes the rows that begin in its share of them.
    """
    per_unit, wide = UNIT // group, min(group, 32)
    bytes_per_unit, records_per_unit = CODE_BYTES + 4 * per_unit, UNIT // wide
    several = VECTORS.get(target.vector_bytes, 2)
    unpack_row = _unpack(group)
    one, many = _product(group, 1), _product(group, several)
    put_one, put_many = _finish(1), _finish(several)

    def columns(args: Any, thread: Any, n_threads: Any) -> None:
        first = arg_ptr(args, 0)
        scales = arg_ptr(args, 1)
        units = arg_ptr(args, 2)
        x = arg_ptr(args, 3)
        y = arg_ptr(args, 4)
        rows = arg_int(args, 5)
        n_groups = (get_i64(arg_ptr(args, 6)) + (COLUMNS - 1)) // COLUMNS
        inputs = arg_int(args, 7)
        y_stride = arg_int(args, 8)
        bias = arg_ptr(args, 9)
        x_stride = arg_int(args, 10)
        sums = arg_ptr(args, 11) + arg_int(args, 12) * thread
        firsts = sums + ROWS * MOST_VECTORS * WORD_BYTES
        heads = firsts + 2 * 8 * ROWS
        most = larger(UNITS, (inputs + (UNIT - 1)) // UNIT * 16)
        codes = heads + (most * records_per_unit + ROWS) * HEAD_BYTES
        end = (inputs + 31) // 32 * BLOCK_BYTES
        base = get_u32(first)
        n_units = get_u32(first + rows * 4) - base
        row = first_row(first, 0, rows, base + n_units * thread // n_threads)
        last = rows
        if thread + 1 < n_threads:
            last = first_row(first, 0, rows, base + n_units * (thread + 1) // n_threads)
        while row < last:
            begin = get_u32(first + row * 4)
            # The row behind those that fit, less what is no whole run of 16.
            fit = first_row(first, row, smaller(last, row + ROWS) + 1, begin + most + 1) - 1 - row
            fit = smaller(larger(fit // 16 * 16, 16), last - row)
            for r in range(fit):
                at = get_u32(first + (row + r) * 4)
                i = (at - begin) * records_per_unit + r
                put_i64(firsts + r * 8, i)
                unpack_row(
                    units + (at - base) * bytes_per_unit,
                    get_u32(first + (row + r) * 4 + 4) - at,
                    inputs, heads + i * HEAD_BYTES, codes + i * wide,
                )  # fmt: skip
            g = 0
            while g < n_groups:
                at_x = x + g * x_stride
                at_y = y + g * COLUMNS * y_stride + row * 4
                if g + several <= n_groups:
                    many(at_x, x_stride, end, fit, heads, codes, firsts, sums)
                    put_many(sums, fit, scales + row * 4, bias + row * 4, at_y, y_stride)
                    g += several
                else:
                    one(at_x, x_stride, end, fit, heads, codes, firsts, sums)
                    put_one(sums, fit, scales + row * 4, bias + row * 4, at_y, y_stride)
                    g += 1
            row += fit

    return columns


# --- the rows of the table ------------------------------------------------------------------------


def code_columns(x: np.ndarray) -> np.ndarray:
    """Reference of the "columns" activations: float32 [tokens, n] -> uint8 [groups, bytes]."""
    import numpy as np

    from headrace.sparse.linear import quantize_q8

    tokens, n = x.shape
    padded = np.zeros((-(-tokens // COLUMNS) * COLUMNS, -(-n // 32) * 32), np.float32)
    padded[:tokens, :n] = x
    entries = quantize_q8(padded, COLUMNS)
    words = entries.view(np.int32).copy()
    total, first = -words[..., 10], -words[..., 11]
    sums = np.stack([total, first, total - first], axis=-1).astype(np.float32)
    words[..., 9:] = sums.view(np.int32)
    return np.ascontiguousarray(words.swapaxes(-1, -2)).view(np.uint8).reshape(len(words), -1)


def entries_of(columns: np.ndarray) -> np.ndarray:
    """Undo `code_columns`: "q8" entries of groups of 16 tokens, uint8 [groups, blocks, 16, 48]."""
    import numpy as np

    words = np.ascontiguousarray(columns).view(np.int32).reshape(len(columns), -1, 12, COLUMNS)
    entries = np.ascontiguousarray(words.swapaxes(-1, -2))
    sums = entries[..., 9:].copy().view(np.float32)
    scale = entries[..., 8].copy().view(np.float32)
    entries[..., 9] = (scale * sums[..., 0]).view(np.int32)
    entries[..., 10], entries[..., 11] = -sums[..., 0], -sums[..., 1]
    return entries.view(np.uint8)


def multiply(raw: np.ndarray, rows: int, n: int, group: int, coded: np.ndarray) -> np.ndarray:
    """Reference of the products, bit for bit: float32 [tokens, rows], without a bias."""
    import numpy as np

    groups, wide = unpack(raw, rows, n, group), min(group, 32)
    entries = entries_of(coded).transpose(0, 2, 1, 3)
    blocks = np.ascontiguousarray(entries).reshape(-1, entries.shape[2], 48)
    x = blocks[..., :32].view(np.int8).astype(np.int64).reshape(len(blocks), -1)
    scales = np.ascontiguousarray(blocks[..., 32:36]).view(np.float32)[..., 0]
    out = np.zeros((len(x), rows), np.float32)
    row = np.repeat(np.arange(rows), groups.counts)
    for i, (r, column) in enumerate(zip(row, groups.columns, strict=True)):
        for at in range(0, group, wide):
            begin = int(column) * group + at
            some = x[:, begin : begin + wide]
            codes = groups.codes[i, at : at + wide].astype(np.int64)
            whole = some @ codes * int(groups.scales[i])
            whole += 16 * int(groups.offsets[i]) * some.sum(axis=1)
            assert np.abs(whole).max() < 1 << 24
            out[:, r] += whole.astype(np.float32) * scales[:, begin // 32]
    return out * groups.row_scales


def _cases(group: int) -> Any:
    def cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
        import numpy as np

        for rows, columns, tokens in ((1, 1, 1), (5, 2, 17), (37, 23, 70), (70, 90, 33)):
            raw, x = example(rng, rows, columns, group, tokens)
            n = columns * group
            coded = code_columns(x)
            bias = rng.standard_normal(rows).astype(np.float32)
            y = np.zeros((len(coded) * COLUMNS, rows), np.float32)
            head = raw[: 8 * rows + 4].view(np.uint32).copy()
            scratch = np.zeros((4, scratch_bytes(n, group)), np.uint8)
            slots = [
                head[: rows + 1].copy(), head[rows + 1 :].view(np.float32).copy(),
                raw[units_offset(rows) :].copy(), coded, y, rows, np.array([tokens], np.int64), n,
                y.strides[0], bias, coded.strides[0], scratch, scratch.shape[1],
            ]  # fmt: skip
            expected = multiply(raw, rows, n, group, coded) + bias
            yield Case(slots, [(y, expected)], 0, f"{rows}x{n}, {tokens} tokens")

    return cases


_SOURCES = (__name__, "headrace.sparse.gqs", "headrace.sparse.gqs_kernels")


def _row(group: int) -> Kernel:
    name = f"columns_gqs_g{group}"
    return Kernel(name, lambda target: _columns(group, target), _SOURCES, _cases(group), __name__)


def all_kernels() -> list[Kernel]:
    """Every row of the table that this module has."""
    return [_row(group) for group in GROUPS]


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
