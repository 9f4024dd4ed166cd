"""Models in formats that only our own files hold: what is computed is what their weights say."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from targets_here import LIKE_OTHERS
from test_streaming import check
from test_tiled import logits, write_model

import headrace
from headrace.compress import compress
from headrace.description import describe_model
from headrace.loaders.gguf import read_gguf
from headrace.loaders.tiled import Entry, build_header, tiled_type
from headrace.sparse.format import Format
from headrace.sparse.registry import FORMATS

OWN = {name: fmt for name, fmt in FORMATS.items() if fmt.ggml_type is None}


def params() -> list[Any]:
    return [
        pytest.param(fmt, id=name, marks=[pytest.mark.slow] if name in LIKE_OTHERS else [])
        for name, fmt in OWN.items()
    ]


def write_coded(folder: Path, formats: Iterable[Format]) -> tuple[Path, Path]:
    """A small model whose matrices take turns at the formats, and the same weights as float32."""
    plain, coded = write_model(folder / "plain.gguf", ["F32"]), folder / "coded.gguf"
    model = read_gguf(plain)
    entries, contents, turns = [], [], cycle(formats)
    with plain.open("r+b") as file:
        for name, info in model.tensors.items():
            raw = model.read(info)
            if len(info.shape) == 1:
                entries.append(Entry(name, info.type, info.shape, info.n_bytes))
                contents.append(raw.tobytes())
                continue
            fmt = next(turns)
            codes = fmt.encode(raw.view(np.float32).reshape(info.shape))
            file.seek(info.offset)
            file.write(fmt.decode(codes).tobytes())
            tiled = fmt.tile(codes).tobytes()
            entries.append(Entry(name, tiled_type(fmt.name), info.shape, len(tiled), fmt.name))
            contents.append(tiled)
    header, places, size = build_header(model, entries)
    with coded.open("wb") as file:
        file.write(header)
        for at, content in zip(places, contents, strict=True):
            file.seek(at)
            file.write(content)
        file.truncate(size)
    return coded, plain


@pytest.mark.parametrize("fmt", params())
def test_whole_models(fmt: Format, tmp_path: Path) -> None:
    coded, plain = write_coded(tmp_path, [fmt])
    expected = logits(plain, activations="f32")
    assert np.ptp(expected) > 1
    assert np.array_equal(logits(coded, activations="f32"), expected)
    found = logits(coded)
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.999
    with headrace.load(coded, threads=2) as model:
        assert model.format == fmt.name
    loads = {row["loads_as"] for row in describe_model(coded)["types"]}
    assert loads == {"kernel", "float32 vector"}
    again = compress(coded, tmp_path / "again.gguf").path
    assert np.array_equal(logits(again), found)


def test_streamed_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_tiled.LAYERS", 6)  # more than fits into the least window
    formats = [fmt for name, fmt in OWN.items() if name not in LIKE_OTHERS]
    check(write_coded(tmp_path, formats)[0])
