"""Statistics of inputs beside those of an independent forward pass, and their cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hf_directory as hf
import numpy as np
import pytest
from reference_llama import ReferenceLlama

import headrace
from headrace import statistics_cache
from headrace.calibration import LayerInputs, calibration_windows
from headrace.calibration_pass import Unit, units_of
from headrace.compress import compress
from headrace.errors import BudgetError
from headrace.families import describe
from headrace.families.decoder import FeedForward, Matrix
from headrace.loaders.gguf import ModelFile, TensorReader
from headrace.loaders.tiled import open_model
from headrace.placing import dense, place
from headrace.rows import raw_rows, read_vector
from headrace.sparse.registry import FORMATS

STORIES = Path(__file__).parent / "data" / "stories260K.gguf"
TEXT = "Once upon a time there was a girl called Lily. She liked to play with a big red ball. " * 60
TOKENS = 1100  # two windows and a rest


def collect(text: str = TEXT, **options: Any) -> dict[str, np.ndarray]:
    model = open_model(STORIES)
    decoder = describe(model)
    arguments = {"tokens": TOKENS, "n_threads": 2, "room": None} | options
    with LayerInputs(model, decoder, text, **arguments) as inputs:
        found = {}
        for matrix in (m for unit in units_of(decoder) for ms in unit.readers for m in ms):
            one = inputs.of(matrix.name)
            assert one is not None
            found[matrix.name] = one.h
        return found


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of statistics that is empty, beside the compiled kernels that are not."""
    monkeypatch.setattr(statistics_cache, "cache_root", lambda: tmp_path)
    return tmp_path / "calibration"


def by_hand(ids: np.ndarray) -> dict[str, np.ndarray]:
    """The sums of x^T x of everything that a matrix is multiplied by, in float64."""
    model = ReferenceLlama(STORIES)
    w, found = model.weights, dict[str, np.ndarray]()

    def add(names: list[str], x: np.ndarray) -> None:
        for name in names:
            found[name] = found.get(name, 0) + x.T @ x

    for row in ids:
        x = w["token_embd.weight"][row]
        for i in range(model.n_layer):
            layer = f"blk.{i}."
            h = model.norm(x, layer + "attn_norm.weight")
            add([f"{layer}attn_{n}.weight" for n in "qkv"], h)
            output = w[layer + "attn_output.weight"]
            w[layer + "attn_output.weight"] = np.eye(len(output))
            attended = model.attention(h, layer)
            w[layer + "attn_output.weight"] = output
            add([layer + "attn_output.weight"], attended)
            x = x + attended @ output.T
            h = model.norm(x, layer + "ffn_norm.weight")
            add([f"{layer}ffn_{n}.weight" for n in ("gate", "up")], h)
            gate, up = (h @ w[f"{layer}ffn_{n}.weight"].T for n in ("gate", "up"))
            inner = gate / (1 + np.exp(-gate)) * up
            add([layer + "ffn_down.weight"], inner)
            x = x + inner @ w[layer + "ffn_down.weight"].T
    return found


def test_statistics_are_those_of_an_independent_pass() -> None:
    model = open_model(STORIES)
    ids = calibration_windows(model, describe(model), TEXT, TOKENS)
    assert ids.shape == (2, 512)
    found, expected = collect(), by_hand(ids)
    assert found.keys() == expected.keys()
    for name, h in found.items():
        # The KV cache has float16.
        assert np.abs(h - expected[name]).max() < 2e-3 * np.abs(expected[name]).max(), name
        assert (h == h.T).all()


@pytest.mark.parametrize(
    "name", ["qwen2", "gemma2", "gemma3", "mixtral", "olmoe", "qwen2moe", "qwen3moe"]
)
def test_layers_in_turn_compute_what_the_whole_model_does(name: str, tmp_path: Path) -> None:
    folder = hf.family_directory(tmp_path / "m", name, dtype="F32")
    model = open_model(folder)
    decoder = describe(model)
    with LayerInputs(model, decoder, TEXT, tokens=100, n_threads=2, room=None) as inputs:
        for unit in units_of(decoder):
            inputs.of(unit.readers[0][0].name)
        ids, hidden = inputs._ids[0], inputs._pass._hidden
        assert hidden is not None
        x = hidden.read(0, len(ids))
    with TensorReader() as reader:
        norm = read_vector(model, reader, decoder.norm)
        p = replace(
            next(p for p in place(model, decoder, "f32") if p.matrix == decoder.head),
            format=FORMATS["f32"],
        )
        head = raw_rows(reader, p, 0, p.matrix.rows)[: p.matrix.rows].view(np.float32)
    x = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + decoder.eps) * norm
    found = x @ head.T
    if decoder.soft_cap:
        found = decoder.soft_cap * np.tanh(found / decoder.soft_cap)
    with headrace.load(folder, threads=2, activations="f32") as whole:
        expected = whole.logits([int(i) for i in ids])
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()


def test_a_short_text_is_one_window() -> None:
    model = open_model(STORIES)
    ids = calibration_windows(model, describe(model), TEXT[:200], TOKENS)
    assert len(ids) == 1
    assert 17 <= ids.shape[1] < 512
    found, expected = collect(TEXT[:200]), by_hand(ids)
    for name, h in found.items():
        assert np.abs(h - expected[name]).max() < 2e-3 * np.abs(expected[name]).max(), name


def test_statistics_are_kept(cache: Path) -> None:
    first = collect()
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    files = sorted(folder.iterdir())
    assert len(files) == 5
    seen: list[str] = []
    again = collect(progress=lambda done, total, what: seen.append(what))
    assert not seen  # nothing was computed
    # A file that is missing or damaged is made again from what is before it.
    files[0].write_bytes(b"damaged")
    files[3].unlink()
    mended = collect(progress=lambda done, total, what: seen.append(what))
    assert "calibrating" in seen
    for name, h in first.items():
        assert (h == again[name]).all()
        np.testing.assert_allclose(mended[name], h, rtol=1e-5, atol=1e-5 * np.abs(h).max())
    collect(TEXT + "More.")
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1  # the windows are the same
    collect("More. " + TEXT)
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 2


def test_the_cache_is_bounded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collect()
    n_bytes = sum(path.stat().st_size for path in cache.rglob("*.npy"))
    monkeypatch.setattr(statistics_cache, "LIMIT_BYTES", n_bytes + n_bytes // 2)
    collect("More. " + TEXT)
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1
    monkeypatch.setattr(statistics_cache, "LIMIT_BYTES", n_bytes // 2)
    said: list[str] = []
    collect("Less. " + TEXT, notice=said.append)
    assert any("too large to be kept" in line for line in said)
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1


def test_too_little_memory() -> None:
    with pytest.raises(BudgetError, match="calibrating a layer takes"):
        collect(room=1_000_000)


# --- mixtures of experts --------------------------------------------------------------------------


def all_units(inputs: LayerInputs, model: ModelFile) -> Iterator[tuple[Unit, list[np.ndarray]]]:
    """Each unit and its sums."""
    for unit in units_of(describe(model)):
        inputs.of(unit.readers[0][0].name)
        found = inputs._cache.get(unit.name, unit.sizes)
        assert found is not None
        yield unit, found


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen2moe", "qwen3moe"])
def test_experts_are_calibrated_on_the_tokens_that_chose_them(name: str, tmp_path: Path) -> None:
    model = open_model(hf.family_directory(tmp_path / "m", name, dtype="F32"))
    decoder = describe(model)
    matrices = {p.matrix.name: p for p in place(model, decoder, "f32")}

    def weights(matrix: Matrix) -> np.ndarray:
        with TensorReader() as reader:
            rows = raw_rows(reader, dense(matrices[matrix.name]), 0, matrix.rows)
        return rows[: matrix.rows].view(np.float32).astype(np.float64)

    with LayerInputs(model, decoder, TEXT, tokens=600, n_threads=2, room=None) as inputs:
        counts: dict[int, float] = {}
        for unit, found in all_units(inputs, model):
            f = unit.layer.feed_forward
            assert isinstance(f, FeedForward)
            if unit.expert is None:
                continue
            # What experts read, by hand, and from there on.
            p = inputs._pass
            assert p._read is not None
            with TensorReader() as reader:
                norm = read_vector(model, reader, unit.layer.feed_forward_norm)
            x = p._read.read(0, p._ids.size).astype(np.float64)
            x = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + decoder.eps) * norm
            mixture = decoder.mixtures()[unit.index]
            logits = x @ weights(mixture.router).T
            mine = np.argsort(-logits, axis=1, kind="stable")[:, : mixture.active] == unit.expert
            x = x[mine.any(axis=1)]
            gate, up = (x @ weights(m).T for m in (f.gate, f.up))
            inner = gate / (1 + np.exp(-gate)) * up
            counts[unit.index] = counts.get(unit.index, 0) + float(found[-1][0, 0])
            assert found[-1][0, 0] == len(x)
            for h, one in zip(found, (x, inner), strict=False):
                expected = one.T @ one
                assert np.abs(h - expected).max() <= 1e-4 * np.abs(expected).max(initial=1e-30)
        assert counts == {i: 600 // 512 * 512 * m.active for i, m in decoder.mixtures().items()}


def test_experts_are_collected_again_where_the_cache_lost_them(tmp_path: Path, cache: Path) -> None:
    path = Path(__file__).parent / "data" / "families" / "qwen2moe.gguf"
    model = open_model(path)

    def collect() -> list[list[np.ndarray]]:
        with LayerInputs(model, describe(model), TEXT, 200, n_threads=2, room=None) as inputs:
            return [found for _, found in all_units(inputs, model)]

    first = collect()
    lost = [next(cache.rglob("layer-1-expert-2.npy")), next(cache.rglob("layer-1.npy"))]
    for one in lost:
        one.unlink()
    again = collect()
    for before, after in zip(first, again, strict=True):
        for a, b in zip(before, after, strict=True):
            assert np.array_equal(a, b)


def test_experts_that_few_tokens_have_chosen(tmp_path: Path) -> None:
    path = Path(__file__).parent / "data" / "families" / "mixtral.gguf"
    few = []
    for tokens in (17, 600):
        said: list[str] = []
        done = compress(
            path, tmp_path / f"{tokens}.gguf", format="i4_g32", calibrate=TEXT,
            calibrate_tokens=tokens, notice=said.append,
        )  # fmt: skip
        lines = [one for one in said if "chosen by fewer tokens of the text than" in one]
        assert [one for one in done.remarks if "chosen by fewer tokens" in one] == lines
        few += [int(one.split()[0]) for one in lines] or [0]
        with headrace.load(done.path, context=64) as model:
            assert np.isfinite(model.logits(list(range(3, 40)))).all()
    experts = sum(len(one.each) for one in describe(open_model(path)).mixtures().values())
    assert few[0] == experts > few[1]  # 17 tokens, 64 inputs
