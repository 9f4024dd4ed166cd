"""Dense models as mixtures of experts: all experts are the dense model, few are what they say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_directory as hf
import numpy as np
import pytest
from mixtures import weights
from reference_llama import ReferenceLlama
from test_bad_models import Spec, Type, outcome, tiny
from test_compress import STORIES, TEXT, _Stop
from test_families import PATHS

import headrace
from headrace import cli
from headrace.compress import compress
from headrace.errors import BudgetError, HeadraceError, ModelFileError, UnsupportedError
from headrace.families import describe
from headrace.families.headrace_moe import (
    ARCHITECTURE,
    BASE_KEY,
    COUNT_KEY,
    INNER_KEY,
    SHARED_KEY,
    USED_KEY,
)
from headrace.loaders.tiled import format_name, open_model
from headrace.offload import expert_store as store
from headrace.planning import bounds
from headrace.price import price_of

CUT: dict[str, Any] = {"to_moe": True, "experts": 4, "active": 2, "shared": 0.25, "calibrate": TEXT}
IDS = np.random.default_rng(3).integers(3, 500, 60).tolist()


def logits(path: Path, ids: list[int] = IDS, **options: Any) -> np.ndarray:
    with headrace.load(path, threads=2, **options) as model:
        return model.logits(ids)


class Mixture(ReferenceLlama):
    """stories260K with the feed-forwards of another file, by the definition."""

    def __init__(self, path: Path, active: int) -> None:
        super().__init__(STORIES)
        self.weights, self.active = weights(path), active

    def part(self, h: np.ndarray, name: str) -> np.ndarray:
        gate, up, down = (self.weights[name.format(p)] for p in ("gate", "up", "down"))
        x = h @ gate.T
        return (x / (1 + np.exp(-x)) * (h @ up.T)) @ down.T

    def feed_forward(self, h: np.ndarray, layer: str) -> np.ndarray:
        w = self.weights
        wanted = h @ w[layer + "ffn_gate_inp.weight"].T + w[layer + "ffn_gate_inp.bias"]
        found = self.part(h, layer + "ffn_{}_shexp.weight")
        for token, chosen in enumerate(np.argsort(-wanted, axis=1)[:, : self.active]):
            for e in chosen:
                found[token] += self.part(h[token], f"{layer}ffn_{{}}.{e}.weight")
        return found


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K, 172 neurons of a layer: 44 shared, 4 experts of 32 of which 2 are active."""
    return compress(STORIES, tmp_path_factory.mktemp("moe") / "moe.gguf", **CUT).path


def test_all_experts_are_the_dense_model(tmp_path: Path) -> None:
    """As near to the exact result as the dense model's own sums, in another order."""
    whole = compress(STORIES, tmp_path / "m.gguf", **{**CUT, "active": 4}).path
    exact = ReferenceLlama(STORIES).logits(IDS)
    dense = np.abs(logits(STORIES) - exact).max()
    assert np.abs(logits(whole) - exact).max() <= 2 * dense
    model = open_model(whole)
    assert model.metadata["general.architecture"] == ARCHITECTURE
    assert describe(model).mixtures()[0].weighting == "one"


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "llama3", "mistral", "qwen2", "qwen3"])
def test_all_experts_of_every_family(name: str, tmp_path: Path) -> None:
    """Also experts without a shared part (32 neurons in gemma's, one expert)."""
    source = PATHS[name]
    neurons = next(iter(describe(open_model(source)).layers)).feed_forward.inner
    n = 3 if neurons == 128 else 1
    text = "the quick brown fox jumps over the lazy dog. " * 40
    options = {"experts": n, "active": n, "shared": 0.25 if n > 1 else 0.0, "calibrate": text}
    found = compress(source, tmp_path / "m.gguf", to_moe=True, **options).path
    ids = np.random.default_rng(3).integers(3, 100, 60).tolist()
    expected = logits(source, ids, activations="f32")
    # Both round their float16 keys and values alike, but of inputs whose last bits differ.
    error = np.abs(logits(found, ids, activations="f32") - expected)
    assert error.max() <= 2.0**-10 * np.abs(expected).max()


def test_a_directory_of_safetensors_is_a_source(tmp_path: Path) -> None:
    """What metadata say of its norms and rotary pairs still holds, and BF16 stays what it is."""
    folder = hf.family_directory(tmp_path / "m", "llama3", dtype="BF16", shards=2)
    text = "the quick brown fox jumps over the lazy dog. " * 40
    cut: dict[str, Any] = {"experts": 3, "active": 3, "shared": 0.25, "calibrate": text}
    found = compress(folder, tmp_path / "m.gguf", to_moe=True, **cut).path
    ids = np.random.default_rng(3).integers(3, 100, 60).tolist()
    expected = logits(folder, ids, activations="f32")
    error = np.abs(logits(found, ids, activations="f32") - expected)
    assert error.max() <= 2.0**-10 * np.abs(expected).max()
    assert format_name(open_model(found).tensors["blk.0.ffn_gate.1.weight"].type) == "bf16"


def test_active_experts_are_what_the_router_says(path: Path) -> None:
    exact = Mixture(path, 2).logits(IDS)
    dense = np.abs(logits(STORIES) - ReferenceLlama(STORIES).logits(IDS)).max()
    found = logits(path)
    assert np.abs(found - exact).max() <= 4 * dense
    assert np.abs(found - logits(STORIES)).max() > 100 * dense  # two of four are not all


def test_chunks_and_threads_change_nothing(path: Path) -> None:
    one = logits(path)
    with headrace.load(path, threads=1) as model:
        assert np.array_equal(model.logits(IDS), one)


def test_neurons_are_the_source_s(path: Path) -> None:
    source, found = weights(STORIES), weights(path)
    for block in ("blk.0", "blk.4"):
        names = ["_shexp.weight", *(f".{e}.weight" for e in range(4))]
        for part, axis in (("gate", 0), ("up", 0), ("down", 1)):
            dense = source[f"{block}.ffn_{part}.weight"]
            parts = np.concatenate([found[f"{block}.ffn_{part}{n}"] for n in names], axis=axis)
            assert parts.shape == dense.shape
            if part == "gate":
                order = [int(np.flatnonzero((dense == row).all(axis=1))[0]) for row in parts]
                assert sorted(order) == list(range(len(dense)))
            assert np.array_equal(parts, np.take(dense, order, axis=axis))


def test_a_fitted_shared_part_is_nearer(path: Path, tmp_path: Path) -> None:
    fitted = compress(STORIES, tmp_path / "m.gguf", **CUT, fit_shared=True).path
    with headrace.load(STORIES) as model:
        ids = model.tokenize(TEXT)[:300]  # what it is fitted to; the rest is one sentence as well
    dense, plain, better = (logits(p, ids) for p in (STORIES, path, fitted))
    assert np.square(better - dense).mean() < 0.9 * np.square(plain - dense).mean()
    a, b = weights(path), weights(fitted)
    changed = {name for name, values in a.items() if not np.array_equal(values, b[name])}
    assert changed == {f"blk.{i}.ffn_down_shexp.weight" for i in range(5)}


@pytest.mark.parametrize("fmt", ["q8_0", "i4_g32"])
def test_compressed_once_more(path: Path, fmt: str, tmp_path: Path) -> None:
    found = compress(path, tmp_path / "m.gguf", format=fmt, evaluate=TEXT, evaluate_tokens=512)
    model = open_model(found.path)
    kept = {key: value for key, value in open_model(path).metadata.items() if ARCHITECTURE in key}
    assert kept == {key: value for key, value in model.metadata.items() if ARCHITECTURE in key}
    assert len(kept) == 5
    kinds = {i.name: format_name(i.type) for i in model.tensors.values()}
    assert kinds["blk.0.ffn_up.3.weight"] == fmt
    assert kinds["blk.0.ffn_gate_inp.weight"] == "f32"
    price = price_of(model)
    assert price is not None
    assert 0 < price["kl_divergence"] < 0.2


def test_experts_from_flash_change_no_bit(path: Path, tmp_path: Path) -> None:
    small = compress(path, tmp_path / "m.gguf", format="q8_0").path
    expected = logits(small, context=128)
    least, most = bounds(small, context=128)
    assert least < most
    with headrace.load(small, threads=2, context=128, memory=least) as model:
        assert np.array_equal(model.logits(IDS), expected)
        cache = model._held.experts
        assert cache is not None and cache.words[store.MISSES] > 0


def test_a_price_beside_the_dense_model(tmp_path: Path) -> None:
    one = compress(
        STORIES, tmp_path / "m.gguf", **{**CUT, "active": 4}, evaluate=TEXT, evaluate_tokens=512
    )
    assert one.price is not None
    assert one.price["kl_divergence"] < 1e-6
    assert price_of(open_model(one.path)) == one.price


# --- interrupted, refused -------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_what_was_interrupted_goes_on(path: Path, share: float, tmp_path: Path) -> None:
    again = tmp_path / "m.gguf"
    first, rest = _Stop(share), _Stop(2)
    with pytest.raises(KeyboardInterrupt):
        compress(STORIES, again, **CUT, progress=first)
    said: list[str] = []
    compress(STORIES, again, **CUT, progress=rest, notice=said.append, threads=1)
    assert again.read_bytes() == path.read_bytes()
    assert min(rest.seen) > max(first.seen)
    assert any("going on after" in line for line in said)


def test_other_sizes_begin_anew(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        compress(STORIES, tmp_path / "m.gguf", **CUT, progress=_Stop(0.5))
    said: list[str] = []
    compress(STORIES, tmp_path / "m.gguf", **{**CUT, "active": 3}, notice=said.append)
    assert any("begun anew" in line for line in said)


def test_too_little_memory_is_refused_early(path: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"layer.*Allow at least") as caught:
        compress(STORIES, tmp_path / "m.gguf", **CUT, memory=100 << 20)
    assert not list(tmp_path.iterdir())
    enough = compress(STORIES, tmp_path / "m.gguf", **CUT, memory=caught.value.needed_bytes).path
    assert enough.read_bytes() == path.read_bytes()


def test_a_share_that_cannot_be_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    compress(STORIES, tmp_path / "m.gguf", **{**CUT, "shared": 0.6}, notice=said.append)
    assert any("44 of 172 neurons" in line for line in said)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"calibrate": None}, "needs a text"),
        ({"format": "q4_0"}, "no --format"),
        ({"ends": "q4_0"}, "no --format"),
        ({"method": "gptq"}, "no --format"),
        ({"experts": 64}, "too few for 64 experts"),
        ({"active": 5}, "--active"),
        ({"to_moe": False, "calibrate": None}, "are for --to-moe"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=words):
        compress(STORIES, tmp_path / "m.gguf", **{**CUT, **options})
    assert not list(tmp_path.iterdir())


def test_mixtures_are_no_dense_models(path: Path, tmp_path: Path) -> None:
    for source in (path, PATHS["mixtral"]):
        with pytest.raises(UnsupportedError, match="mixture of experts already"):
            compress(source, tmp_path / "m.gguf", **CUT)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "m.gguf"
    text.write_text(TEXT)
    words = ["compress", str(STORIES), str(out), "--to-moe", "--experts", "4", "--active", "2"]
    assert cli.main([*words, "--calibrate", str(text), "--json"]) == 0
    mixture = describe(open_model(out)).mixtures()[0]
    assert (len(mixture.each), mixture.active) == (4, 2)


# --- files in which something is wrong ------------------------------------------------------------


def routed() -> Spec:
    """A good file of the architecture, of 96 neurons 32 shared."""
    spec = tiny(inner=96)
    spec.architecture = ARCHITECTURE
    keys = {COUNT_KEY: 2, USED_KEY: 1, INNER_KEY: 32, SHARED_KEY: 32}
    spec.keys |= {key: (value, Type.UINT32) for key, value in keys.items()}
    spec.keys[BASE_KEY] = "llama", Type.STRING
    for i in range(2):
        for part in ("gate", "up", "down"):
            whole = spec.tensors.pop(f"blk.{i}.ffn_{part}.weight")
            pieces = np.split(whole, 3, axis=1 if part == "down" else 0)
            for name, piece in zip(
                (f"{part}.0", f"{part}.1", f"{part}_shexp"), pieces, strict=True
            ):
                spec.tensors[f"blk.{i}.ffn_{name}.weight"] = piece
        router = np.random.default_rng(i).standard_normal((2, 64))
        spec.tensors[f"blk.{i}.ffn_gate_inp.weight"] = router
    return spec


def setting(key: str, value: Any, kind: Type = Type.UINT32) -> Callable[[Spec], None]:
    return lambda spec: spec.keys.__setitem__(key, (value, kind))


def without(key: str) -> Callable[[Spec], None]:
    return lambda spec: spec.keys.__delitem__(key)


CASES: dict[str, tuple[Callable[[Spec], None], type[HeadraceError], str]] = {
    "no base": (without(BASE_KEY), ModelFileError, BASE_KEY),
    "a base of another type": (setting(BASE_KEY, 7), ModelFileError, BASE_KEY),
    "itself as base": (setting(BASE_KEY, ARCHITECTURE, Type.STRING), UnsupportedError, BASE_KEY),
    "an unknown base": (setting(BASE_KEY, "../common", Type.STRING), UnsupportedError, BASE_KEY),
    "a base that has this one as its base": (
        lambda spec: spec.keys.update({
            BASE_KEY: ("headrace_clusters", Type.STRING),
            "headrace_clusters.base_architecture": (ARCHITECTURE, Type.STRING),
        }), UnsupportedError, BASE_KEY,
    ),
    "a base without its sizes": (setting(BASE_KEY, "qwen2", Type.STRING), ModelFileError, "qwen2."),
    "a base with experts": (setting("llama.expert_count", 2), HeadraceError, "llama.expert"),
    "no count": (without(COUNT_KEY), ModelFileError, COUNT_KEY),
    "no experts": (setting(COUNT_KEY, 0), ModelFileError, COUNT_KEY),
    "millions of experts": (setting(COUNT_KEY, 1 << 30), ModelFileError, COUNT_KEY),
    "neurons are missing": (setting(INNER_KEY, 16), ModelFileError, "96 values"),
    "neurons too many": (setting(SHARED_KEY, 64), ModelFileError, "96 values"),
    "a negative shared part": (setting(SHARED_KEY, -1, Type.INT32), ModelFileError, SHARED_KEY),
    "more used than there are": (setting(USED_KEY, 3), ModelFileError, USED_KEY),
    "a tensor is missing": (
        lambda spec: spec.tensors.__delitem__("blk.1.ffn_up.1.weight"), ModelFileError,
        "blk.1.ffn_up.1.weight",
    ),
}  # fmt: skip


def test_the_good_file_is_the_dense_model(tmp_path: Path) -> None:
    spec = routed()
    spec.keys[USED_KEY] = 2, Type.UINT32
    ids = IDS[:20]
    ids = [i % 70 + 3 for i in ids]
    dense = logits(tiny(inner=96).write(tmp_path / "dense.gguf"), ids)
    found = logits(spec.write(tmp_path / "m.gguf"), ids)
    assert np.abs(found - dense).max() <= 1e-4 * np.abs(dense).max()


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_is_said(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change, kind, words = CASES[name]
    spec = routed()
    change(spec)
    error = outcome(spec.write(tmp_path / "m.gguf"), monkeypatch)
    assert isinstance(error, kind), error
    assert words in str(error)
