"""Kernels that are written once for every format: matrix products, tiling and row lookup.

A format gives three functions over the markers of `headrace.targets.simd`:
    product(acc, w, tile_stride, x, T, R, G)   acc += one block of R tiles times T tokens, of the G
                                            that lie side by side
    tile_block(src, row_bytes, dst)         16 raw rows' block, `row_bytes` apart, to a tile block
    row_block(w, lane, out)                 one row (lane) of a tile block to float32

Activations lie T tokens side by side, so that one register addresses them all:
    "q8": [token group][block of 32][token in group] x 48 bytes: 32 int8 codes, float32 scale,
          float32 scale * sum of codes, int32 -(sum of codes), int32 -(sum of the first 16 codes)
    "q8x2": as "q8" with two entries for each token: the codes, and the codes of what they leave
          out, which together are worth 15 bits
    "f32": [token group][input][token in group] float32
    "rows": "f32" in groups of one
    "x16": of group sparsity, see `headrace.sparse.gqs_kernels`; in groups of one
    "columns": "q8" word by word, for 16 tokens; see `headrace.sparse.gqs_columns`
    "tables": see `headrace.sparse.plane_tables`; for one token, or one after the other
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from headrace.sparse import plane_tables
from headrace.sparse.format import TILE_ROWS, Format, Tiled
from headrace.sparse.registry import FORMATS
from headrace.sparse.sums import by_columns, sums
from headrace.sparse.token_pairs import pair_entries
from headrace.sparse.unpacking import unpacked_linear, unpacked_rows, unpacking_slots
from headrace.targets.simd import (
    arg_float,
    arg_int,
    arg_ptr,
    get_f32,
    get_i64,
    put_f32,
    strip,
    with_lanes,
)
from headrace.targets.table import Case, Kernel, KernelFunction
from headrace.targets.target import Target

if TYPE_CHECKING:
    import numpy as np

Q8_BLOCK = 32
Q8_BLOCK_BYTES = 48
X16_HEAD_BYTES = 64
# A decode step reads one tile at a time: several streams of weights at once are slower from memory.
# Plain floats do one multiply-add per load, whose latency hides behind several sums of one tile.
# Short chunks sum like decode: what checks guessed tokens must give the same.
CHAINS = {"q8": 1, "f32": 4}
ALL = 1 << 16  # columns at a time: no limit


def activation_bytes(kind: str, inputs: int) -> int:
    """Bytes of one token's activations of `inputs` values, of one of the kinds above."""
    if kind == "tables":
        return plane_tables.table_bytes(inputs)
    if kind in ("f32", "rows"):
        return inputs * 4
    if kind == "x16":
        return X16_HEAD_BYTES + 2 * inputs
    if kind == "columns":
        return -(-inputs // Q8_BLOCK) * Q8_BLOCK_BYTES
    return inputs // Q8_BLOCK * Q8_BLOCK_BYTES * (2 if kind == "q8x2" else 1)


def together(fmt: Tiled) -> str:
    """The activations of tokens that a product takes several of at once."""
    return "f32" if fmt.activation == "f32" else "q8"


def _linear(
    fmt: Tiled,
    tiles: int,
    tokens: int,
    pairs: bool = False,
    lanes: int = TILE_ROWS,
    columns: int = ALL,
    token_pairs: bool = False,
    chains: int = 1,
    ahead: int = 0,
) -> KernelFunction:
    """y[token, row] = bias[row] + sum over inputs of w[row, input] * x[token, input].

    `tokens` columns are multiplied at once; with `pairs` two of them make a token ("q8x2"). With
    fewer than 16 `lanes` a tile is cut in strips of so many rows, and products are formed for at
    most `columns` columns at a time: registers then hold one strip's weights and many sums. With
    `token_pairs` the activations are those of `headrace.sparse.token_pairs`. With 4 `chains` every
    sum is 4, of every fourth block; kernels with as many chains give the same bits for a token.
    Weights are asked for `ahead` bytes before they are used (0: the CPU's business).

    Slots: 0 tiled weights, 1 activations, 2 y, 3 blocks in a row, 4 tiles, 5 address of the token
    count, 6 bytes between the threads' own activations (0: one for all), 7 bytes between tokens
    of y, 8 bias (float32, 16 a tile), 9 bytes between token groups of the activations.
    Threads share the tiles. Rows of y up to the end of the last token group are written.
    Formats that are unpacked first have slots more: see `headrace.sparse.unpacking`.
    """
    x_advance = activation_bytes(together(fmt), fmt.block) * tokens
    if fmt.unpacked is not None:
        return unpacked_linear(fmt, x_advance, tiles, tokens, pairs, lanes, columns, token_pairs)
    tile_block_bytes = fmt.tile_block_bytes
    out_tokens = tokens // 2 if pairs else tokens
    strips = TILE_ROWS // lanes
    some = sums(
        by_columns(fmt.product, tokens, columns, tokens), tile_block_bytes, x_advance, tokens,
        pairs, columns < tokens, chains, ahead,
    )  # fmt: skip

    def linear(args: Any, thread: Any, n_threads: Any) -> None:
        w = arg_ptr(args, 0)
        x = arg_ptr(args, 1) + arg_int(args, 6) * thread
        y = arg_ptr(args, 2)
        n_blocks = arg_int(args, 3)
        n_tiles = arg_int(args, 4)
        n_tokens = get_i64(arg_ptr(args, 5))
        y_stride = arg_int(args, 7)
        bias = arg_ptr(args, 8)
        x_stride = arg_int(args, 9)
        tile_stride = n_blocks * tile_block_bytes
        n_groups = (n_tokens + out_tokens - 1) // out_tokens
        t = n_tiles * thread // n_threads
        last = n_tiles * (thread + 1) // n_threads
        while t + tiles <= last:
            for g in range(n_groups):
                if strips == 1:
                    some(
                        w + t * tile_stride,
                        x + g * x_stride,
                        y + (t * 64 + g * out_tokens * y_stride),
                        n_blocks,
                        tile_stride,
                        y_stride,
                        bias + t * 64,
                        tiles,
                    )
                else:
                    for s in range(strips):
                        some(
                            strip(w + t * tile_stride, s),
                            x + g * x_stride,
                            y + (t * 64 + s * lanes * 4 + g * out_tokens * y_stride),
                            n_blocks,
                            tile_stride,
                            y_stride,
                            bias + (t * 64 + s * lanes * 4),
                            tiles,
                        )
            t += tiles
        if tiles > 1:
            while t < last:
                for g in range(n_groups):
                    some(
                        w + t * tile_stride,
                        x + g * x_stride,
                        y + (t * 64 + g * out_tokens * y_stride),
                        n_blocks,
                        tile_stride,
                        y_stride,
                        bias + t * 64,
                        1,
                    )
                t += 1

    return with_lanes(linear, lanes, in_order=columns < tokens, token_pairs=token_pairs)


def _gemm(fmt: Tiled, target: Target, pairs: bool) -> KernelFunction:
    # One column (or pair) at a time finds the weights of a strip in registers, and needs no more
    # than its own activations beside them. The weights of a long block do not fit.
    lanes = target.lanes(fmt.activation)
    coded = together(fmt) == "q8"
    one = (lanes < TILE_ROWS or target.q8_in_registers) and coded
    two = target.token_pairs and coded
    columns = (2 if two else 1) if one and fmt.block == Q8_BLOCK else ALL
    tokens = target.tokens(fmt.activation)
    return _linear(fmt, target.gemm_tiles, tokens, pairs, lanes, columns, two)


def _gemv(fmt: Tiled, target: Target) -> KernelFunction:
    chains, ahead = CHAINS[fmt.activation], target.ahead
    return _linear(fmt, 1, 1, lanes=target.gemv_lanes, chains=chains, ahead=ahead)


def _gems(fmt: Tiled, target: Target) -> KernelFunction:
    # A register's width of rows: each of its tokens has several sums in registers.
    lanes = min(TILE_ROWS, target.vector_bytes // 4)
    return _linear(fmt, 1, target.few_tokens, lanes=lanes, chains=CHAINS[fmt.activation])


def _tile(fmt: Format) -> KernelFunction:
    """Tile raw rows. Slots: 0 raw rows, 1 bytes of a row, 2 tiled, 3 blocks in a row, 4 tiles.

    The raw rows are a multiple of 16 (the caller fills up with zero bytes). Threads share tiles.
    """
    tile_block = fmt.tile_block
    run, tile_run = fmt.tile_run or (1, tile_block)
    block_bytes = fmt.block_bytes
    tile_block_bytes = fmt.tile_block_bytes

    def tile(args: Any, thread: Any, n_threads: Any) -> None:
        src = arg_ptr(args, 0)
        row_bytes = arg_int(args, 1)
        dst = arg_ptr(args, 2)
        n_blocks = arg_int(args, 3)
        n_tiles = arg_int(args, 4)
        for t in range(n_tiles * thread // n_threads, n_tiles * (thread + 1) // n_threads):
            raw = src + t * 16 * row_bytes
            tiled = dst + t * n_blocks * tile_block_bytes
            whole = n_blocks // run * run
            for b in range(0, whole, run):
                tile_run(raw + b * block_bytes, row_bytes, tiled + b * tile_block_bytes)
            if run > 1:
                for b in range(whole, n_blocks):
                    tile_block(raw + b * block_bytes, row_bytes, tiled + b * tile_block_bytes)

    return tile


def _rows(fmt: Format) -> KernelFunction:
    """Look up rows of a tiled matrix: x[token] = scale * w[ids[token]].

    Slots: 0 tiled weights, 1 x, 2 ids (int64), 3 blocks in a row, 4 address of the token count,
    5 bytes between tokens of x, 6 bytes between the threads' own x (0: threads share the tokens),
    7 scale (float32), 8 row length.
    """
    if fmt.unpacked is not None:
        return unpacked_rows(fmt)
    row_block = fmt.row_block
    tile_block_bytes = fmt.tile_block_bytes
    block = fmt.block

    def rows(args: Any, thread: Any, n_threads: Any) -> None:
        w = arg_ptr(args, 0)
        private = arg_int(args, 6)
        x = arg_ptr(args, 1) + private * thread
        ids = arg_ptr(args, 2)
        n_blocks = arg_int(args, 3)
        n_tokens = get_i64(arg_ptr(args, 4))
        x_stride = arg_int(args, 5)
        scale = arg_float(args, 7)
        width = arg_int(args, 8)
        first = n_tokens * thread // n_threads
        last = n_tokens * (thread + 1) // n_threads
        if private != 0:
            first = 0
            last = n_tokens
        for token in range(first, last):
            row = get_i64(ids + token * 8)
            out = x + token * x_stride
            at = w + (row // 16) * n_blocks * tile_block_bytes
            for b in range(n_blocks):
                row_block(at + b * tile_block_bytes, row % 16, out + b * block * 4)
            for i in range(width):
                put_f32(out + i * 4, get_f32(out + i * 4) * scale)

    return rows


# --- the rows of the table ------------------------------------------------------------------------


def quantize_q8(x: np.ndarray, tokens: int) -> np.ndarray:
    """Reference of the "q8" activations: float32 [n_tokens, n] -> uint8, n_tokens % tokens == 0."""
    import numpy as np

    n_tokens, n = x.shape
    blocks = x.reshape(n_tokens, n // Q8_BLOCK, Q8_BLOCK).astype(np.float32)
    most = np.abs(blocks).max(axis=-1)
    scale = most * np.float32(1 / 127)
    inverse = np.where(most > 0, np.float32(127) / np.where(most > 0, most, 1), 0).astype("f4")
    codes = np.rint(blocks * inverse[..., None]).astype(np.int32)
    sums = codes.sum(axis=-1, dtype=np.int32)
    out = np.empty((n_tokens, n // Q8_BLOCK, Q8_BLOCK_BYTES), np.uint8)
    out[..., :32] = codes.astype(np.int8).view(np.uint8)
    tail = out[..., 32:].view(np.int32)
    tail[..., 0] = scale.view(np.int32)
    tail[..., 1] = (scale * sums.astype(np.float32)).view(np.int32)
    tail[..., 2] = -sums
    tail[..., 3] = -codes[..., :16].sum(axis=-1, dtype=np.int32)
    grouped = out.reshape(n_tokens // tokens, tokens, n // Q8_BLOCK, Q8_BLOCK_BYTES)
    return np.ascontiguousarray(grouped.transpose(0, 2, 1, 3))


def quantize_q8x2(x: np.ndarray, tokens: int) -> np.ndarray:
    """Reference of the "q8x2" activations; `tokens` counts tokens, not entries."""
    import numpy as np

    n_tokens, n = x.shape
    first = quantize_q8(x, 1)
    # float32 throughout: what the codes leave out is exact, the code times the scale is not.
    scale = first[:, :, 0, 32:36].copy().view(np.float32)
    codes = first[:, :, 0, :32].view(np.int8).astype(np.float32)
    rest = x.reshape(n_tokens, -1, Q8_BLOCK).astype(np.float32) - codes * scale
    second = quantize_q8(rest.reshape(n_tokens, n), 1)
    both = np.stack([first, second], axis=2).reshape(n_tokens // tokens, tokens, -1, 2, 48)
    return np.ascontiguousarray(both.transpose(0, 2, 1, 3, 4)).reshape(
        n_tokens // tokens, n // Q8_BLOCK, 2 * tokens, Q8_BLOCK_BYTES
    )


def dequantize_q8(packed: np.ndarray, n: int) -> np.ndarray:
    """The values that "q8" activations stand for: float64 [n_tokens, n]."""
    import numpy as np

    groups, blocks, tokens, _ = packed.shape
    by_token = np.ascontiguousarray(packed.transpose(0, 2, 1, 3))
    codes = by_token[..., :32].view(np.int8).astype(np.float64)
    scale = by_token[..., 32:36].copy().view(np.float32).astype(np.float64)
    return (codes * scale).reshape(groups * tokens, blocks * Q8_BLOCK)[:, :n]


def pack_f32(x: np.ndarray, tokens: int) -> np.ndarray:
    """Reference of the "f32" activations: [groups, n, tokens]."""
    import numpy as np

    n_tokens, n = x.shape
    grouped = x.astype(np.float32).reshape(n_tokens // tokens, tokens, n)
    return np.ascontiguousarray(grouped.transpose(0, 2, 1))


def _random_raw(fmt: Tiled, rng: np.random.Generator, rows: int, n: int) -> np.ndarray:
    """Raw rows with every code, extreme rows among them; finite scales."""
    import numpy as np

    if fmt.unpacked is not None and fmt.unpacked.examples is not None:
        return fmt.unpacked.examples(rng, rows, n)
    x = rng.standard_normal((rows, n)).astype(np.float32)
    x[rows // 2] *= 100
    x[-1] = 0
    x[0] = np.where(np.arange(n) % 2, 3.0, -3.0)
    return fmt.encode(x)


def group_tokens(operation: str, fmt: Tiled, target: Target) -> int:
    """Tokens that lie side by side in the activations of a product of `kernels`."""
    if operation.startswith("gemv"):
        return 1
    if operation == "gems":
        return target.few_tokens
    return target.tokens(fmt.activation) // (2 if operation == "gemm2" else 1)


def _linear_cases(fmt: Tiled, operation: str) -> Any:
    def cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
        import numpy as np

        group = group_tokens(operation, fmt, target)
        pairs = operation.endswith("2")
        for rows, blocks, n_tokens in ((16, 1, 1), (100, 3, group), (37, 2, 3 * group - 1)):
            n = fmt.block * blocks * (1 if fmt.block > 1 else 11)
            n_tokens = 1 if group == 1 else n_tokens
            padded = -(-n_tokens // group) * group
            raw = _random_raw(fmt, rng, rows, n)
            x = rng.standard_normal((padded, n)).astype(np.float32)
            x[0] *= 1000
            if pairs:
                packed = quantize_q8x2(x, group)
                entries = dequantize_q8(packed, n)
                exact_x = entries[0::2] + entries[1::2]
            elif together(fmt) == "q8":
                packed = quantize_q8(x, group)
                exact_x = dequantize_q8(packed, n)
            else:
                packed = pack_f32(x, group)
                exact_x = x.astype(np.float64)
            if together(fmt) == "q8" and group > 1 and target.token_pairs:
                packed = pair_entries(packed)
            w = fmt.decode(raw).astype(np.float64)
            bias = np.zeros(-(-rows // TILE_ROWS) * TILE_ROWS, np.float32)
            bias[:rows] = rng.standard_normal(rows)
            y = np.zeros((padded, len(bias)), np.float32)
            expected = exact_x @ w.T + bias[:rows]
            # Each block adds a few roundings of the running sum: bounded by the sum of magnitudes.
            # Zero points are taken off as sums, so codes count with their whole offset.
            size = np.abs(exact_x) @ (np.abs(w) + np.abs(w).max(axis=1, keepdims=True)).T
            tolerance = np.zeros_like(y)
            tolerance[:n_tokens, :rows] = (size + np.abs(bias[:rows]))[:n_tokens] * (
                (n // min(fmt.block, 32) + 8) * 2.0**-23
            )
            tolerance[n_tokens:] = np.inf
            full = np.zeros_like(y)
            full[:n_tokens, :rows] = expected[:n_tokens]
            count = np.array([n_tokens], np.int64)
            slots = [
                fmt.tile(raw), packed, y, n // fmt.block, len(bias) // 16, count, 0,
                y.strides[0], bias, packed[0].nbytes, *unpacking_slots(fmt, n, target.gemm_tiles),
            ]  # fmt: skip
            yield Case(slots, [(y, full)], tolerance, f"{rows}x{n}, {n_tokens} tokens")

    return cases


def _tile_cases(fmt: Format) -> Any:
    def cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
        import numpy as np

        for rows, blocks in ((16, 1), (48, 3)):
            n = fmt.block * blocks * (1 if fmt.block > 1 else 37)  # runs, and what is left over
            raw = rng.integers(0, 256, (rows, fmt.row_bytes(n)), dtype=np.uint8)
            expected = fmt.tile(raw)
            out = np.zeros_like(expected)
            slots = [raw, raw.shape[1], out, n // fmt.block, rows // 16]
            yield Case(slots, [(out, expected)], 0, f"{rows}x{n}")

    return cases


def _rows_cases(fmt: Format) -> Any:
    def cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
        import numpy as np

        rows = 40
        n = fmt.block * (3 if fmt.block > 1 else 33)
        raw = _random_raw(fmt, rng, rows, n)
        ids = np.array([0, 39, 17, 17, 5], np.int64)
        scale = 1.5
        expected = fmt.decode(raw)[ids] * np.float32(scale)
        x = np.zeros_like(expected)
        count = np.array([len(ids)], np.int64)
        slots = [
            fmt.tile(raw), x, ids, n // fmt.block, count, x.strides[0], 0, scale, n,
            *unpacking_slots(fmt, fmt.block, 1),
        ]  # fmt: skip
        yield Case(slots, [(x, expected)], 0, f"{rows}x{n}")

    return cases


def _sources(fmt: Tiled) -> tuple[str, ...]:
    return (
        __name__,
        "headrace.sparse.format",
        "headrace.sparse.sums",
        "headrace.sparse.unpacking",
        "headrace.sparse.interleaving",
        "headrace.sparse.lookup",
        *(f"headrace.sparse.{module}" for module in fmt.modules or (fmt.name,)),
    )


def products(fmt: Tiled) -> dict[str, Kernel]:
    """The rows of the kernel table of products by weights that are tiled so, by operation.

    "gemv" is one token (decode), "gemm" groups of tokens (prefill); "gemv2" and "gemm2" are the
    same for "q8x2" activations. With tables "gemv" takes any number of tokens, one by one. For
    floats, whose sums show in which order they are formed, "gems" is small groups in the order of
    "gemv" (short chunks); of the others "gemm" has that order.
    """
    builders: dict[str, Any] = {"gemm": lambda t: _gemm(fmt, t, False)}
    if fmt.activation == "f32":
        builders["gems"] = lambda t: _gems(fmt, t)
    else:
        builders["gemm2"] = lambda t: _gemm(fmt, t, True)
    if fmt.activation == "q8":
        builders["gemv2"] = lambda t: _linear(fmt, 1, 2, True, ahead=t.ahead)
    if fmt.activation != "tables":
        builders["gemv"] = lambda t: _gemv(fmt, t)
    return {name: _row(fmt, name, how, _linear_cases(fmt, name)) for name, how in builders.items()}


def _row(fmt: Tiled, operation: str, build: Any, cases: Any) -> Kernel:
    return Kernel(f"{operation}_{fmt.name}", build, _sources(fmt), cases, __name__)


def kernels(fmt: Format) -> dict[str, Kernel]:
    """The rows of the kernel table that a format has, by operation: `products` and others."""
    found = {
        "tile": _row(fmt, "tile", lambda t: _tile(fmt), _tile_cases(fmt)),
        "rows": _row(fmt, "rows", lambda t: _rows(fmt), _rows_cases(fmt)),
        **products(fmt),
    }
    if fmt.activation == "tables":
        gemv, cases = (lambda t: plane_tables.gemv(fmt, t)), plane_tables.cases(fmt)
        found["gemv"] = _row(fmt, "gemv", gemv, cases)
    return found


def all_kernels() -> list[Kernel]:
    """Every row of the table that belongs to a weight format."""
    return [kernel for fmt in FORMATS.values() for kernel in kernels(fmt).values()]


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    operation, _, fmt = name.partition("_")
    return kernels(FORMATS[fmt])[operation]
