"""Switch layers: experts of two matrices, of which each token takes one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import gguf
import numpy as np
import pytest
from mixtures import check_from_flash, learn_beside, said, same
from reference_llama import ReferenceLlama
from test_bad_models import Quant, Spec, tiny
from test_calibration import TEXT, all_units
from test_experts import IDS, logits
from test_families import check_close, one_by_one, rounding

import headrace
from headrace.calibration import LayerInputs
from headrace.compress import compress
from headrace.errors import ModelFileError, UnsupportedError
from headrace.families import describe
from headrace.loaders.tiled import open_model
from headrace.memory_plan import plan_model
from headrace.offload.recall import Predictor
from headrace.planning import bounds, prepare

EXPERTS, INNER, WIDTH = 6, 512, 64
ARCHITECTURE = "headrace_switch"


@dataclass
class OwnSpec(Spec):
    """As `Spec`, with keys of the architecture's own."""

    def set(self, key: str, value: object, kind: gguf.GGUFValueType = gguf.GGUFValueType.UINT32):
        mine = key if key.startswith(("tokenizer.", "general.")) else f"{self.architecture}.{key}"
        self.keys[mine] = (value, kind)


def own(spec: Spec, architecture: str) -> OwnSpec:
    """A model of `tiny` as one of another architecture."""
    keys = {
        key.replace("llama.", f"{architecture}.", 1) if key.startswith("llama.") else key: value
        for key, value in spec.keys.items()
    }
    return OwnSpec(keys, spec.tensors, spec.types, architecture)


def switch(together: bool = True) -> OwnSpec:
    """A model whose layers are Switch layers, the experts of a layer together or apart."""
    spec = own(tiny(inner=INNER), ARCHITECTURE)
    rng = np.random.default_rng(1)
    spec.set("expert_count", EXPERTS)
    spec.set("expert_used_count", 1)
    for i in range(2):
        for part, shape in (("up", (INNER, WIDTH)), ("down", (WIDTH, INNER))):
            del spec.tensors[f"blk.{i}.ffn_{part}.weight"]
            all_of_them = rng.standard_normal((EXPERTS, *shape)) * (2.5 / shape[1] ** 0.5)
            if together:
                spec.tensors[f"blk.{i}.ffn_{part}_exps.weight"] = all_of_them
                continue
            for e, one in enumerate(all_of_them):
                spec.tensors[f"blk.{i}.ffn_{part}.{e}.weight"] = one
        del spec.tensors[f"blk.{i}.ffn_gate.weight"]
        spec.tensors[f"blk.{i}.ffn_gate_inp.weight"] = rng.standard_normal((EXPERTS, WIDTH)) * 0.3
    return spec


class ReferenceSwitch(ReferenceLlama):
    """The layer as the paper has it (equations 1 and 2)."""

    architecture = ARCHITECTURE

    def feed_forward(self, h: np.ndarray, layer: str) -> np.ndarray:
        ups, downs = (self.weights[f"{layer}ffn_{part}_exps.weight"] for part in ("up", "down"))
        router = h @ self.weights[layer + "ffn_gate_inp.weight"].T
        p = np.exp(router) / np.exp(router).sum(axis=1, keepdims=True)
        out = np.zeros_like(h)
        for token, e in enumerate(p.argmax(axis=1)):
            out[token] = p[token, e] * (downs[e] @ np.maximum(ups[e] @ h[token], 0))
        return out


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return switch().write(tmp_path_factory.mktemp("switch") / "m.gguf")


def test_logits_equal_numpy(path: Path) -> None:
    expected = ReferenceSwitch(path).logits(IDS)
    with headrace.load(path, activations="f32", threads=2) as model:
        check_close(model.logits(IDS), expected, rounding(model))
        for pieces in (1, 7):
            cut = one_by_one(model, IDS, lambda _, n=pieces: n)
            rows = ~np.isnan(cut[:, 0])
            check_close(cut[rows], expected[rows], rounding(model))


def test_threads_and_experts_apart_change_nothing(path: Path, tmp_path: Path) -> None:
    apart = switch(together=False).write(tmp_path / "apart.gguf")
    with headrace.load(path, context=128, threads=1) as model:
        whole = said(model, IDS)
    for other, threads in ((path, 2), (path, 3), (apart, 2)):
        with headrace.load(other, context=128, threads=threads) as model:
            assert same(said(model, IDS), whole)


@pytest.mark.parametrize("tiled", [False, True], ids=["gguf", "tiled"])
def test_from_flash_with_every_predictor(tiled: bool, path: Path, tmp_path: Path) -> None:
    if tiled:
        path = compress(path, tmp_path / "m.gguf", format="q8_0").path
        types = {name: t.type for name, t in open_model(path).tensors.items()}
        assert types["blk.0.ffn_gate_inp.weight"] == "tiled f32"
        assert types["blk.1.ffn_up.3.weight"] == "tiled q8_0"
    else:
        path = switch().write(tmp_path / "m.gguf")
    learned = learn_beside(path)
    assert (learned.tokens, len(learned.experts), learned.active) == (64, 2, 1)
    predictors: tuple[Predictor, ...] = ("fitted",) if tiled else get_args(Predictor)
    check_from_flash(path, IDS, learned, 2 * EXPERTS, predictors)


def test_a_token_reads_one_expert_of_two_matrices(path: Path) -> None:
    prepared = prepare(path, context=None, threads=1, target=None)
    one = 4 * 2 * INNER * WIDTH
    whole = sum(p.n_bytes for p in prepared.placed) - prepared.placed[0].n_bytes
    assert prepared.read_bytes == whole - 2 * (EXPERTS - 1) * one
    assert plan_model(path, measure=False).bytes_per_token == prepared.read_bytes


def test_experts_of_two_formats(tmp_path: Path) -> None:
    spec = switch(together=False)
    for i in range(2):
        for e in range(EXPERTS):
            for part in ("up", "down"):
                name = f"blk.{i}.ffn_{part}.{e}.weight"
                spec.types[name] = (Quant.Q8_0, Quant.F16)[(e + (part == "up")) % 2]
                spec.tensors[name] = spec.tensors[name].astype(np.float32)
    path = spec.write(tmp_path / "m.gguf")
    with headrace.load(path, context=128) as model:
        whole = said(model, IDS)
    least, _ = bounds(path, context=128)
    with headrace.load(path, context=128, memory=least) as model:
        assert model.streams
        assert same(said(model, IDS), whole)


def test_calibration_sees_what_experts_read(path: Path) -> None:
    model = open_model(path)
    decoder, reference = describe(model), ReferenceSwitch(path)
    tokens = 0
    with LayerInputs(model, decoder, TEXT, tokens=128, n_threads=2, room=None) as inputs:
        for unit, found in all_units(inputs, model):
            if unit.expert is None:
                continue
            p, block = inputs._pass, f"blk.{unit.index}."
            assert p._read is not None
            x = reference.norm(
                p._read.read(0, p._ids.size).astype(float), block + "ffn_norm.weight"
            )
            router = x @ reference.weights[block + "ffn_gate_inp.weight"].T
            x = x[router.argmax(axis=1) == unit.expert]
            tokens += len(x)
            assert found[-1][0, 0] == len(x)
            inner = np.maximum(
                x @ reference.weights[block + "ffn_up_exps.weight"][unit.expert].T, 0
            )
            for h, one in zip(found, (x, inner), strict=False):
                expected = one.T @ one
                assert np.abs(h - expected).max() <= 1e-4 * np.abs(expected).max(initial=1e-30)
    assert tokens == 2 * 128


def test_experts_are_rounded_on_what_they_read(path: Path, tmp_path: Path) -> None:
    done = compress(
        path, tmp_path / "i4.gguf", format="i4_g32", method="gptq", calibrate=TEXT,
        calibrate_tokens=256,
    )  # fmt: skip
    assert np.isfinite(logits(done.path)).all()


def test_one_thing_wrong(tmp_path: Path) -> None:
    spec = switch()
    spec.set("expert_used_count", 2)
    with pytest.raises(UnsupportedError, match="takes 1"):
        headrace.load(spec.write(tmp_path / "two.gguf"))
    kinds = gguf.GGUFValueType
    for name, value, kind, wrong in (
        ("expert_count", -1, kinds.INT32, "is -1, expected at least 1"),
        ("expert_count", 1 << 20, kinds.UINT32, "is 1048576, expected at most 4096"),
        ("expert_count", "8", kinds.STRING, "is str, expected int"),
        ("expert_used_count", 0, kinds.UINT32, "is 0, expected at least 1"),
        ("expert_used_count", -1, kinds.INT32, "is -1, expected at least 1"),
    ):
        spec = switch()
        spec.set(name, value, kind)
        with pytest.raises(ModelFileError, match=rf"headrace_switch\.{name}' {wrong}"):
            headrace.load(spec.write(tmp_path / "number.gguf"))
    spec = switch()
    spec.set("feed_forward_activation", "silu", gguf.GGUFValueType.STRING)
    with pytest.raises(UnsupportedError, match="without a gate whose activation is 'silu'"):
        headrace.load(spec.write(tmp_path / "silu.gguf"))
    spec = switch()
    del spec.tensors["blk.1.ffn_up_exps.weight"]
    with pytest.raises(ModelFileError, match=r"blk\.1\.ffn_up\.0\.weight"):
        headrace.load(spec.write(tmp_path / "up.gguf"))
    with pytest.raises(UnsupportedError, match="mixture of experts already"):
        compress(
            switch().write(tmp_path / "m.gguf"), tmp_path / "o.gguf", to_moe=True, calibrate=TEXT
        )
