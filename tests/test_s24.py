"""2:4 sparsity: which weights stay, what their bytes say, and what `compress` makes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from kernel_harness import call

import headrace
from headrace.compress import compress
from headrace.loaders.tiled import open_model
from headrace.sparse import linear
from headrace.sparse.registry import FORMATS
from headrace.sparse.unpacking import unpacking_slots
from headrace.targets.cache import KernelStore
from headrace.targets.host import pick_target

STORIES = Path(__file__).parent / "data" / "stories260K.gguf"
S24 = FORMATS["s24_g32"]


def test_the_two_largest_of_four_stay() -> None:
    x = np.random.default_rng(1).standard_normal((50, 96)).astype(np.float32)
    found = S24.decode(S24.encode(x)).reshape(-1, 4)
    fours = x.reshape(-1, 4)
    assert ((found != 0).sum(axis=1) <= 2).all()
    order = np.argsort(np.abs(fours), axis=1)
    assert not np.take_along_axis(found, order[:, :2], axis=1).any()
    large = [np.take_along_axis(a, order[:, 2:], axis=1) for a in (fours, found)]
    assert np.abs(large[0] - large[1]).max() <= np.abs(x).max() / 8
    noise = ((large[0] - large[1]) ** 2).mean() / (large[0] ** 2).mean()
    assert noise < 10**-2.0
    assert S24.bits_per_weight == 3.5


def test_any_bytes_are_weights() -> None:
    """Kernels and reference agree on all of them, also where two codes have one place."""
    rng = np.random.default_rng(2)
    raw = rng.integers(0, 256, (16, 4 * S24.block_bytes), dtype=np.uint8)
    raw.reshape(16, 4, -1)[..., 1] &= 0x3B  # finite scales
    kernel, store = linear.kernels(S24)["rows"], KernelStore(pick_target())
    address = store.load([kernel])[kernel.name]
    x, ids = np.zeros((16, 128), np.float32), np.arange(16)
    slots = [
        S24.tile(raw), x, ids, 4, np.array([16]), x.strides[0], 0, 1.0, 128,
        *unpacking_slots(S24, S24.block, 1),
    ]  # fmt: skip
    call(address, slots, 2)
    assert np.array_equal(x, S24.decode(raw))
    assert np.ptp(x) > 0


def test_compress(tmp_path: Path) -> None:
    path = compress(STORIES, tmp_path / "m.gguf", format="s24_g32").path
    types = {info.type for info in open_model(path).tensors.values()}
    assert "tiled s24_g32" in types
    with headrace.load(path, context=64) as small, headrace.load(STORIES, context=64) as source:
        ids = [1, 403, 407, 261, 378] * 6
        both = [model.logits(ids).ravel() for model in (small, source)]
    assert np.corrcoef(*both)[0, 1] > 0.5
