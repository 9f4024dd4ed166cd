"""Models with group-sparse matrices: written, loaded, streamed, and refused where hostile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference_llama import ReferenceLlama
from targets_here import TARGETS, best
from test_check import check as check_tokens
from test_compress import TEXT
from test_streaming import check as check_streams
from test_streaming import small_pieces  # noqa: F401
from test_tiled import write_model

import headrace
from headrace.compress import compress
from headrace.description import describe_model
from headrace.errors import BudgetError, ModelFileError, UnsupportedError
from headrace.loaders.gguf import read_gguf
from headrace.loaders.tiled import Entry, build_header, open_model, tiled_type
from headrace.memory_plan import plan_model
from headrace.planning import prepare
from headrace.sparse import gqs
from headrace.sparse.registry import FORMATS

STORIES = Path(__file__).parent / "data" / "stories260K.gguf"
NAMES = [f"gqs_g{group}" for group in gqs.GROUPS]
IDS = [1, 403, 407, 261, 378, 432, 285, 286, 261, 400, 31, 72, 80, 90, 100, 110, 120, 130, 140, 150]


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of all three sizes of groups; rows of a matrix keep different numbers of them."""
    folder = tmp_path_factory.mktemp("gqs")
    return _mixed(folder, write_model(folder / "source.gguf", ["F32"]))


def _mixed(folder: Path, source: Path) -> Path:
    """Layers' matrices take turns at the sizes of groups; embedding and head are float32."""
    model, entries, contents = read_gguf(source), [], []
    formats = list(gqs.GROUP_FORMATS.values())
    for i, (name, info) in enumerate(model.tensors.items()):
        raw, kind = model.read(info), None
        if name.startswith("blk.") and len(info.shape) == 2:
            fmt = formats[i % 3]
            w = raw.view(np.float32).reshape(info.shape)
            keep = np.random.default_rng(i).random((len(w), w.shape[1] // fmt.group)) < 0.4
            keep[16:48] &= i % 2 == 1  # whole tiles without units
            raw, kind = gqs.pack_weights(w, keep, fmt.group), fmt.name
        elif len(info.shape) == 2:
            raw, kind = FORMATS["f32"].tile(raw.reshape(info.shape[0], -1)).reshape(-1), "f32"
        type_ = info.type if kind is None else tiled_type(kind)
        entries.append(Entry(name, type_, info.shape, len(raw), kind))
        contents.append(raw.tobytes())
    header, places, size = build_header(model, entries)
    path = folder / "sparse.gguf"
    with path.open("wb") as file:
        file.write(header)
        for at, content in zip(places, contents, strict=True):
            file.seek(at)
            file.write(content)
        file.truncate(size)
    return path


def weights_of(path: Path) -> dict[str, np.ndarray]:
    """The weights that the group-sparse matrices of a file stand for."""
    model, found = open_model(path), {}
    for name, info in model.tensors.items():
        fmt = gqs.GROUP_FORMATS.get(info.type.removeprefix("tiled "))
        if fmt is not None:
            found[name] = gqs.decode(model.read(info), *info.shape, fmt.group)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_weights(name: str, tmp_path: Path) -> None:
    path = compress(STORIES, tmp_path / "m.gguf", format=name, sparsity=0.4, ends="f32").path
    reference, found = ReferenceLlama(STORIES), weights_of(path)
    assert len(found) == 5 * 6  # rows of 172 have no such groups
    for matrix, w in found.items():
        assert (w == 0).mean() >= 0.4
        reference.weights[matrix] = w.astype(np.float64)
    model = open_model(path)
    for matrix, info in model.tensors.items():
        fmt = FORMATS.get(info.type.removeprefix("tiled "))
        if fmt is not None and info.type.startswith("tiled ") and matrix not in found:
            tiled = model.read(info).reshape(-1, info.shape[1] // fmt.block, fmt.tile_block_bytes)
            rows = fmt.decode(fmt.untile(tiled, info.shape[0]))
            reference.weights[matrix] = rows.astype(np.float64)
    wanted = reference.logits(IDS)
    size = float(np.abs(wanted).max())
    with headrace.load(path, context=64, threads=2) as loaded:
        for n in (1, 8, len(IDS)):
            assert float(np.abs(loaded.logits(IDS[:n]) - wanted[:n]).max()) < 0.01 * size
    expanded = headrace.load(path, context=64, activations="f32")
    assert float(np.abs(expanded.logits(IDS) - wanted).max()) < 0.01 * size
    expanded.close()


def test_threads_and_copies_change_no_bit(sparse: Path, tmp_path: Path) -> None:
    copy = compress(sparse, tmp_path / "copy.gguf").path
    found = []
    for path, threads in ((sparse, 1), (sparse, 2), (sparse, 3), (copy, 2)):
        with headrace.load(path, threads=threads) as model:
            ids = [i * 7 % model.vocabulary for i in range(40)]
            parts = (model.logits(ids), model.logits(ids[:1]), model.logits(ids[:7]))
            found.append(np.concatenate(parts))
    assert np.ptp(found[0]) > 0
    for one in found[1:]:
        assert np.array_equal(one, found[0])


@pytest.mark.usefixtures("small_pieces")
def test_streamed_equals_resident(sparse: Path) -> None:
    check_streams(sparse)


@pytest.mark.parametrize("target", [pytest.param(name, marks=best(name)) for name in TARGETS])
def test_checked_tokens_equal_decode(sparse: Path, target: str) -> None:
    with headrace.load(sparse, target=target, threads=2) as model:
        for tokens in (2, 5, 16):
            check_tokens(model, 3, tokens)


def test_what_it_says_of_itself(sparse: Path, tmp_path: Path) -> None:
    rows = {row["type"]: row for row in describe_model(sparse)["types"]}
    for name in NAMES:
        assert rows[f"tiled {name}"]["loads_as"] == "kernel"
    plan = plan_model(sparse, context=64, measure=False)
    with headrace.load(sparse, context=64) as model:
        assert model.plan.weights == plan.weights
    dense = compress(sparse, tmp_path / "dense.gguf", format="q8_0").path
    with headrace.load(sparse, threads=2) as a, headrace.load(dense, threads=2) as b:
        ids = [i * 7 % a.vocabulary for i in range(20)]
        assert np.corrcoef(a.logits(ids).ravel(), b.logits(ids).ravel())[0, 1] > 0.99


def _damaged(source: Path, to: Path, name: str, at: int, value: bytes) -> Path:
    info = open_model(source).tensors[name]
    raw = bytearray(source.read_bytes())
    raw[info.offset + at : info.offset + at + len(value)] = value
    to.write_bytes(raw)
    return to


def test_hostile_files_are_refused(sparse: Path, tmp_path: Path) -> None:
    model = open_model(sparse)
    name, info = next((n, t) for n, t in model.tensors.items() if t.type == "tiled gqs_g16")
    begin = gqs.units_offset(info.shape[0])
    for at, value, message in (
        (3, b"\xff", "begin at unit 0"),
        (7, b"\xff", "has 0 to"),
        (4 * info.shape[0] - 1, b"\x7f", "has 0 to"),
        (4 * info.shape[0] + 6, b"\x80\x7f", "not finite"),
        (begin, b"\xff", "above 127"),
        (begin + 17, b"\xff", "does not begin"),
    ):
        path = _damaged(sparse, tmp_path / "bad.gguf", name, at, value)
        with pytest.raises(ModelFileError, match=message) as caught:
            headrace.load(path, context=64)
        assert caught.value.path == path
        assert caught.value.tensor == name
        assert info.offset <= caught.value.offset < info.offset + info.n_bytes


@pytest.mark.usefixtures("small_pieces")
def test_hostile_units_lead_nowhere_while_they_stream(sparse: Path, tmp_path: Path) -> None:
    """They are not looked at there: every place that 16 bits can name is memory of the model."""
    with pytest.raises(BudgetError) as caught:
        headrace.load(sparse, memory=1, context=64)
    least = caught.value.needed_bytes
    prepared = prepare(sparse, context=64, threads=2, target=None, budget=least)
    assert prepared.residency is not None
    raw, tensors = bytearray(sparse.read_bytes()), open_model(sparse).tensors
    for piece in prepared.residency.streamed:
        info = tensors[piece.matrix]
        if info.type.startswith("tiled gqs"):
            at = info.offset + piece.start
            raw[at : at + piece.read_bytes] = b"\xff" * piece.read_bytes
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    with pytest.raises(ModelFileError, match="above 127"):
        headrace.load(path, context=64)
    with headrace.load(path, memory=least, context=64, threads=2) as loaded:
        assert loaded.streams
        for n in (1, 3, 40):
            loaded.logits([1] * n)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "q4_0", "sparsity": 0.5}, "--sparsity is for"),
        ({"format": "gqs_g32", "sparsity": 1.0}, "less than 1"),
        ({"format": "gqs_g32", "sparsity": float("nan")}, "less than 1"),
        ({"format": "gqs_g32", "ends": "gqs_g32"}, "cannot be group-sparse"),
        ({"format": "gqs_g24"}, "there is no format"),
    ],
)
def test_options(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=message):
        compress(STORIES, tmp_path / "m.gguf", **options)


def test_survivors_are_rounded_by_gptq(tmp_path: Path) -> None:
    divergence = {}
    for method in ("rtn", "gptq"):
        calibrate = {"calibrate": TEXT} if method == "gptq" else {}
        done = compress(
            STORIES, tmp_path / f"{method}.gguf", format="gqs_g16", sparsity=0.0, method=method,
            evaluate=TEXT[: len(TEXT) // 2], **calibrate,
        )  # fmt: skip
        assert done.price is not None
        divergence[method] = done.price["kl_divergence"]
    assert divergence["gptq"] < 0.8 * divergence["rtn"]
