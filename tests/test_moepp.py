"""MoE++: experts that compute nothing, and routers that know what the one before said.

The reference is numpy written from the source that the authors published; that and what could not
be verified are said in `headrace.families.headrace_moepp`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import gguf
import numpy as np
import pytest
from hf_directory import fields, write_json, write_tokenizer, write_weights
from mixtures import check_from_flash, learn_beside, said, same
from reference_llama import ReferenceLlama
from test_bad_models import tiny
from test_calibration import TEXT, all_units
from test_experts import IDS, logits
from test_families import check_close, one_by_one, rounding
from test_switch import OwnSpec, own

import headrace
from headrace.calibration import LayerInputs
from headrace.compress import compress
from headrace.errors import HeadraceError, ModelFileError, UnsupportedError
from headrace.families import describe
from headrace.learned_routes import statistics_path
from headrace.loaders.tiled import open_model
from headrace.memory_plan import plan_model
from headrace.offload import expert_store as store
from headrace.offload.recall import Predictor
from headrace.offload.route_statistics import learn
from headrace.offload.routing_replay import predictor_of, rates, replay
from headrace.planning import bounds
from headrace.routing import record

ARCHITECTURE = "headrace_moepp"
COMPUTED, IDLE, INNER, WIDTH, LAYERS = 5, 4, 512, 64, 3
EXPERTS = COMPUTED + IDLE
HIDDEN = 8 * EXPERTS


def moepp(two_layers: bool = True) -> OwnSpec:
    """A model with all kinds of experts, of which each token takes two."""
    spec = own(tiny(inner=INNER, layers=LAYERS), ARCHITECTURE)
    rng = np.random.default_rng(1)
    spec.set("expert_count", EXPERTS)
    spec.set("expert_used_count", 2)
    spec.set("router_hidden_length", HIDDEN if two_layers else 0)

    def matrix(rows: int, columns: int, scale: float = 1.5) -> np.ndarray:
        return rng.standard_normal((rows, columns)) * (scale / columns**0.5)

    for i in range(LAYERS):
        block = f"blk.{i}."
        for part in ("gate", "up", "down"):
            del spec.tensors[f"{block}ffn_{part}.weight"]
        for e in range(COMPUTED):
            spec.tensors[f"{block}ffn_gate_up.{e}.weight"] = matrix(2 * INNER, WIDTH, 0.7)
            spec.tensors[f"{block}ffn_down.{e}.weight"] = matrix(WIDTH, INNER)
        for e in (COMPUTED, COMPUTED + 1):
            spec.tensors[f"{block}ffn_const.{e}.weight"] = matrix(2, WIDTH)
            spec.tensors[f"{block}ffn_const.{e}.bias"] = rng.standard_normal(WIDTH)
        if two_layers:
            spec.tensors[f"{block}ffn_gate_inp_hidden.weight"] = matrix(HIDDEN, WIDTH, 1.0)
            spec.tensors[f"{block}ffn_gate_inp.weight"] = matrix(EXPERTS, HIDDEN, 2.5)
        else:
            spec.tensors[f"{block}ffn_gate_inp.weight"] = matrix(EXPERTS, WIDTH, 1.5)
        if i:
            spec.tensors[f"{block}ffn_gate_inp_map.weight"] = matrix(EXPERTS, EXPERTS, 1.0)
    return spec


class ReferenceMoEPP(ReferenceLlama):
    """One expert after the other, as the authors' code has it."""

    architecture = ARCHITECTURE

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.before = np.empty(0)  # logits of the layer before
        self.chosen: list[np.ndarray] = []  # of each layer, [n_tok, 2]

    def rope(self, x: np.ndarray) -> np.ndarray:
        """Pairs are halves apart."""
        half = x.shape[-1] // 2
        apart = np.stack((x[..., :half], x[..., half:]), axis=-1).reshape(x.shape)
        turned = super().rope(apart)
        return np.concatenate((turned[..., 0::2], turned[..., 1::2]), axis=-1)

    def feed_forward(self, h: np.ndarray, layer: str) -> np.ndarray:
        w = {n.removeprefix(layer): v for n, v in self.weights.items() if n.startswith(layer)}
        said = h
        if "ffn_gate_inp_hidden.weight" in w:
            said = np.tanh(h @ w["ffn_gate_inp_hidden.weight"].T)
        router = said @ w["ffn_gate_inp.weight"].T
        if layer != "blk.0.":
            router = router + self.before @ w["ffn_gate_inp_map.weight"].T
        self.before = router
        p = np.exp(router) / np.exp(router).sum(axis=1, keepdims=True)
        two = np.argsort(-p, axis=1)[:, :2]
        self.chosen.append(two)
        gates = np.take_along_axis(p, two, axis=1)
        n = p.shape[1]
        if not self.key("zero_expert_weight", False):
            gates = np.where(two == n - 1, 0, gates)
        gates = gates / gates.sum(axis=1, keepdims=True)
        x = h * self.key("expert_input_scale", 2.0)
        out = np.zeros_like(h)
        for token, k in np.ndindex(two.shape):
            out[token] += gates[token, k] * self.expert(w, int(two[token, k]), n, x[token])
        return out

    def expert(self, w: dict[str, np.ndarray], e: int, n: int, x: np.ndarray) -> np.ndarray:
        if e == n - 1:
            return np.zeros_like(x)
        if e == n - 2:
            return x
        if e >= n - 4:
            a = np.exp(w[f"ffn_const.{e}.weight"] @ x)
            a = a / a.sum()
            return a[0] * x + a[1] * w[f"ffn_const.{e}.bias"]
        gate, up = np.split(w[f"ffn_gate_up.{e}.weight"] @ x, 2)
        return w[f"ffn_down.{e}.weight"] @ (gate / (1 + np.exp(-gate)) * up)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return moepp().write(tmp_path_factory.mktemp("moepp") / "m.gguf")


def compare(path: Path, source: Path | None = None) -> np.ndarray:
    """All programs against numpy; the choices of the reference."""
    reference = ReferenceMoEPP(source or path)
    expected = reference.logits(IDS)
    with headrace.load(path, activations="f32", threads=2) as model:
        check_close(model.logits(IDS), expected, rounding(model))
        for pieces in (1, 7):
            cut = one_by_one(model, IDS, lambda _, n=pieces: n)
            rows = ~np.isnan(cut[:, 0])
            check_close(cut[rows], expected[rows], rounding(model))
    return np.stack(reference.chosen, axis=1)


def test_logits_equal_numpy(path: Path) -> None:
    chosen = compare(path)
    # Every kind is chosen, as the best and as the second, and two without a feed-forward at once.
    assert {0, COMPUTED, EXPERTS - 2, EXPERTS - 1} <= set(chosen[..., 0].ravel().tolist())
    assert {0, COMPUTED, EXPERTS - 2, EXPERTS - 1} <= set(chosen[..., 1].ravel().tolist())
    assert (chosen >= COMPUTED).all(axis=2).any()


def test_one_layer_routers_and_weights_of_zero(tmp_path: Path) -> None:
    spec = moepp(two_layers=False)
    spec.set("zero_expert_weight", True, gguf.GGUFValueType.BOOL)
    spec.set("expert_input_scale", 1.0, gguf.GGUFValueType.FLOAT32)
    compare(spec.write(tmp_path / "m.gguf"))


def test_chunks_in_which_nobody_takes_a_feed_forward(tmp_path: Path) -> None:
    """Then there are no visits, and nothing is read."""
    spec = moepp(two_layers=False)
    for i in range(LAYERS):
        router = spec.tensors[f"blk.{i}.ffn_gate_inp.weight"]
        router[:COMPUTED] = 0
        router[COMPUTED:] = np.stack([router[-1], -router[-1], router[-2], -router[-2]])
        if i:
            spec.tensors[f"blk.{i}.ffn_gate_inp_map.weight"][:] = 0
    path = spec.write(tmp_path / "m.gguf")
    assert (compare(path) >= COMPUTED).all()
    least, _ = bounds(path, context=128)
    with headrace.load(path, context=128) as model:
        whole = said(model, IDS)
    with headrace.load(path, context=128, memory=least) as model:
        assert same(said(model, IDS), whole)
        counts = model._held.experts.counts
        assert (counts.hits, counts.late, counts.misses) == (0, 0, 0)


def test_threads_change_nothing(path: Path) -> None:
    with headrace.load(path, context=128, threads=1) as model:
        whole = said(model, IDS)
    for threads in (2, 3):
        with headrace.load(path, context=128, threads=threads) as model:
            assert same(said(model, IDS), whole)


@pytest.mark.parametrize("tiled", [False, True], ids=["gguf", "tiled"])
def test_from_flash_with_every_predictor(tiled: bool, tmp_path: Path) -> None:
    path = moepp().write(tmp_path / "m.gguf")
    if tiled:
        path = compress(path, tmp_path / "q8.gguf", format="q8_0").path
        types = {name: t.type for name, t in open_model(path).tensors.items()}
        kept = ("_inp.", "_inp_hidden.", "_inp_map.")
        assert {types[n] for n in types if any(k in n for k in kept)} == {"tiled f32"}
        assert types["blk.1.ffn_gate.3.weight"] == types["blk.1.ffn_up.3.weight"] == "tiled q8_0"
        assert not any("gate_up" in name for name in types)
    predictors: tuple[Predictor, ...] = ("fitted",) if tiled else get_args(Predictor)
    check_from_flash(path, IDS, learn_beside(path, TEXT, 128), LAYERS * COMPUTED, predictors)


def test_what_computes_nothing_is_neither_hit_nor_miss(path: Path) -> None:
    least, _ = bounds(path, context=128)
    reference = ReferenceMoEPP(path)
    reference.logits(IDS)
    uses = int((np.stack(reference.chosen) < COMPUTED).sum())
    assert 0 < uses < 2 * LAYERS * len(IDS)
    with headrace.load(path, context=128, memory=least) as model:
        cache = model._held.experts
        assert cache is not None
        for i, token in enumerate(IDS):
            model.read_tokens([token], i)
        counts = cache.counts
        assert counts.hits + counts.late + counts.misses == uses
        state = cache._experts.reshape(-1, store.EXPERT_WORDS)[:, store.STATE]
        without = state.reshape(LAYERS, EXPERTS) == store.NOTHING
        assert without[:, COMPUTED:].all() and not without[:, :COMPUTED].any()


def test_traces_and_what_plan_expects(path: Path) -> None:
    trace = record(path, TEXT, tokens=128, threads=2)
    assert trace.experts.tolist() == [EXPERTS] * LAYERS
    assert trace.computed.tolist() == [COMPUTED] * LAYERS
    model = open_model(path)
    ids = LayerInputs(model, describe(model), TEXT, 128, n_threads=1, room=None)._pass._ids[0]
    reference = ReferenceMoEPP(path)
    reference.logits(ids.tolist())
    assert (trace.chosen == np.stack(reference.chosen, axis=1)).mean() > 0.999
    # The router of the next layer knows what it is told by this one's.
    right = (trace.ahead[0, :, 1:, 0] == trace.chosen[:, 1:, 0]).mean()
    assert right > 2 / EXPERTS
    uses = int((trace.chosen < COMPUTED).sum())
    done = replay(trace, 6, "lru", predictor_of("pre-gating", trace, None))
    assert done.hits + done.late + done.misses == uses
    learned = learn(trace, rates(trace))
    statistics = statistics_path(path)
    learned.write(statistics)
    try:
        plan = plan_model(path, memory=bounds(path)[0], measure=False)
        assert plan.bytes_per_token > 0
    finally:
        statistics.unlink()


def test_calibration_sees_what_experts_read(path: Path, tmp_path: Path) -> None:
    model = open_model(path)
    decoder, reference = describe(model), ReferenceMoEPP(path)
    with LayerInputs(model, decoder, TEXT, tokens=128, n_threads=2, room=None) as inputs:
        ids = inputs._pass._ids[0].tolist()
        reference.logits(ids)
        tokens = 0
        for unit, found in all_units(inputs, model):
            if unit.expert is None:
                continue
            p, block = inputs._pass, f"blk.{unit.index}."
            assert p._read is not None
            x = 2 * reference.norm(p._read.read(0, 128).astype(float), block + "ffn_norm.weight")
            x = x[(reference.chosen[unit.index] == unit.expert).any(axis=1)]
            tokens += len(x)
            assert found[-1][0, 0] == len(x)
            expected = x.T @ x
            assert np.abs(found[0] - expected).max() <= 1e-4 * np.abs(expected).max(initial=1e-30)
    assert tokens == sum(int((one < COMPUTED).sum()) for one in reference.chosen)
    done = compress(
        path, tmp_path / "i4.gguf", format="i4_g32", method="gptq", calibrate=TEXT,
        calibrate_tokens=128,
    )  # fmt: skip
    assert np.isfinite(logits(done.path)).all()


# --- safetensors directories ----------------------------------------------------------------------


def directory(folder: Path, path: Path, change: dict[str, Any] | None = None) -> Path:
    """The model as its authors' code saves it."""
    reader = gguf.GGUFReader(path)
    keys = fields(path)
    found = {}
    names = {
        "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "ffn_gate_inp_hidden": "mlp.moe.gate.wg.0", "ffn_gate_inp": "mlp.moe.gate.wg.2",
        "ffn_gate_inp_map": "mlp.moe.gate.gate_map",
        **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
        "attn_output": "self_attn.o_proj",
    }  # fmt: skip
    for tensor in reader.tensors:
        x = np.array(tensor.data, np.float32)
        stem, _, kind = tensor.name.rpartition(".")
        if not stem.startswith("blk."):
            found[f"{names[stem]}.{kind}"] = x
            continue
        _, layer, part, *number = stem.split(".")
        if number:
            expert = f"mlp.moe.experts.experts.{number[0]}"
            inside = {
                "ffn_gate_up": f"{expert}.up_proj.weight", "ffn_down": f"{expert}.down_proj.weight",
                "ffn_const": f"{expert}.wg.weight" if kind == "weight" else f"{expert}.constant",
            }[part]  # fmt: skip
        else:
            inside = f"{names[part]}.{kind}"
        found[f"model.layers.{layer}.{inside}"] = x
    unused = np.full((EXPERTS, EXPERTS), np.nan, np.float32)
    found["model.layers.0.mlp.moe.gate.gate_map.weight"] = unused
    config = {
        "model_type": "MoE++", "architectures": ["MoeForCausalLM"], "hidden_act": "silu",
        "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "rope_scaling": None, "max_position_embeddings": 128,
        "tie_word_embeddings": False, "num_experts": [EXPERTS], "moe_expert_interval": 1,
        "moe_use_mixtral_gating": False, "moe_2layer_gate": True, "moe_use_logits_norm": False,
        "moe_gate_norm_std": 1.0, "moe_feature_no_mul_topk": False, "vocab_size": 80,
        **(change or {}),
    }  # fmt: skip
    folder.mkdir()
    write_weights(folder, found, shards=2)
    write_json(folder, "config.json", config)
    write_tokenizer(folder, {"tokenizer.ggml.pre": "default",
                             "tokenizer.ggml.unknown_token_id": 0, **keys})  # fmt: skip
    return folder


def test_a_directory_gives_the_same(path: Path, tmp_path: Path) -> None:
    folder = directory(tmp_path / "hf", path)
    with headrace.load(path, context=128) as model:
        whole = said(model, IDS)
    least, _ = bounds(folder, context=128)
    for memory in (None, least):
        with headrace.load(folder, context=128, memory=memory) as model:
            assert model.streams == (memory is not None)
            assert same(said(model, IDS), whole)
    done = compress(folder, tmp_path / "m.gguf")
    with headrace.load(done.path, context=128) as model:
        assert same(said(model, IDS), whole)


CHANGES: dict[str, tuple[dict[str, Any], type[HeadraceError], str]] = {
    "logits are normalised": ({"moe_use_logits_norm": True}, UnsupportedError, "logits_norm"),
    "dense layers between": ({"moe_expert_interval": 2}, UnsupportedError, "moe_expert_interval"),
    "no list of experts": ({"num_experts": 9}, ModelFileError, "num_experts"),
    "a list of words": ({"num_experts": ["9"]}, ModelFileError, "config.json: num_experts is '9'"),
    "fewer than none": ({"num_experts": [-1]}, ModelFileError, "config.json: num_experts is -1"),
    "millions": ({"num_experts": [1 << 20]}, ModelFileError, "num_experts is 1048576, expected"),
    "nothing but idle experts": ({"num_experts": [4]}, ModelFileError, "expert_count is 4"),
    "one expert more": ({"num_experts": [EXPERTS + 1]}, ModelFileError, "ffn_gate_inp"),
    "a router of one layer": ({"moe_2layer_gate": False}, UnsupportedError, "gate.wg."),
}


@pytest.mark.parametrize("case", CHANGES)
def test_one_thing_wrong(case: str, path: Path, tmp_path: Path) -> None:
    change, kind, named = CHANGES[case]
    folder = directory(tmp_path / "hf", path, change)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "MoE++"
    with pytest.raises(kind, match=named.replace(".", r"\.")):
        headrace.load(folder)


def test_three_experts_for_a_token(tmp_path: Path) -> None:
    spec = moepp()
    spec.set("expert_used_count", 3)
    with pytest.raises(UnsupportedError, match="takes 2"):
        headrace.load(spec.write(tmp_path / "m.gguf"))
    spec = moepp()
    spec.tensors["blk.1.ffn_gate_up.2.weight"] = np.zeros((2 * INNER + 1, WIDTH))
    with pytest.raises(ModelFileError, match="no gate and up"):
        headrace.load(
            spec.write(
                tmp_path / "m.gguf",
            )
        )
