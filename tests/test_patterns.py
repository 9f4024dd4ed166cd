"""Formats that keep n of m weights: which stay, what bytes say, what `compress` makes."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from kernel_harness import call

import headrace
from headrace.compress import compress
from headrace.loaders.tiled import open_model
from headrace.sparse import linear
from headrace.sparse.format import Floats, Format
from headrace.sparse.gptq import inverse_factor, output_errors
from headrace.sparse.gqs_pruning import Hessian, refit
from headrace.sparse.group_size import ADAPTIVE, choose_format, relative_noise
from headrace.sparse.pattern import loss, stays
from headrace.sparse.registry import FORMATS
from headrace.sparse.unpacking import unpacking_slots
from headrace.targets.cache import KernelStore
from headrace.targets.host import pick_target

STORIES = Path(__file__).parent / "data" / "stories260K.gguf"
TEXT = "Once upon a time, there was a little girl named Lily. She loved to play. " * 150
PATTERNS = {name: fmt for name, fmt in FORMATS.items() if fmt.pattern is not None}
every_pattern = pytest.mark.parametrize("fmt", PATTERNS.values(), ids=PATTERNS)


def test_sizes() -> None:
    bits = {name: fmt.bits_per_weight for name, fmt in PATTERNS.items()}
    assert bits == {"s24_g32": 3.5, "s16of32_g32": 3.5, "s8of32_g32": 2.5}


@every_pattern
def test_the_largest_stay(fmt: Format) -> None:
    assert fmt.pattern is not None
    kept, of = fmt.pattern.kept, fmt.pattern.of
    x = np.random.default_rng(1).standard_normal((50, 96)).astype(np.float32)
    found = fmt.decode(fmt.encode(x)).reshape(-1, of)
    runs = x.reshape(-1, of)
    assert ((found != 0).sum(axis=1) <= kept).all()
    order = np.argsort(np.abs(runs), axis=1)
    assert not np.take_along_axis(found, order[:, :-kept], axis=1).any()
    large = [np.take_along_axis(a, order[:, -kept:], axis=1) for a in (runs, found)]
    assert np.abs(large[0] - large[1]).max() <= np.abs(x).max() / 8
    assert ((large[0] - large[1]) ** 2).mean() < 0.01 * (large[0] ** 2).mean()


@every_pattern
def test_any_bytes_are_weights(fmt: Format) -> None:
    """Kernels and reference agree on all: two codes in one place, too many or few places."""
    rng = np.random.default_rng(2)
    raw = rng.integers(0, 256, (16, 5 * fmt.block_bytes), dtype=np.uint8)
    blocks = raw.reshape(16, 5, -1)
    blocks[8:, :4, 2:6] &= rng.integers(0, 256, (8, 4, 4), dtype=np.uint8)
    blocks[:, 3, 2:6], blocks[:, 4, 2:6] = 0xFF, 0
    blocks[..., 1] &= 0x3B  # finite scales
    kernel, store = linear.kernels(fmt)["rows"], KernelStore(pick_target())
    address = store.load([kernel])[kernel.name]
    x, ids = np.zeros((16, 160), np.float32), np.arange(16)
    slots = [
        fmt.tile(raw), x, ids, 5, np.array([16]), x.strides[0], 0, 1.0, 160,
        *unpacking_slots(fmt, fmt.block, 1),
    ]  # fmt: skip
    call(address, slots, 2)
    assert np.array_equal(x, fmt.decode(raw))
    assert (x != 0).mean() > 0.1


def data() -> tuple[Floats, Floats]:
    """Weights [32, 128] and the Hessian of inputs that depend on each other."""
    rng = np.random.default_rng(3)
    w = rng.standard_normal((32, 128)).astype(np.float32)
    mixed = rng.standard_normal((24, 128)) + 0.05 * rng.standard_normal((2000, 128))[:24]
    x = rng.standard_normal((2000, 24)) @ mixed + 0.3 * rng.standard_normal((2000, 128))
    x *= np.exp(rng.standard_normal(128) / 2)
    return w, (x.T @ x).astype(np.float32)


@every_pattern
def test_fitted_weights_lose_less(fmt: Format) -> None:
    assert fmt.pattern is not None
    w, h = data()
    u = inverse_factor(h)
    importance = np.diag(h) / np.diag(h).max()
    made = [
        fmt.encode(w), fmt.pattern.encode(w, importance),
        fmt.pattern.encode_fitted(w, Hessian(h, u), importance),
    ]  # fmt: skip
    found = [fmt.decode(raw) for raw in made]
    lost = [output_errors(h, one - w).sum() for one in found]
    assert lost[1] < lost[0]
    assert lost[2] < 0.1 * lost[1]
    assert ((found[2] != 0).reshape(-1, fmt.pattern.of).sum(axis=1) <= fmt.pattern.kept).all()
    # Fitted weights rounded by GPTQ are between those not rounded and those rounded to nearest.
    best = refit(w, stays(loss(w, Hessian(h, u)), *ratio(fmt)), h)
    assert not found[2][best == 0].any()
    grid = fmt.pattern.grid
    nearest = fmt.decode(grid.round(best, grid.fit(best, importance)))
    off = [output_errors(h, one - w).sum() for one in (best, nearest)]
    assert off[0] < lost[2] < off[1]


def ratio(fmt: Format) -> tuple[int, int]:
    assert fmt.pattern is not None
    return fmt.pattern.kept, fmt.pattern.of


@every_pattern
def test_inputs_that_do_not_depend_on_each_other_keep_their_weights(fmt: Format) -> None:
    """There is nothing to make up for then: fitting is choosing by importance, and rounding."""
    assert fmt.pattern is not None
    w, h = data()
    importance = np.diag(h) / np.diag(h).max()
    h = np.diag(np.diag(h))
    damped = np.diag(h) + 0.01 * np.diag(h).mean()
    keep = stays(np.abs(w) * np.sqrt(damped), *ratio(fmt))
    some = np.where(keep, w, 0)
    found = fmt.pattern.encode_fitted(w, Hessian(h, inverse_factor(h)), importance)
    grid = fmt.pattern.grid
    expected = fmt.decode(grid.round(some, grid.fit(some, importance)))
    assert (np.abs(fmt.decode(found) - expected) < 1e-6).mean() > 0.995


@every_pattern
def test_extreme_weights(fmt: Format) -> None:
    w = np.zeros((4, 64), np.float32)
    w[1], w[2], w[3, 5] = 60000, 1e-30, -3
    found = fmt.decode(fmt.encode(w))
    assert np.isfinite(found).all()
    assert not found[0].any()
    assert found[3, 5] == pytest.approx(-3, rel=1e-3)
    assert np.count_nonzero(found[3]) == 1
    assert fmt.decode(np.zeros((0, fmt.row_bytes(64)), np.uint8)).shape == (0, 64)


@pytest.mark.parametrize(
    ("zeros", "chosen"),
    [(0, "i4_g32"), (0.3, "i4_g32"), (0.7, "s16of32_g32"), (0.9, "s8of32_g32"), (2 / 4, "s24_g32")],
)
def test_zeros_that_are_there_are_left_out(zeros: float, chosen: str) -> None:
    """Any weights, so that runs keep different numbers; and two of each four."""
    rng = np.random.default_rng(4)
    w = rng.standard_normal((64, 1024)).astype(np.float32)
    keep = stays(np.abs(w), 2, 4) if chosen == "s24_g32" else rng.random(w.shape) >= zeros
    w = np.where(keep, w, np.float32(0))
    counts = keep.reshape(-1, 32).sum(axis=1)
    fmt = choose_format(w, ADAPTIVE["s_auto"])
    assert fmt.name == chosen
    found = fmt.decode(fmt.encode(w))
    assert not found[~keep].any()
    dense = relative_noise(FORMATS["i4_g32"], w)
    assert relative_noise(fmt, w) < 2 * dense
    if fmt.pattern is not None and chosen != "s24_g32":  # some runs have more, and lose little
        assert counts.max() > fmt.pattern.kept > counts.mean()


def test_a_model_of_zeros_is_smaller(tmp_path: Path) -> None:
    """stories260K with 75% of all weights left out, and one matrix whole."""
    source, whole = tmp_path / "zeros.gguf", "blk.2.ffn_gate.weight"
    shutil.copy(STORIES, source)
    rng = np.random.default_rng(5)
    with source.open("r+b") as file:
        for name, info in open_model(STORIES).tensors.items():
            if name.startswith("blk.") and len(info.shape) == 2 and name != whole:
                w = open_model(STORIES).read(info).view(np.float32).copy()
                w[rng.random(w.size) < 0.75] = 0
                file.seek(info.offset)
                file.write(w.tobytes())
    ids, sizes, logits = [1, 403, 407, 261, 378] * 6, {}, {}
    with headrace.load(source, context=64) as model:
        true = model.logits(ids).ravel()
    for name in ("i4_g32", "s_auto"):
        done = compress(source, tmp_path / f"{name}.gguf", format=name)
        sizes[name] = done.formats
        with headrace.load(done.path, context=64) as model:
            logits[name] = np.corrcoef(model.logits(ids).ravel(), true)[0, 1]
    sparse = sizes["s_auto"]
    assert set(sparse) >= {"s16of32_g32", "i4_g32"}
    assert sum(sparse.values()) < 0.9 * sum(sizes["i4_g32"].values())
    types = {name: info.type for name, info in open_model(tmp_path / "s_auto.gguf").tensors.items()}
    assert types[whole] == "tiled i4_g32"
    assert logits["s_auto"] > logits["i4_g32"] - 0.01


@every_pattern
def test_compress(fmt: Format, tmp_path: Path) -> None:
    ids = [1, 403, 407, 261, 378] * 6
    with headrace.load(STORIES, context=64) as source:
        true = source.logits(ids).ravel()
    close = []
    for name, options in (("rtn", {}), ("gptq", {"calibrate": TEXT})):
        path = compress(STORIES, tmp_path / f"{name}.gguf", format=fmt.name, **options).path
        types = {info.type for info in open_model(path).tensors.values()}
        assert f"tiled {fmt.name}" in types
        with headrace.load(path, context=64) as small:
            close.append(np.corrcoef(small.logits(ids).ravel(), true)[0, 1])
    assert close[1] > max(close[0], 0.5)
