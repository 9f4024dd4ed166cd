"""Our own model files: what is written computes the same, and nothing hostile gets through."""

from __future__ import annotations

import json
import os
import shutil
import struct
import types
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import headrace
from headrace import cli
from headrace.compress import compress
from headrace.errors import HeadraceError, ModelFileError, ModelNotFoundError, UnsupportedError
from headrace.loaders import tiled
from headrace.loaders.gguf import read_gguf
from headrace.loaders.tiled import open_model
from headrace.memory_plan import plan_model
from headrace.model import Model
from headrace.planning import prepare
from headrace.sparse.registry import FORMATS
from headrace.targets.cache import KernelStore

DATA = Path(__file__).parent / "data"
FAMILIES = {path.stem: path for path in sorted((DATA / "families").glob("*.gguf"))}
WIDTH, VOCABULARY, LAYERS = 256, 300, 2
KINDS = [fmt.ggml_type for fmt in FORMATS.values() if fmt.ggml_type]  # with kernels
EXPANDED = ["F64"]
LIST = "llama.attention.head_count_kv"


def raw_matrix(rng: np.random.Generator, kind: str, rows: int, columns: int) -> np.ndarray:
    own = next((f for f in FORMATS.values() if f.ggml_type == kind), None)
    if own is not None and not own.written:
        return own.unpacked.examples(rng, rows, columns)
    if own is not None:
        return own.encode(rng.standard_normal((rows, columns)).astype(np.float32) / 16)
    if kind != "F64":
        raise AssertionError(kind)
    return (rng.standard_normal((rows, columns)) / 16).view(np.uint8)


def write_model(
    path: Path,
    kinds: list[str],
    extra: dict[str, np.ndarray] | None = None,
    *,
    nested: bool = False,
) -> Path:
    """A small Llama whose matrices take turns at the types; 300 rows are no whole tiles."""
    rng = np.random.default_rng(5)
    w = gguf.GGUFWriter(path, "llama")
    w.add_block_count(LAYERS)
    w.add_context_length(64)
    w.add_embedding_length(WIDTH)
    w.add_feed_forward_length(512)
    w.add_head_count(4)
    w.add_array(LIST, [2] * LAYERS)
    w.add_layer_norm_rms_eps(1e-5)
    # Every type of value that there is.
    for kind, value in {
        "uint8": 200, "int8": -7, "uint16": 60000, "int16": -300, "uint32": 1 << 31,
        "int32": -(1 << 30), "uint64": 1 << 63, "int64": -(1 << 62), "float32": 0.1,
        "float64": 0.1, "bool": True, "string": "naïve \U0001f600",
    }.items():  # fmt: skip
        getattr(w, f"add_{kind}")(f"test.{kind}", value)
    if nested:
        w.add_array("test.nested", [[1, 2], [3]])
    w.add_array("test.bytes", [b"\xff\xfe", b""])
    w.add_token_list([f"t{i}" for i in range(VOCABULARY)])

    def matrix(name: str, rows: int, columns: int) -> None:
        kind = kinds[len(used) % len(kinds)]
        used.append(kind)
        raw = raw_matrix(rng, kind, rows, columns)
        w.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[kind])

    used: list[str] = []
    matrix("output.weight", VOCABULARY, WIDTH)  # not the order of a pass
    matrix("token_embd.weight", VOCABULARY, WIDTH)
    w.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    for b in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            w.add_tensor(f"blk.{b}.{name}.weight", np.ones(WIDTH, np.float32))
        w.add_tensor(f"blk.{b}.attn_q.bias", rng.standard_normal(WIDTH).astype(np.float16))
        for name, rows, columns in (
            ("attn_q", 256, 256), ("attn_k", 128, 256), ("attn_v", 128, 256),
            ("attn_output", 256, 256), ("ffn_gate", 512, 256), ("ffn_up", 512, 256),
            ("ffn_down", 256, 512),
        ):  # fmt: skip
            matrix(f"blk.{b}.{name}.weight", rows, columns)
    for name, values in (extra or {}).items():
        w.add_tensor(name, values)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def logits(path: Path, **options: Any) -> np.ndarray:
    with headrace.load(path, threads=2, **options) as model:
        ids = [i * 7 % model.vocabulary for i in range(40)]
        return np.concatenate([model.logits(ids), model.logits(ids[:1]), model.logits(ids[:3])])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiled file of three formats with its source beside it."""
    folder = tmp_path_factory.mktemp("small")
    write_model(folder / "source.gguf", ["Q4_K", "Q8_0", "F16"], nested=True)
    return compress(folder / "source.gguf", folder / "tiled.gguf").path


# --- the same model -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_families_compute_the_same(name: str, tmp_path: Path) -> None:
    done = compress(FAMILIES[name], tmp_path / "m.gguf")
    assert done.size_bytes == done.path.stat().st_size
    assert done.source_bytes == FAMILIES[name].stat().st_size
    assert np.array_equal(logits(FAMILIES[name]), logits(done.path))


@pytest.mark.parametrize("kinds", [KINDS, EXPANDED, *([kind] for kind in KINDS)], ids="-".join)
@pytest.mark.parametrize("activations", ["q8", "f32"])
def test_types_compute_the_same(kinds: list[str], activations: str, tmp_path: Path) -> None:
    source = write_model(tmp_path / "source.gguf", kinds)
    path = compress(source, tmp_path / "m.gguf").path
    expected = logits(source, activations=activations)
    assert np.isfinite(expected).all()
    assert np.array_equal(expected, logits(path, activations=activations))


def test_smollm2_says_the_same(smollm2_path: Path, tmp_path: Path) -> None:
    path = compress(smollm2_path, tmp_path / "m.gguf").path
    with headrace.load(smollm2_path, context=64) as one, headrace.load(path, context=64) as two:
        ids = one.tokenize("The capital of France is")
        assert two.tokenize("The capital of France is") == ids
        assert np.array_equal(one.logits(ids), two.logits(ids))
        assert two.generate(ids, max_tokens=1).text() == " Paris"
        assert one.render_chat([{"role": "user", "content": "x"}]) == two.render_chat(
            [{"role": "user", "content": "x"}]
        )


def test_in_small_pieces(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.rows.PIECE_BYTES", 5000)
    monkeypatch.setattr("headrace.rows.STRAIGHT_BYTES", 5000)
    path = compress(small.with_name("source.gguf"), tmp_path / "m.gguf").path
    assert path.read_bytes() == small.read_bytes()
    assert compress(path, tmp_path / "n.gguf").path.read_bytes() == small.read_bytes()
    pieces = logits(path), logits(path, activations="f32")
    monkeypatch.undo()
    assert np.array_equal(pieces[0], logits(small))
    assert np.array_equal(pieces[1], logits(small, activations="f32"))


def test_a_tiled_file_can_be_written_again(small: Path, tmp_path: Path) -> None:
    again = compress(small, tmp_path / "again.gguf").path
    assert again.read_bytes() == small.read_bytes()


def test_a_split_source(small: Path, tmp_path: Path) -> None:
    whole = read_gguf(small.with_name("source.gguf"))
    names = list(whole.tensors)
    for part, chosen in enumerate((names[:5], names[5:])):
        path = tmp_path / f"m-{part + 1:05}-of-00002.gguf"
        w = gguf.GGUFWriter(path, "llama")
        w.add_uint16("split.no", part)
        w.add_uint16("split.count", 2)
        w.add_int32("split.tensors.count", len(names))
        if part == 0:
            for key in ("block_count", "embedding_length", "feed_forward_length"):
                w.add_uint32(f"llama.{key}", whole.metadata[f"llama.{key}"])
            w.add_uint32("llama.attention.head_count", 4)
            w.add_array(LIST, [2] * LAYERS)
        for name in chosen:
            info = whole.tensors[name]
            raw = whole.read(info).reshape(*info.shape[:-1], -1)
            kind = gguf.GGMLQuantizationType[info.type]
            values = raw.view(np.float32) if info.type == "F32" else raw
            w.add_tensor(name, values, raw_dtype=kind)
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_tensors_to_file()
        w.close()
    path = compress(tmp_path / "m-00001-of-00002.gguf", tmp_path / "whole.gguf").path
    model = open_model(path)
    assert not any(key.startswith("split.") for key in model.metadata)
    assert len(model.paths) == 1
    assert np.array_equal(logits(path), logits(small))


@pytest.mark.parametrize("name", ["blk.1.ffn_up.scale", "blk.1.ffn_up.weight.scale"])
def test_a_scale_for_a_whole_tensor_is_refused(name: str, tmp_path: Path) -> None:
    source = write_model(tmp_path / "s.gguf", ["Q8_0"], {name: np.ones(1, np.float32)})
    with pytest.raises(UnsupportedError, match=rf"blk\.1\.ffn_up\.weight.*{name}.*convert"):
        prepare(source, context=None, threads=1, target=None)
    source = write_model(tmp_path / "s.gguf", ["NVFP4"], {name: np.ones(2, np.float32)})
    with pytest.raises(UnsupportedError, match=rf"{name}.*convert"):
        prepare(source, context=None, threads=1, target=None)


# --- what is in the file --------------------------------------------------------------------------


def test_metadata_are_copied_with_their_types(small: Path) -> None:
    source = gguf.GGUFReader(small.with_name("source.gguf"))
    reader = gguf.GGUFReader(small)
    for key, field in source.fields.items():
        if key.startswith("GGUF."):
            continue
        copy = reader.fields[key]
        assert copy.types == field.types, key
        assert [p.tobytes() for p in copy.parts] == [p.tobytes() for p in field.parts], key
    added = reader.fields.keys() - source.fields.keys()
    assert added == {"general.alignment", "headrace.version"} | {
        f"headrace.tiled.{name}" for name in ("names", "formats", "rows", "columns")
    }


def test_gguf_tools_can_list_it(small: Path) -> None:
    reader = gguf.GGUFReader(small)
    assert reader.alignment == 4096
    listed = {t.name: t for t in reader.tensors}
    source = read_gguf(small.with_name("source.gguf"))
    assert listed.keys() == source.tensors.keys()
    head = listed["output.weight"]
    assert head.tensor_type == gguf.GGMLQuantizationType.I8
    assert head.data.shape == (FORMATS["q4_k"].tiled_bytes(VOCABULARY, WIDTH),)
    raw = source.read(source.tensors["output.weight"]).reshape(VOCABULARY, -1)
    assert head.data.tobytes() == FORMATS["q4_k"].tile(raw).tobytes()
    norm = listed["output_norm.weight"]
    assert norm.tensor_type == gguf.GGMLQuantizationType.F32
    # llama.cpp insists on this.
    at = 0
    for t in reader.tensors:
        assert t.field.parts[-1][0] == at
        at += -(-int(t.n_bytes) // 4096) * 4096
    assert small.stat().st_size == reader.data_offset + at


def test_matrices_lie_in_the_order_of_a_pass(small: Path) -> None:
    prepared = prepare(small, context=None, threads=1, target=None)
    infos = [p.info for p in prepared.placed]
    assert infos[0].name == "token_embd.weight"
    assert infos[-1].name == "output.weight"
    for before, after in pairwise(infos):
        assert after.offset == -(-(before.offset + before.n_bytes) // 4096) * 4096
    vectors = [t for t in prepared.file.tensors.values() if t.type in ("F32", "F16")]
    assert len(vectors) == 1 + 3 * LAYERS
    assert all(vector.offset < infos[0].offset for vector in vectors)


def test_unused_tensors_are_kept(tmp_path: Path) -> None:
    extra = {"unused": np.arange(12, dtype=np.float32).reshape(2, 2, 3)}
    source = write_model(tmp_path / "source.gguf", ["Q8_0"], extra)
    model = open_model(compress(source, tmp_path / "m.gguf").path)
    info = list(model.tensors.values())[-1]
    assert (info.name, info.shape, info.type) == ("unused", (2, 2, 3), "F32")
    assert model.read(info).tobytes() == extra["unused"].tobytes()


def test_plan_shows_what_it_is(small: Path) -> None:
    source = plan_model(small.with_name("source.gguf"), measure=False).to_dict()
    own = plan_model(small, measure=False).to_dict()
    assert own.pop("file") == small.stat().st_size
    assert own.pop("model") == str(small)
    del source["file"], source["model"]
    for plan in (own, source):
        assert plan.pop("limit") > 0  # what is free just then
    assert own == source


def test_inspect_shows_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_model(tmp_path / "source.gguf", ["Q4_K", "Q8_0", "F16"])
    path = compress(source, tmp_path / "m.gguf").path
    assert cli.main(["inspect", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    before = read_gguf(source).tensors.values()
    assert facts["parameters"] == sum(int(np.prod(t.shape)) for t in before)
    rows = {row["type"]: row for row in facts["types"]}
    assert rows.keys() == {"tiled q4_k", "tiled q8_0", "tiled f16", "F32", "F16"}
    for name, row in rows.items():
        assert row["loads_as"] == ("kernel" if name.startswith("tiled") else "float32 vector")
    assert rows["tiled q4_k"]["bytes"] == rows["tiled q4_k"]["loaded_bytes"]


def test_bench_shows_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_model(tmp_path / "source.gguf", ["Q4_K"])
    path = compress(source, tmp_path / "m.gguf").path
    assert cli.main(["bench", str(path), "-p", "16", "-n", "2", "--runs", "1", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    plan = plan_model(source, measure=False)
    assert facts["format"] == "q4_k"
    assert facts["bytes_per_token"] == plan.bytes_per_token


def test_expanded_types_are_written_as_they_load(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source.gguf", [EXPANDED[0]])
    path = compress(source, tmp_path / "m.gguf").path
    assert plan_model(source, measure=False).expanded
    assert plan_model(path, measure=False).expanded == ()
    assert open_model(path).tensors["output.weight"].type == "tiled f32"


def test_no_tile_kernel_is_loaded(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    load = KernelStore.load

    def spy(self: KernelStore, kernels: Any, *rest: Any) -> dict[str, int]:
        kernels = list(kernels)
        names.extend(kernel.name for kernel in kernels)
        return load(self, kernels, *rest)

    monkeypatch.setattr(KernelStore, "load", spy)
    with headrace.load(small, threads=1) as model:
        assert model.format in ("q4_k", "q8_0", "f16")
    assert names
    assert not [name for name in names if name.startswith("tile_")]


@pytest.mark.parametrize("threads", [1, 3])
def test_progress_of_loading(small: Path, threads: int) -> None:
    calls: list[tuple[int, int | None, str]] = []
    with headrace.load(small, threads=threads, progress=lambda *call: calls.append(call)):
        pass
    loading = [call for call in calls if call[2] == "loading weights"]
    done = [call[0] for call in loading]
    assert done == sorted(done)
    assert done[-1] == loading[-1][1]


# --- hostile files --------------------------------------------------------------------------------


def rewrite(source: Path, to: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy with other headrace.* keys (None leaves one out); tensors and places stay."""
    reader = read_gguf(source)
    listed = {
        key: value.tolist() if hasattr(value, "tolist") else value
        for key, value in reader.metadata.items()
        if key.startswith("headrace.") or key == "general.alignment"
    }
    change(listed)
    keys = tiled._copied_keys(reader, {})
    for key, value in listed.items():
        if value is None:
            continue
        if isinstance(value, int):
            keys.append(tiled._number_key(key, value))
        elif isinstance(value, str):
            keys.append(tiled._string(key) + struct.pack("<I", 8) + tiled._string(value))
        elif value and isinstance(value[0], str):
            keys.append(tiled._strings_key(key, value))
        elif value and isinstance(value[0], float):
            head = struct.pack("<IIQ", 9, 6, len(value))
            keys.append(tiled._string(key) + head + struct.pack(f"<{len(value)}f", *value))
        else:
            head = struct.pack("<IIQ", 9, 11, len(value))
            keys.append(tiled._string(key) + head + struct.pack(f"<{len(value)}q", *value))
    infos = b""
    for i in reader.tensors.values():
        dims = tuple(reversed(i.shape))
        kind = tiled.ggml_types.BY_NAME[i.type].id
        infos += tiled._string(i.name) + struct.pack(
            f"<I{len(dims)}QIQ", len(dims), *dims, kind, i.offset - reader.header_bytes
        )
    head = b"GGUF" + struct.pack("<IQQ", 3, len(reader.tensors), len(keys))
    head += b"".join(keys) + infos
    head += bytes(-len(head) % 4096)
    to.write_bytes(head + source.read_bytes()[reader.header_bytes :])
    return to


def put(key: str, value: Any, index: int | None = None) -> Callable[[dict[str, Any]], None]:
    def change(keys: dict[str, Any]) -> None:
        if index is None:
            keys[key] = value
        else:
            keys[key][index] = value

    return change


def drop_last(*names: str) -> Callable[[dict[str, Any]], None]:
    def change(keys: dict[str, Any]) -> None:
        for name in names:
            keys[f"headrace.tiled.{name}"].pop()

    return change


NAMES, SIZES = "headrace.tiled.names", ("headrace.tiled.rows", "headrace.tiled.columns")
FORMAT = "headrace.tiled.formats"
EVERY = ("names", "formats", "rows", "columns")
HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], None], type[HeadraceError], str]] = {
    "version of the future": (put("headrace.version", 2), UnsupportedError, "update Headrace"),
    "version 0": (put("headrace.version", 0), ModelFileError, "at least 1"),
    "version of text": (put("headrace.version", "1"), ModelFileError, "expected int"),
    "version array": (put("headrace.version", [1]), ModelFileError, "expected int"),
    "alignment": (put("general.alignment", 2048), ModelFileError, "alignment is 2048"),
    "no names": (put(NAMES, None), ModelFileError, "is missing"),
    "no formats": (put(FORMAT, None), ModelFileError, "is missing"),
    "no rows": (put(SIZES[0], None), ModelFileError, "is missing"),
    "no columns": (put(SIZES[1], None), ModelFileError, "is missing"),
    "names of numbers": (put(NAMES, [1, 2]), ModelFileError, "expected StringArray"),
    "rows of text": (put(SIZES[0], ["a"]), ModelFileError, "expected ndarray"),
    "rows of floats": (put(SIZES[0], [1.0]), ModelFileError, "expected integers"),
    "one name less": (drop_last("names"), ModelFileError, "different lengths"),
    "one size less": (drop_last("columns"), ModelFileError, "different lengths"),
    "blob undescribed": (drop_last(*EVERY), ModelFileError, "nothing describes it"),
    "name twice": (put(NAMES, "token_embd.weight", 1), ModelFileError, "a name twice"),
    "no such tensor": (put(NAMES, "ghost", 0), ModelFileError, "nothing describes it"),
    "vector described": (
        put(NAMES, "output_norm.weight", 0), ModelFileError, "is a F32 tensor of shape",
    ),
    "unknown format": (put(FORMAT, "q9_9", 0), UnsupportedError, "no weight format 'q9_9'"),
    "format is a path": (put(FORMAT, "../../x", 0), ModelFileError, "no name of a format"),
    "empty format": (put(FORMAT, "", 0), ModelFileError, "no name of a format"),
    "format too long": (put(FORMAT, "q" * 9999, 0), ModelFileError, "no name of a format"),
    "another format": (put(FORMAT, "q4_0", 0), ModelFileError, "are no q4_0 matrix"),
    "no rows at all": (put(SIZES[0], 0, 0), ModelFileError, "not a size of a matrix"),
    "negative rows": (put(SIZES[0], -16, 0), ModelFileError, "not a size of a matrix"),
    "negative sides": (
        lambda keys: [put(key, -256, 0)(keys) for key in SIZES] and None,
        ModelFileError, "not a size of a matrix",
    ),
    "huge rows": (put(SIZES[0], 1 << 40, 0), ModelFileError, "not a size of a matrix"),
    "huge columns": (put(SIZES[1], 1 << 31, 0), ModelFileError, "metadata call for"),
    "other rows": (put(SIZES[0], VOCABULARY + 1, 0), ModelFileError, "metadata call for"),
    "columns of half a block": (put(SIZES[1], 128, 0), ModelFileError, "metadata call for"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_descriptions(small: Path, tmp_path: Path, case: str) -> None:
    change, kind, message = HOSTILE[case]
    path = rewrite(small, tmp_path / "m.gguf", change)
    with pytest.raises(HeadraceError, match=message) as caught:
        prepare(path, context=None, threads=1, target=None)
    assert type(caught.value) is kind
    assert len(str(caught.value)) < 1000
    assert str(path) in str(caught.value)
    assert cli.main(["plan", str(path)]) == 2
    assert cli.main(["inspect", str(path)]) in (0, 2)


def test_the_unchanged_rewrite_is_good(small: Path, tmp_path: Path) -> None:
    path = rewrite(small, tmp_path / "m.gguf", lambda keys: None)
    assert np.array_equal(logits(path), logits(small))


def test_blobs_of_the_wrong_size(small: Path) -> None:
    """Shapes that agree with the metadata, bytes that do not."""
    from headrace.placing import tiled_format

    info = open_model(small).tensors["output.weight"]
    assert tiled_format(info) is FORMATS["q4_k"]
    for wrong in (
        replace(info, n_bytes=info.n_bytes - 1),
        replace(info, n_bytes=info.n_bytes + 1),
        replace(info, n_bytes=0),
        replace(info, shape=(VOCABULARY + 16, WIDTH)),
        replace(info, shape=(VOCABULARY, WIDTH + 1)),
        replace(info, shape=(WIDTH, VOCABULARY)),
    ):
        with pytest.raises(ModelFileError, match="are no q4_k matrix"):
            tiled_format(wrong)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.01, 0.5, 0.999])
def test_a_truncated_file(small: Path, tmp_path: Path, keep: float) -> None:
    path = tmp_path / "m.gguf"
    raw = small.read_bytes()
    path.write_bytes(raw[: int(len(raw) * keep)])
    with pytest.raises(ModelFileError):
        prepare(path, context=None, threads=1, target=None)


def test_a_file_that_shrinks_before_it_is_loaded(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    shutil.copy(small, path)
    for threads in (1, 3):
        prepared = prepare(path, context=None, threads=threads, target=None)
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(ModelFileError, match="cut or grew"):
            Model(prepared, None)
        shutil.copy(small, path)


# --- writing --------------------------------------------------------------------------------------


def test_other_formats_are_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="--format takes: keep, "):
        compress(small, tmp_path / "m.gguf", format="q2_x")
    assert not list(tmp_path.iterdir())


def test_what_is_in_the_way(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"precious")
    with pytest.raises(HeadraceError, match="--force"):
        compress(small, path)
    assert path.read_bytes() == b"precious"
    compress(small, path, force=True)
    assert path.read_bytes() == small.read_bytes()
    assert list(tmp_path.iterdir()) == [path]
    for wrong, message in (
        (tmp_path, "is a directory"),
        (tmp_path / "no" / "m.gguf", "make it first"),
        (path / "m.gguf", "not a directory"),
        (small, "is the model to be read"),
    ):
        with pytest.raises(HeadraceError, match=message):
            compress(small, wrong, force=True)
    (tmp_path / "link.gguf").symlink_to(small)
    with pytest.raises(HeadraceError, match="is the model to be read"):
        compress(small, tmp_path / "link.gguf", force=True)
    with pytest.raises(ModelNotFoundError):
        compress(tmp_path / "none.gguf", tmp_path / "new.gguf")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_write_leaves_a_part_to_go_on_from(
    small: Path, tmp_path: Path, error: type[BaseException]
) -> None:
    def interrupt(done: int, total: int | None, what: str) -> None:
        if what == "writing" and total and done > total // 2:
            raise error

    old = tmp_path / "old.gguf"
    old.write_bytes(b"old")
    for path in (tmp_path / "m.gguf", old):
        with pytest.raises(error):
            compress(small, path, force=True, progress=interrupt)
    assert old.read_bytes() == b"old"
    assert not (tmp_path / "m.gguf").exists()
    for path in (tmp_path / "m.gguf", old):
        compress(small, path, force=True)
        assert path.read_bytes() == small.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "old.gguf"]


def test_a_full_disk(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = types.SimpleNamespace(free=100_000)
    monkeypatch.setattr("headrace.partial_file.shutil.disk_usage", lambda _: usage)
    with pytest.raises(HeadraceError, match="100 kB free"):
        compress(small, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_an_i8_vector_is_refused(tmp_path: Path) -> None:
    source = write_model(tmp_path / "s.gguf", ["Q8_0"], {"odd": np.zeros(32, np.int8)})
    with pytest.raises(UnsupportedError, match="'odd'"):
        compress(source, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == [source]


def test_the_command(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, path = str(small.with_name("source.gguf")), str(tmp_path / "my model.gguf")
    assert cli.main(["compress", source, path, "--format", "keep"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 2 and "larger than the source: " in err
    assert f"headrace bench '{path}'" in err  # it has no tokenizer
    assert Path(path).read_bytes() == small.read_bytes()
    assert cli.main(["compress", source, path]) == 2
    assert "--force" in capsys.readouterr().err
    assert cli.main(["compress", source, path, "--force"]) == 0
    assert cli.main(["compress", source, path, "--force", "--format", "q2"]) == 2
    assert "--format takes: keep" in capsys.readouterr().err
