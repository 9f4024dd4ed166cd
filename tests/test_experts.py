"""Mixtures of experts: the same whatever runs them, and files in which they are wrong.

That families compute what transformers does is in test_families.py, kernels in test_kernels.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import gguf
import numpy as np
import pytest
from mixtures import learn_beside, said, same
from test_bad_models import Quant, Spec, key, outcome, tiny

import headrace
from headrace.cli import main
from headrace.compress import compress
from headrace.errors import BudgetError, HeadraceError, ModelFileError, UnsupportedError
from headrace.expert_memory import predictor_bytes
from headrace.learned_routes import statistics_path
from headrace.loaders.tiled import open_model
from headrace.memory_plan import plan_model
from headrace.offload import expert_store as store
from headrace.offload.recall import Predictor
from headrace.planning import bounds, prepare

EXPERTS, ACTIVE, INNER, WIDTH = 6, 2, 32, 64
PARTS = {"gate": (INNER, WIDTH), "up": (INNER, WIDTH), "down": (WIDTH, INNER)}
LARGE = {"gate": (512, WIDTH), "up": (512, WIDTH), "down": (WIDTH, 512)}
LARGER = {"gate": (4096, WIDTH), "up": (4096, WIDTH), "down": (WIDTH, 4096)}
IDS = np.random.default_rng(3).integers(3, 80, 40).tolist()


def mixture(together: bool = True, parts: dict[str, tuple[int, int]] = PARTS) -> Spec:
    """A good model whose layers are mixtures, the experts of a layer together or apart."""
    spec = tiny(inner=parts["gate"][0])
    rng = np.random.default_rng(1)
    spec.set("expert_count", EXPERTS)
    spec.set("expert_used_count", ACTIVE)
    for i in range(2):
        for part, shape in parts.items():
            del spec.tensors[f"blk.{i}.ffn_{part}.weight"]
            all_of_them = rng.standard_normal((EXPERTS, *shape)) * (1.5 / shape[1] ** 0.5)
            if together:
                spec.tensors[f"blk.{i}.ffn_{part}_exps.weight"] = all_of_them
                continue
            for e, one in enumerate(all_of_them):
                spec.tensors[f"blk.{i}.ffn_{part}.{e}.weight"] = one
        spec.tensors[f"blk.{i}.ffn_gate_inp.weight"] = rng.standard_normal((EXPERTS, WIDTH))
    return spec


def logits(path: Path, threads: int = 2) -> np.ndarray:
    with headrace.load(path, threads=threads) as model:
        return model.logits(IDS)


def test_one_tensor_for_all_experts_or_one_for_each(tmp_path: Path) -> None:
    together = logits(mixture().write(tmp_path / "together.gguf"))
    apart = logits(mixture(together=False).write(tmp_path / "apart.gguf"))
    assert np.isfinite(together).all()
    assert np.array_equal(together, apart)


def test_any_number_of_threads_gives_the_same(tmp_path: Path) -> None:
    path = mixture().write(tmp_path / "m.gguf")
    one = logits(path, 1)
    for threads in (2, 3, 5):
        assert np.array_equal(logits(path, threads), one)


def test_another_order_of_experts_changes_nothing(tmp_path: Path) -> None:
    spec, turned = mixture(), mixture()
    for i in range(2):
        for name in (*(f"ffn_{part}_exps" for part in PARTS), "ffn_gate_inp"):
            turned.tensors[f"blk.{i}.{name}.weight"] = spec.tensors[f"blk.{i}.{name}.weight"][::-1]
    found = logits(turned.write(tmp_path / "turned.gguf"))
    assert np.array_equal(found, logits(spec.write(tmp_path / "m.gguf")))


def test_experts_that_are_all_one_feed_forward(tmp_path: Path) -> None:
    """With weights that sum to one, a mixture of equal experts is the dense model."""
    dense, same = tiny(inner=INNER), mixture()
    for i in range(2):
        for part in PARTS:
            one = dense.tensors[f"blk.{i}.ffn_{part}.weight"]
            same.tensors[f"blk.{i}.ffn_{part}_exps.weight"] = np.stack([one] * EXPERTS)
    for name, values in dense.tensors.items():
        if name in same.tensors:
            same.tensors[name] = values
    found = logits(same.write(tmp_path / "same.gguf"))
    expected = logits(dense.write(tmp_path / "dense.gguf"))
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_a_token_reads_the_experts_that_it_takes(tmp_path: Path) -> None:
    path = mixture().write(tmp_path / "m.gguf")
    prepared = prepare(path, context=None, threads=1, target=None)
    one = sum(gguf.quant_shape_to_byte_shape(s, Quant.F32)[-1] * s[0] for s in PARTS.values())
    whole = sum(p.n_bytes for p in prepared.placed) - prepared.placed[0].n_bytes
    assert prepared.placed[0].matrix.name == "token_embd.weight"
    assert prepared.read_bytes == whole - 2 * (EXPERTS - ACTIVE) * one
    assert plan_model(path, measure=False).bytes_per_token == prepared.read_bytes


def shaped(name: str, *shape: int) -> Callable[[Spec], None]:
    return lambda spec: spec.tensors.__setitem__(name, np.zeros(shape, np.float32))


def no_number(name: str) -> Callable[[Spec], None]:
    return lambda spec: spec.tensors[name].__setitem__((3, 7), np.nan)


def without(name: str) -> Callable[[Spec], None]:
    return lambda spec: spec.tensors.__delitem__(name)


ROUTER, GATES = "blk.1.ffn_gate_inp.weight", "blk.1.ffn_gate_exps.weight"
CASES: dict[str, tuple[Callable[[Spec], None], type[HeadraceError], str]] = {
    "no experts": (key("expert_count", 0), ModelFileError, "blk.0.ffn_gate.weight"),
    "fewer than none": (
        key("expert_count", -1, gguf.GGUFValueType.INT32), ModelFileError, "llama.expert_count",
    ),
    "one expert more": (key("expert_count", EXPERTS + 1), ModelFileError, "ffn_gate_inp.weight"),
    "thousands of experts": (key("expert_count", 4096), ModelFileError, "ffn_gate_inp.weight"),
    "millions of experts": (key("expert_count", 1 << 30), ModelFileError, "llama.expert_count"),
    "none of them used": (key("expert_used_count", 0), ModelFileError, "llama.expert_used_count"),
    "more used than there are": (
        key("expert_used_count", EXPERTS + 1), ModelFileError, "llama.expert_used_count",
    ),
    "another way to choose": (key("expert_gating_func", 2), UnsupportedError, "expert_gating_func"),
    "scaled": (
        key("expert_weights_scale", 2.5, gguf.GGUFValueType.FLOAT32), UnsupportedError,
        "expert_weights_scale",
    ),
    "no router": (without(ROUTER), ModelFileError, ROUTER),
    "a router of another width": (shaped(ROUTER, EXPERTS, 32), ModelFileError, ROUTER),
    "a router of what is no number": (
        no_number(ROUTER), ModelFileError, f"tensor '{ROUTER}': row 3, column 7 is nan",
    ),
    "no gates": (without(GATES), ModelFileError, "blk.1.ffn_gate.0.weight"),
    "an expert too few": (shaped(GATES, EXPERTS - 1, INNER, WIDTH), ModelFileError, GATES),
    "an expert too many": (shaped(GATES, EXPERTS + 1, INNER, WIDTH), ModelFileError, GATES),
    "experts in a row": (shaped(GATES, EXPERTS * INNER, WIDTH), ModelFileError, GATES),
    "experts of another width": (
        shaped(GATES, EXPERTS, INNER, 32), ModelFileError, "blk.1.ffn_gate.0.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_thing_wrong(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change, kind, named = CASES[case]
    spec = mixture()
    change(spec)
    path = spec.write(tmp_path / "m.gguf")
    error = outcome(path, monkeypatch)
    assert type(error) is kind, f"{case}: {error!r}"
    assert str(path) in str(error)
    assert named in str(error)


def test_too_many_for_a_token(tmp_path: Path) -> None:
    spec = mixture()
    spec.set("expert_count", 20)
    spec.set("expert_used_count", 17)
    with pytest.raises(UnsupportedError, match="17 experts for a token"):
        headrace.load(spec.write(tmp_path / "m.gguf"))


# --- experts that are brought from flash ----------------------------------------------------------

GOLDENS = ("mixtral", "olmoe", "qwen2moe", "qwen3moe")
FAMILIES = Path(__file__).parent / "data" / "families"


def tokens_of(name: str) -> list[int]:
    with np.load(FAMILIES / f"{name}.npz") as arrays:
        return arrays["ids"].tolist()


@pytest.mark.parametrize("tiled", [False, True], ids=["gguf", "tiled"])
@pytest.mark.parametrize("name", GOLDENS)
def test_a_cache_of_any_size_gives_the_same(name: str, tiled: bool, tmp_path: Path) -> None:
    path, ids = FAMILIES / f"{name}.gguf", tokens_of(name)
    if tiled:
        path = compress(path, tmp_path / "m.gguf").path
    with headrace.load(path, context=128) as model:
        whole = said(model, ids)
    least, most = bounds(path, context=128)
    assert least < most
    room = prepare(path, context=128, threads=1, target=None).room
    assert room is not None
    slots = set()
    for more in (0, 3 * room.slot_bytes):
        with headrace.load(path, context=128, memory=least + more) as model:
            slots.add(model.prepared.slots)
            assert model.streams
            assert same(said(model, ids), whole)
            cache = model._held.experts
            assert cache is not None and cache.words[store.MISSES] > 0
    assert slots == {room.least, room.least + 3}


KINDS = (Quant.Q8_0, Quant.F16, Quant.Q4_0, Quant.F32, Quant.Q5_0, Quant.Q8_0)


def in_many_formats(spec: Spec) -> Spec:
    """The same, experts and the matrices of one having types of their own."""
    for i, (turn, part) in ((i, part) for i in range(2) for part in enumerate(PARTS)):
        for e in range(EXPERTS):
            name, kind = f"blk.{i}.ffn_{part}.{e}.weight", KINDS[(e + turn + i) % len(KINDS)]
            spec.types[name] = kind
            spec.tensors[name] = spec.tensors[name].astype(np.float32)
    return spec


def test_experts_of_many_formats(tmp_path: Path) -> None:
    spec = in_many_formats(mixture(together=False, parts=LARGER))
    plain = mixture(together=False, parts=LARGER)
    for name, kind in spec.types.items():
        if kind != Quant.F32:
            coded = gguf.quantize(spec.tensors[name], kind)
            plain.tensors[name] = gguf.dequantize(coded, kind)
    path = spec.write(tmp_path / "many.gguf")
    with headrace.load(path, context=128) as model:
        whole = said(model, IDS)
    expected = logits(plain.write(tmp_path / "plain.gguf"))
    # Activations of coded weights have 8 bits: about 1% of what they are multiplied by.
    assert np.abs(whole[0] - expected).max() < 0.1 * np.abs(expected).max()
    least, most = bounds(path, context=128)
    for more in (0, (most - least) // 2):
        with headrace.load(path, context=128, memory=least + more) as model:
            assert model.streams
            assert same(said(model, IDS), whole)


def test_fewer_experts_than_a_token_and_those_on_their_way_take(tmp_path: Path) -> None:
    """All of them have room then, and the least memory that is said is one that works."""
    spec = mixture(parts=LARGE)
    for name in [name for name in spec.tensors if name.startswith("blk.1.")]:
        del spec.tensors[name]
    spec.set("block_count", 1)
    spec.set("expert_used_count", EXPERTS - 1)
    path = compress(spec.write(tmp_path / "large.gguf"), tmp_path / "m.gguf").path
    with headrace.load(path, context=128) as model:
        whole = said(model, IDS)
    least, most = bounds(path, context=128)
    assert least < most
    with headrace.load(path, context=128, memory=least) as model:
        assert model.streams and model.prepared.slots == EXPERTS
        assert same(said(model, IDS), whole)


def test_memory_may_change_meanwhile(tmp_path: Path) -> None:
    large = mixture(parts=LARGE).write(tmp_path / "large.gguf")
    path = compress(large, tmp_path / "m.gguf").path
    least, most = bounds(path, context=128)
    with headrace.load(path, context=128) as model:
        whole = said(model, IDS)
        assert not model.streams
    with headrace.load(path, context=128, memory=least) as model:
        assert same(said(model, IDS), whole)
        for memory in (most, least + 500_000, most, least):
            held, taken = model._held, list[np.ndarray]()
            if held.streaming is not None:
                taken.append(held.streaming.window._slots.view("slots"))
            if held.experts is not None:
                taken.append(held.experts._slots.view("slots"))
            assert len(taken) >= model.streams and all(one.any() for one in taken)
            model.memory = memory
            assert not any(one.any() for one in taken)  # given back: there is no room beside it
            assert model.streams == (memory < most)
            assert same(said(model, IDS), whole)


@pytest.mark.parametrize("policy", [store.LRU, store.EDGE, store.EDGE_PRINTED])
def test_policies_change_nothing(policy: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path, ids = FAMILIES / "olmoe.gguf", tokens_of("olmoe")
    least, _ = bounds(path, context=128)
    with headrace.load(path, context=128) as model:
        whole = said(model, ids)
    with headrace.load(path, context=128, memory=least) as model:
        assert model._held.experts is not None
        model._held.experts.words[store.POLICY] = policy
        assert same(said(model, ids), whole)


def kept_bytes(model: headrace.model.Model) -> int:
    """Of matrices in memory."""
    kept = model._held.weights._kept.values()
    return sum(place.n_bytes for places in kept for place in places.values())


def test_fitted_routers_go_where_memory_is_short_and_come_back(tmp_path: Path) -> None:
    path, ids = mixture(parts=LARGE).write(tmp_path / "m.gguf"), IDS
    learned = learn_beside(path)
    (least, most), tables = bounds(path, context=128), predictor_bytes(learned, "fitted")
    with headrace.load(path, context=128) as model:
        whole = said(model, ids)
        assert model.expert_counts is None
    with headrace.load(path, context=128, memory=least + tables) as model:
        hits = stalls = 0.0
        for memory, predictor in (
            (least + tables, "fitted"), (least + tables - 1, "gates"), (least, "gates"),
            (most + tables, None), (least + tables, "fitted"), (least, "gates"),
        ):  # fmt: skip
            model.memory = memory
            with headrace.load(path, context=128, memory=memory) as other:
                assert other.prepared.predictor == (predictor or "fitted")
            assert model.plan.peak_bytes <= memory
            # Of an embedding that is not the head as well rows are looked up where experts are.
            assert kept_bytes(model) == model.prepared.parts["weights"]
            assert model.streams == (predictor is not None)
            if predictor is not None:
                assert model._held.experts is not None and model.prepared.predictor == predictor
                fitted = model._held.experts.router_ahead(0, 1) is not None
                assert fitted == (predictor == "fitted")
            assert same(said(model, ids), whole)
            counts = model.expert_counts
            assert counts is not None and model.stall_s >= stalls
            assert (counts.hits > hits) == (predictor is not None)
            hits, stalls = counts.hits, model.stall_s
        statistics_path(path).unlink()
        model.memory = least + tables
        assert model.prepared.predictor == "gates"
        assert model.plan.peak_bytes <= least + tables
        assert same(said(model, ids), whole)
    with pytest.raises(BudgetError), headrace.load(path, context=128, memory=least) as model:
        model.memory = least - 1


@pytest.mark.parametrize("name", GOLDENS)
def test_predictors_change_nothing(name: str, tmp_path: Path) -> None:
    path, ids = tmp_path / "m.gguf", tokens_of(name)
    path.write_bytes((FAMILIES / f"{name}.gguf").read_bytes())
    least, _ = bounds(path, context=128)
    with headrace.load(path, context=128) as model:
        whole = said(model, ids)
    with pytest.raises(UnsupportedError, match="headrace trace MODEL TEXT --learn"):
        headrace.load(path, context=128, memory=least, predictor="pairs")
    learned = learn_beside(path)
    for predictor in get_args(Predictor):
        tables = predictor_bytes(learned, predictor)
        assert (tables > 0) == (predictor in ("pairs", "affinity", "fitted"))
        with headrace.load(path, context=128, memory=least + tables, predictor=predictor) as model:
            assert same(said(model, ids), whole)
            cache = model._held.experts
            assert cache is not None
            assert (cache.recall is not None) == (predictor in ("pairs", "affinity"))
            assert (cache.router_ahead(0, 1) is not None) == (predictor == "fitted")
            # In front of the embedding, which asks for the first mixture, is the token before.
            assert (cache.router_ahead(0, 2) is not None) == (predictor == "fitted")
            asked = cache.words[store.ASKED]
            assert predictor != "none" or asked == 0
    replace(learned, pairs=learned.pairs[:0]).write(statistics_path(path))
    with pytest.raises(UnsupportedError, match="use predictor 'affinity'"):
        headrace.load(path, context=128, predictor="pairs")
    with pytest.raises(ValueError, match="predictor must be one of"):
        headrace.load(path, context=128, predictor="luck")  # type: ignore[arg-type]


def test_predictors_that_there_are_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a dense model nothing can be learned; an empty name is no default."""
    dense = str(tiny().write(tmp_path / "dense.gguf"))
    for command in (["plan", dense], ["run", dense, "x", "--raw"], ["bench", dense]):
        assert main([*command, "--predictor", "pairs"]) == 2
        said = capsys.readouterr().err
        assert "has no mixtures of experts" in said and "--learn" not in said
        assert main([*command, "--predictor", ""]) == 2
        assert "predictor must be one of" in capsys.readouterr().err


def test_reads_of_experts_that_fail_are_made_again() -> None:
    path, ids = FAMILIES / "olmoe.gguf", tokens_of("olmoe")
    least, _ = bounds(path, context=128)
    with headrace.load(path, context=128, memory=least) as model:
        expected = model.logits(ids)
        cache = model._held.experts
        assert cache is not None
        table = cache._table.reshape(-1, store.READ_WORDS)
        table[::3, store.FILE] = 987654  # no descriptor: the system says EBADF
        with pytest.warns(RuntimeWarning, match=r"reads of .* failed and were made again"):
            assert np.array_equal(model.logits(ids), expected)
        assert cache.mended_reads > 0


def test_a_file_that_is_cut_meanwhile(tmp_path: Path) -> None:
    path, ids = tmp_path / "m.gguf", tokens_of("qwen3moe")
    path.write_bytes((FAMILIES / "qwen3moe.gguf").read_bytes())
    before = path.stat()
    least, _ = bounds(path, context=128)
    with headrace.load(path, context=128, memory=least) as model:
        expected = model.logits(ids)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(ModelFileError, match="changed while it is in use"):
            model.logits(ids)
        path.write_bytes(content)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert np.array_equal(model.logits(ids), expected)


# --- compressing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDENS)
def test_experts_are_compressed_and_routers_stay(name: str, tmp_path: Path) -> None:
    path, ids = FAMILIES / f"{name}.gguf", tokens_of(name)
    with headrace.load(path, context=128) as model:
        expected = model.logits(ids)
    done = compress(path, tmp_path / "q8.gguf", format="q8_0")
    types = {n: t.type for n, t in open_model(done.path).tensors.items()}
    assert {types[n] for n in types if "gate_inp" in n} == {"tiled f32"}
    assert types["blk.0.ffn_down.3.weight"] == "tiled q8_0"
    with headrace.load(done.path, context=128) as model:
        found = model.logits(ids)
        model.generate(ids[:5], max_tokens=3).text()
    # Tokens whose choice of experts the rounding of weights moves are few.
    near = np.abs(found - expected).max(axis=1) < 0.2 * expected.std()
    assert near.mean() > 0.7, near.mean()
    done = compress(path, tmp_path / "i4.gguf", format="i4_g32")
    with headrace.load(done.path, context=128) as model:
        assert np.isfinite(model.logits(ids)).all()


@pytest.mark.parametrize("format", ["gqs_g32", "bitstack"])
def test_what_experts_cannot_be(format: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="experts"):
        compress(FAMILIES / "mixtral.gguf", tmp_path / "m.gguf", format=format, method="rtn")
    assert list(tmp_path.iterdir()) == []
