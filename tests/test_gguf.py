"""Files that the gguf package writes come back as they were meant."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import platformdirs
import pytest

from headrace.errors import ModelFileError
from headrace.loaders import ggml_types
from headrace.loaders import gguf as loader
from headrace.loaders.gguf import ModelFile, StringArray, TensorReader, read_gguf

V = gguf.GGUFValueType


def write(path: Path, tensors: dict[str, np.ndarray], alignment: int = 32, **options: Any) -> None:
    writer = gguf.GGUFWriter(path, "llama", **options)
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    writer.add_uint32("llama.block_count", 2)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    finish(writer)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def some_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        "a": rng.standard_normal((3, 5)).astype(np.float32),
        "b": rng.standard_normal(7).astype(np.float16),
        "c": rng.integers(-99, 99, (2, 3, 4, 5)).astype(np.int8),
        "d": rng.standard_normal((1, 9)),
    }


def assert_same(mf: ModelFile, tensors: dict[str, np.ndarray]) -> None:
    assert list(mf.tensors) == list(tensors)
    for name, values in tensors.items():
        info = mf.tensors[name]
        assert info.shape == values.shape
        assert info.n_bytes == values.nbytes
        assert mf.read(info).tobytes() == values.tobytes()


def test_type_table_is_that_of_the_gguf_package() -> None:
    theirs = {
        int(t): (t.name, *(int(n) for n in gguf.constants.GGML_QUANT_SIZES[t]))
        for t in gguf.GGMLQuantizationType
    }
    ours = {t.id: (t.name, t.block_elements, t.block_bytes) for t in ggml_types.BY_ID.values()}
    assert ours.pop(36) == ("I2_S", 128, 32)  # of bitnet.cpp
    # An older gguf package than the newest knows fewer types.
    assert {i: row for i, row in ours.items() if i in theirs} == theirs
    assert len(ggml_types.BY_NAME) == len(ours) + 1
    assert not ours.keys() & ggml_types.REMOVED.keys()


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [8, 32, 64, 4096])
def test_round_trip(tmp_path: Path, alignment: int, version: int) -> None:
    path = tmp_path / "m.gguf"
    tensors = some_tensors()
    write(path, tensors, alignment)
    with path.open("r+b") as file:  # the two versions differ in their number only
        file.seek(4)
        file.write(struct.pack("<I", version))
    mf = read_gguf(str(path))
    assert_same(mf, tensors)
    assert (mf.version, mf.alignment, mf.paths) == (version, alignment, (path,))
    assert mf.size_bytes == path.stat().st_size
    assert all(info.offset % alignment == 0 for info in mf.tensors.values())
    assert mf.header_bytes == mf.tensors["a"].offset
    assert [info.type for info in mf.tensors.values()] == ["F32", "F16", "I8", "F64"]


def test_quantized_tensor(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    values = np.linspace(-1, 1, 3 * 64, dtype=np.float32).reshape(3, 64)
    coded = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_1)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("w", coded, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    finish(writer)
    mf = read_gguf(path)
    info = mf.tensors["w"]
    assert (info.type, info.shape, info.n_bytes) == ("Q4_1", (3, 64), 3 * 2 * 20)
    assert mf.read(info).tobytes() == coded.tobytes()
    assert mf.read(info, 40, 20).tobytes() == coded.tobytes()[40:60]


NUMBERS = [
    (V.UINT8, 255), (V.INT8, -128), (V.UINT16, 65535), (V.INT16, -32768), (V.UINT32, 2**32 - 1),
    (V.INT32, -(2**31)), (V.UINT64, 2**64 - 1), (V.INT64, -(2**63)), (V.FLOAT32, 0.5),
    (V.FLOAT64, 1e300), (V.BOOL, True), (V.BOOL, False), (V.STRING, "käse ✓"), (V.STRING, ""),
]  # fmt: skip


def test_every_metadata_type(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for i, (kind, value) in enumerate(NUMBERS):
        writer.add_key_value(f"one.{i}", value, kind)
        writer.add_key_value(f"many.{i}", [value] * 3, V.ARRAY, sub_type=kind)
    finish(writer)
    metadata = read_gguf(path).metadata
    for i, (kind, value) in enumerate(NUMBERS):
        one, many = metadata[f"one.{i}"], metadata[f"many.{i}"]
        assert one == value
        assert type(one) is type(value)
        assert len(many) == 3
        assert many.tolist() == [value] * 3
        if kind != V.STRING:
            assert many.dtype.name == kind.name.lower()
            assert not many.flags.writeable
            assert many.base is None or many.base.nbytes < 64  # holds no header in memory


def test_nested_and_empty_arrays(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_key_value("nested", [[1, 2], [3]], V.ARRAY)
    writer.add_key_value("deep", [[["a"], ["b", "c"]]], V.ARRAY)
    finish(writer)
    metadata = read_gguf(path).metadata
    assert [inner.tolist() for inner in metadata["nested"]] == [[1, 2], [3]]
    assert metadata["deep"] == [[["a"], ["b", "c"]]]


def test_strings_that_are_not_utf8_come_back(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    tokens = [b"plain", b"\xe2\x96", b"\xff\x00\xfe", b"", "✓".encode()]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_key_value("one", b"\xc3", V.STRING)
    writer.add_key_value("tokens", tokens, V.ARRAY)
    finish(writer)
    metadata = read_gguf(path).metadata
    strings = metadata["tokens"]
    assert metadata["one"].encode("utf-8", "surrogateescape") == b"\xc3"
    assert [s.encode("utf-8", "surrogateescape") for s in strings] == tokens
    assert [strings.raw(i) for i in range(5)] == tokens


def test_string_array_is_a_sequence(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    words = [f"word{i}" for i in range(10)]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("words", words)
    finish(writer)
    strings = read_gguf(path).metadata["words"]
    assert isinstance(strings, StringArray)
    assert (len(strings), strings[0], strings[-1], strings[2:4]) == (
        10, "word0", "word9", ["word2", "word3"],
    )  # fmt: skip
    assert strings == words
    assert strings != words[:9]
    assert "word5" in strings
    assert strings.index("word5") == 5
    assert repr(strings).startswith("<StringArray of 10: 'word0'")
    for index in (10, -11):
        with pytest.raises(IndexError):
            strings[index]


def test_header_longer_than_the_first_read(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "m.gguf"
    tensors = some_tensors()
    words = ["x" * (i % 40) for i in range(500)]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("words", words)
    writer.add_array("numbers", list(range(300)))
    writer.add_string("text", "t" * 1000)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    finish(writer)
    for first_read in (24, 25, 64, 333, 1024):
        monkeypatch.setattr(loader, "FIRST_READ_BYTES", first_read)
        mf = read_gguf(path)
        assert mf.metadata["words"] == words
        assert mf.metadata["numbers"].tolist() == list(range(300))
        assert_same(mf, tensors)


@pytest.mark.parametrize("alignment", [8, 32, 64, 4096])
@pytest.mark.parametrize("small_first", [False, True])
def test_split_model(tmp_path: Path, alignment: int, small_first: bool) -> None:
    # gguf-py names the alignment in the first part only and then uses it in all of them.
    tensors = some_tensors()
    write(
        tmp_path / "m.gguf", tensors, alignment, split_max_tensors=2, small_first_shard=small_first
    )
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) == (3 if small_first else 2)
    for given in parts:
        mf = read_gguf(given)
        assert mf.paths == tuple(parts)
        assert mf.alignment == alignment
        assert mf.size_bytes == sum(p.stat().st_size for p in parts)
        assert mf.metadata["llama.block_count"] == 2
        assert_same(mf, tensors)
        assert {info.path for info in mf.tensors.values()} <= set(parts)


def test_split_model_through_links(tmp_path: Path) -> None:
    # Hugging Face's cache: links with the names of the parts to files named by their hash.
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    write(tmp_path / "blobs" / "m.gguf", some_tensors(), split_max_tensors=3)
    for i, part in enumerate(sorted((tmp_path / "blobs").glob("*.gguf"))):
        blob = part.rename(part.with_name(f"hash{i}"))
        try:
            (tmp_path / "snapshot" / part.name).symlink_to(blob)
        except OSError as error:
            pytest.skip(f"this system makes no links: {error}")
    mf = read_gguf(tmp_path / "snapshot" / "m-00002-of-00002.gguf")
    assert_same(mf, some_tensors())


def test_a_link_of_any_name_to_a_part(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    write(tmp_path / "parts" / "m.gguf", some_tensors(), split_max_tensors=3)
    try:
        (tmp_path / "mine.gguf").symlink_to(tmp_path / "parts" / "m-00001-of-00002.gguf")
    except OSError as error:
        pytest.skip(f"this system makes no links: {error}")
    assert_same(read_gguf(tmp_path / "mine.gguf"), some_tensors())


@pytest.fixture
def keys(tmp_path: Path) -> ModelFile:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("n", 7)
    writer.add_float32("eps", 0.5)
    writer.add_float32("nan", float("nan"))
    writer.add_bool("yes", True)
    writer.add_string("s", "text")
    writer.add_array("heads", [4, 8])
    writer.add_array("halves", [0.5, 1.5])
    writer.add_array("words", ["a", "b"])
    finish(writer)
    return read_gguf(path)


def test_get(keys: ModelFile) -> None:
    assert keys.get("n", int) == 7
    assert keys.get("n", float) == 7.0
    assert keys.get("eps", float, low=0, high=1) == 0.5
    assert keys.get("yes", bool) is True
    assert keys.get("s", str) == "text"
    assert keys.get("words", list) == ["a", "b"]
    assert keys.get("heads", list) == [4, 8]
    assert keys.get("heads", np.ndarray).tolist() == [4, 8]
    assert keys.get("absent", int, None) is None
    assert keys.get("absent", int, 3) == 3
    assert keys.get_per_layer("n", 3) == [7, 7, 7]
    assert keys.get_per_layer("heads", 2, low=1) == [4, 8]
    assert keys.get_per_layer("absent", 2, 1) == [1, 1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.get("absent", int), "'absent' is missing .int expected"),
        (lambda m: m.get("s", int), "'s' is str, expected int"),
        (lambda m: m.get("yes", int), "'yes' is bool, expected int"),
        (lambda m: m.get("n", bool), "'n' is int, expected bool"),
        (lambda m: m.get("eps", int), "'eps' is float, expected int"),
        (lambda m: m.get("words", str), "'words' is an array of str, expected str"),
        (lambda m: m.get("heads", int), "'heads' is an array of int32, expected int"),
        (lambda m: m.get("n", int, low=8), "'n' is 7, expected at least 8"),
        (lambda m: m.get("n", int, high=6), "'n' is 7, expected at most 6"),
        (lambda m: m.get("nan", float), "'nan' is nan, expected a finite number"),
        (lambda m: m.get_per_layer("absent", 2), "'absent' is missing"),
        (lambda m: m.get_per_layer("heads", 3), "'heads' has 2 values for 3 layers"),
        (lambda m: m.get_per_layer("heads", 2, high=4), "'heads' is 8, expected at most 4"),
        (lambda m: m.get_per_layer("halves", 2), "'halves' is an array of float32, expected ints"),
        (lambda m: m.get_per_layer("s", 2), "'s' is str, expected int"),
    ],
)
def test_get_says_what_is_wrong(keys: ModelFile, call: Any, message: str) -> None:
    with pytest.raises(ModelFileError, match=message) as caught:
        call(keys)
    assert caught.value.path == keys.paths[0]


def test_reader_reads_parts_from_many_threads(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "m.gguf"
    values = np.arange(50_000, dtype=np.int32)
    write(path, {"w": values})
    info = read_gguf(path).tensors["w"]
    raw = values.tobytes()
    wrong: list[int] = []

    def work(reader: TensorReader, seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(100):
            start, end = sorted(rng.integers(0, len(raw), 2).tolist())
            buffer = bytearray(end - start)
            reader.readinto(info, start, buffer)
            if buffer != raw[start:end]:
                wrong.append(start)

    for positional in (True, False):  # False: how it is on Windows
        if not positional:
            monkeypatch.delattr(os, "preadv", raising=False)
        with TensorReader() as reader:
            threads = [threading.Thread(target=work, args=(reader, i)) for i in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert wrong == []


def test_reader_goes_on_after_short_reads(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "m.gguf"
    tensors = some_tensors()
    write(path, tensors)
    real = TensorReader._read_once
    monkeypatch.setattr(
        TensorReader, "_read_once", lambda self, file, view, at: real(self, file, view[:7], at)
    )
    assert_same(read_gguf(path), tensors)


def test_reader_takes_shaped_and_empty_buffers(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    tensors = some_tensors()
    write(path, tensors)
    info = read_gguf(path).tensors["a"]
    whole = np.empty((3, 5), np.float32)
    with TensorReader() as reader:
        reader.readinto(info, 0, whole)
        reader.readinto(info, info.n_bytes, np.empty((0, 4), np.float32))
    assert (whole == tensors["a"]).all()


def test_reader_refuses_what_is_outside_the_tensor(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write(path, some_tensors())
    mf = read_gguf(path)
    info = mf.tensors["a"]
    for start, n_bytes in ((-1, 4), (0, 61), (58, 4), (0, -1), (61, None)):
        with pytest.raises(ValueError, match="outside tensor 'a'"):
            mf.read(info, start, n_bytes)
    reader = TensorReader()
    reader.close()
    with pytest.raises(ValueError, match="closed"):
        reader.readinto(info, 0, bytearray(4))


def test_import_is_light() -> None:
    code = "import sys, headrace.loaders.gguf; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "headrace.loaders.gguf" in modules
    assert not {"gguf", "numba", "llvmlite", "tokenizers", "rich", "typer"} & set(modules)


def test_agrees_with_the_gguf_package_on_a_published_model() -> None:
    models = Path(platformdirs.user_cache_dir("headrace"), "models")
    found = sorted(models.rglob("SmolLM2-135M*.gguf")) if models.is_dir() else []
    if not found:
        pytest.skip(f"no SmolLM2 file in {models}: run `headrace pull smollm2-135m`")
    mf, theirs = read_gguf(found[0]), gguf.GGUFReader(found[0])
    fields = {k: f for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert list(mf.metadata) == list(fields)
    for key, field in fields.items():
        ours, expected = mf.metadata[key], field.contents()
        assert (ours.tolist() if hasattr(ours, "tolist") else ours) == expected
    assert len(mf.tensors) == len(theirs.tensors)
    for tensor in theirs.tensors:
        info = mf.tensors[tensor.name]
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
        assert (info.type, info.offset) == (tensor.tensor_type.name, tensor.data_offset)
        assert info.n_bytes == tensor.n_bytes
    smallest = min(theirs.tensors, key=lambda t: t.n_bytes)
    assert mf.read(mf.tensors[smallest.name]).tobytes() == smallest.data.tobytes()
