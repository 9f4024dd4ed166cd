"""Files of model directories that are truncated, corrupt or hostile: one exception, in bounds."""

from __future__ import annotations

import json
import os
import shutil
import time
import tracemalloc
from pathlib import Path
from typing import Any

import hf_directory as hf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

import headrace
from headrace.errors import HeadraceError, ModelFileError, ModelNotFoundError, UnsupportedError
from headrace.loaders import folder as folders
from headrace.loaders import safetensors as loader
from headrace.loaders.folder import Folder
from headrace.loaders.huggingface import read_directory
from headrace.loaders.safetensors import INDEX, SINGLE, read_part, read_parts

DEADLINE_S = 3.0  # most take 1 ms; the machine may be busy
MEMORY_BYTES = 16 << 20


def craft(header: Any, data: int | bytes = 0, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    raw = data if isinstance(data, bytes) else bytes(data)
    return (len(text) if length is None else length).to_bytes(8, "little") + text + raw


def entry(dtype: str = "F32", shape: Any = (2, 3), offsets: Any = (0, 24)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


GOOD = craft(
    {
        "__metadata__": {"format": "pt"},
        "b": entry("BF16", (5,), (24, 34)),
        "a": entry(),
        "none": entry("F32", (0, 7), (34, 34)),
        "scalar": entry("F8_E4M3", (), (34, 35)),
    },
    35,
)


def outcome(path: Path, raw: bytes) -> HeadraceError | None:
    """Read a file within the time and memory that any file may take; what came of it."""
    path.write_bytes(raw)
    tracemalloc.start()
    begin = time.perf_counter()
    try:
        part = read_part(path)
        for info in part.tensors:
            assert part.header_bytes <= info.offset <= info.offset + info.n_bytes <= len(raw)
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


def library_takes(path: Path) -> bool:
    try:
        with safe_open(path, framework="numpy") as file:
            file.keys()
        return True
    except (SafetensorError, OSError):
        return False


def test_the_good_file_is_good(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    assert outcome(path, GOOD) is None
    assert library_takes(path)
    part = read_part(path)
    begin = part.header_bytes
    found = {t.name: (t.type, t.shape, t.offset - begin, t.n_bytes) for t in part.tensors}
    assert found == {
        "a": ("F32", (2, 3), 0, 24),
        "b": ("BF16", (5,), 24, 10),
        "none": ("F32", (0, 7), 34, 0),
        "scalar": ("F8_E4M3", (), 34, 1),
    }


def test_truncated_at_every_byte(tmp_path: Path) -> None:
    for n in range(len(GOOD)):
        error = outcome(tmp_path / "m.safetensors", GOOD[:n])
        assert isinstance(error, ModelFileError), n
        assert not isinstance(error, UnsupportedError), n
    assert "1 bytes are missing" in str(outcome(tmp_path / "m.safetensors", GOOD[:-1]))


DEEP = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
CRAFTED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "ends after 0 bytes"),
    "header_longer_than_the_file": (craft({}, 0, 1 << 62), "ends inside its header"),
    "header_beyond_all_bounds": (
        craft(b"{" + b" " * (loader.MAX_HEADER_BYTES + 1)), "more than any known model has",
    ),
    "no_header": (craft(b"", 100), "not a safetensors file, it looks like zeros"),
    "a_web_page": (b"<!doctype html><html>" * 40, "looks like a web page"),
    "a_pointer": (b"version https://git-lfs.github.com/spec/v1\n" * 9, "a Git LFS pointer"),
    "a_gguf_file": (b"GGUF" + bytes(100), "not a safetensors file"),
    "a_pickle": (b"\x80\x02" + bytes(100), "pickle"),
    "no_json": (craft(b"{'a'}"), "no valid JSON"),
    "an_array": (craft(b"[]"), "not a safetensors file"),
    "no_utf8": (craft(b'{"\xff": 1}'), "no valid JSON"),
    "nested": (craft(DEEP), "more than 262,144 tensors|nested too deep"),
    "nested_less": (craft(DEEP[:30_005] + b"]" * 30_000 + b"}"), "nested too deep"),
    "a_name_twice": (
        craft(b'{"a": {"dtype":"U8","shape":[1],"data_offsets":[0,1]}, '
              b'"a": {"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1),
        "'a' occurs twice",
    ),
    "a_field_twice": (
        craft(b'{"a": {"dtype":"U8","dtype":"F32","shape":[1],"data_offsets":[0,1]}}', 1),
        "'dtype' occurs twice",
    ),
    "no_entry": (craft({"a": 3}), "its entry is no object"),
    "no_dtype": (craft({"a": {}}), "its entry has no dtype"),
    "unknown_dtype": (craft({"a": entry("F7")}, 24), "unknown type 'F7'"),
    "negative_shape": (craft({"a": entry(shape=(-2, -3))}, 24), "its shape is"),
    "float_shape": (craft({"a": entry(shape=(2.0, 3))}, 24), "its shape is"),
    "bool_shape": (craft({"a": entry(shape=(True, 6))}, 24), "its shape is"),
    "long_shape": (craft({"a": entry(shape=(1,) * 100)}, 4), "its shape is"),
    "overflow": (craft({"a": entry(shape=(1 << 40, 1 << 40))}, 24), "overflows 63 bits"),
    "overflow_to_the_size": (
        craft({"a": entry("U8", (1 << 62, 4), (0, 0))}), "overflows 63 bits",
    ),
    "huge_number": (craft(b'{"a": ' + b"9" * 10_000 + b"}"), "no valid JSON"),
    "nan": (craft(b'{"a": NaN}'), "no JSON number"),
    "shape_and_offsets": (
        craft({"a": entry(shape=(2, 4))}, 24), "24 bytes, but shape .2, 4. of F32 takes 32",
    ),
    "half_bytes": (craft({"a": entry("F4", (3,), (0, 1))}, 1), "takes 1.5"),
    "offsets_backwards": (craft({"a": entry(offsets=(24, 0))}, 24), "its data_offsets are"),
    "offsets_missing": (craft({"a": entry(offsets=None)}, 24), "its data_offsets are"),
    "three_offsets": (craft({"a": entry(offsets=(0, 24, 48))}, 48), "its data_offsets are"),
    "outside": (craft({"a": entry()}, 20), "4 bytes are missing"),
    "a_gap": (craft({"a": entry(), "b": entry(offsets=(32, 56))}, 56), "has a gap before it"),
    "a_gap_at_the_start": (craft({"a": entry(offsets=(8, 32))}, 32), "has a gap before it"),
    "overlap": (craft({"a": entry(), "b": entry(offsets=(12, 36))}, 36), "overlaps"),
    "same_place": (craft({"a": entry(), "b": entry()}, 24), "overlaps"),
    "more_behind": (craft({"a": entry()}, 25), "1 bytes behind the last tensor"),
    "metadata": (craft({"__metadata__": [1]}), "'__metadata__' is no object"),
    "empty_name": (craft({"": entry()}, 24), "the tensor name '' is unusable"),
    "long_name": (craft({"x" * 5000: entry()}, 24), "is unusable"),
    "surrogate": (craft(b'{"\\ud800": 1}'), "is unusable"),
}  # fmt: skip


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted(name: str, tmp_path: Path) -> None:
    raw, message = CRAFTED[name]
    path = tmp_path / "m.safetensors"
    path.write_bytes(raw)
    with pytest.raises(ModelFileError, match=message):
        read_part(path)
    if "bounds" not in name:  # that one alone takes more memory than the check allows
        assert outcome(path, raw) is not None


# What the library takes and we do not: duplicates are the last ones to it.
STRICTER = {"a_name_twice", "a_field_twice", "empty_name", "long_name", "long_shape"}


@pytest.mark.parametrize("name", sorted(CRAFTED.keys() - STRICTER))
def test_the_library_refuses_the_same(name: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(CRAFTED[name][0])
    assert not library_takes(path)


def mutate(raw: bytes, changes: list[tuple[int, int, int]]) -> bytes:
    data = bytearray(raw)
    for kind, at, value in changes:
        at %= len(data)
        if kind == 0:
            data[at] = value
        elif kind == 1:
            data[at:at] = bytes((value,))
        elif len(data) > 1:
            del data[at]
    return bytes(data)


CHANGES = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.integers(0, len(GOOD)),
        st.one_of(st.sampled_from(list(b'0123456789[]{},:"-.eE ')), st.integers(0, 255)),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=600, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=CHANGES)
def test_what_we_take_the_library_takes(changes: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    if outcome(path, mutate(GOOD, changes)) is None:
        assert library_takes(path)
        with safe_open(path, framework="numpy") as file:
            ours = {t.name: list(t.shape) for t in read_part(path).tensors}
            assert {n: file.get_slice(n).get_shape() for n in file.keys()} == ours  # noqa: SIM118


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(
        st.sampled_from(["a", "dtype", "shape", "data_offsets", "__metadata__", "F32"]), inner,
        max_size=4,
    ),
    max_leaves=20,
))  # fmt: skip
def test_any_json_is_a_file_or_an_error(header: Any, tmp_path: Path) -> None:
    outcome(tmp_path / "m.safetensors", craft(header))


# --- indexes and folders --------------------------------------------------------------------------


@pytest.fixture
def split(tmp_path: Path) -> Path:
    return hf.family_directory(tmp_path / "m", "llama2", shards=2)


def index_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / INDEX).read_text())


def refused(folder: Path, message: str, kind: type[HeadraceError] = ModelFileError) -> Any:
    with pytest.raises(kind, match=message) as caught:
        headrace.load(folder)
    assert str(folder) in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "", ".x.safetensors",
     "C:x.safetensors", "a\\b.safetensors", "x\0.safetensors", "x" * 300 + ".safetensors"],
)  # fmt: skip
def test_names_that_lead_elsewhere(split: Path, name: str) -> None:
    shutil.copy(split / "model-00001-of-00002.safetensors", split.parent / "x.safetensors")
    index = index_of(split)
    tensor = next(iter(index["weight_map"]))
    index["weight_map"][tensor] = name
    hf.write_json(split, INDEX, index)
    refused(split, r"no name of a file in this directory|no \.safetensors file")


@pytest.mark.parametrize("name", [SINGLE, "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_links_that_lead_out(name: str, tmp_path: Path) -> None:
    folder = hf.family_directory(tmp_path / "m", "llama2")
    shutil.move(folder / name, tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")
    assert refused(folder, "a link that leads out of its directory").path == folder / name


def test_links_that_stay(tmp_path: Path) -> None:
    folder = hf.family_directory(tmp_path / "m", "llama2")
    (folder / SINGLE).rename(folder / "data")
    (folder / SINGLE).symlink_to("data")
    (tmp_path / "link").symlink_to(folder)
    assert read_directory(folder).tensors
    assert read_directory(tmp_path / "link").tensors


def test_snapshots_of_the_hub_cache(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    folder = hf.family_directory(repository / "snapshots" / "abc", "llama2")
    (repository / "blobs").mkdir()
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(repository / "blobs" / str(i))
        path.symlink_to(f"../../blobs/{i}")
    assert read_directory(folder).tensors
    (tmp_path / "secret").write_bytes((folder / SINGLE).read_bytes())
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to("../../../secret")
    refused(folder, "a link that leads out")


def test_index_and_files_disagree(split: Path) -> None:
    index = index_of(split)
    names = sorted(set(index["weight_map"].values()))
    tensor = next(iter(index["weight_map"]))

    def with_map(change: Any, message: str, kind: type[HeadraceError] = ModelFileError) -> None:
        weight_map = dict(index["weight_map"])
        change(weight_map)
        hf.write_json(split, INDEX, {"weight_map": weight_map})
        refused(split, message, kind)

    with_map(lambda m: m.pop(tensor), "says that this tensor is in None")
    other = next(name for name in names if name != index["weight_map"][tensor])
    with_map(lambda m: m.update({tensor: other}), "says that this tensor is in")
    with_map(lambda m: m.update({"more": other}), "should have this tensor and has not")
    with_map(lambda m: m.update({tensor: 3}), "'weight_map' must give the files")
    with_map(lambda m: m.clear(), "there is no 'weight_map'")
    missing = "model-00009-of-00002.safetensors"
    with_map(
        lambda m: m.update({tensor: missing}),
        "no such file, which model",
        ModelNotFoundError,
    )
    text = json.dumps(index)
    (split / INDEX).write_text(text.replace(f'"{tensor}"', f'"{tensor}": "a", "{tensor}"'))
    refused(split, "occurs twice")
    hf.write_json(split, INDEX, index)
    shutil.copy(split / names[0], split / names[1])
    refused(split, "says that this tensor is in")


def test_truncated_parts_of_a_directory(tmp_path: Path) -> None:
    folder = hf.family_directory(tmp_path / "m", "qwen2")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", SINGLE):
        raw = (folder / name).read_bytes()
        for share in (0, 0.3, 0.999):
            (folder / name).write_bytes(raw[: int(len(raw) * share)])
            error = refused(folder, "download|no valid JSON|missing")
            assert name in str(error)
        (folder / name).write_bytes(raw)
    read_directory(folder)


def test_files_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hf.family_directory(tmp_path / "m", "qwen2")
    with open(folder / "config.json", "r+b") as file:
        file.truncate(5 << 20)
    refused(folder, "more than the 4,194,304 that such a file may have")
    os.truncate(folder / "tokenizer.json", 1 << 40)
    refused(folder, "more than")
    monkeypatch.setattr(folders, "MAX_ARRAYS", 10)
    with pytest.raises(ModelFileError, match="more parts than any known"):
        folders.parse_object(b'{"a": [' + b"[]," * 20 + b"[]]}", folder / "x")


def test_a_fifo_does_not_block(tmp_path: Path) -> None:
    folder = hf.family_directory(tmp_path / "m", "qwen2")
    for name in ("config.json", SINGLE):
        raw = (folder / name).read_bytes()
        (folder / name).unlink()
        os.mkfifo(folder / name)
        refused(folder, "a FIFO, not a regular file")
        (folder / name).unlink()
        (folder / name).write_bytes(raw)


def test_the_parts_of_a_folder(split: Path) -> None:
    parts = read_parts(Folder(split))
    assert [part.path.name for part in parts] == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    ]  # fmt: skip
    assert sum(len(part.tensors) for part in parts) == len(index_of(split)["weight_map"])
    assert all(part.size == part.path.stat().st_size for part in parts)


JSON_BYTES = b'0179[]{},:"-nt '


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["config.json", "tokenizer.json", "tokenizer_config.json"]),
    changes=st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 100_000), st.sampled_from(list(JSON_BYTES))),
        min_size=1, max_size=3,
    ),
)  # fmt: skip
def test_changed_json_is_a_model_or_an_error(
    name: str, changes: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    good = tmp_path_factory.getbasetemp() / "good-qwen2"
    if not good.exists():
        hf.family_directory(good, "qwen2")
    raw = (good / name).read_bytes()
    folder = tmp_path_factory.mktemp("m")
    shutil.copytree(good, folder, dirs_exist_ok=True)
    (folder / name).write_bytes(mutate(raw, changes))
    try:
        read_directory(folder)
    except HeadraceError as error:
        assert str(folder) in str(error)
        str(error).encode()
    finally:
        shutil.rmtree(folder)
