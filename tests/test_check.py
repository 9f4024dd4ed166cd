"""Checked tokens: their logits and keys and values equal those of decode, bit for bit.

The kernels behind them are compared in `emulated/test_few_tokens.py`, on every target.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from targets_here import best, mark, usual
from test_families import PATHS, TARGETS, recoded, with_number

import headrace
from headrace.kernels.kv_cache import CHUNK
from headrace.model import Model
from headrace.plan import SHORT_TOKENS

KINDS = ["Q8_0", "Q5_0", "Q4_0", "Q4_1", "F16", "BF16", "F32"]


def prompt(model: Model, n: int) -> list[int]:
    rng = np.random.default_rng(n)
    return [int(i) for i in rng.integers(0, model.vocabulary, n)]


def one_by_one(model: Model, ids: list[int], start: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits after each token from `start` as decode gives them, and the cache after all."""
    rows = []
    for i in range(start, len(ids)):
        model.read_tokens(ids[i : i + 1], i)
        rows.append(model._logits().copy())
    return np.array(rows), model._programs.kv_cache.view("kv").copy()


def at_once(model: Model, ids: list[int], start: int) -> tuple[np.ndarray, np.ndarray]:
    """The same in one chunk."""
    with model._begin():
        rows = model._read_guessed(ids[start:], start)
    return np.array(rows), model._programs.kv_cache.view("kv").copy()


def check(model: Model, prefix: int, tokens: int) -> None:
    """Read a prefix, then a chunk, in both ways."""
    ids = prompt(model, prefix + tokens)
    results = []
    for read in (one_by_one, at_once):
        model._programs.kv_cache.view("kv")[:] = 0
        model.forget()
        if prefix:
            model.read_tokens(ids[:prefix])
        results.append(read(model, ids, prefix))
    (logits, cache), (few_logits, few_cache) = results
    assert np.ptp(logits) > 0
    assert np.array_equal(logits, few_logits)
    assert np.array_equal(cache, few_cache)


FAMILIES = [pytest.param(f, t, id=f"{f}-{t}", marks=best(t)) for f in PATHS for t in TARGETS]


@pytest.mark.parametrize(("family", "target"), FAMILIES)
def test_every_family(family: str, target: str) -> None:
    with headrace.load(PATHS[family], threads=2, target=target) as model:
        for prefix, tokens in ((0, 2), (0, SHORT_TOKENS), (20, 5), (37, SHORT_TOKENS)):
            check(model, prefix, tokens)


FORMATS = [
    pytest.param(k, t, id=f"{k}-{t}", marks=mark(t) or usual(k.lower(), t))
    for k in KINDS
    for t in TARGETS
]


@pytest.mark.parametrize(("kind", "target"), FORMATS)
def test_every_format(kind: str, target: str, tmp_path: Path) -> None:
    path = recoded(PATHS["qwen2"], gguf.GGMLQuantizationType[kind], tmp_path / "m.gguf")
    with headrace.load(path, threads=2, target=target) as model:
        assert model.format == kind.lower()
        for prefix, tokens in ((0, 3), (20, SHORT_TOKENS), (33, 7)):
            check(model, prefix, tokens)


@pytest.mark.parametrize("family", ["llama2", "mistral"])  # without and with a window
def test_across_chunks_of_the_cache(family: str, tmp_path: Path) -> None:
    path = with_number(PATHS[family], "llama.context_length", 1024, tmp_path / "long.gguf")
    if family == "mistral":
        path = with_number(path, "llama.attention.sliding_window", 300, tmp_path / "window.gguf")
    for threads in (1, 2, 3):
        with headrace.load(path, threads=threads) as model:
            for prefix in (CHUNK - 1, CHUNK - 7, CHUNK, 2 * CHUNK - 3, 3 * CHUNK - 15):
                check(model, prefix, SHORT_TOKENS)


def test_smollm2(smollm2_path: Path) -> None:
    """Heads that share keys and values, formats of long blocks."""
    with headrace.load(smollm2_path, threads=2, context=512) as model:
        check(model, 250, SHORT_TOKENS)
        check(model, 3, 4)
