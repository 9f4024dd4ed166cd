"""Typed SIMD values: the vocabulary that every kernel is written in.

These are marker functions. Kernels call them, and `headrace.targets.lowering` tells Numba what each
one means in LLVM; calling one from Python is an error. Nothing here imports Numba, so that reading
a format or a kernel costs nothing.

Values
    Ptr        an address; ``p + n`` moves it by n bytes.
    vectors    a *block* of ``count`` vectors of 16 lanes (64 lanes for bytes). A block is a plain
               value: LLVM keeps its vectors in registers where they fit. Arithmetic (+ - * & | ^)
               works lane by lane on blocks of equal shape, and between a block and one vector.

A lane count of 16 is a logical width: a CPU with shorter registers gets several instructions.
Products and what surrounds them may be compiled for 4 or 8 lanes instead (`with_lanes`): then a
block of weights is read in strips (`strip`), and 64 bytes become 4 times the number of lanes.
``count`` and ``bits`` must be constants at compile time. Elements in memory are aligned to their
size, unless the marker says otherwise.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

MARKERS: dict[str, Callable[..., Any]] = {}


def _marker(fn: Callable[..., Any]) -> Callable[..., Any]:
    MARKERS[fn.__name__] = fn
    return fn


def _only_compiled() -> Any:
    raise RuntimeError("a SIMD marker runs only inside a compiled kernel")


def with_lanes(
    kernel: Callable[..., None], lanes: int, *, in_order: bool = False, token_pairs: bool = False
) -> Callable[..., None]:
    """A kernel whose vectors have so many lanes.

    Args:
        kernel: the function.
        lanes: 4, 8 or 16.
        in_order: the order of its instructions is chosen to fit the registers: LLVM shall keep it.
        token_pairs: its instructions multiply two rows by two tokens. The two vectors of 4 rows and
            tokens t, t + 1 (t even) then hold rows 0, 0, 1, 1 and 2, 2, 3, 3 of both tokens in
            turn; "q8" entries are read in pairs (`headrace.sparse.token_pairs`).
    """
    kernel.__dict__.update(lanes=lanes, in_order=in_order, token_pairs=token_pairs)
    return kernel


def of_words(fn: Callable[..., Any], words: int) -> Callable[..., Any]:
    """A function that takes so many `int32` and returns one, for other code to call: no kernel."""
    fn.__dict__.update(words=words)
    return fn


def table_words(values: Sequence[int]) -> tuple[int, int]:
    """16 signed bytes as the two constants that `lookup16` takes."""
    low, high = struct.unpack("<2q", struct.pack("<16b", *values))
    return low, high


# --- argument blocks: 8-byte slots --------------------------------------------------------------


@_marker
def arg_ptr(args: Any, slot: int) -> Any:
    """Slot `slot` of an argument block as an address."""
    return _only_compiled()


@_marker
def arg_int(args: Any, slot: int) -> Any:
    """Slot `slot` of an argument block as a signed 64-bit integer."""
    return _only_compiled()


@_marker
def arg_float(args: Any, slot: int) -> Any:
    """Slot `slot` of an argument block as a float32 (its low 4 bytes)."""
    return _only_compiled()


# --- scalars ------------------------------------------------------------------------------------


@_marker
def get_u8(p: Any) -> Any:
    """One unsigned byte as an integer."""
    return _only_compiled()


@_marker
def get_i8(p: Any) -> Any:
    """One signed byte as an integer."""
    return _only_compiled()


@_marker
def get_u16(p: Any) -> Any:
    """An unsigned 16-bit integer at any address, as an integer."""
    return _only_compiled()


@_marker
def get_i32(p: Any) -> Any:
    """A 32-bit integer as an integer."""
    return _only_compiled()


@_marker
def get_u32(p: Any) -> Any:
    """An unsigned 32-bit integer at any address, as an integer."""
    return _only_compiled()


@_marker
def get_i64(p: Any) -> Any:
    """A 64-bit integer."""
    return _only_compiled()


@_marker
def get_f32(p: Any) -> Any:
    """A float32."""
    return _only_compiled()


@_marker
def get_f16(p: Any) -> Any:
    """An IEEE half as a float32."""
    return _only_compiled()


@_marker
def get_e4m3(p: Any) -> Any:
    """One float8 as `load_e4m3` gives it."""
    return _only_compiled()


@_marker
def get_bf16(p: Any) -> Any:
    """A bfloat16 as a float32."""
    return _only_compiled()


@_marker
def put_u8(p: Any, value: Any) -> None:
    """Store the low 8 bits of an integer."""
    _only_compiled()


@_marker
def put_u16(p: Any, value: Any) -> None:
    """Store the low 16 bits of an integer."""
    _only_compiled()


@_marker
def put_i32(p: Any, value: Any) -> None:
    """Store the low 32 bits of an integer."""
    _only_compiled()


@_marker
def put_i64(p: Any, value: Any) -> None:
    """Store a 64-bit integer."""
    _only_compiled()


@_marker
def put_f32(p: Any, value: Any) -> None:
    """Store a float32."""
    _only_compiled()


@_marker
def put_f16(p: Any, value: Any) -> None:
    """Store a float32 rounded to an IEEE half (nearest, ties to even)."""
    _only_compiled()


# --- loads: `count` vectors, `stride` bytes apart -------------------------------------------------


@_marker
def load_u8(p: Any, count: int, stride: Any) -> Any:
    """count x 64 unsigned bytes."""
    return _only_compiled()


@_marker
def load_runs(p: Any, row_bytes: Any, run: int) -> Any:
    """4 x 64 bytes: 16 bytes of each of 16 rows, in runs of 1, 2 or 4 bytes.

    The rows are `row_bytes` apart, at any address. The first runs of all rows come first, then
    their second ones: the loads of `headrace.sparse.interleaving`.
    """
    return _only_compiled()


@_marker
def copy_runs(dst: Any, src: Any, row_bytes: Any, run: int) -> None:
    """Store the 256 bytes of `load_runs` at an address that is a multiple of `run`."""
    _only_compiled()


@_marker
def load_u8_i32(p: Any, count: int, stride: Any) -> Any:
    """count x 16 unsigned bytes, widened to int32."""
    return _only_compiled()


@_marker
def load_i8_i32(p: Any, count: int, stride: Any) -> Any:
    """count x 16 signed bytes, widened to int32."""
    return _only_compiled()


@_marker
def load_halves(p: Any, q: Any, count: int, stride: Any) -> Any:
    """count x 16 int32 of two places: 8 from p, then 8 from q."""
    return _only_compiled()


@_marker
def load_f32(p: Any, count: int, stride: Any) -> Any:
    """count x 16 float32."""
    return _only_compiled()


@_marker
def load_f16(p: Any, count: int, stride: Any) -> Any:
    """count x 16 halves, widened to float32."""
    return _only_compiled()


@_marker
def load_half(p: Any, count: int, stride: Any) -> Any:
    """`count` vectors of IEEE halves, `stride` bytes apart, to be computed with as such.

    Of chips that do (`Target.half`); each operation rounds to a half.
    """
    return _only_compiled()


@_marker
def bcast_half(p: Any, count: int, stride: Any) -> Any:
    """`count` vectors, each full of the half at `p + i * stride`; see `load_half`."""
    return _only_compiled()


@_marker
def zeros_half(count: int) -> Any:
    """`count` vectors of halves that are 0."""
    return _only_compiled()


@_marker
def splat_half(value: Any) -> Any:
    """A float, rounded to a half, in all lanes."""
    return _only_compiled()


@_marker
def store_half(p: Any, value: Any, stride: Any) -> None:
    """Store vectors of halves, `stride` bytes apart."""
    _only_compiled()


@_marker
def bcast_f16(p: Any, count: int, stride: Any) -> Any:
    """`count` vectors, each full of the half at `p + i * stride` as float32."""
    return _only_compiled()


@_marker
def load_bf16(p: Any, count: int, stride: Any) -> Any:
    """count x 16 bfloat16, widened to float32."""
    return _only_compiled()


@_marker
def load_e4m3(p: Any, count: int, stride: Any) -> Any:
    """count x 16 float8 E4M3 without their signs, widened and divided by 256; 0x7F gives 0.

    Source: `ggml_ue4m3_to_fp32` of ggml-impl.h.
    """
    return _only_compiled()


@_marker
def load_e8m0(p: Any, count: int, stride: Any) -> Any:
    """count x 16 bytes as powers of two: float32 2^(byte - 128); what is below 2^-126 gives 0."""
    return _only_compiled()


@_marker
def load_columns(p: Any, count: int, stride: Any) -> Any:
    """count x 64 bytes that lie column by column: byte 4r + i of the result is byte 16i + r."""
    return _only_compiled()


@_marker
def bcast_i8x4(p: Any, count: int, stride: Any) -> Any:
    """count x 64 bytes: the same 4 bytes in each of the 16 lanes."""
    return _only_compiled()


@_marker
def bcast_f32(p: Any, count: int, stride: Any) -> Any:
    """count x 16 float32: one value of memory in every lane."""
    return _only_compiled()


@_marker
def bcast_i32(p: Any, count: int, stride: Any) -> Any:
    """count x 16 int32: one value of memory in every lane."""
    return _only_compiled()


@_marker
def load_f32_grid(p: Any, rows: int, columns: int, row_stride: Any, column_stride: Any) -> Any:
    """rows x columns vectors of 16 float32, columns innermost."""
    return _only_compiled()


# --- entries of "q8" activations (see `headrace.sparse.linear`) -----------------------------------


@_marker
def strip(p: Any, index: Any) -> Any:
    """An address whose vector loads give lanes index * n .. index * n + n - 1 of 16.

    n is the number of lanes that the kernel is compiled for. Only loads of weights are meant; `+`
    moves the address as a whole.
    """
    return _only_compiled()


@_marker
def load_q8(p: Any, count: int) -> Any:
    """The entries of `count` tokens, 48 bytes each: 32 int8 codes and 4 words of metadata.

    A target keeps them in registers (`q8_in_registers`) or reads each part when it is used.
    """
    return _only_compiled()


@_marker
def past_q8(x: Any, count: int) -> Any:
    """The address behind the entries of `count` tokens."""
    return _only_compiled()


@_marker
def q8_f32(entry: Any, offset: int) -> Any:
    """count x 16 float32: the one at byte `offset` of the entry in every lane."""
    return _only_compiled()


@_marker
def q8_i32(entry: Any, offset: int) -> Any:
    """count x 16 int32: the one at byte `offset` of the entry in every lane."""
    return _only_compiled()


@_marker
def q8_shifted(entry: Any, offset: int, bits: int) -> Any:
    """`q8_i32`, shifted left by a constant; the integer in memory must fit in 16 bits."""
    return _only_compiled()


# --- stores ---------------------------------------------------------------------------------------


@_marker
def store_f32(p: Any, value: Any, stride: Any) -> None:
    """Store count x 16 float32, `stride` bytes apart."""
    _only_compiled()


@_marker
def store_f32_grid(p: Any, value: Any, columns: int, row_stride: Any, column_stride: Any) -> None:
    """Store a block of rows x columns vectors of 16 float32, columns innermost."""
    _only_compiled()


@_marker
def store_f16(p: Any, value: Any, stride: Any) -> None:
    """Store count x 16 float32 as halves (nearest, ties to even)."""
    _only_compiled()


@_marker
def store_i8(p: Any, value: Any, stride: Any) -> None:
    """Store the low bytes of count x 16 int32, `stride` bytes apart."""
    _only_compiled()


@_marker
def store_i16(p: Any, value: Any, stride: Any) -> None:
    """Store the low 16 bits of count x 16 int32, `stride` bytes apart."""
    _only_compiled()


@_marker
def store_i8_halves(p: Any, value: Any, apart: int, stride: Any) -> None:
    """`store_i8`, the upper 8 lanes of each vector `apart` bytes behind the lower ones."""
    _only_compiled()


@_marker
def store_u8(p: Any, value: Any) -> None:
    """Store count x 64 bytes, one behind the other."""
    _only_compiled()


@_marker
def store_u8_rows(p: Any, value: Any, per_vector: int, rows: int, stride: Any) -> None:
    """Store `rows` rows of bytes, `stride` bytes apart, of which each vector has 1, 2 or 4.

    Row k of a vector is made of the 16 / `per_vector` bytes from (16 / `per_vector`) * k on of all
    its four 16 bytes.
    """
    _only_compiled()


@_marker
def store_u8_quarter(p: Any, value: Any, index: int) -> None:
    """Store 16 of 64 bytes."""
    _only_compiled()


@_marker
def store_u8_quarters(p: Any, value: Any, stride: Any) -> None:
    """Store 64 bytes in runs of 16, `stride` bytes apart."""
    _only_compiled()


# --- making vectors -------------------------------------------------------------------------------


@_marker
def zeros_f32(count: int) -> Any:
    """count x 16 float32 zeros."""
    return _only_compiled()


@_marker
def splat_f32(value: Any) -> Any:
    """A float in 16 lanes."""
    return _only_compiled()


@_marker
def splat_i32(value: Any) -> Any:
    """An integer in 16 lanes."""
    return _only_compiled()


@_marker
def iota_i32() -> Any:
    """0, 1, ..., 15."""
    return _only_compiled()


@_marker
def repeat(value: Any, count: int) -> Any:
    """A block of T vectors, `count` times over: [count * T], the given block innermost."""
    return _only_compiled()


@_marker
def part(value: Any, index: int) -> Any:
    """Vector `index` of a block."""
    return _only_compiled()


@_marker
def join4(a: Any, b: Any, c: Any, d: Any) -> Any:
    """Four single vectors as a block."""
    return _only_compiled()


@_marker
def join(a: Any, b: Any) -> Any:
    """Two blocks of equal shape as one: a's vectors, then b's."""
    return _only_compiled()


@_marker
def sub_block(value: Any, start: int, count: int) -> Any:
    """Vectors start .. start + count - 1 of a block."""
    return _only_compiled()


@_marker
def lane0(value: Any) -> Any:
    """Lane 0 of one vector of float32, as a float32."""
    return _only_compiled()


@_marker
def evens(a: Any, b: Any) -> Any:
    """Lanes 0, 2, ... of two vectors laid end to end."""
    return _only_compiled()


@_marker
def odds(a: Any, b: Any) -> Any:
    """Lanes 1, 3, ... of two vectors laid end to end."""
    return _only_compiled()


@_marker
def load_turned(p: Any, stride: Any) -> Any:
    """As many float32 as lanes of as many rows: lane j of vector i is float i of row j."""
    return _only_compiled()


@_marker
def transpose16(block: Any) -> Any:
    """16 vectors: lane j of vector i becomes lane i of vector j."""
    return _only_compiled()


# --- lane by lane ---------------------------------------------------------------------------------


@_marker
def fma(a: Any, b: Any, c: Any) -> Any:
    """a * b + c rounded once, on every target."""
    return _only_compiled()


@_marker
def reciprocal(value: Any) -> Any:
    """1 / value within 2 units of the last place, for values from 1e-30 to 1e30."""
    return _only_compiled()


@_marker
def to_f32(value: Any) -> Any:
    """int32 lanes to float32."""
    return _only_compiled()


@_marker
def round_i32(value: Any) -> Any:
    """float32 lanes to int32, nearest, ties to even; |value| must be below 2**22."""
    return _only_compiled()


@_marker
def bits_f32(value: Any) -> Any:
    """The bits of int32 lanes as float32."""
    return _only_compiled()


@_marker
def bits_i32(value: Any) -> Any:
    """The bits of float32 lanes, or of 4 bytes, as int32."""
    return _only_compiled()


@_marker
def bits_u8(value: Any) -> Any:
    """int32 lanes as 4 bytes each."""
    return _only_compiled()


@_marker
def shl(value: Any, bits: int) -> Any:
    """Shift int32 lanes left by a constant."""
    return _only_compiled()


@_marker
def shr(value: Any, bits: int) -> Any:
    """Shift int32 lanes right by a constant; zeros come in."""
    return _only_compiled()


@_marker
def shl_by(value: Any, bits: Any) -> Any:
    """Shift each int32 lane of a vector left by what another has in that lane, 0..31."""
    return _only_compiled()


@_marker
def shr_by(value: Any, bits: Any) -> Any:
    """Shift each int32 lane right by what another vector has in that lane, 0..31; zeros come in."""
    return _only_compiled()


@_marker
def sar_by(value: Any, bits: Any) -> Any:
    """The same with copies of the sign coming in."""
    return _only_compiled()


@_marker
def shr_u8(value: Any, bits: int) -> Any:
    """Shift 64 bytes right by a constant."""
    return _only_compiled()


@_marker
def shl_u8(value: Any, bits: int) -> Any:
    """Shift 64 bytes left by a constant."""
    return _only_compiled()


@_marker
def and_u8(value: Any, mask: int) -> Any:
    """64 bytes AND a constant byte."""
    return _only_compiled()


@_marker
def xor_u8(value: Any, mask: int) -> Any:
    """64 bytes XOR a constant byte."""
    return _only_compiled()


@_marker
def third_u8(value: Any) -> Any:
    """The third of 0..255, 0..2, in which 64 bytes are; they are signed, 128 less."""
    return _only_compiled()


@_marker
def lookup16(value: Any, shift: int, low: int, high: int, bits: int) -> Any:
    """Bits `shift` .. `shift` + 3 of 64 bytes choose from 16 signed bytes (`table_words`).

    `bits` is that of the products which follow: 8, or `SMALL` (see `dot_start`).
    """
    return _only_compiled()


@_marker
def load_entries(table: Any, index: Any, n_bytes: int, n_entries: int) -> Any:
    """Two entries of a table in memory for each int32 lane, chosen by its low and its high half.

    A table (`headrace.sparse.codebook.table_of`) has `n_entries` entries of 4 or 8 bytes, then the
    same in 16 bits each and what these stand for: targets use what suits them. Whoever calls
    sees to it that no index leaves the table. Gives vectors of bytes: the first 4 bytes of the
    entries that low halves choose, if `n_bytes` is 8 their last 4, then those of high halves.
    """
    return _only_compiled()


@_marker
def negate_bytes(value: Any, bits: Any, shift: int) -> Any:
    """Negate byte i of each lane where bit `shift` + i of the int32 lane of `bits` is set.

    Both are single vectors; `shift` is a multiple of 4.
    """
    return _only_compiled()


@_marker
def plane_sums(codes: Any, tables: Any, bits: int) -> Any:
    """Of 16 rows of 64 weights of `bits` bit planes, the sums that tables of bytes give: int32.

    The tables are 16 of 16 bytes, each its number plus 128, unsigned. Nibble h (0: low) of byte
    64 (c * bits + p) + 16q + r, c = 0..1, chooses from table 8c + 4h + q; row r is the sum of these
    numbers times 2^p.
    """
    return _only_compiled()


@_marker
def doubling_high(a: Any, b: Any) -> Any:
    """The upper 32 bits of 2ab of int32 lanes, rounded to the nearest; of two the greater one.

    Not both may be -2**31.
    """
    return _only_compiled()


@_marker
def add_rounded_high(acc: Any, a: Any, b: Any) -> Any:
    """acc + the upper 32 bits of ab of int32 lanes, rounded to the nearest; of two the greater."""
    return _only_compiled()


@_marker
def rounding_shift(value: Any, by: Any) -> Any:
    """int32 lanes * 2**by, rounded to the nearest; of two the one farther from 0.

    `by` has int32 lanes, -31..0; a value and half of what it is divided by add up in 32 bits.
    """
    return _only_compiled()


@_marker
def nearest_shift(value: Any, by: Any) -> Any:
    """`rounding_shift`, but of two numbers the greater one."""
    return _only_compiled()


@_marker
def least_i32(a: Any, b: Any) -> Any:
    """The smaller of two int32 lanes."""
    return _only_compiled()


@_marker
def most_i32(a: Any, b: Any) -> Any:
    """The larger of two int32 lanes."""
    return _only_compiled()


@_marker
def maximum(a: Any, b: Any) -> Any:
    """The larger of two float32 lanes; the first one if any is NaN."""
    return _only_compiled()


@_marker
def minimum(a: Any, b: Any) -> Any:
    """The smaller of two float32 lanes; the second one if any is NaN."""
    return _only_compiled()


@_marker
def absolute(a: Any) -> Any:
    """The magnitude of float32 lanes."""
    return _only_compiled()


@_marker
def square_root(a: Any) -> Any:
    """The square roots of float32 lanes."""
    return _only_compiled()


@_marker
def select_lt(a: Any, b: Any, yes: Any, no: Any) -> Any:
    """yes where a < b, else no (a and b int32 or float32 lanes)."""
    return _only_compiled()


@_marker
def select_nan(x: Any, yes: Any, no: Any) -> Any:
    """yes where float32 lanes are NaN, else no."""
    return _only_compiled()


# --- across lanes (one vector): a fixed tree, so the same result on every target ------------------


@_marker
def sum_f32(value: Any) -> Any:
    """The sum of all float32 lanes."""
    return _only_compiled()


@_marker
def max_f32(value: Any) -> Any:
    """The largest of all float32 lanes."""
    return _only_compiled()


@_marker
def sum_i32(value: Any) -> Any:
    """The sum of all int32 lanes."""
    return _only_compiled()


@_marker
def row_max_f32(block: Any) -> Any:
    """One vector: lane i is the largest of 16 float32 lanes of vector i (of 1, 2, 4, 8 or 16)."""
    return _only_compiled()


@_marker
def row_sum_i32(block: Any) -> Any:
    """One vector: lane i is the sum of 16 int32 lanes of vector i (of 1, 2, 4, 8 or 16)."""
    return _only_compiled()


@_marker
def splat_lane(value: Any, lane: int) -> Any:
    """One lane of a vector in every lane."""
    return _only_compiled()


@_marker
def store_lanes(p: Any, a: Any, b: Any, c: Any, d: Any, count: int, stride: Any) -> None:
    """For lane i of `count`: store a[i], b[i], c[i], d[i] (4 bytes each) at p + i * stride."""
    _only_compiled()


@_marker
def store_words(p: Any, a: Any, count: int, stride: Any) -> None:
    """For lane i of `count`: store a[i] (4 bytes) at p + i * stride."""
    _only_compiled()


# --- inner products -------------------------------------------------------------------------------


SMALL = -5  # `bits` of signed codes of magnitude at most 15, which `lookup16` makes


@_marker
def dot_start(entry: Any, offset: int, bits: int) -> Any:
    """What a sum of signed codes starts from: T vectors of int32.

    `bits` of products is 4, 5 or 6 for unsigned codes, and for signed ones 8 or `SMALL`. Where
    instructions multiply unsigned by signed bytes a target adds a bias to all signed codes (`dot8`
    does to those of 8 bits, `lookup16` to `SMALL` ones): this is -bias * (sum of activations),
    which cancels it. The negative sum is read at byte `offset` of the entries.
    """
    return _only_compiled()


@_marker
def dot_init(start: Any, rows: int) -> Any:
    """A sum of products for `rows` row vectors that begins at int32 `start` (a block of T vectors).

    The result is opaque until `dot_result`: a target may keep 16-bit partial sums beside it.
    """
    return _only_compiled()


@_marker
def eights(first: Any, second: Any) -> Any:
    """What `dot8` multiplies, of the weights of inputs 0..3 and of inputs 4..7 of some 8.

    Both are blocks of R x 64 bytes. The result is a block of twice as many, in an order of the
    target's; bytes keep their bits, so codes may be unpacked before or after.
    """
    return _only_compiled()


@_marker
def dot8(acc: Any, weights: Any, entry: Any, offset: Any, bits: int) -> Any:
    """acc[r, t, lane] += sum over 8 bytes of weights[r] * activations[t], exactly.

    `weights` is made by `eights` of R vectors, the activations are those from byte `offset` (a
    multiple of 8) of the entries of T tokens, `acc` has R * T vectors (t innermost). At most 4
    calls may follow one `dot_init` (2 for bits = 6), so that products of less than 8 bits can be
    summed in 16; activations lie in -127..127. Of signed codes see `dot_start`. A target gives
    `dot8`, or `dot4`, half of it.
    """
    return _only_compiled()


@_marker
def dot16(acc: Any, low: Any, high: Any, entry: Any, offset: Any, bits: int) -> Any:
    """`dot8` of `low` from byte `offset` and of `high` from `offset` + 16: counts as two calls."""
    return _only_compiled()


@_marker
def dot8_lanes(acc: Any, first: Any, second: Any, low: Any, high: Any, bits: int) -> Any:
    """acc[r, t, lane] += first[r] * low[t] + second[r] * high[t], of 4 bytes a lane each, exactly.

    `first` and `second` have R vectors of codes of `bits` bits, each the same 4 over and over: they
    are unsigned, or signed of 8 (of which see `dot_start`); `low` and `high` have T vectors of
    activations, -127..127. Counts as a `dot8`. A target gives `dot4_lanes` where its `dot4` wants
    the same activations in all lanes.
    """
    return _only_compiled()


@_marker
def dot4_lanes(acc: Any, first: Any, low: Any, bits: int) -> Any:
    """The first half of `dot8_lanes`."""
    return _only_compiled()


@_marker
def dot4_each(acc: Any, codes: Any, weights: Any) -> Any:
    """acc[i, lane] + the sum over 4 bytes of codes[i] * weights[i], exactly, in int32.

    Blocks of equal shape; codes are signed (see `dot_start`), weights lie in -127..127.
    """
    return _only_compiled()


@_marker
def add_products(acc: Any, p: Any, x: Any) -> Any:
    """Lanes of int32 plus those of signed bytes at p, each times an `int32` of 16 bits."""
    return _only_compiled()


@_marker
def gather_bytes(p: Any, offsets: Any) -> Any:
    """Bytes at p + each of a vector's unsigned bytes."""
    return _only_compiled()


@_marker
def scatter_i8(p: Any, value: Any, offsets: Any) -> None:
    """Store the low byte of each int32 lane at p + that of another vector, which is positive."""
    _only_compiled()


@_marker
def four_i32(a: Any, b: Any, c: Any, d: Any) -> Any:
    """Four `int32` as a vector of 4 lanes."""
    return _only_compiled()


@_marker
def store_in_turn(p: Any, a: Any, b: Any, more: Any) -> None:
    """Store lanes of a and b in turn, int32, plus `more` as the nearest signed bytes.

    `more` has a signed byte, the same in all lanes.
    """
    _only_compiled()


@_marker
def even_bytes(value: Any) -> Any:
    """Bytes 0 and 2 of an `int32` as two signed 16-bit integers; bytes of 1 and 3: `odd_bytes`."""
    return _only_compiled()


@_marker
def odd_bytes(value: Any) -> Any:
    """See `even_bytes`."""
    return _only_compiled()


@_marker
def dot_pairs(acc: Any, a: Any, b: Any) -> Any:
    """acc + a.low * b.low + a.high * b.high of `int32`, two signed 16-bit integers each."""
    return _only_compiled()


@_marker
def dot_sum(acc: Any, a: Any, b: Any) -> Any:
    """An integer of 32 bits (`int32`) and all products of two vectors of signed bytes."""
    return _only_compiled()


@_marker
def interleave4(block: Any) -> Any:
    """4 vectors of bytes: lane 4j + i of vector v becomes the bytes 16j + 4v + i of all of them."""
    return _only_compiled()


@_marker
def to_bytes(value: Any, zero: Any, least: Any, most: Any) -> Any:
    """float32 to unsigned bytes, 4 vectors to one: max(least, min(most, round(x) + zero)).

    Rounded to the nearest, ties to even; |x| must be below 2**31. Lane 4j + i of vector v becomes
    byte 16j + 4v + i: what `interleave4` takes apart. `zero`, `least` and `most` (int32, 0..255)
    are single vectors that have the same in all lanes.
    """
    return _only_compiled()


@_marker
def dot_result(acc: Any, bits: int) -> Any:
    """The int32 sums of a `dot_init` block that `dot8` filled with codes of `bits` bits."""
    return _only_compiled()


@_marker
def group_words(value: Any, index: int, scales: Any, first: int, count: int) -> Any:
    """16-bit integers, two in a lane: nibble * scale + 16 * offset.

    The nibbles are bits 4 * index .. 4 * index + 3 of the 32 words in int32 lanes of `value`. They
    are `count` groups in runs of 32 / count; the word `first` + g of `scales` has the scale of
    group g, 0..127, in its low byte and the offset, signed, in its high one.
    """
    return _only_compiled()


@_marker
def dot_words(acc: Any, a: Any, b: Any) -> Any:
    """acc + a.low * b.low + a.high * b.high, for int32 lanes of two signed 16-bit integers each.

    Blocks of equal shape, vectors of 16 lanes.
    """
    return _only_compiled()


@_marker
def outer(a: Any, b: Any) -> Any:
    """a[r] * b[t] for blocks of R and T vectors: R * T vectors, t innermost."""
    return _only_compiled()


@_marker
def fma_outer(a: Any, b: Any, c: Any) -> Any:
    """c[r, t] + a[r] * b[t], rounded once."""
    return _only_compiled()


@_marker
def fma_columns(
    acc: Any, w: Any, x: Any, n: int, rows: int, w_step: Any, columns: int, x_step: Any
) -> Any:
    """acc + the sum of n `outer` of float32 rows and columns.

    Vectors of rows are 64 bytes apart from one to the next and `w_step` within one, numbers of
    columns 4 bytes and `x_step`. Addresses are formed once for all n.
    """
    return _only_compiled()


@_marker
def bf16_pairs(a: Any, b: Any) -> Any:
    """int32 lanes: bfloat16 of a in the low half, of b in the high half (nearest, ties to even)."""
    return _only_compiled()


@_marker
def bf16_dot(acc: Any, a: Any, b: Any) -> Any:
    """acc[r, t] + a[r].low * b[t].low + a[r].high * b[t].high, for int32 lanes of `bf16_pairs`.

    Only on targets with `bf16_dot`.
    """
    return _only_compiled()


@_marker
def store_i32(p: Any, value: Any, stride: Any) -> None:
    """Store count x 16 int32, `stride` bytes apart."""
    _only_compiled()


@_marker
def load_i32(p: Any, count: int, stride: Any) -> Any:
    """count x 16 int32."""
    return _only_compiled()


@_marker
def add_pairs(value: Any) -> Any:
    """A block of half as many float32 vectors: the sums of tokens 2i and 2i + 1."""
    return _only_compiled()


@_marker
def by_token(value: Any) -> Any:
    """A block of R * T float32 sums with the rows of one token in each vector."""
    return _only_compiled()


# --- registers of matrices: on targets with `byte_matrix` -----------------------------------------


@_marker
def matrix_begin(n_bytes: Any) -> None:
    """Shape the registers, until `matrix_end`, which must come.

    0 to 3 are 16 x 16 int32 sums, 4 and 5 16 rows of `n_bytes` unsigned bytes (4 to 64, a multiple
    of 4), 6 and 7 `n_bytes` / 4 rows of 16 times 4 signed bytes.
    """
    _only_compiled()


@_marker
def matrix_end() -> None:
    """Leave the registers as a thread finds them."""
    _only_compiled()


@_marker
def matrix_zero(register: int) -> None:
    """Sums of nothing."""
    _only_compiled()


@_marker
def matrix_load(register: int, p: Any, stride: Any) -> None:
    """Rows, `stride` bytes apart."""
    _only_compiled()


@_marker
def matrix_store(p: Any, register: int, stride: Any) -> None:
    """The same of sums."""
    _only_compiled()


@_marker
def matrix_dot(sums: int, unsigned: int, signed: int) -> None:
    """sums[i, j] += the sum over k and n < 4 of unsigned[i, 4 k + n] * signed[k, j, n].

    It wraps.
    """
    _only_compiled()


# --- memory and threads ---------------------------------------------------------------------------


@_marker
def prefetch(p: Any) -> None:
    """Ask for the cache line of an address that will be read."""
    _only_compiled()


@_marker
def prefetch_l2(p: Any) -> None:
    """The same into the second cache: what comes until it is read is more than the first holds."""
    _only_compiled()


@_marker
def atomic_add(p: Any, value: Any) -> Any:
    """Add to a 64-bit integer in memory; gives the old value (sequentially consistent)."""
    return _only_compiled()


@_marker
def atomic_get(p: Any) -> Any:
    """Load a 64-bit integer (acquire)."""
    return _only_compiled()


@_marker
def atomic_put(p: Any, value: Any) -> None:
    """Store a 64-bit integer (release)."""
    _only_compiled()


@_marker
def spin_pause() -> None:
    """Tell the CPU that this is a spin loop."""
    _only_compiled()


@_marker
def clock() -> Any:
    """A cheap monotonic counter in ticks of a fixed, unknown rate (0 where the target has none)."""
    return _only_compiled()


@_marker
def call_kernel(function: Any, args: Any, thread: Any, n_threads: Any) -> None:
    """Call a kernel by address: void (args, int64, int64)."""
    _only_compiled()


@_marker
def call_void(function: Any) -> None:
    """Call an operating system function without arguments by address."""
    _only_compiled()


@_marker
def call_system(function: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Call an operating system function by address: word (word a, word b, word c, int64 d).

    A function with fewer arguments does not look at the rest.
    """
    return _only_compiled()


@_marker
def to_int(value: Any) -> Any:
    """A float32 scalar to an integer, toward zero."""
    return _only_compiled()


@_marker
def f32(value: Any) -> Any:
    """A number as a float32 scalar."""
    return _only_compiled()


@_marker
def sqrt(value: Any) -> Any:
    """The square root of a float32 scalar."""
    return _only_compiled()


@_marker
def int32(value: Any) -> Any:
    """The low 32 bits of an integer, as one whose arithmetic is of 32 bits.

    Operators of such a one and any integer give such ones, and wrap; `>>` copies the sign. They are
    what short chips compute with: other integers have 64 bits.
    """
    return _only_compiled()


@_marker
def widened(value: Any) -> Any:
    """An `int32` as an integer of 64 bits, of which the upper half is 0."""
    return _only_compiled()


@_marker
def leading_zeros(value: Any) -> Any:
    """Zero bits in front of the highest bit of an integer of its width, as an `int32`."""
    return _only_compiled()


@_marker
def larger(a: Any, b: Any) -> Any:
    """The larger of two integers or of two float32 scalars."""
    return _only_compiled()


@_marker
def smaller(a: Any, b: Any) -> Any:
    """The smaller of two integers or of two float32 scalars."""
    return _only_compiled()


@_marker
def stack_bytes(n_bytes: int) -> Any:
    """The address of so many bytes on the stack (a multiple of 64 is), the same each time."""
    return _only_compiled()


@_marker
def ptr_to_int(p: Any) -> Any:
    """An address as an integer."""
    return _only_compiled()


@_marker
def int_to_ptr(value: Any) -> Any:
    """An integer as an address."""
    return _only_compiled()
