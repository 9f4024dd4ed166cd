"""Weight formats: bytes against gguf, tile layouts against scalar definitions, error bounds.

The first part loops over whatever `sparse/` holds, so a new format needs no line here.
"""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.sparse.format import TILE_ROWS, Format
from headrace.sparse.lookup import E2M1
from headrace.sparse.registry import FORMATS, by_ggml_type

every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
GGML = {name: fmt for name, fmt in FORMATS.items() if fmt.ggml_type}
every_ggml_format = pytest.mark.parametrize("fmt", GGML.values(), ids=GGML)
ENCODED = {name: fmt for name, fmt in GGML.items() if fmt.written}
every_encoded_format = pytest.mark.parametrize("fmt", ENCODED.values(), ids=ENCODED)


def random_raw(fmt: Format, rows: int, n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (rows, fmt.row_bytes(n)), dtype=np.uint8)


def steady_weights(rows: int, n: int) -> np.ndarray:
    """Weights that are the same with every numpy: integers mixed, then one cube."""
    k = np.arange(rows * n, dtype=np.uint64)
    mixed = (k * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)  # 24 bits
    unit = mixed.astype(np.float64) / 2.0**23 - 1
    return (unit * unit * unit * 0.25).astype(np.float32).reshape(rows, n)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    nan = np.isnan(a) & np.isnan(b)
    return bool(np.all(nan | (a.view(np.uint32) == b.view(np.uint32))))


def gguf_decode(raw: np.ndarray, fmt: Format) -> np.ndarray:
    with np.errstate(all="ignore"):
        return quants.dequantize(raw, GGMLQuantizationType[fmt.ggml_type])


@every_ggml_format
def test_decode_equals_gguf_for_any_bytes(fmt: Format) -> None:
    for seed in range(3):
        raw = random_raw(fmt, 33, 2048, seed)
        got = fmt.decode(raw)
        assert got.dtype == np.float32
        assert got.shape == (33, 2048)
        assert same_bits(got, gguf_decode(raw, fmt))


@every_ggml_format
@pytest.mark.parametrize("byte", [0x00, 0xFF, 0x7C, 0x7E, 0xFC, 0x80, 0x01, 0x3C])
def test_decode_equals_gguf_for_equal_bytes(fmt: Format, byte: int) -> None:
    # Covers scales of zero, NaN (0xFFFF, 0x7E7E, 0x7C7C), subnormals and negative zero-like ones.
    raw = np.full((2, fmt.row_bytes(512)), byte, np.uint8)
    assert same_bits(fmt.decode(raw), gguf_decode(raw, fmt))


@every_ggml_format
@pytest.mark.parametrize("scale", [0x7C00, 0xFC00, 0x8000, 0x0001, 0x83FF, 0x7E00, 0x7BFF])
def test_decode_equals_gguf_for_special_words(fmt: Format, scale: int) -> None:
    # Infinity, minus zero, subnormals, NaN and the largest, at every even place in turn.
    raw = random_raw(fmt, 1, 256).view(np.uint16)
    rows = np.repeat(raw, raw.shape[1], axis=0)
    np.fill_diagonal(rows, scale)
    assert same_bits(fmt.decode(rows.view(np.uint8)), gguf_decode(rows.view(np.uint8), fmt))


@every_encoded_format
def test_encode_equals_gguf_where_it_can(fmt: Format) -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((33, 2048)).astype(np.float32)
    x[1], x[2], x[3], x[4] = 0, 1, -0.25, np.abs(x[4])
    x[5], x[6], x[7] = x[5] * 1e-6, x[6] * 1e4, np.round(x[7])
    try:
        expected = quants.quantize(x, GGMLQuantizationType[fmt.ggml_type]).view(np.uint8)
    except NotImplementedError:
        got = fmt.encode(x)
        assert got.shape == (33, fmt.row_bytes(2048))
        assert got.dtype == np.uint8
        return
    assert np.array_equal(fmt.encode(x), expected)


@every_encoded_format
def test_encode_error_is_within_the_bits(fmt: Format) -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((32, 2048)).astype(np.float32)
    x[1], x[2], x[3] = 0, np.abs(x[2]) + 1, -0.25
    x[np.abs(x) < 2.0**-14] = 0  # what follows is about normal numbers, and this is float16's least
    error = np.abs(fmt.decode(fmt.encode(x)) - x)
    if fmt.block == 1:  # a rounded number: off by the unit of its own significand, which we probe
        digits = next(k for k in range(1, 64) if _rounds_away(fmt, 1 + 2.0**-k))
        assert np.all(error <= np.abs(x) * 2.0**-digits)
        return
    # b-bit codes span twice the largest weight, so a step is 2^(1-b) of it; a weight is off by one
    # step where the range is cut (code 8 of Q4_0), and a quarter of one is for the rounded scales.
    # Values of FP4 are unequally far apart: 4 and 6 are next, and MXFP4 cuts 8 down to 6.
    coarse = {"mxfp4": 2, "nvfp4": 4 / 3}.get(fmt.name, 1)
    step = np.abs(x.reshape(-1, fmt.block)).max(axis=1) * 2.0 ** (1 - int(fmt.bits_per_weight))
    step *= coarse
    assert np.all(error.reshape(-1, fmt.block).max(axis=1) <= 1.25 * step)


def _rounds_away(fmt: Format, value: float) -> bool:
    one = np.full((1, 1), value, np.float32)
    return float(fmt.decode(fmt.encode(one))[0, 0]) != value


@every_format
@pytest.mark.parametrize("rows", [1, 7, 16, 17, 48])
def test_untile_undoes_tile(fmt: Format, rows: int) -> None:
    raw = random_raw(fmt, rows, 768)
    tiled = fmt.tile(raw)
    tiles = math.ceil(rows / TILE_ROWS)
    assert tiled.shape == (tiles, 768 // fmt.block, fmt.tile_block_bytes)
    assert tiled.nbytes == fmt.tiled_bytes(rows, 768)
    assert tiled.flags.c_contiguous
    assert np.array_equal(fmt.untile(tiled, rows), raw)


@every_format
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 40), blocks=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
def test_tiling_is_per_block_and_pads_with_zero_rows(
    fmt: Format, rows: int, blocks: int, seed: int
) -> None:
    raw = random_raw(fmt, rows, blocks * fmt.block, seed)
    tiled = fmt.tile(raw)
    assert np.array_equal(fmt.untile(tiled, rows), raw)
    padded = np.zeros((-(-rows // TILE_ROWS) * TILE_ROWS, raw.shape[1]), np.uint8)
    padded[:rows] = raw
    assert np.array_equal(fmt.tile(padded), tiled)
    at = slice((blocks - 1) * fmt.block_bytes, blocks * fmt.block_bytes)
    assert np.array_equal(fmt.tile(raw[:, at])[:, 0], tiled[:, -1])
    assert np.array_equal(fmt.tile(raw[-(-rows // 16) * 16 - 16 :])[0], tiled[-1])


@every_format
def test_sizes(fmt: Format) -> None:
    assert fmt.bits_per_weight == 8 * fmt.block_bytes / fmt.block
    assert fmt.row_bytes(3 * fmt.block) == 3 * fmt.block_bytes
    if fmt.ggml_type is None:
        assert fmt.name.upper() not in GGMLQuantizationType.__members__
        assert by_ggml_type(fmt.name.upper()) is None
        return
    kind = GGMLQuantizationType[fmt.ggml_type]
    assert GGML_QUANT_SIZES[kind] == (fmt.block, fmt.block_bytes)
    assert by_ggml_type(fmt.ggml_type) is fmt
    assert fmt.name == fmt.ggml_type.lower()


@every_format
def test_memory_that_is_read_only_or_strided(fmt: Format) -> None:
    raw = random_raw(fmt, 5, 512)
    wide = np.zeros((5, 2 * raw.shape[1]), np.uint8)
    wide[:, ::2] = raw
    raw.flags.writeable = False
    assert same_bits(fmt.decode(wide[:, ::2]), fmt.decode(raw))
    assert np.array_equal(fmt.tile(wide[:, ::2]), fmt.tile(raw))


@every_format
def test_rows_of_a_wrong_length_are_refused(fmt: Format) -> None:
    if fmt.block > 1:
        with pytest.raises(ValueError, match=str(fmt.block)):
            fmt.row_bytes(fmt.block + 1)
        with pytest.raises(ValueError, match=str(fmt.block)):
            fmt.encode(np.zeros((1, fmt.block + 1), np.float32))
    with pytest.raises(ValueError):
        fmt.decode(np.zeros((1, fmt.block_bytes + 1), np.uint8))
    with pytest.raises(ValueError):
        fmt.tile(np.zeros((1, fmt.block_bytes + 1), np.uint8))
    with pytest.raises(ValueError, match="rows"):
        fmt.untile(np.zeros((1, 1, fmt.tile_block_bytes), np.uint8), 17)


def test_registry_imports_numpy_only() -> None:
    code = (
        "import sys, headrace.sparse.registry;"
        "heavy = {'gguf', 'numba', 'llvmlite', 'rich', 'typer'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert by_ggml_type("Q9_9") is None


# SHA-256 of what ggml's own C (llama-cpp-python's libggml-base, quantize_row_*_ref) makes of
# `steady_weights(16, 2048)`: gguf cannot quantise these types.
GGML_ENCODES = {
    "iq4_nl": "5b0bc354baaff1c1934575ac8ee91a049c9d95acde40163fa4c435a625197bdd",
    "iq4_xs": "2d46d980e0fc5f9c86469d2d43943be7121dd07dd24b00d93bac05ada7c319ab",
    "nvfp4": "a2b997b65425b286ad6e6f81c63711d4fcac4be9171ecb808ca6ea4324a117bb",
    "q2_k": "7b60d7ecf456aa8ceea3fc903e720dfd601f602c406b5a2986392fd909efd676",
    "q3_k": "91aa5a27cfdc9aee28f26f67db998f6c05f3bb6845318ac627636c9861076196",
    "q4_k": "1b6ba55fb4f90ebb7d17250175dc36806963e00d65b3b4733a85c184e7f5cc05",
    "q5_k": "73430ecf5dc7e14cc1e8e10a1e7f89fc7d8664a66535f18c397653a553c0f4b8",
    "q6_k": "6ac543d5eeb504d0e453a6b8c848c64fdbea2385956fa5800969d929d78f1c0e",
}


@pytest.mark.parametrize("name", GGML_ENCODES)
def test_encode_equals_ggml(name: str) -> None:
    got = FORMATS[name].encode(steady_weights(16, 2048))
    assert hashlib.sha256(got.tobytes()).hexdigest() == GGML_ENCODES[name]


@pytest.mark.parametrize("name", GGML_ENCODES)
def test_encode_in_chunks(name: str) -> None:
    fmt = FORMATS[name]
    x = steady_weights(2100, 256)  # more blocks than are searched at once
    assert np.array_equal(fmt.encode(x)[2090:], fmt.encode(x[2090:]))


@pytest.mark.parametrize("name", [name for name in GGML_ENCODES if name.endswith("_k")])
def test_encode_degenerate_blocks(name: str) -> None:
    fmt = FORMATS[name]
    flat = np.zeros((5, 256), np.float32)
    flat[1], flat[2], flat[3], flat[4, 7] = 0.5, -0.5, 1e-20, 2
    # d is rounded to float16, and so is dmin; the codes carry the error of d.
    assert np.all(np.abs(fmt.decode(fmt.encode(flat)) - flat) <= np.abs(flat) * 2.0**-10 + 1e-19)


# Signal to noise of 2^20 weights of a normal distribution, in dB. Those of INT4, whose scales are
# searched, are what was found once; without the search see `test_int4.py`.
QSNR = {
    "mxfp4": 18.79, "nvfp4": 20.45, "nvint4": 21.28, "mxint8": 41.6, "q4_0": 21.31,
    "i4_g16": 23.14, "i4_g32": 21.84, "i4_g64": 20.92, "i4_g128": 20.29,
    "i4_dual": 21.16, "e2m1_g16": 21.8, "e2m1_g128": 19.85, "e1m2_g128": 19.51, "e3m0_g128": 15.02,
    "i1_g64": 4.46, "i2_g64": 9.47, "i3_g64": 14.82,
    "i4a_g16": 24.80, "i4a_g32": 22.86, "i4a_g64": 21.50, "i4a_g128": 20.57,
}  # fmt: skip


@pytest.mark.parametrize("name", QSNR)
def test_noise_of_normal_weights(name: str) -> None:
    x = np.random.default_rng(0).standard_normal((1024, 1024)).astype(np.float32)
    noise = FORMATS[name].decode(FORMATS[name].encode(x)).astype(np.float64) - x
    found = -10 * np.log10((noise**2).sum() / (x.astype(np.float64) ** 2).sum())
    assert abs(found - QSNR[name]) <= 0.05, found


def test_e4m3_equals_another_cast() -> None:
    import ml_dtypes

    codes = np.arange(0x7F, dtype=np.uint8)
    raw = np.full((0x7F, 36), 0x77, np.uint8)  # every weight is 6 times its scale
    raw[:, :4] = codes[:, None]
    expected = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * 6
    assert np.array_equal(FORMATS["nvfp4"].decode(raw), np.repeat(expected[:, None], 64, axis=1))
    e2m1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert np.array_equal(E2M1, e2m1 * 2)


def test_formats_with_small_scales_by_definition() -> None:
    """NVINT4 and MXINT8, whose scales another package casts."""
    import ml_dtypes

    raw = random_raw(FORMATS["nvint4"], 64, 64)
    raw[:, :4] %= 0x7F  # no sign, no NaN
    scales = raw[:, :4].copy().view(ml_dtypes.float8_e4m3fn).astype(np.float64) / 256
    codes = raw[:, 4:].reshape(64, 4, 8).astype(np.int64)
    codes = np.concatenate([codes & 15, codes >> 4], axis=2) - 8
    expected = (scales[..., None] * codes).reshape(64, 64)
    assert np.array_equal(FORMATS["nvint4"].decode(raw), expected)
    raw = random_raw(FORMATS["mxint8"], 64, 32)
    raw[:, 0] = 3 * np.arange(64) + 40  # numbers that float32 has
    scales = raw[:, :1].copy().view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    assert np.array_equal(FORMATS["mxint8"].decode(raw), scales * raw[:, 1:].view(np.int8) / 64)


def test_encodings_with_small_scales_at_their_ends() -> None:
    x = np.zeros((6, 64), np.float32)
    x[0], x[1, ::2], x[2] = 12.25, -1e30, 1e-30
    x[3], x[4], x[5] = 127 / 64, 127.5 / 64, 7 * 2.0**-17
    coded, eight = (FORMATS[name].decode(FORMATS[name].encode(x)) for name in ("nvint4", "mxint8"))
    assert np.array_equal(coded[0], x[0])
    assert np.array_equal(coded[1], np.where(x[1] < 0, np.float32(-12.25), 0))  # cut
    assert not coded[2].any()
    assert np.array_equal(coded[5], x[5])
    assert np.array_equal(eight[[3, 5]], x[[3, 5]])  # 127 is the largest code
    assert np.array_equal(eight[4], np.full(64, 2, np.float32))  # 64 steps of the next power
    assert np.abs(eight[1] - x[1]).max() <= 1e30 / 127
    assert np.abs(eight[2] - x[2]).max() <= 1e-30 / 127


# The tile layouts once more, from the codes of single weights, in plain Python. Each function
# gives {byte of the tile block: value}; `rows` are the bytes of one block of 16 rows.


def _place(out: dict[int, int], at: int, value: int) -> None:
    out[at] = out.get(at, 0) | value


def _scale(out: dict[int, int], at: int, row: bytes, source: int, r: int) -> None:
    _place(out, at + 2 * r, row[source])
    _place(out, at + 2 * r + 1, row[source + 1])


def _nibble(row: bytes, at: int, k: int) -> int:
    """Code of input k of 32, whose 16 bytes start at `at`."""
    return row[at + k] & 15 if k < 16 else row[at + k - 16] >> 4


def layout_q4_0(rows: list[bytes], at: int = 32, source: int = 2) -> dict[int, int]:
    out: dict[int, int] = {}
    for r, row in enumerate(rows):
        _scale(out, 0, row, 0, r)
        for k in range(32):
            j, i = k % 16 // 4, k % 4
            _place(out, at + 64 * j + 4 * r + i, _nibble(row, source, k) << (4 * (k // 16)))
    return out


def layout_q4_1(rows: list[bytes]) -> dict[int, int]:
    out = layout_q4_0(rows, 64, 4)
    for r, row in enumerate(rows):
        _scale(out, 32, row, 2, r)
    return out


def layout_q5_0(rows: list[bytes]) -> dict[int, int]:
    out = layout_q4_0(rows, 96, 6)
    for r, row in enumerate(rows):
        high = int.from_bytes(row[2:6], "little")
        for k in range(32):
            _place(out, 32 + 4 * r + k % 4, (high >> k & 1) << (k // 4))
    return out


def layout_q5_1(rows: list[bytes]) -> dict[int, int]:
    out = layout_q4_0(rows, 128, 8)
    for r, row in enumerate(rows):
        _scale(out, 32, row, 2, r)
        high = int.from_bytes(row[4:8], "little")
        for k in range(32):
            _place(out, 64 + 4 * r + k % 4, (high >> k & 1) << (k // 4))
    return out


def layout_q8_0(rows: list[bytes]) -> dict[int, int]:
    out: dict[int, int] = {}
    for r, row in enumerate(rows):
        _scale(out, 0, row, 0, r)
        for k in range(32):
            _place(out, 32 + 64 * (k // 4) + 4 * r + k % 4, row[2 + k])
    return out


def six_bit_scales(rows: list[bytes]) -> dict[int, int]:
    """The first 320 bytes of a tile block of Q4_K or Q5_K."""
    out: dict[int, int] = {}
    for r, row in enumerate(rows):
        _scale(out, 0, row, 0, r)
        _scale(out, 32, row, 2, r)
        packed = row[4:16]
        for s in range(8):
            if s < 4:
                scale, low = packed[s] & 63, packed[s + 4] & 63
            else:
                scale = packed[s + 4] & 15 | packed[s - 4] >> 6 << 4
                low = packed[s + 4] >> 4 | packed[s] >> 6 << 4
            _place(out, 64 + 32 * s + r, scale)
            _place(out, 64 + 32 * s + 16 + r, low)
    return out


def layout_q4_k(rows: list[bytes]) -> dict[int, int]:
    out = six_bit_scales(rows)
    for r, row in enumerate(rows):
        for k in range(256):
            p, half, inner = k // 64, k % 64 // 32, k % 32
            code = row[16 + 32 * p + inner] >> (4 * half) & 15
            at = 320 + 512 * p + 64 * (inner // 4) + 4 * r + k % 4
            _place(out, at, code << (4 * half))
    return out


def layout_q5_k(rows: list[bytes]) -> dict[int, int]:
    out = six_bit_scales(rows)
    for r, row in enumerate(rows):
        for k in range(256):
            s, inner = k // 32, k % 32
            low = row[48 + 32 * (s // 2) + inner] >> (4 * (s % 2)) & 15
            high = row[16 + inner] >> s & 1
            at = 320 + 320 * s + 4 * r + k % 4
            _place(out, at, high << (inner // 4))
            _place(out, at + 64 + 64 * (inner % 16 // 4), low << (4 * (inner // 16)))
    return out


def layout_q6_k(rows: list[bytes]) -> dict[int, int]:
    out: dict[int, int] = {}
    for r, row in enumerate(rows):
        _scale(out, 0, row, 208, r)
        for s in range(16):
            _place(out, 32 + 16 * s + r, row[192 + s])
        for k in range(256):
            h, quarter, b = k // 128, k % 128 // 32, k % 32
            low = row[64 * h + 32 * (quarter % 2) + b] >> (4 * (quarter // 2)) & 15
            high = row[128 + 32 * h + b] >> (2 * quarter) & 3
            c, v, j, i = k // 32, k % 32 // 16, k % 16 // 4, k % 4
            _place(out, 288 + 256 * c + 64 * j + 4 * r + i, low << (4 * v))
            _place(out, 2336 + 128 * c + 64 * v + 4 * r + i, high << (2 * j))
    return out


def layout_q2_k(rows: list[bytes]) -> dict[int, int]:
    out: dict[int, int] = {}
    for r, row in enumerate(rows):
        _scale(out, 0, row, 80, r)
        _scale(out, 32, row, 82, r)
        for s in range(16):
            _place(out, 64 + 16 * s + r, row[s])
        for k in range(256):
            code = row[16 + 32 * (k // 128) + k % 32] >> (2 * (k % 128 // 32)) & 3
            at = 320 + 128 * (k // 32) + 64 * (k % 8 // 4) + 4 * r + k % 4
            _place(out, at, code << (2 * (k % 32 // 8)))
    return out


def layout_q3_k(rows: list[bytes]) -> dict[int, int]:
    # Of groups of 4 inputs: (byte, bit) of bits 0..1 of a code, and of its bit 2.
    low = [(0, 0), (64, 0), (0, 3), (64, 3), (128, 0), (128, 3), (0, 6), (64, 6)]
    high = [(0, 2), (64, 2), (0, 5), (64, 5), (128, 2), (128, 5), (128, 6), (128, 7)]
    out: dict[int, int] = {}
    for r, row in enumerate(rows):
        _scale(out, 0, row, 108, r)
        for s in range(16):
            nibble = row[96 + s % 8] >> (4 * (s // 8)) & 15
            scale = nibble | (row[104 + s % 4] >> (2 * (s // 4)) & 3) << 4
            _place(out, 32 + 16 * s + r, (scale - 32) % 256)
        for k in range(256):
            at = 288 + 192 * (k // 32) + 4 * r + k % 4
            code = row[32 + 32 * (k // 128) + k % 32] >> (2 * (k % 128 // 32)) & 3
            byte, bit = low[k % 32 // 4]
            _place(out, at + byte, code << bit)
            byte, bit = high[k % 32 // 4]
            _place(out, at + byte, (row[k % 32] >> (k // 32) & 1) << bit)
    return out


def layout_f16(rows: list[bytes]) -> dict[int, int]:
    size = len(rows[0])
    return {size * r + i: row[i] for r, row in enumerate(rows) for i in range(size)}


def layout_mxfp4(rows: list[bytes]) -> dict[int, int]:
    out: dict[int, int] = {}
    for r, row in enumerate(rows):
        _place(out, r, row[0])
        for k in range(32):
            j, i = k % 16 // 4, k % 4
            _place(out, 16 + 64 * j + 4 * r + i, _nibble(row, 1, k) << (4 * (k // 16)))
    return out


def layout_i4_dual(rows: list[bytes]) -> dict[int, int]:
    out: dict[int, int] = {}
    for r, row in enumerate(rows):
        _scale(out, 0, row, 0, r)
        for p in range(4):
            _place(out, 32 + 16 * p + r, row[2 + p])
        for b in range(128):
            _place(out, 96 + 64 * (b // 4) + 4 * r + b % 4, row[6 + b])
    return out


def layout_mxint8(rows: list[bytes]) -> dict[int, int]:
    out: dict[int, int] = {}
    for r, row in enumerate(rows):
        _place(out, r, row[0])
        for k in range(32):
            _place(out, 16 + 64 * (k // 4) + 4 * r + k % 4, row[1 + k])
    return out


def layout_nvfp4(rows: list[bytes]) -> dict[int, int]:
    out: dict[int, int] = {}
    for r, row in enumerate(rows):
        for k in range(64):
            s, upper, b = k // 16, k % 16 // 8, k % 8
            _place(out, 16 * s + r, row[s])
            code = row[4 + 8 * s + b] >> (4 * upper) & 15
            _place(out, 64 + 128 * s + 64 * (b // 4) + 4 * r + b % 4, code << (4 * upper))
    return out


def layout_iq4_xs(rows: list[bytes]) -> dict[int, int]:
    out: dict[int, int] = {}
    for r, row in enumerate(rows):
        _scale(out, 0, row, 0, r)
        for s in range(8):
            low = row[4 + s // 2] >> (4 * (s % 2)) & 15
            high = int.from_bytes(row[2:4], "little") >> (2 * s) & 3
            _place(out, 32 + 16 * s + r, low | high << 4)
        for k in range(256):
            s, j, i = k // 32, k % 16 // 4, k % 4
            code = _nibble(row, 8 + 16 * s, k % 32)
            _place(out, 160 + 256 * s + 64 * j + 4 * r + i, code << (4 * (k % 32 // 16)))
    return out


def layout_tq2_0(rows: list[bytes]) -> dict[int, int]:
    out: dict[int, int] = {}
    for r, row in enumerate(rows):
        _scale(out, 0, row, 64, r)
        for k in range(256):
            code = row[32 * (k // 128) + k % 32] >> (2 * (k % 128 // 32)) & 3
            at = 32 + 128 * (k // 32) + 64 * (k % 32 // 16) + 4 * r + k % 4
            _place(out, at, code << (2 * (k % 16 // 4)))
    return out


def layout_tq1_0(rows: list[bytes]) -> dict[int, int]:
    out: dict[int, int] = {}
    for r, row in enumerate(rows):
        _scale(out, 0, row, 52, r)
        for k in range(52):
            _place(out, 32 + 64 * (k // 4) + 4 * r + k % 4, row[k])
    return out


def layout_codebook(rows: list[bytes], scale: int = 2) -> dict[int, int]:
    out: dict[int, int] = {}
    for r, row in enumerate(rows):
        if scale:
            _scale(out, 0, row, 0, r)
        for k in range(scale, len(row)):
            word, i = divmod(k - scale, 4)
            _place(out, 16 * scale + 64 * word + 4 * r + i, row[k])
    return out


LAYOUTS = {
    **dict.fromkeys(("iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq1_s"), layout_codebook),
    "iq1_m": lambda rows: layout_codebook(rows, 0),
    "q4_0": layout_q4_0, "q4_1": layout_q4_1, "q5_0": layout_q5_0, "q5_1": layout_q5_1,
    "q8_0": layout_q8_0, "q2_k": layout_q2_k, "q3_k": layout_q3_k, "q4_k": layout_q4_k,
    "q5_k": layout_q5_k, "q6_k": layout_q6_k,
    "mxfp4": layout_mxfp4, "nvfp4": layout_nvfp4, "iq4_nl": layout_q4_0, "iq4_xs": layout_iq4_xs,
    "tq1_0": layout_tq1_0, "tq2_0": layout_tq2_0, "nvint4": layout_nvfp4, "mxint8": layout_mxint8,
    "i4_dual": layout_i4_dual,
    "f16": layout_f16, "bf16": layout_f16, "f32": layout_f16,
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_tile_layout(name: str) -> None:
    fmt = FORMATS[name]
    raw = random_raw(fmt, 32, 2 * fmt.block)
    tiled = fmt.tile(raw)
    for t in range(2):
        for b in range(2):
            at = slice(b * fmt.block_bytes, (b + 1) * fmt.block_bytes)
            expected = LAYOUTS[name]([bytes(row[at]) for row in raw[16 * t : 16 * t + 16]])
            assert sorted(expected) == list(range(fmt.tile_block_bytes))
            assert bytes(expected[k] for k in range(fmt.tile_block_bytes)) == tiled[t, b].tobytes()
