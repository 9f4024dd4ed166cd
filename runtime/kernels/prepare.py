"""Kernels that make the input of a matrix product: normalise, gate or copy, then code.

One row per producer and kind of activation. In decode every thread makes the whole input for
itself ("private"), which costs less than a barrier; in prefill threads share the tokens.
All float rows are padded with zeros to a multiple of 16.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from headrace.kernels.math import gelu_tanh, silu, tanh
from headrace.sparse.gqs_columns import COLUMNS, code_columns, entries_of, to_columns
from headrace.sparse.gqs_kernels import code_x16, to_x16
from headrace.sparse.linear import (
    Q8_BLOCK_BYTES,
    X16_HEAD_BYTES,
    dequantize_q8,
    pack_f32,
    quantize_q8,
    quantize_q8x2,
)
from headrace.sparse.plane_tables import code_tables, to_tables
from headrace.sparse.token_pairs import pair_entries, separate_entries
from headrace.targets.simd import (
    absolute,
    arg_float,
    arg_int,
    arg_ptr,
    fma,
    get_f32,
    get_i64,
    join,
    join4,
    load_f32,
    maximum,
    put_f32,
    round_i32,
    row_max_f32,
    row_sum_i32,
    select_lt,
    shl,
    splat_f32,
    splat_i32,
    splat_lane,
    sqrt,
    store_f32,
    store_i8,
    store_i8_halves,
    store_lanes,
    store_words,
    sub_block,
    sum_f32,
    to_f32,
    zeros_f32,
)
from headrace.targets.table import Case, Kernel, KernelFunction
from headrace.targets.target import Target

if TYPE_CHECKING:
    import numpy as np


# --- producers: one float32 row -------------------------------------------------------------------


def inverse_rms(x: Any, n: Any, eps: Any) -> Any:
    """1 / sqrt(mean of squares + eps) of a padded row of n values."""
    total = zeros_f32(1)
    for i in range(0, n, 16):
        v = load_f32(x + i * 4, 1, 0)
        total = fma(v, v, total)
    return 1.0 / sqrt(sum_f32(total) / n + eps)


def normalize(x: Any, weight: Any, n: Any, eps: Any, out: Any) -> None:
    """out = x / rms(x) * weight on a padded row."""
    scale = splat_f32(inverse_rms(x, n, eps))
    for i in range(0, n, 16):
        store_f32(
            out + i * 4, load_f32(x + i * 4, 1, 0) * scale * load_f32(weight + i * 4, 1, 0), 0
        )


def _add_normalize(
    a: Any, b: Any, w: Any, post: Any, n: Any, eps: Any, out: Any, mode: Any
) -> None:
    # a: residual stream (updated), b: what the last block adds, post: a norm of its own for b.
    if mode == 1:
        for i in range(0, n, 16):
            at = i * 4
            store_f32(a + at, load_f32(a + at, 1, 0) + load_f32(b + at, 1, 0), 0)
    if mode == 2:
        scale = splat_f32(inverse_rms(b, n, eps))
        for i in range(0, n, 16):
            at = i * 4
            v = load_f32(b + at, 1, 0) * scale * load_f32(post + at, 1, 0)
            store_f32(a + at, load_f32(a + at, 1, 0) + v, 0)
    normalize(a, w, n, eps, out)


def _gate_silu(a: Any, b: Any, w: Any, post: Any, n: Any, eps: Any, out: Any, mode: Any) -> None:
    for i in range(0, n, 16):
        at = i * 4
        store_f32(out + at, silu(load_f32(a + at, 1, 0)) * load_f32(b + at, 1, 0), 0)


def _gate_gelu(a: Any, b: Any, w: Any, post: Any, n: Any, eps: Any, out: Any, mode: Any) -> None:
    for i in range(0, n, 16):
        at = i * 4
        store_f32(out + at, gelu_tanh(load_f32(a + at, 1, 0)) * load_f32(b + at, 1, 0), 0)


def _gate_relu(a: Any, b: Any, w: Any, post: Any, n: Any, eps: Any, out: Any, mode: Any) -> None:
    for i in range(0, n, 16):
        at = i * 4
        gate = maximum(load_f32(a + at, 1, 0), zeros_f32(1))
        store_f32(out + at, gate * load_f32(b + at, 1, 0), 0)


def _relu_alone(a: Any, b: Any, w: Any, post: Any, n: Any, eps: Any, out: Any, mode: Any) -> None:
    for i in range(0, n, 16):
        store_f32(out + i * 4, maximum(load_f32(a + i * 4, 1, 0), zeros_f32(1)), 0)


def _tanh(a: Any, b: Any, w: Any, post: Any, n: Any, eps: Any, out: Any, mode: Any) -> None:
    for i in range(0, n, 16):
        store_f32(out + i * 4, tanh(load_f32(a + i * 4, 1, 0)), 0)


def _copy(a: Any, b: Any, w: Any, post: Any, n: Any, eps: Any, out: Any, mode: Any) -> None:
    for i in range(0, n, 16):
        store_f32(out + i * 4, load_f32(a + i * 4, 1, 0), 0)


# --- consumers: a float32 row to one token's place among a group's activations --------------------


def _put_entries(
    low: Any,
    high: Any,
    scale: Any,
    total: Any,
    first: Any,
    out: Any,
    t: Any,
    step: Any,
    blocks: Any,
) -> None:
    """Store an entry of each block: see `headrace.sparse.linear`."""
    store_i8(out, low, step)
    store_i8(out + 16, high, step)
    none = splat_i32(0)
    store_lanes(out + 32, scale, scale * to_f32(total), none - total, none - first, blocks, step)


def _put_paired(
    low: Any,
    high: Any,
    scale: Any,
    total: Any,
    first: Any,
    out: Any,
    t: Any,
    step: Any,
    blocks: Any,
) -> None:
    """Store entry t of a pair of each block: see `headrace.sparse.token_pairs`."""
    words = out + 4 * t
    start = shl(splat_i32(0) - total, 3)
    store_words(words, start, blocks, step)
    store_words(words + 8, start, blocks, step)
    store_words(words + 16, scale, blocks, step)
    store_words(words + 24, scale * to_f32(total), blocks, step)
    codes = out + (32 + 8 * t)
    store_i8_halves(codes, low, 16, step)
    store_i8_halves(codes + 32, high, 16, step)


def _coder(put: Any) -> Any:
    def code(low: Any, high: Any, out: Any, t: Any, step: Any, blocks: Any) -> Any:
        """Code `blocks` (1 or 4) blocks of 32 values at once, `step` bytes apart in `out`.

        `low` and `high` are the blocks' halves. Gives what the codes leave out, as one block of
        vectors: all lower halves, then all upper ones.
        """
        most = row_max_f32(maximum(absolute(low), absolute(high)))
        zero = splat_f32(0.0)
        inverse = select_lt(zero, most, splat_f32(127.0) / most, zero)
        scale = most * splat_f32(1.0 / 127.0)
        if blocks == 4:
            up = join4(
                splat_lane(inverse, 0), splat_lane(inverse, 1), splat_lane(inverse, 2),
                splat_lane(inverse, 3),
            )  # fmt: skip
            down = join4(
                splat_lane(scale, 0), splat_lane(scale, 1), splat_lane(scale, 2),
                splat_lane(scale, 3),
            )  # fmt: skip
        else:
            up = splat_lane(inverse, 0)
            down = splat_lane(scale, 0)
        q_low = round_i32(low * up)
        q_high = round_i32(high * up)
        first = row_sum_i32(q_low)
        total = row_sum_i32(q_low + q_high)
        put(q_low, q_high, scale, total, first, out, t, step, blocks)
        return join(low - to_f32(q_low) * down, high - to_f32(q_high) * down)

    return code


def _to_q8(pairs: bool, put: Any, ahead: int) -> Any:
    """Code a row; with `pairs` also what the codes leave out, `ahead` bytes behind, as entry 1."""
    code = _coder(put)

    def blocks_of(row: Any, out: Any, t: Any, step: Any, blocks: Any) -> None:
        rest = code(
            load_f32(row, blocks, 128), load_f32(row + 64, blocks, 128), out, t, step, blocks
        )
        if pairs:
            low = sub_block(rest, 0, blocks)
            high = sub_block(rest, blocks, blocks)
            code(low, high, out + ahead, 1, step, blocks)

    def to_q8(row: Any, n: Any, out: Any, t: Any, step: Any) -> None:
        i = 0
        while i + 128 <= n:
            blocks_of(row + i * 4, out + (i // 32) * step, t, step, 4)
            i += 128
        while i < n:
            blocks_of(row + i * 4, out + (i // 32) * step, t, step, 1)
            i += 32

    return to_q8


def consumer(activation: str, token_pairs: bool) -> Any:
    """Puts the row of a token (its number in a group of so many) in its place in `out`."""
    if activation == "x16":
        return to_x16
    if activation == "f32":

        def to_f32(row: Any, n: Any, out: Any, token: Any, group: Any) -> None:
            for i in range(n):
                put_f32(out + (i * (4 * group) + token * 4), get_f32(row + i * 4))

        return to_f32
    if activation == "tables":
        return to_tables
    pairs = activation == "q8x2"
    entry = 2 * Q8_BLOCK_BYTES if pairs else Q8_BLOCK_BYTES
    alone = _to_q8(pairs, _put_entries, Q8_BLOCK_BYTES)
    if activation == "columns":

        def by_words(row: Any, n: Any, out: Any, token: Any, group: Any) -> None:
            # Entries take the place of the values, of which the last block may be half there.
            if n % 32 != 0:
                store_f32(row + n * 4, zeros_f32(1), 0)
            whole = (n + 31) // 32 * 32
            alone(row, whole, row, 0, 128)
            to_columns(row, whole, out, token, group)

        return by_words

    def to_entries(row: Any, n: Any, out: Any, token: Any, group: Any) -> None:
        alone(row, n, out + token * entry, 0, entry * group)

    if not token_pairs:
        return to_entries
    paired = _to_q8(pairs, _put_paired, 0)
    tokens = 1 if pairs else 2  # in a pair of entries

    def to_pairs(row: Any, n: Any, out: Any, token: Any, group: Any) -> None:
        if group == 1:
            to_entries(row, n, out, token, group)
        else:
            at = out + token // tokens * (2 * Q8_BLOCK_BYTES)
            paired(row, n, at, token % tokens, entry * group)

    return to_pairs


_PRODUCERS = {
    "norm": _add_normalize,
    "silu": _gate_silu,
    "gelu": _gate_gelu,
    "relu": _gate_relu,
    "relu_alone": _relu_alone,
    "tanh": _tanh,
    "copy": _copy,
}


def _prepare(producer_name: str, activation: str, token_pairs: bool) -> KernelFunction:
    """Slots: 0 a, 1 b, 2 weight, 3 post-norm weight, 4 out, 5 values in a row, 6 address of the
    token count, 7 address of the first token, 8 bytes between tokens of a, 9 of b, 10 bytes between
    token groups of out, 11 tokens in a group, 12 bytes between the threads' own a (0: shared),
    13 the same for out, 14 scratch row, 15 bytes between the threads' scratch, 16 eps, 17 mode
    (norm: 0 only normalise a, 1 add b to a first, 2 add the normalised b).
    Private or not is decided by slot 13: then every thread makes all tokens.
    """
    produce = _PRODUCERS[producer_name]
    consume = consumer(activation, token_pairs)

    def prepare(args: Any, thread: Any, n_threads: Any) -> None:
        a = arg_ptr(args, 0) + arg_int(args, 12) * thread
        b = arg_ptr(args, 1)
        weight = arg_ptr(args, 2)
        post = arg_ptr(args, 3)
        private = arg_int(args, 13)
        out = arg_ptr(args, 4) + private * thread
        n = arg_int(args, 5)
        count = get_i64(arg_ptr(args, 6))
        start = get_i64(arg_ptr(args, 7))
        a_stride = arg_int(args, 8)
        b_stride = arg_int(args, 9)
        group_stride = arg_int(args, 10)
        group = arg_int(args, 11)
        row = arg_ptr(args, 14) + arg_int(args, 15) * thread
        eps = arg_float(args, 16)
        mode = arg_int(args, 17)
        first = count * thread // n_threads
        last = count * (thread + 1) // n_threads
        if private != 0:
            first = 0
            last = count
        for token in range(first, last):
            produce(
                a + (start + token) * a_stride,
                b + (start + token) * b_stride,
                weight,
                post,
                n,
                eps,
                row,
                mode,
            )
            consume(row, n, out + (token // group) * group_stride, token % group, group)

    return prepare


def _reference(name: str, a: Any, b: Any, w: Any, post: Any, eps: float, mode: int) -> Any:
    import numpy as np

    a, b = a.astype(np.float64), b.astype(np.float64)
    if name == "copy":
        return a, a
    if name == "silu":
        return a, a / (1 + np.exp(-a)) * b
    if name == "gelu":
        return a, 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3))) * b
    if name == "relu":
        return a, np.maximum(a, 0) * b
    if name == "relu_alone":
        return a, np.maximum(a, 0)
    if name == "tanh":
        return a, np.tanh(a)
    if mode == 1:
        a = a + b
    if mode == 2:
        a = a + b / np.sqrt((b**2).mean(-1, keepdims=True) + eps) * post
    return a, a / np.sqrt((a**2).mean(-1, keepdims=True) + eps) * w


def _cases(name: str, activation: str) -> Any:
    def cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
        import numpy as np

        eps = 1e-5
        tables = activation == "tables"
        least = 64 if tables else 32
        for n_tokens, n, mode in ((1, least, 0), (6, 3 * least, 1), (5, 576, 2)):
            group = 1 if n_tokens == 1 or activation in ("tables", "x16") else 4
            if activation == "columns":
                group, n = COLUMNS, n - 16 * (n_tokens == 6)
            padded = -(-n_tokens // group) * group
            a = (rng.standard_normal((n_tokens, n)) * 3).astype(np.float32)
            b = rng.standard_normal((n_tokens, n)).astype(np.float32)
            a[0, :3] = (0, -80, 80)
            w = rng.standard_normal(n).astype(np.float32)
            post = rng.standard_normal(n).astype(np.float32)
            _, values = _reference(name, a, b, w, post, eps, mode)
            rows = np.zeros((padded, n), np.float32)
            rows[:n_tokens] = values
            expected = _PACK[activation](rows, group)
            paired = activation.startswith("q8") and group > 1 and target.token_pairs
            if paired:
                expected = pair_entries(expected)
            out = np.zeros_like(expected)
            # Coded rows: a value may round to the neighbouring code; metadata follows it.
            if tables:
                tolerance: Any = 0 if name == "copy" else _TablesClose(rows)
            elif activation == "x16":
                tolerance = 0 if name == "copy" else _WordsClose(rows)
            elif activation == "columns":
                tolerance = _ColumnsClose(rows)
            elif activation != "f32":
                tolerance = _CodedClose(n, rows, activation == "q8x2", paired)
            else:
                tolerance = 0 if name == "copy" else np.abs(expected) * 4e-6 + 1e-6
            count, start = np.array([n_tokens], np.int64), np.zeros(1, np.int64)
            scratch = np.full((8, n + 16), np.nan, np.float32)
            slots = [
                a, b, w, post, out, n, count, start, n * 4, n * 4, out[0].nbytes, group, 0, 0,
                scratch, scratch.strides[0], eps, mode,
            ]  # fmt: skip
            yield Case(slots, [(out, expected)], tolerance, f"{n_tokens}x{n}, mode {mode}")

    return cases


class _CodedClose:
    """Do coded activations stand for the values, and do their sums belong to their codes?"""

    def __init__(self, n: int, rows: np.ndarray, pairs: bool, paired: bool) -> None:
        self.n = n
        self.rows = rows
        self.pairs = pairs
        self.paired = paired

    def __call__(self, found: np.ndarray, expected: np.ndarray) -> bool:
        import numpy as np

        if self.paired:
            separate = separate_entries(found)
            if not (pair_entries(separate) == found).all():  # what is there twice, sums of codes
                return False
            found = separate
        values = dequantize_q8(found, self.n)
        most = np.abs(self.rows.reshape(len(self.rows), -1, 32)).max(-1).repeat(32, axis=-1)
        step = most / 127
        if self.pairs:
            values = values[0::2] + values[1::2]
            step = step / 254 + most * 2.0**-20  # and the roundings of the value itself
        tokens = len(self.rows)
        if not (np.abs(values[:tokens] - self.rows) <= step * 0.502 + most * 4e-6 + 1e-12).all():
            return False
        codes = found[..., :32].view(np.int8).astype(np.int64)
        tail = np.ascontiguousarray(found[..., 32:])
        ints, floats = tail.view(np.int32), tail.view(np.float32)
        return bool(
            (ints[..., 2] == -codes.sum(-1)).all()
            and (ints[..., 3] == -codes[..., :16].sum(-1)).all()
            and np.allclose(floats[..., 1], floats[..., 0] * codes.sum(-1), rtol=1e-6)
        )


class _ColumnsClose:
    """Are "columns" activations entries that stand for the values, and are sums those of codes?"""

    def __init__(self, rows: np.ndarray) -> None:
        import numpy as np

        self.rows = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 32)))

    def __call__(self, found: np.ndarray, expected: np.ndarray) -> bool:
        import numpy as np

        entries = entries_of(found)
        sums = found.view(np.float32).reshape(len(found), -1, 12, COLUMNS)[:, :, 9:]
        return bool(
            (sums[:, :, 0] == sums[:, :, 1] + sums[:, :, 2]).all()
            and _CodedClose(self.rows.shape[1], self.rows, False, False)(entries, expected)
        )


class _WordsClose:
    """Do "x16" activations stand for the values?"""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows

    def __call__(self, found: np.ndarray, expected: np.ndarray) -> bool:
        import numpy as np

        scale = np.ascontiguousarray(found[:, :4]).view(np.float32)
        codes = np.ascontiguousarray(found[:, X16_HEAD_BYTES:]).view(np.int16)
        most = np.abs(self.rows).max(axis=1, keepdims=True)
        near = np.abs(codes * scale - self.rows) <= most * (0.502 / 32767 + 4e-6) + 1e-12
        return bool(near.all() and (np.abs(codes).max(axis=1) == 32767).all())


class _TablesClose:
    """Are tables off by a step at most, and scales by as much as the values may be?"""

    def __init__(self, rows: np.ndarray) -> None:
        self.numbers = rows.shape[1] * 4

    def __call__(self, found: np.ndarray, expected: np.ndarray) -> bool:
        import numpy as np

        steps = found[:, : self.numbers].astype(int) - expected[:, : self.numbers]
        end = self.numbers + self.numbers // 64
        scale, exact = (
            np.ascontiguousarray(a[:, self.numbers : end]).view(np.float32)
            for a in (found, expected)
        )
        close = np.allclose(scale, exact, rtol=1e-5, atol=0)
        return bool(np.abs(steps).max() <= 1 and close)


def _pack_x16(rows: np.ndarray, group: int) -> np.ndarray:
    return code_x16(rows)


def _pack_columns(rows: np.ndarray, group: int) -> np.ndarray:
    return code_columns(rows)


_PACK = {
    "q8": quantize_q8,
    "q8x2": quantize_q8x2,
    "f32": pack_f32,
    "tables": code_tables,
    "x16": _pack_x16,
    "columns": _pack_columns,
}


def kernel(producer: str, activation: str) -> Kernel:
    """The row of a producer ("norm", "silu", "gelu", "relu", "copy", "tanh", and "relu_alone"
    where there is no gate) and an activation kind.
    """
    kinds: tuple[str, ...] = ("headrace.sparse.interleaving", "headrace.sparse.plane_tables")
    if activation == "x16":
        kinds = (*kinds, "headrace.sparse.gqs_kernels")
    if activation == "columns":
        kinds = (*kinds, "headrace.sparse.gqs_columns")
    return Kernel(
        f"{producer}_{activation}",
        lambda target: _prepare(producer, activation, target.token_pairs),
        (__name__, "headrace.kernels.math", *kinds),
        _cases(producer, activation),
        __name__,
    )


def all_kernels() -> list[Kernel]:
    """Every row of this module."""
    return [kernel(p, a) for p in _PRODUCERS for a in _PACK]


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
