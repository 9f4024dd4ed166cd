"""Malformed GGUF files: one crafted file per way to be bad, truncation everywhere, and fuzzing."""

from __future__ import annotations

import json
import os
import pickle
import socket
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.errors import HeadraceError, ModelFileError, ModelNotFoundError, UnsupportedError
from headrace.loaders import gguf as loader
from headrace.loaders.gguf import TensorReader, read_gguf

U8, I8, U32, F32, BOOL, STRING, ARRAY = 0, 1, 4, 6, 7, 8, 9
TYPE_F32, TYPE_Q4_1 = 0, 3
ALIGNMENT = 32
DEADLINE_S = 2.0  # most take 1 ms; the machine may be busy
MEMORY_BYTES = 8 << 20


def u32(n: int) -> bytes:
    return struct.pack("<I", n)


def u64(n: int) -> bytes:
    return struct.pack("<Q", n)


def text(s: str | bytes) -> bytes:
    raw = s.encode() if isinstance(s, str) else s
    return u64(len(raw)) + raw


def kv(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + u32(kind) + value


def strings(*values: str) -> bytes:
    return u32(STRING) + u64(len(values)) + b"".join(text(v) for v in values)


def tensor(
    name: str | bytes = "w", ne: tuple[int, ...] = (64,), kind: int = TYPE_F32, offset: int = 0
) -> bytes:
    return text(name) + u32(len(ne)) + b"".join(map(u64, ne)) + u32(kind) + u64(offset)


def craft(
    keys: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: int = 256,
    version: int = 3,
    n_tensors: int | None = None,
    n_keys: int | None = None,
) -> bytes:
    keys = [] if keys is None else keys
    tensors = [tensor()] if tensors is None else tensors
    header = b"GGUF" + u32(version)
    header += u64(len(tensors) if n_tensors is None else n_tensors)
    header += u64(len(keys) if n_keys is None else n_keys)
    header += b"".join(keys) + b"".join(tensors)
    return header + bytes(-len(header) % ALIGNMENT) + bytes(data)


def good_file() -> bytes:
    """A small file with one of everything."""
    keys = [
        kv("general.architecture", STRING, text("llama")),
        kv("n", U32, u32(7)),
        kv("f", F32, struct.pack("<f", 0.5)),
        kv("yes", BOOL, b"\1"),
        kv("tokens", ARRAY, strings("a", "", "ccc")),
        kv("numbers", ARRAY, u32(U32) + u64(3) + u32(1) * 3),
        kv("nested", ARRAY, u32(ARRAY) + u64(2) + (u32(U8) + u64(2) + b"ab") * 2),
    ]
    tensors = [tensor("w", (32, 2)), tensor("q", (64, 2), TYPE_Q4_1, 256)]
    return craft(keys, tensors, 256 + 80)


GOOD = good_file()


def outcome(path: Path, raw: bytes) -> HeadraceError | None:
    """Read a file within the time and memory that any file may take; what came of it."""
    path.write_bytes(raw)
    tracemalloc.start()
    begin = time.perf_counter()
    try:
        mf = read_gguf(path)
        for info in mf.tensors.values():
            assert info.offset + info.n_bytes <= len(raw)
        return None
    except HeadraceError as error:
        assert str(path) in str(error)
        assert len(str(error)) < 4000
        str(error).encode()  # can be printed
        return error
    finally:
        taken = time.perf_counter() - begin
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert taken < DEADLINE_S
        assert peak < MEMORY_BYTES


def test_the_good_file_is_good(tmp_path: Path) -> None:
    assert outcome(tmp_path / "m.gguf", GOOD) is None
    mf = read_gguf(tmp_path / "m.gguf")
    assert list(mf.tensors) == ["w", "q"]
    assert len(mf.metadata) == 7


def test_truncated_at_every_byte(tmp_path: Path) -> None:
    for n in range(len(GOOD)):
        error = outcome(tmp_path / "m.gguf", GOOD[:n])
        assert isinstance(error, ModelFileError), n
        assert not isinstance(error, UnsupportedError), n
        assert "download it again" in str(error), n


def test_truncated_with_every_first_read(tmp_path: Path, monkeypatch: Any) -> None:
    # The header then ends at another place in the buffer each time.
    for first_read in range(4, 200, 14):
        monkeypatch.setattr(loader, "FIRST_READ_BYTES", first_read)
        assert outcome(tmp_path / "m.gguf", GOOD) is None
        for n in range(4, len(GOOD), 11):
            assert isinstance(outcome(tmp_path / "m.gguf", GOOD[:n]), ModelFileError)


def test_truncated_weights_say_how_much_is_missing(tmp_path: Path) -> None:
    error = outcome(tmp_path / "m.gguf", GOOD[:-50])
    assert isinstance(error, ModelFileError)
    assert error.tensor == "q"
    assert error.offset == len(GOOD) - 80
    assert "50 bytes are missing" in str(error)
    error = outcome(tmp_path / "m.gguf", GOOD[:-200])  # cuts both, counts to the end
    assert isinstance(error, ModelFileError)
    assert error.tensor == "w"
    assert "200 bytes are missing" in str(error)


HUGE = 2**63 + 5
ENDLESS = b"GGUF" + u32(3) + u64(0) + u64(1) + kv("", ARRAY, u32(I8) + u64(2**63))
# name: (file, exception, what the message says, tensor)
CRAFTED: dict[str, tuple[bytes, type[HeadraceError], str, str | None]] = {
    # What hangs gguf-py 0.19 (llama.cpp #27188): a tiny file, an array of 2**63 elements.
    "hang": (ENDLESS, ModelFileError, "'' has 9,223,372,036,854,775,808 elements", None),
    "hang_cut_to_43_bytes": (
        ENDLESS[:43], ModelFileError, "ends inside metadata key '': 5 bytes are missing", None,
    ),
    "array_count_u8": (
        craft([kv("k", ARRAY, u32(U8) + u64(2**64 - 1))]), ModelFileError,
        "'k' has 18,446,744,073,709,551,615 elements", None,
    ),
    "array_count_strings": (
        craft([kv("k", ARRAY, u32(STRING) + u64(HUGE))]), ModelFileError, "'k' has 9,223", None,
    ),
    "array_count_arrays": (
        craft([kv("k", ARRAY, u32(ARRAY) + u64(HUGE))]), ModelFileError, "'k' has 9,223", None,
    ),
    "array_of_unknown_type": (
        craft([kv("k", ARRAY, u32(99) + u64(HUGE))]), ModelFileError,
        "'k' is an array of the unknown value type 99", None,
    ),
    "array_too_deep": (
        craft([kv("k", ARRAY, (u32(ARRAY) + u64(1)) * 9 + u32(U8) + u64(0))]), UnsupportedError,
        "'k' nests arrays deeper than 4", None,
    ),
    "array_of_many_empty_arrays": (
        craft([kv("k", ARRAY, u32(ARRAY) + u64(70_000) + (u32(U8) + u64(0)) * 70_000)]),
        UnsupportedError, "more than 65,536 times", None,
    ),
    "string_in_array_past_end": (
        craft([kv("k", ARRAY, u32(STRING) + u64(2) + text("a") + u64(HUGE))]), ModelFileError,
        "the file ends inside metadata key 'k'", None,
    ),
    "string_past_end": (
        craft([kv("k", STRING, u64(HUGE))]), ModelFileError,
        "the file ends inside metadata key 'k'", None,
    ),
    "key_past_end": (
        craft([u64(HUGE)]), ModelFileError, "ends inside the name of metadata key 0", None,
    ),
    "key_too_long": (
        craft([kv("k" * 70_000, U8, b"1")]), ModelFileError, "key 0 is 70,000 bytes long", None,
    ),
    "key_not_utf8": (
        craft([kv(b"\xff", U8, b"1")]), ModelFileError, "key 0 is not valid UTF-8", None,
    ),
    "key_twice": (
        craft([kv("k", U8, b"1"), kv("k", U8, b"1")]), ModelFileError, "'k' occurs twice", None,
    ),
    "unknown_value_type": (
        craft([kv("k", 13, u64(0))]), ModelFileError, "'k' has the unknown value type 13", None,
    ),
    "bool_of_2": (craft([kv("k", BOOL, b"\2")]), ModelFileError, "'k' is a bool of value 2", None),
    "bool_array_of_2": (
        craft([kv("k", ARRAY, u32(BOOL) + u64(1) + b"\2")]), ModelFileError, "'k' holds a bool",
        None,
    ),
    "too_many_keys_for_the_file": (
        craft(n_keys=HUGE), ModelFileError, "the metadata has 9,223", None,
    ),
    "too_many_tensors_for_the_file": (
        craft(n_tensors=HUGE), ModelFileError, "the tensor list has 9,223", None,
    ),
    "too_many_keys": (
        craft(n_keys=70_000, data=1 << 20), UnsupportedError, "70,000 metadata keys", None,
    ),
    "too_many_tensors": (
        craft(n_tensors=270_000, data=7 << 20), UnsupportedError, "270,000 tensors", None,
    ),
    "alignment_0": (
        craft([kv("general.alignment", U32, u32(0))]), ModelFileError,
        "'general.alignment' is 0, expected a power of two", None,
    ),
    "alignment_24": (
        craft([kv("general.alignment", U32, u32(24))]), ModelFileError, "is 24, expected", None,
    ),
    "alignment_2**31": (
        craft([kv("general.alignment", U32, u32(2**31))]), ModelFileError, "is 2147483648", None,
    ),
    "alignment_text": (
        craft([kv("general.alignment", STRING, text("x"))]), ModelFileError, "is x, expected", None,
    ),
    "name_past_end": (
        craft(tensors=[u64(HUGE) + bytes(16)]), ModelFileError, "the name of tensor 0", None,
    ),
    "name_too_long": (
        craft(tensors=[tensor("w" * 2000)]), ModelFileError, "tensor 0 is 2,000 bytes long", None,
    ),
    "name_not_utf8": (
        craft(tensors=[tensor(b"\xc3")]), ModelFileError, "tensor 0 is not valid UTF-8", None,
    ),
    "name_twice": (
        craft(tensors=[tensor(), tensor(offset=256)], data=512), ModelFileError,
        "this name occurs twice", "w",
    ),
    "five_dimensions": (
        craft(tensors=[tensor(ne=(1,) * 5)]), ModelFileError, "5 dimensions, at most 4", "w",
    ),
    "dimension_0": (
        craft(tensors=[tensor(ne=(4, 0))]), ModelFileError, "a dimension is 0", "w",
    ),
    "shape_overflows": (
        craft(tensors=[tensor(ne=(2**32, 2**32))]), ModelFileError, "overflows 63 bits", "w",
    ),
    "shape_overflows_to_a_small_one": (
        craft(tensors=[tensor(ne=(2**62, 2, 2, 2))]), ModelFileError, "overflows 63 bits", "w",
    ),
    "half_a_block": (
        craft(tensors=[tensor(ne=(48, 2), kind=TYPE_Q4_1)]), ModelFileError,
        "rows of 48 elements are no multiple of the 32 in a block of Q4_1", "w",
    ),
    "type_unknown": (
        craft(tensors=[tensor(kind=99)]), UnsupportedError, "unknown tensor type 99", "w",
    ),
    "type_Q4_2": (
        craft(tensors=[tensor(kind=4)]), UnsupportedError,
        r"type 4 \(Q4_2\) was removed from GGUF: get the file as Q4_0", "w",
    ),
    "type_Q4_0_4_4": (
        craft(tensors=[tensor(kind=31)]), UnsupportedError, r"31 \(Q4_0_4_4\) was removed", "w",
    ),
    "type_IQ4_NL_4_8": (
        craft(tensors=[tensor(kind=37)]), UnsupportedError, "get the file as IQ4_NL", "w",
    ),
    "offset_unaligned": (
        craft(tensors=[tensor(offset=16)], data=512), ModelFileError, "not aligned to 32", "w",
    ),
    "offset_outside": (
        craft(tensors=[tensor(offset=2**63)]), ModelFileError, "outside the file", "w",
    ),
    "offset_wraps_around": (
        craft(tensors=[tensor(offset=2**64 - 32)]), ModelFileError, "outside the file", "w",
    ),
    "overlap": (
        craft(tensors=[tensor("w"), tensor("v", offset=224)], data=512), ModelFileError,
        "overlaps that of tensor 'w'", "v",
    ),
    "same_place": (
        craft(tensors=[tensor("w"), tensor("v")]), ModelFileError, "overlaps", "v",
    ),
    "version_0": (craft(version=0), ModelFileError, "version 0 does not exist", None),
    "version_1": (craft(version=1), UnsupportedError, "version 1, which nothing has written", None),
    "version_4": (craft(version=4), UnsupportedError, "newer than this release reads", None),
    "version_junk": (craft(version=123_457), ModelFileError, "123457 does not exist", None),
    "big_endian": (craft(version=3 << 24), UnsupportedError, "big-endian", None),
    "split_count_negative": (
        craft([kv("split.count", 5, struct.pack("<i", -1))]), ModelFileError,
        "'split.count' is -1", None,
    ),
    "split_without_part_name": (
        craft([kv("split.count", U32, u32(2**32 - 1))]), ModelFileError,
        "its name does not end in -00001-of-4294967295.gguf", None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted(tmp_path: Path, name: str) -> None:
    raw, kind, message, tensor_name = CRAFTED[name]
    error = outcome(tmp_path / "m.gguf", raw)
    assert type(error) is kind
    assert isinstance(error, ModelFileError)
    with pytest.raises(kind, match=message):
        raise error
    assert error.path == tmp_path / "m.gguf"
    assert error.tensor == tensor_name
    if message != "outside the file" and error.offset is not None:
        assert error.offset <= len(raw)
    if tensor_name is not None:
        assert error.offset is not None


def pickled() -> bytes:
    return pickle.dumps({"w": [1.0]})


SAFETENSORS = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 98362432\n"
FOREIGN = {
    "html": (b"\n<!DOCTYPE html><html>", "looks like a web page: .*/resolve/"),
    "html_plain": (b"<html><head>", "looks like a web page"),
    "lfs": (LFS, "looks like a Git LFS pointer: run `git lfs pull`"),
    "safetensors": (u64(len(SAFETENSORS)) + SAFETENSORS, "looks like a safetensors file"),
    "safetensors_header": (b'{"__metadata__":{}}', "looks like the header of a safetensors file"),
    "json": (b'{"error":"Invalid credentials"}', "looks like JSON: .*Invalid credentials"),
    "pickle": (pickled(), "looks like a Python pickle: .*can run any code"),
    "pytorch_old": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9", "PyTorch checkpoint: .*can run any code"),
    "ggml": (b"lmgg" + bytes(40), "a GGML file from before GGUF: convert"),
    "ggjt": (b"tjgg" + u32(3), "a GGML file from before GGUF: convert"),
    "gzip": (b"\x1f\x8b\x08" + bytes(9), "looks like a gzip archive: unpack"),
    "onnx": (b"\x08\x08\x12\x07pytorch", "looks like an ONNX file: .*`compress` take it as"),
    "zeros": (bytes(4096), "looks like zeros: a download that"),
    "noise": (b"\xde\xad\xbe\xef" * 9, "looks like nothing known: it begins with"),
    "empty": (b"", "the file is empty: download it again"),
    "two_bytes": (b"GG", "ends after 2 bytes: download it again"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_file(tmp_path: Path, name: str) -> None:
    raw, message = FOREIGN[name]
    error = outcome(tmp_path / "m.gguf", raw)
    assert type(error) is ModelFileError
    with pytest.raises(ModelFileError, match=message):
        raise error


def test_zip_archive(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.gguf", "w") as archive:
        archive.writestr("archive/data.pkl", pickled())
    with pytest.raises(ModelFileError, match="a zip archive, perhaps a PyTorch checkpoint"):
        read_gguf(tmp_path / "m.gguf")


def test_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path / "no.gguf", tmp_path / "no" / "m.gguf", tmp_path / ("x" * 300)):
        with pytest.raises(ModelNotFoundError, match="check the path"):
            read_gguf(path)
    with pytest.raises(ModelNotFoundError, match="not a file name"):
        read_gguf("a\0b")
    (tmp_path / "file").write_bytes(GOOD)
    with pytest.raises(ModelNotFoundError):
        read_gguf(tmp_path / "file" / "m.gguf")


def test_link_to_nothing(tmp_path: Path) -> None:
    try:
        (tmp_path / "m.gguf").symlink_to(tmp_path / "gone")
    except OSError as error:
        pytest.skip(f"this system makes no links: {error}")
    with pytest.raises(ModelNotFoundError, match="a link to a file that is gone"):
        read_gguf(tmp_path / "m.gguf")


def test_directory(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"a directory, .*no .gguf file in it"):
        read_gguf(tmp_path)
    (tmp_path / "m.gguf").write_bytes(GOOD)
    with pytest.raises(ModelFileError, match=r"such as m.gguf"):
        read_gguf(tmp_path)


def test_no_permission(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "m.gguf").write_bytes(GOOD)

    def refuse(*_: Any) -> int:  # chmod would not stop root, as whom CI containers run
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ModelFileError, match="permission denied: make the file readable"):
        read_gguf(tmp_path / "m.gguf")


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.close()


@pytest.mark.skipif(os.name != "posix", reason="FIFOs and devices are POSIX files")
@pytest.mark.parametrize("make", [fifo, unix_socket, lambda p: p.symlink_to("/dev/zero")])
def test_special_file_does_not_block(
    tmp_path: Path, monkeypatch: Any, make: Callable[[Path], None]
) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket has at most 107 bytes
    make(Path("m.gguf"))
    with pytest.raises(ModelFileError, match="not a regular file: copy the model"):
        read_gguf("m.gguf")


def split(tmp_path: Path, no: int, count: int, tensors: int, name: str, given: str) -> Path:
    keys = [
        kv("split.no", U32, u32(no)),
        kv("split.count", U32, u32(count)),
        kv("split.tensors.count", U32, u32(tensors)),
    ]
    path = tmp_path / given
    path.write_bytes(craft(keys, [tensor(name)]))
    return path


def test_missing_part_is_named(tmp_path: Path) -> None:
    path = split(tmp_path, 1, 3, 3, "w", "m-00002-of-00003.gguf")
    with pytest.raises(ModelFileError, match="2 of 3 parts") as caught:
        read_gguf(path)
    assert "m-00001-of-00003.gguf, m-00003-of-00003.gguf" in str(caught.value)


def test_part_with_another_name(tmp_path: Path) -> None:
    for file in ("m.gguf", "m-00001-of-00003.gguf"):
        with pytest.raises(ModelFileError, match="give the parts their original names"):
            read_gguf(split(tmp_path, 0, 2, 2, "w", file))


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    first = split(tmp_path, 0, 2, 2, "w", "m-00001-of-00002.gguf")
    split(tmp_path, 0, 2, 2, "v", "m-00002-of-00002.gguf")
    with pytest.raises(ModelFileError, match="says part 2 of 2, its metadata part 1 of 2"):
        read_gguf(first)
    split(tmp_path, 1, 2, 2, "w", "m-00002-of-00002.gguf")
    with pytest.raises(ModelFileError, match=r"tensor 'w'.*two parts have a tensor of this name"):
        read_gguf(first)
    split(tmp_path, 0, 2, 5, "w", "m-00001-of-00002.gguf")
    split(tmp_path, 1, 2, 5, "v", "m-00002-of-00002.gguf")
    with pytest.raises(ModelFileError, match=r"hold 2 tensors, split.tensors.count says 5"):
        read_gguf(first)
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(b"")
    with pytest.raises(ModelFileError, match=r"00002-of-00002.gguf.*empty"):
        read_gguf(first)


def test_part_whose_alignment_cannot_be_known(tmp_path: Path) -> None:
    # Neither 32 nor the first part's 4096 explains the size: weights might be read from the
    # wrong place.
    first = split(tmp_path, 0, 2, 2, "w", "m-00001-of-00002.gguf")
    keys = [kv("split.count", U32, u32(2)), kv("general.alignment", U32, u32(4096))]
    head = craft(keys, [tensor("w")], 0)
    first.write_bytes(head + bytes(-len(head) % 4096 + 4096))
    second = split(tmp_path, 1, 2, 2, "v", "m-00002-of-00002.gguf")
    assert set(read_gguf(first).tensors) == {"w", "v"}  # 32 fits
    second.write_bytes(second.read_bytes() + b"x")
    with pytest.raises(ModelFileError, match=r"this part names no general.alignment"):
        read_gguf(first)


def test_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(GOOD)
    mf = read_gguf(path)
    buffer = bytearray(80)
    with TensorReader() as reader:
        reader.readinto(mf.tensors["q"], 0, buffer)
        os.truncate(path, len(GOOD) - 30)
        with pytest.raises(ModelFileError, match="the file shrank: it ends 30 bytes early") as e:
            reader.readinto(mf.tensors["q"], 0, buffer)
    assert (e.value.tensor, e.value.offset) == ("q", len(GOOD) - 30)
    path.unlink()
    with pytest.raises(ModelNotFoundError):
        mf.read(mf.tensors["q"])


def test_giant_sparse_file_takes_no_memory(tmp_path: Path) -> None:
    # Sizes that fit in the file are still no reason to allocate them.
    for field in (
        kv("k", STRING, u64(1 << 40)),
        kv("k", ARRAY, u32(U8) + u64(1 << 40)),
        kv("k", ARRAY, u32(STRING) + u64(1 << 37) + u64(1 << 40)),
    ):
        path = tmp_path / "m.gguf"
        path.write_bytes(craft([field]))
        try:
            os.truncate(path, 1 << 42)
        except OSError as error:
            pytest.skip(f"this file system has no files of 4 TB: {error}")
        tracemalloc.start()
        try:
            with pytest.raises(ModelFileError, match=r"'k' (is|makes)"):
                read_gguf(path)
            assert tracemalloc.get_traced_memory()[1] < MEMORY_BYTES
        finally:
            tracemalloc.stop()


def test_endless_empty_strings_stop_at_the_header_limit(tmp_path: Path, monkeypatch: Any) -> None:
    # The hole in a sparse file reads as zeros: strings of length 0, as many as one likes.
    monkeypatch.setattr(loader, "MAX_HEADER_BYTES", 4 << 20)
    path = tmp_path / "m.gguf"
    path.write_bytes(craft([kv("k", ARRAY, u32(STRING) + u64(1 << 30))], []))
    os.truncate(path, 1 << 34)
    begin = time.perf_counter()
    tracemalloc.start()
    try:
        with pytest.raises(ModelFileError, match="'k' makes the header longer than 4 MiB"):
            read_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 4 * (4 << 20)
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - begin < 10


edits = st.lists(
    st.one_of(
        # (position, byte) and bit flips; then whole 32 and 64-bit fields of nasty numbers
        st.tuples(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=1)),
        st.tuples(
            st.integers(0, len(GOOD) - 1), st.integers(0, 7).map(lambda bit: -1 - bit)
        ),
        st.tuples(
            st.integers(0, len(GOOD) - 8),
            st.sampled_from([0, 1, 9, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]).map(
                u64
            ),
        ),
        st.tuples(st.integers(0, len(GOOD) - 4), st.integers(0, 45).map(u32)),
    ),
    min_size=1,
    max_size=6,
)  # fmt: skip


@settings(
    max_examples=2000,
    derandomize=True,
    database=None,
    deadline=None,  # outcome() has its own
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(edits=edits, cut=st.integers(0, len(GOOD)) | st.none())
def test_fuzzed(tmp_path: Path, edits: list[tuple[int, bytes | int]], cut: int | None) -> None:
    raw = bytearray(GOOD)
    for at, edit in edits:
        if isinstance(edit, int):
            raw[at] ^= 1 << (-1 - edit)
        else:
            raw[at : at + len(edit)] = edit
    outcome(tmp_path / "m.gguf", bytes(raw[:cut]))


def test_every_bit_of_the_header_flipped(tmp_path: Path) -> None:
    begin = len(GOOD) - 336
    for at in range(begin):
        for bit in range(0, 8, 7 if at % 2 else 3):
            raw = bytearray(GOOD)
            raw[at] ^= 1 << bit
            outcome(tmp_path / "m.gguf", bytes(raw))
