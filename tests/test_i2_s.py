"""I2_S, bitnet.cpp's ternary type: its layout, its scale behind the codes, and whole models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from test_tiled import logits, write_model

from headrace.compress import compress
from headrace.description import describe_model
from headrace.errors import ModelFileError, UnsupportedError
from headrace.loaders.gguf import read_gguf
from headrace.sparse import i2_s, tq2_0
from headrace.sparse.expand import expand_scaled
from headrace.sparse.format import as_rows, half_bytes
from headrace.sparse.registry import FORMATS

I2_S = 36
SCALES = (1.25, 0.375)  # of matrices in turn; float16 has them


def pack(codes: np.ndarray) -> bytes:
    """Byte by byte, as `quantize_i2_s` does it."""
    flat = codes.ravel()
    out = bytearray(len(flat) // 4)
    for at, code in enumerate(flat):
        block, within = divmod(at, 128)
        out[block * 32 + within % 32] |= int(code) << (6 - 2 * (within // 32))
    return bytes(out)


def ternary_model(path: Path, monkeypatch: pytest.MonkeyPatch, ternary: str) -> Path:
    """A small Llama of ternary matrices with a scale each, in I2_S or TQ2_0."""
    plain = gguf.GGUFWriter.add_tensor
    seen: list[str] = []

    def add(self: Any, name: str, tensor: np.ndarray, *args: Any, **kw: Any) -> None:
        if kw.get("raw_dtype") != gguf.GGMLQuantizationType.TQ2_0:
            plain(self, name, tensor, *args, **kw)
            return
        scale = SCALES[len(seen) % 2]
        seen.append(name)
        rows, columns = len(tensor), tensor.shape[1] // 66 * 256
        codes = np.random.default_rng(len(seen)).integers(0, 3, (rows, columns), dtype=np.uint8)
        if ternary == "TQ2_0":
            blocks = codes.reshape(rows, -1, 256)
            d = half_bytes(np.full((*blocks.shape[:2], 1), scale))
            plain(self, name, as_rows(tq2_0.join(blocks, d)), **kw)
            return
        data = pack(codes) + np.float32(scale).tobytes() + b"\x55" * 28
        kind: Any = I2_S
        tail = np.frombuffer(data, np.int8)
        plain(self, name, tail, raw_shape=(rows, columns), raw_dtype=kind)

    with monkeypatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_tensor", add)
        return write_model(path, ["TQ2_0"])


def test_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ternary_model(tmp_path / "i.gguf", monkeypatch, "I2_S")
    expected = logits(ternary_model(tmp_path / "t.gguf", monkeypatch, "TQ2_0"))
    assert np.array_equal(logits(source), expected)
    assert ("I2_S", "expanded to TQ2_0") in {
        (row["type"], row["loads_as"]) for row in describe_model(source)["types"]
    }
    assert np.array_equal(logits(compress(source, tmp_path / "c.gguf").path), expected)


def test_codes_are_exact_in_any_format() -> None:
    codes = np.random.default_rng(0).integers(0, 3, (5, 384), dtype=np.uint8)
    raw = np.frombuffer(pack(codes), np.uint8).reshape(5, -1)
    assert np.array_equal(i2_s.codes_of(raw), codes)
    scales = np.full((5, 1), 0.7, np.float32)
    f32 = FORMATS["f32"]
    found = f32.decode(expand_scaled(raw, "I2_S", f32, scales, 384))
    assert np.array_equal(found, (codes.astype(np.float32) - 1) * np.float32(0.7))


def test_other_orders_and_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = np.full((1, 32), 0b11, np.uint8)
    with pytest.raises(UnsupportedError, match=r"does not use.*IQ4_NL"):
        i2_s.codes_of(raw)
    source = ternary_model(tmp_path / "i.gguf", monkeypatch, "I2_S")
    data = source.read_bytes()
    cut = tmp_path / "cut.gguf"
    last = max(read_gguf(source).tensors.values(), key=lambda info: info.offset)
    assert last.type == "I2_S"
    cut.write_bytes(data[: last.offset + last.n_bytes])  # the codes, and no scale
    with pytest.raises(ModelFileError, match="32 bytes are missing"):
        read_gguf(cut)
