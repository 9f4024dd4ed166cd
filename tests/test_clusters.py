"""ReLU models with their neurons in clusters: exactly the dense model, wherever they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mixtures import weights
from reference_llama import ReferenceLlama
from test_bad_models import Quant, Spec, Type, outcome, tiny

import headrace
from headrace import cli
from headrace.cluster_memory import fired_of
from headrace.compress import compress
from headrace.errors import HeadraceError, ModelFileError, UnsupportedError
from headrace.families import describe
from headrace.families.headrace_clusters import (
    ARCHITECTURE,
    BASE_KEY,
    COUNT_KEY,
    clusters_fired,
    neurons_fired,
)
from headrace.fired_clusters import choose_clusters, nearest_count
from headrace.loaders.gguf import TensorReader
from headrace.loaders.tiled import format_name, open_model
from headrace.model import Model
from headrace.offload import expert_store as store
from headrace.placing import place
from headrace.planning import bounds
from headrace.rows import raw_rows

INNER, GROUP, LAYERS = 256, 32, 3
TEXT = "".join(chr(33 + i) for i in np.random.default_rng(5).integers(0, 77, 4000))
IDS = np.random.default_rng(3).integers(3, 80, 60).tolist()


def relu_llama() -> Spec:
    """A ReLU llama whose neurons fire in groups, each for some tokens; in no order.

    The first channel is the same for all tokens, and holds all gates down.
    """
    spec, rng = tiny(inner=INNER, layers=LAYERS), np.random.default_rng(1)
    spec.set("feed_forward_activation", "relu", Type.STRING)
    spec.tensors["token_embd.weight"][:, 0] = 4
    for i in range(LAYERS):
        for name in ("attn_output", "ffn_down"):
            spec.tensors[f"blk.{i}.{name}.weight"][0] = 0
        spec.tensors[f"blk.{i}.ffn_norm.weight"][0] = 1
        groups = np.repeat(rng.standard_normal((INNER // GROUP, 64)) * 0.2, GROUP, axis=0)
        gate = groups + rng.standard_normal((INNER, 64)) * 0.04
        gate[:, 0] = -0.6
        spec.tensors[f"blk.{i}.ffn_gate.weight"] = gate[rng.permutation(INNER)]
    return spec


class ReferenceRelu(ReferenceLlama):
    """The dense model by its definition."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.firing: list[float] = []  # share of the neurons, by layer

    def feed_forward(self, h: np.ndarray, layer: str) -> np.ndarray:
        self.firing.append(float((h @ self.weights[layer + "ffn_gate.weight"].T > 0).mean()))
        return super().feed_forward(h, layer)


def logits(path: Path, ids: list[int] = IDS, **options: Any) -> np.ndarray:
    with headrace.load(path, **{"threads": 2, **options}) as model:
        return model.logits(ids)


def by_token(model: Model, ids: list[int]) -> np.ndarray:
    """Logits after each token, read one by one."""
    model.forget()
    rows = []
    for i, token in enumerate(ids):
        model.read_tokens([token], i)
        rows.append(model._logits().copy())
    return np.array(rows)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return relu_llama().write(tmp_path_factory.mktemp("relu") / "dense.gguf")


@pytest.fixture(scope="module")
def path(source: Path) -> Path:
    to = source.with_name("clusters.gguf")
    return compress(source, to, neuron_clusters=8, calibrate=TEXT, calibrate_tokens=2048).path


@pytest.fixture(scope="module")
def small(path: Path) -> Path:
    return compress(path, path.with_name("q8_0.gguf"), format="q8_0").path


def test_it_is_the_dense_model(source: Path, path: Path) -> None:
    reference = ReferenceRelu(source)
    exact = reference.logits(IDS)
    assert all(0.02 < share < 0.4 for share in reference.firing)  # it is worth a test
    dense = np.abs(logits(source) - exact).max()
    assert np.abs(logits(path) - exact).max() <= 2 * dense
    with headrace.load(source, threads=2) as model:
        one_by_one = np.abs(by_token(model, IDS) - exact).max()
    with headrace.load(path, threads=2) as model:
        assert np.abs(by_token(model, IDS) - exact).max() <= 2 * one_by_one


def test_neurons_are_the_source_s(source: Path, path: Path) -> None:
    dense, cut = weights(source), weights(path)
    for i, clusters in describe(open_model(path)).clustered().items():
        name = "blk.{}.ffn_{}.weight"
        gate = dense[name.format(i, "gate")]
        found = cut[name.format(i, "gate")]
        order = [int(np.flatnonzero((gate == row).all(axis=1))[0]) for row in found]
        assert sorted(order) == list(range(INNER))
        for part, axis in (("up", 0), ("down", 1)):
            parts = [cut[getattr(one, part).name] for one in clusters.each]
            whole = dense[name.format(i, part)]
            assert np.array_equal(np.concatenate(parts, axis=axis), whole.take(order, axis=axis))


def test_what_fired_is_in_the_file(source: Path, path: Path) -> None:
    """The groups of the model are found, the hottest first."""
    model = open_model(path)
    found = fired_of(model, describe(model))
    assert found is not None
    reference = ReferenceRelu(source)
    with headrace.load(source) as loaded:
        ids = loaded.tokenize(TEXT, add_special=False)[:2048]
    reference.logits(ids[:128])  # the context; later windows are alike
    assert found.neurons == pytest.approx(np.mean(reference.firing), rel=0.3)
    for shares in found.clusters:
        assert shares.tolist() == sorted(shares, reverse=True)
        # Neurons in no order would have nearly all clusters of 32 fire.
        assert shares.mean() < 0.6
    assert found.rate(3 * 8) == 1.0
    assert found.read_clusters(3 * 8, 5) == 0
    rest = np.sort(np.concatenate(found.clusters))[: 3 * 8 - 5]
    assert found.read_clusters(5, 1) == pytest.approx(rest.sum(), rel=1e-6)


def test_clusters_of_neurons_that_fire_together() -> None:
    rng = np.random.default_rng(0)
    groups = rng.random((500, 6)) < np.array([0.9, 0.5, 0.3, 0.1, 0.1, 0.05])
    of = rng.permutation(np.arange(6).repeat(32))
    fires = groups[:, of] & (rng.random((500, 192)) < 0.9)
    found = choose_clusters(fires, 6)
    assert [set(of[neurons].tolist()) for neurons in found.neurons] == [
        {i} for i in of[found.neurons[:, 0]]
    ]
    assert np.array_equal(
        found.clusters_fired, fires[:, found.neurons].any(axis=2).mean(axis=0).astype("f4")
    )
    assert np.allclose(found.neurons_fired, fires.mean(axis=0)[found.neurons.reshape(-1)])
    assert found.clusters_fired.tolist() == sorted(found.clusters_fired, reverse=True)


def test_of_independent_neurons_the_hot_ones_lie_together() -> None:
    rng = np.random.default_rng(0)
    chance = rng.permutation(np.exp(-8 * np.arange(256) / 256))
    fires = rng.random((800, 256)) < chance
    found = choose_clusters(fires, 8)
    by_number = fires.reshape(800, 8, 32).any(axis=2).sum(axis=1).mean()
    hot = fires[:, np.argsort(-fires.mean(axis=0), kind="stable")]
    by_heat = hot.reshape(800, 8, 32).any(axis=2).sum(axis=1).mean()
    assert found.clusters_fired.sum() <= by_heat * 1.0001 < 0.8 * by_number


@pytest.mark.parametrize(
    ("neurons", "wanted", "count"),
    [(256, 8, 8), (256, 7, 8), (256, 3, 4), (11008, 64, 43), (11008, 4096, 344), (96, 1, 1)],
)
def test_the_nearest_count(neurons: int, wanted: int, count: int) -> None:
    assert nearest_count(neurons, wanted) == count


def test_threads_and_chunks_change_nothing(small: Path) -> None:
    expected = logits(small)
    for threads in (1, 3, 4):
        assert np.array_equal(logits(small, threads=threads), expected)


def test_what_is_left_out_is_not_read(path: Path, tmp_path: Path) -> None:
    """Clusters that do not fire may have any weights; those that do may not."""
    model, raw = open_model(path), bytearray(path.read_bytes())
    memory, _ = next(budgets(path))
    with headrace.load(path, threads=2, context=128, memory=memory) as loaded:
        expected = by_token(loaded, IDS)
        cache = loaded._held.experts
        assert cache is not None
        uses = cache._experts.reshape(-1, store.EXPERT_WORDS)[:, store.USES].tolist()
    assert 3 <= uses.count(0) <= 12
    for number in np.flatnonzero(np.array(uses) == 0).tolist():
        for part in ("up", "down"):
            info = model.tensors[f"blk.{number // 8}.ffn_{part}.{number % 8}.weight"]
            raw[info.offset : info.offset + info.n_bytes] = b"\xff" * info.n_bytes  # NaN
    changed = tmp_path / "m.gguf"
    changed.write_bytes(raw)
    with headrace.load(changed, threads=2) as loaded:
        assert np.array_equal(by_token(loaded, IDS), expected)


def test_one_cluster_is_the_dense_model_bit_by_bit(source: Path, tmp_path: Path) -> None:
    """Of neurons in the same order; so is a token for which no neuron fires."""
    cut = compress(source, tmp_path / "m.gguf", neuron_clusters=1, calibrate=TEXT,
                   calibrate_tokens=512).path  # fmt: skip
    spec, model = relu_llama(), open_model(cut)
    placed = {p.matrix.name: p for p in place(model, describe(model), "f32")}
    with TensorReader() as reader:
        for i in range(LAYERS):
            name = f"blk.{i}.ffn_gate.weight"
            old = spec.tensors[name].astype("f4")
            new = raw_rows(reader, placed[name], 0, INNER).view("f4")
            order = [int(np.flatnonzero((old == row).all(axis=1))[0]) for row in new]
            spec.tensors[name] = old[order]
            for part, axis in (("up", 0), ("down", 1)):
                name = f"blk.{i}.ffn_{part}.weight"
                spec.tensors[name] = spec.tensors[name].take(order, axis=axis)
    ordered = spec.write(tmp_path / "ordered.gguf")
    assert np.array_equal(logits(cut), logits(ordered))
    with headrace.load(cut, threads=2) as one, headrace.load(ordered, threads=2) as other:
        assert np.array_equal(by_token(one, IDS), by_token(other, IDS))


def test_a_layer_in_which_nothing_fires(path: Path, tmp_path: Path) -> None:
    spec = relu_llama()
    for i in range(LAYERS):
        spec.tensors[f"blk.{i}.ffn_gate.weight"][:, 0] = -50
    dense = spec.write(tmp_path / "dense.gguf")
    cut = compress(dense, tmp_path / "m.gguf", neuron_clusters=4, calibrate=TEXT,
                   calibrate_tokens=512).path  # fmt: skip
    assert np.array_equal(logits(cut), logits(dense))


# --- from flash -----------------------------------------------------------------------------------


def budgets(path: Path, threads: int = 2) -> Iterator[tuple[int, int]]:
    """(bytes, slots): the least, and one with room for some more."""
    least, most = bounds(path, context=128, threads=threads)
    yield least, 8
    yield least + 6 * 8192, 14
    assert least + 6 * 8192 < most


@pytest.mark.parametrize("n", [0, 1])
def test_from_flash_no_bit_changes(small: Path, n: int) -> None:
    with headrace.load(small, threads=2, context=128) as model:
        expected, one_by_one = model.logits(IDS), by_token(model, IDS)
        assert model._held.experts is None
    for threads in (1, 2):
        memory, slots = list(budgets(small, threads))[n]
        with headrace.load(small, threads=threads, context=128, memory=memory) as model:
            assert model.prepared.slots == slots
            assert np.array_equal(model.logits(IDS), expected)
            assert np.array_equal(by_token(model, IDS), one_by_one)
            cache = model._held.experts
            assert cache is not None
            assert cache.words[store.MISSES] > 0
            assert cache.words[store.HITS] > cache.words[store.MISSES]
            assert cache.counts.read_bytes == cache.words[store.MISSES] * 8192


def test_only_what_fires_is_read(path: Path, small: Path) -> None:
    """One token, nothing there before: misses are the clusters that fire for it."""
    memory, _ = next(budgets(small))
    model = open_model(path)
    for token in (7, 40):
        with headrace.load(path, threads=2) as resident:
            resident.read_tokens([token], 0)
            programs = resident._programs
            last = int(programs.buffers.view("listed", "i8")[0])
            gates = programs.buffers.view("gate", "f4")[:INNER].reshape(8, GROUP)
            assert last == int((gates > 0).any(axis=1).sum())
        with headrace.load(small, threads=2, context=128, memory=memory) as streamed:
            streamed.read_tokens([token], 0)
            counts = streamed.expert_counts
            assert counts is not None
            assert 0 < counts.misses < 3 * 8
            assert counts.hits == counts.late == 0
    assert model.metadata["general.architecture"] == ARCHITECTURE


def test_guessed_tokens_get_the_same_bits(small: Path) -> None:
    """`check` reads several tokens at once, whose clusters are those of all of them."""
    memory, _ = next(budgets(small))
    prompt = TEXT[:20]
    found = []
    for options in ({}, {"memory": memory}):
        with headrace.load(small, threads=2, context=128, **options) as model:
            for lookup in (False, True):
                answer = model.generate(prompt, raw=True, max_tokens=40, lookup=lookup)
                list(answer)
                found.append(list(answer.ids))
    assert all(ids == found[0] for ids in found)


def test_a_read_that_fails_ends_the_pass(small: Path, tmp_path: Path) -> None:
    copy = tmp_path / "m.gguf"
    copy.write_bytes(small.read_bytes())
    memory, _ = next(budgets(copy))
    with headrace.load(copy, threads=2, context=128, memory=memory) as model:
        with copy.open("r+b") as file:
            file.truncate(copy.stat().st_size // 3)
        with pytest.raises(ModelFileError):
            model.logits(IDS)


# --- making them ----------------------------------------------------------------------------------


def test_compressed_once_more(path: Path, small: Path) -> None:
    first, second = open_model(path), open_model(small)
    kept = {key: value for key, value in first.metadata.items() if ARCHITECTURE in key}
    assert len(kept) == 2
    assert kept == {key: value for key, value in second.metadata.items() if ARCHITECTURE in key}
    kinds = {i.name: format_name(i.type) for i in second.tensors.values()}
    assert kinds["blk.0.ffn_up.3.weight"] == kinds["blk.2.ffn_gate.weight"] == "q8_0"
    for name in (clusters_fired(1), neurons_fired(1)):
        assert np.array_equal(first.read(first.tensors[name]), second.read(second.tensors[name]))
    with pytest.raises(UnsupportedError, match="without --calibrate"):
        compress(path, path.with_name("no.gguf"), format="q4_0", calibrate=TEXT)


def test_the_command_and_the_plan(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "m.gguf"
    text.write_text(TEXT)
    words = ["compress", str(source), str(out), "--neuron-clusters", "9", "--calibrate", str(text)]
    assert cli.main([*words, "--calibrate-tokens", "512"]) == 0
    assert "8 clusters of 32 neurons instead of 9" in capsys.readouterr().err
    assert cli.main(["plan", str(out), "--json"]) == 0
    said = capsys.readouterr().out
    assert '"experts_in_file": 24' in said
    assert '"neurons_fire": 0.' in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"calibrate": None}, "needs a text"),
        ({"format": "q4_0"}, "no --format"),
        ({"to_moe": True}, "exclude each other"),
        ({"neuron_clusters": 0}, "from 1 to"),
    ],
)
def test_options_that_do_not_fit(
    source: Path, options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    cut = {"neuron_clusters": 8, "calibrate": TEXT, "calibrate_tokens": 512, **options}
    with pytest.raises(UnsupportedError, match=words):
        compress(source, tmp_path / "m.gguf", **cut)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_cut(path: Path, tmp_path: Path) -> None:
    silu = tiny(inner=64).write(tmp_path / "silu.gguf")
    odd = relu_llama()
    for i in range(LAYERS):
        for part, axis in (("gate", 0), ("up", 0), ("down", 1)):
            name = f"blk.{i}.ffn_{part}.weight"
            odd.tensors[name] = odd.tensors[name].take(range(100), axis=axis)
    odd.set("feed_forward_length", 100)
    for file, words in (
        (silu, "gated by silu"),
        (path, "already"),
        (odd.write(tmp_path / "odd.gguf"), "multiple of 32"),
    ):
        with pytest.raises(UnsupportedError, match=words):
            compress(file, tmp_path / "m.gguf", neuron_clusters=2, calibrate=TEXT)


# --- files in which something is wrong ------------------------------------------------------------


def clustered() -> Spec:
    """A good file of the architecture."""
    spec = tiny(inner=96)
    spec.architecture = ARCHITECTURE
    spec.set("feed_forward_activation", "relu", Type.STRING)
    spec.keys |= {COUNT_KEY: (3, Type.UINT32), BASE_KEY: ("llama", Type.STRING)}
    for i in range(2):
        spec.tensors[clusters_fired(i)] = np.array([0.9, 0.5, 0.0])
        spec.tensors[neurons_fired(i)] = np.full(96, 0.25)
        for part in ("up", "down"):
            whole = spec.tensors.pop(f"blk.{i}.ffn_{part}.weight")
            for c, piece in enumerate(np.split(whole, 3, axis=1 if part == "down" else 0)):
                spec.tensors[f"blk.{i}.ffn_{part}.{c}.weight"] = piece
    return spec


def setting(key: str, value: Any, kind: Type = Type.UINT32) -> Callable[[Spec], None]:
    return lambda spec: spec.keys.__setitem__(key, (value, kind))


def tensor(name: str, values: Any) -> Callable[[Spec], None]:
    return lambda spec: spec.tensors.__setitem__(name, np.asarray(values))


CASES: dict[str, tuple[Callable[[Spec], Any], type[HeadraceError], str]] = {
    "no base": (lambda spec: spec.keys.pop(BASE_KEY), ModelFileError, BASE_KEY),
    "itself as base": (setting(BASE_KEY, ARCHITECTURE, Type.STRING), UnsupportedError, BASE_KEY),
    "not ReLU": (
        lambda spec: spec.keys.pop("llama.feed_forward_activation"), UnsupportedError, "ReLU",
    ),
    "no clusters": (setting(COUNT_KEY, 0), ModelFileError, COUNT_KEY),
    "millions of clusters": (setting(COUNT_KEY, 1 << 30), ModelFileError, COUNT_KEY),
    "clusters of half a block": (setting(COUNT_KEY, 6), ModelFileError, "6 clusters"),
    "other clusters than neurons": (setting(COUNT_KEY, 1), ModelFileError, clusters_fired(0)),
    "a cluster is missing": (
        lambda spec: spec.tensors.pop("blk.1.ffn_up.1.weight"), ModelFileError,
        "blk.1.ffn_up.1.weight",
    ),
    "clusters of several formats": (
        lambda spec: spec.types.__setitem__("blk.1.ffn_up.2.weight", Quant.Q8_0),
        UnsupportedError, "blk.1.ffn_up.2.weight",
    ),
    "no shares": (
        lambda spec: spec.tensors.pop(neurons_fired(1)), ModelFileError, neurons_fired(1),
    ),
    "a share above one": (
        tensor(clusters_fired(1), [1.5, 0.5, 0]), ModelFileError, clusters_fired(1),
    ),
    "a share that is no number": (
        tensor(neurons_fired(0), np.full(96, np.nan)), ModelFileError, neurons_fired(0),
    ),
}  # fmt: skip


def test_the_good_file_is_the_dense_model(tmp_path: Path) -> None:
    dense = tiny(inner=96)
    dense.set("feed_forward_activation", "relu", Type.STRING)
    expected = logits(dense.write(tmp_path / "dense.gguf"))
    found = logits(clustered().write(tmp_path / "m.gguf"))
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_is_said(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change, kind, words = CASES[name]
    spec = clustered()
    change(spec)
    error = outcome(spec.write(tmp_path / "m.gguf"), monkeypatch)
    assert isinstance(error, kind), error
    assert words in str(error)
