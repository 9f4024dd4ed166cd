"""Expansion of foreign GGML types: plain numbers, other targets, and what cannot be decoded."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, quants

from headrace.errors import UnsupportedError
from headrace.sparse.expand import CHUNK_BYTES, expand, plan_expansion
from headrace.sparse.registry import FORMATS


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    nan = np.isnan(a) & np.isnan(b)
    return bool(np.all(nan | (a.view(np.uint32) == b.view(np.uint32))))


def test_every_type_that_gguf_decodes_has_a_target_with_no_fewer_bits() -> None:
    tried = 0
    for kind, (block, block_bytes) in GGML_QUANT_SIZES.items():
        try:
            quants.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
        except NotImplementedError:
            continue
        target = plan_expansion(kind.name)
        assert target.bits_per_weight >= 8 * block_bytes / block, kind.name
        assert block % target.block == 0, "a valid row length of the type must be one of the target"
        tried += 1
    assert tried >= 26


def test_own_types_pass_through() -> None:
    for target in (fmt for fmt in FORMATS.values() if fmt.ggml_type):
        raw = np.zeros((3, target.row_bytes(256)), np.uint8)
        assert plan_expansion(target.ggml_type) is target
        assert expand(raw, target.ggml_type, target) is raw


def test_another_target_goes_through_the_weights() -> None:
    exact = np.random.default_rng(2).standard_normal((5, 64)).astype(np.float32)
    own = FORMATS["q4_0"].encode(exact)
    assert same_bits(
        FORMATS["f32"].decode(expand(own, "Q4_0", FORMATS["f32"])), FORMATS["q4_0"].decode(own)
    )


@pytest.mark.parametrize(
    ("ggml_type", "values"),
    [
        ("I8", np.arange(-128, 127, dtype=np.int8)),
        ("I16", np.arange(-32768, 32767, 7, dtype=np.int16)),
        ("F64", np.array([0.5, -1e30, 3.25])),
    ],
)
def test_plain_numbers(ggml_type: str, values: np.ndarray) -> None:
    raw = np.ascontiguousarray(values)[None].view(np.uint8)
    target = plan_expansion(ggml_type)
    got = target.decode(expand(raw, ggml_type, target))
    assert np.array_equal(got[0], values.astype(np.float32))


def test_rows_beyond_one_chunk() -> None:
    rows = 3 * CHUNK_BYTES // 512 + 5
    raw = np.random.default_rng(0).integers(0, 256, (rows, 512), dtype=np.uint8)
    target = plan_expansion("I8")
    whole = expand(raw, "I8", target)
    for row in (0, rows // 2, rows - 1):
        assert np.array_equal(whole[row : row + 1], expand(raw[row : row + 1], "I8", target))


@pytest.mark.parametrize("ggml_type", ("Q8_1", "Q8_K", "I32", "I64", "Q9_9"))
def test_undecodable_types_say_what_to_do(ggml_type: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{ggml_type}.*convert"):
        plan_expansion(ggml_type)


def test_weights_too_large_for_the_scale_are_refused() -> None:
    doubles = np.full((1, 32), 1e7).view(np.uint8)
    with pytest.raises(UnsupportedError, match="Q8_0"):
        expand(doubles, "F64", FORMATS["q8_0"])


def test_gguf_is_imported_only_when_needed() -> None:
    code = (
        "import sys; from headrace.errors import UnsupportedError;"
        "from headrace.sparse.expand import expand, plan_expansion;"
        "import numpy; raw = numpy.zeros((1, 64), 'u1');"
        "plan_expansion('IQ3_S'); expand(raw, 'I8', plan_expansion('I8'));"
        "assert 'gguf' not in sys.modules\n"
        "try: plan_expansion('Q8_1')\n"
        "except UnsupportedError: assert 'gguf' in sys.modules\n"
        "else: raise AssertionError"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
