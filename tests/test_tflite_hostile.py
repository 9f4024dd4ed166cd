"""TFLite files that are damaged, or made to do harm: one clear error, no memory taken for it."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tflite_files import TfliteFile
from tflite_networks import Kind, conv, residual

import headrace
from headrace.errors import HeadraceError, ModelFileError, UnsupportedError
from headrace.loaders.tflite import open_tflite


def small() -> tuple[TfliteFile, int, int]:
    file, kind = TfliteFile(), Kind("int8")
    x = kind.value(file, (1, 5, 5, 6), name="image")
    return file, x, conv(file, kind, x, (8, 3, 3, 6), (1, 5, 5, 8))


def refused(content: bytes, folder: Path) -> ModelFileError:
    path = folder / "bad.tflite"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ModelFileError) as caught:
            open_tflite(path)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert "bad.tflite" in str(caught.value)
    return caught.value


def test_any_end_is_found(tmp_path: Path) -> None:
    file, x, y = small()
    whole = file.bytes([x], [y])
    for size in [*range(64), *range(64, len(whole), 97)]:
        refused(whole[:size], tmp_path)


def test_other_bytes_are_an_error_or_another_model(tmp_path: Path) -> None:
    """Nothing but errors of ours, whatever stands where."""
    (file, x, y), _ = residual()
    whole = np.frombuffer(file.bytes([x], [y]), np.uint8)
    random, path, wrong = np.random.default_rng(1), tmp_path / "x.tflite", 0
    for _ in range(250):
        content = whole.copy()
        if random.random() < 0.5:
            content[random.integers(len(content))] = random.integers(256)
        else:
            at = int(random.integers(len(content) // 4)) * 4
            value = int(random.choice([0, 1, 4, -1, 2**31 - 1, -(2**31), len(content)]))
            content[at : at + 4] = np.frombuffer(struct.pack("<i", value), np.uint8)[
                : len(content) - at
            ]
        path.write_bytes(content.tobytes())
        try:
            open_tflite(path)
        except HeadraceError as error:
            assert "x.tflite" in str(error)
            wrong += 1
    assert wrong > 20


def test_it_is_no_such_file(tmp_path: Path) -> None:
    assert "TFL3" in str(refused(b"GGUF" * 64, tmp_path))
    refused(b"", tmp_path)
    with pytest.raises(HeadraceError, match="no file"):
        headrace.load(tmp_path / "none.tflite")


def changed(of: tuple[TfliteFile, int, int], index: int, **fields: Any) -> bytes:
    file, x, y = of
    file.tensors[index].update(fields)
    return file.bytes([x], [y])


@pytest.mark.parametrize(
    ("index", "fields", "says"),
    [
        (1, {"shape": [8, 3, 3, 7]}, "ask for 504 bytes, and buffer"),
        (1, {"shape": [2**30, 2**30, 2**30, 1]}, "not possible"),
        (1, {"shape": [-8, 3, 3, 6]}, "not possible"),
        (1, {"scale": [0.1] * 7}, "7 scales"),
        (1, {"scale": np.nan}, "no.* positive|not a positive"),
        (0, {"zero": 300}, "zero point"),
        (0, {"shape": [1, 5, 5, 5]}, "do not fit"),
        (3, {"shape": [1, 5, 5, 9]}, "follows"),
        (3, {"shape": [1, 5, 5]}, "image"),
        (2, {"shape": [4], "data": np.zeros(4, np.int32)}, "bias"),
    ],
)
def test_what_does_not_fit_is_named(
    index: int, fields: dict[str, Any], says: str, tmp_path: Path
) -> None:
    error = refused(changed(small(), index, **fields), tmp_path)
    text = str(error)
    assert "offset" in text and ("tensor" in text or "operator 0 (CONV_2D)" in text)
    with pytest.raises(ModelFileError, match=says):
        raise error


def test_operators_out_of_order_or_in_a_circle(tmp_path: Path) -> None:
    file = TfliteFile()
    x, y, z = (file.tensor((1, 4)) for _ in range(3))
    file.operator("RELU", [z], [y])
    file.operator("RELU", [x], [z])
    assert "nothing makes" in str(refused(file.bytes([x], [y]), tmp_path))
    file.operators.reverse()
    file.operator("RELU", [x], [y])
    assert "there already" in str(refused(file.bytes([x], [y]), tmp_path))
    file.operators.pop()
    assert "tensor 9" in str(refused(file.bytes([x], [9]), tmp_path))


def test_options_that_mean_nothing(tmp_path: Path) -> None:
    for options in ({"i1": 0}, {"i2": -1}, {"b0": 7}, {"b3": 99}, {"i4": 2**31 - 1}):
        file, x, y = small()
        file.operators[0]["options"].update(options)
        assert "operator 0 (CONV_2D)" in str(refused(file.bytes([x], [y]), tmp_path))


def test_more_than_one_kind_of_scales(tmp_path: Path) -> None:
    file, x, y = small()
    file.tensors[1].update(scale=[0.01] * 6, axis=3)
    path = file.write(tmp_path / "x.tflite", [x], [y])
    with pytest.raises(UnsupportedError, match="dimension 3"):
        open_tflite(path)


def test_the_same_bytes_again_and_again(tmp_path: Path) -> None:
    """Tables that all lead to the same long vector do not make a small file large."""
    file = TfliteFile(copies=2000)
    x = file.tensor((100_000,), "int8", scale=np.ones(100_000))
    content = file.bytes([x], [x])
    assert len(content) < 2 << 20
    assert "too often" in str(refused(content, tmp_path))


def test_more_tables_than_the_file_has_room_for(tmp_path: Path) -> None:
    file, x, y = small()
    content = bytearray(file.bytes([x], [y]))
    root = struct.unpack_from("<I", content, 0)[0]
    fields = root - struct.unpack_from("<i", content, root)[0]
    for field in (1, 2, 4):  # codes, subgraphs, buffers
        at = root + struct.unpack_from("<H", content, fields + 4 + 2 * field)[0]
        vector = at + struct.unpack_from("<I", content, at)[0]
        for count in (100_000, 2**30, 2**32 - 1):
            wrong = content.copy()
            struct.pack_into("<I", wrong, vector, count)
            assert refused(bytes(wrong), tmp_path).offset is not None
