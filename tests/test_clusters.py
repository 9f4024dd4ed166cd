"""ReLU models with their neurons in clusters: exactly the dense model, wherever they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference_llama import ReferenceLlama
from test_bad_models import Spec, Type, tiny

import headrace
from headrace.compress import compress

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

    def logits(self, ids: list[int]) -> np.ndarray:
        w = self.weights
        x = w["token_embd.weight"][np.asarray(ids)]
        for i in range(self.n_layer):
            b = f"blk.{i}."
            x = x + self.attention(self.norm(x, b + "attn_norm.weight"), b)
            h = self.norm(x, b + "ffn_norm.weight")
            gate = np.maximum(h @ w[b + "ffn_gate.weight"].T, 0)
            self.firing.append(float((gate > 0).mean()))
            x = x + (gate * (h @ w[b + "ffn_up.weight"].T)) @ w[b + "ffn_down.weight"].T
        return self.norm(x, "output_norm.weight") @ w["output.weight"].T


def logits(path: Path, ids: list[int] = IDS, **options: Any) -> np.ndarray:
    with headrace.load(path, **{"threads": 2, **options}) as model:
        return model.logits(ids)


def by_token(model: headrace.Model, ids: list[int]) -> np.ndarray:
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
