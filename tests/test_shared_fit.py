"""Shared parts that make up for rounded experts: beside least squares on all tokens at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_compress import TEXT
from test_expert_bits import EXPERTS, LAYERS, OPTIONS, source, widths_of

import headrace
from headrace.compress import compress
from headrace.errors import HeadraceError
from headrace.expert_trial import Trial, last_windows
from headrace.families import describe
from headrace.families.decoder import Experts, FeedForward, Matrix
from headrace.loaders.gguf import TensorReader
from headrace.loaders.tiled import format_name, open_model
from headrace.placing import PlacedMatrix, dense, place
from headrace.rows import float_matrix
from headrace.shared_fit import RIDGE, SharedSums, shared_downs
from headrace.sparse.registry import FORMATS

__all__ = ["source"]  # a fixture
GPTQ = {**OPTIONS, "method": "gptq", "calibrate_tokens": 4096}
WIDTH, INNER, SHARED, TOKENS, WINDOW = 24, 6, 10, 96, 32

ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": lambda a: a / (1 + np.exp(-a)),
    "gelu": lambda a: 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3))),
    "relu": lambda a: np.maximum(a, 0),
}


def feed_forward(name: str, inner: int, activation: Any, gated: bool) -> FeedForward:
    gate, up, down = (Matrix(f"{name}.{m}", *shape) for m, shape in (
        ("gate", (inner, WIDTH)), ("up", (inner, WIDTH)), ("down", (WIDTH, inner))))  # fmt: skip
    return FeedForward(gate if gated else None, up, down, activation)


class Layer:
    """One layer on random tokens, of which each chooses two of four experts."""

    def __init__(self, activation: str, gated: bool, folder: Path) -> None:
        rng = np.random.default_rng(5)
        self.folder, self.gated, self.act = folder, gated, ACTIVATIONS[activation]

        def random(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape).astype(np.float32)

        self.x, self.s = random(TOKENS, WIDTH), random(TOKENS, SHARED)
        self.picked = np.argsort(random(TOKENS, EXPERTS), axis=1)[:, :2]
        self.shares = np.abs(random(TOKENS, 2))
        sizes = [(INNER, WIDTH)] * (1 + gated) + [(WIDTH, INNER)]
        self.exact = [[random(*size) for size in sizes] for _ in range(EXPERTS)]
        self.rounded = {
            width: [[m + 0.3 / width * random(*m.shape) for m in one] for one in self.exact]
            for width in (2, 4)
        }
        shared = feed_forward("shared", SHARED, activation, gated)
        each = tuple(feed_forward(str(e), INNER, activation, gated) for e in range(EXPERTS))
        self.mixture = Experts(Matrix("router", EXPERTS, WIDTH), each, 2, "all", shared)
        info: Any = None
        self.down = PlacedMatrix(shared.down, info, FORMATS["f32"])
        self.asked = list[int]()

    def place_of(self, name: str) -> tuple[int, int]:
        assert name == "shared.down"
        return 7, 3

    def chosen(self, expert: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, place = np.nonzero(self.picked == expert)
        return tokens, self.shares[tokens, place]

    def watch(self, index: int, taken: int, see: Any) -> None:
        self.asked.append(index)
        common = index == 7
        tokens = np.arange(TOKENS) if common else self.chosen(index - 8)[0]
        for window, first in enumerate(range(0, len(tokens), WINDOW)):
            some = tokens[first : first + WINDOW]
            if common:
                read = (self.x, self.x, self.x, self.s)
            else:
                read = (self.x, self.inner(index - 8, self.exact[index - 8][:-1]))
            for reader, values in enumerate(read):
                see(window, reader, partial(np.ascontiguousarray, values[some].T))

    def inner(self, e: int, matrices: list[np.ndarray]) -> np.ndarray:
        *gate, up = (self.x.astype(np.float64) @ m.T for m in matrices)
        return (self.act(gate[0]) * up if gate else self.act(up)).astype(np.float32)

    def output(self, of: Callable[[int], tuple[list[np.ndarray], np.ndarray]]) -> np.ndarray:
        """What experts add to each token."""
        out = np.zeros((TOKENS, WIDTH))
        for e in range(EXPERTS):
            tokens, shares = self.chosen(e)
            before, down = of(e)
            out[tokens] += shares[:, None] * (self.inner(e, before)[tokens] @ down.T)
        return out


@pytest.mark.parametrize(("activation", "gated"), [("silu", True), ("gelu", True), ("relu", False)])
def test_a_correction_is_that_of_least_squares(
    activation: str, gated: bool, tmp_path: Path
) -> None:
    layer, data = Layer(activation, gated, tmp_path), np.zeros(1 << 20, np.uint8)
    sums = SharedSums({3: layer.mixture}, {3: layer.down}, (2, 4), 64)

    def write(at: int, some: np.ndarray) -> None:
        assert at >= 64 and at + some.size <= sums.size
        data[at : at + some.size] = some

    inputs: Any = layer
    sums.collect(3, lambda e, width: layer.rounded[width][e][:-1], inputs, write, 1)
    assert layer.asked == [7, 8, 9, 10, 11]
    widths = [(2, 2), (2, 4), (4, 2), (4, 4)]  # of gate and up, and of down

    def now(e: int) -> tuple[list[np.ndarray], np.ndarray]:
        before, down = widths[e]
        return layer.rounded[before][e][:-1], layer.rounded[down][e][-1]

    found = sums.correction(
        3, lambda e: (widths[e][0], layer.exact[e][-1], now(e)[1]),
        lambda at, n: data[at : at + n].tobytes(),
    )  # fmt: skip
    missing = layer.output(lambda e: (layer.exact[e][:-1], layer.exact[e][-1])) - layer.output(now)
    s = layer.s.astype(np.float64)
    damped = np.vstack([s, np.eye(SHARED) * np.sqrt(RIDGE * np.square(s).sum() / SHARED)])
    wanted = np.linalg.lstsq(damped, np.vstack([missing, np.zeros((SHARED, WIDTH))]))[0].T
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_a_layer_that_computes_no_finite_numbers(tmp_path: Path) -> None:
    layer = Layer("silu", True, tmp_path)
    layer.rounded[4][2][0][0, 0] = np.nan
    sums, inputs = SharedSums({3: layer.mixture}, {3: layer.down}, (4,), 0), layer
    with pytest.raises(HeadraceError, match="layer 3 computes no finite numbers"):
        sums.collect(
            3, lambda e, width: layer.rounded[width][e][:-1], inputs,  # type: ignore[arg-type]
            lambda at, some: None, 1,
        )  # fmt: skip


def test_which_shared_parts_make_up_for_experts(tmp_path: Path) -> None:
    layer = Layer("silu", True, tmp_path)
    found = shared_downs({3: layer.mixture}, [layer.down])
    assert found == {3: layer.down}
    gated = replace(layer.mixture, shared_gate=Matrix("gate", 1, WIDTH))
    assert not shared_downs({3: gated, 4: replace(layer.mixture, shared=None)}, [layer.down])
    assert not shared_downs({3: layer.mixture}, [replace(layer.down, format=FORMATS["q8_0"])])


def floats(path: Path, name: str) -> np.ndarray:
    model = open_model(path)
    matrix = next(m for m in describe(model).matrices() if m.name == name)
    with TensorReader() as reader:
        found: np.ndarray = float_matrix(model, reader, matrix)[0]
    return found


def test_predictions_come_nearer_to_the_source(source: Path, tmp_path: Path) -> None:
    """At 2 bits, with the shared parts of the file and with the source's."""
    path = compress(source, tmp_path / "m.gguf", expert_bits=(2,), expert_loss=1e6, **GPTQ).path
    assert set(widths_of(path).values()) == {2}
    model = open_model(source)
    downs = shared_downs(describe(model).mixtures(), place(model, describe(model), "q8"))
    assert len(downs) == LAYERS
    windows = last_windows(model, describe(model), TEXT)
    with headrace.load(source, context=windows.context, logits_rows=windows.scored) as loaded:
        trial = Trial(loaded, windows)
        for p in map(dense, place(model, describe(model), "q8")):
            if p.expert:
                trial.put(p.matrix.name, floats(path, p.matrix.name))
        alone = trial.divergence()
        for down in downs.values():
            trial.put(down.matrix.name, floats(path, down.matrix.name))
        assert trial.divergence() < 0.85 * alone
    other = compress(source, tmp_path / "s.gguf", expert_bits=(2,), expert_loss=1e6, **OPTIONS).path
    for down in downs.values():
        exact = floats(source, down.matrix.name)
        assert np.array_equal(floats(other, down.matrix.name), exact)
        assert not np.array_equal(floats(path, down.matrix.name), exact)


def test_shared_parts_of_another_format(source: Path, tmp_path: Path) -> None:
    options = {"format": "q8_0", "expert_bits": (2, 4), "expert_loss": 1e6, **GPTQ}
    path = compress(source, tmp_path / "m.gguf", **options).path
    keep = compress(source, tmp_path / "k.gguf", **{**options, "format": "keep"}).path
    name = "blk.2.ffn_down_shexp.weight"
    assert format_name(open_model(path).tensors[name].type) == "bf16"  # rows of 44
    exact, rounded, wanted = (floats(one, name) for one in (source, path, keep))
    assert np.abs(rounded - wanted).max() < 0.5 * np.abs(exact - wanted).max()
