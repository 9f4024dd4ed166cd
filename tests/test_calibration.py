"""Statistics of inputs beside those of an independent forward pass, and their cache."""

from __future__ import annotations

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
from headrace.errors import BudgetError
from headrace.families import describe
from headrace.loaders.gguf import TensorReader
from headrace.loaders.tiled import open_model
from headrace.placing import place
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
        for i in range(len(decoder.layers)):
            found |= {name: one.h for name, one in inputs.layer(i).items()}
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


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gemma3"])
def test_layers_in_turn_compute_what_the_whole_model_does(name: str, tmp_path: Path) -> None:
    folder = hf.family_directory(tmp_path / "m", name, dtype="F32")
    model = open_model(folder)
    decoder = describe(model)
    with LayerInputs(model, decoder, TEXT, tokens=100, n_threads=2, room=None) as inputs:
        for i in range(len(decoder.layers)):
            inputs.layer(i)
        ids, x = inputs._ids[0], inputs._load(0)
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
