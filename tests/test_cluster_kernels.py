"""Kernels of clusters that have no cases, as they call others or need a store, against numpy."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernel_harness import call
from test_expert_cache import EXPERTS, LAYERS, Harness

from headrace.kernels import clusters
from headrace.kernels.clusters import CALL_BYTES, PRODUCT_SLOTS
from headrace.kernels.expert_cache import FADES
from headrace.offload import expert_store as store
from headrace.offload.modes import MODES
from headrace.sparse import linear
from headrace.sparse.registry import FORMATS
from headrace.targets.cache import KernelStore
from headrace.targets.host import pick_target
from headrace.targets.table import ENTRY, Kernel

CLUSTERS, SIZE, ROWS = 5, 64, 80
THREADS = (1, 2, 3, 7)  # 7: more than there are tiles
FIRST = 3  # number of the layer's first cluster in the store
TARGET = pick_target(None)
PRODUCTS = [("gemv", "f32"), ("gemv", "q8_0"), ("gemm", "f32")]
PARTS = ["up", "down"]
CODE = KernelStore(TARGET)


@cache
def address_of(kernel: Kernel) -> int:
    return CODE.load([kernel])[kernel.name]


@dataclass
class Made:
    """A call of `up` or `down`, what comes out, and what must."""

    slots: list[Any]
    found: np.ndarray
    expected: np.ndarray
    tolerance: np.ndarray
    alive: list[Any]  # what is in `slots` as an address
    stored: Store | None


class Store:
    """Words of a store in which all clusters are there, each in a slot of its own."""

    def __init__(self, weights: list[np.ndarray]) -> None:
        self.words = np.zeros(store.STORE_WORDS, np.int64)
        self.experts = np.zeros((FIRST + CLUSTERS, store.EXPERT_WORDS), np.int64)
        self.slots = np.full((CLUSTERS, store.SLOT_WORDS), -1, np.int64)
        self.cancel = np.zeros(1, np.int64)
        self.words[store.EXPERTS] = self.experts.ctypes.data
        self.words[store.SLOTS] = self.slots.ctypes.data
        self.words[store.CANCEL] = self.cancel.ctypes.data
        self.words[store.PATIENCE] = 1 << 62
        for i, one in enumerate(weights):
            at = CLUSTERS - 1 - i  # in another order
            self.experts[FIRST + i, [store.STATE, store.SLOT]] = store.THERE, at
            self.slots[at, store.ADDRESS] = one.ctypes.data - 64 * i


def prepare(part: str, operation: str, name: str, fires: list[int], in_store: bool = True) -> Made:
    """`part` of the clusters that fire, whose weights are in a store's slots or in no store."""
    rng, fmt = np.random.default_rng(4), FORMATS[name]
    group = linear.group_tokens(operation, fmt, TARGET)
    kind = linear.together(fmt)
    tokens = 1 if group == 1 else group + 1
    padded = -(-tokens // group) * group
    rows, columns, inner = (SIZE, 96, 96) if part == "up" else (ROWS, SIZE, CLUSTERS * SIZE)
    x = rng.integers(-8, 9, (padded, inner)).astype(np.float32)
    packed = linear.quantize_q8(x, group) if kind == "q8" else linear.pack_f32(x, group)
    exact = linear.dequantize_q8(packed, inner) if kind == "q8" else x.astype(np.float64)
    raws = [fmt.encode(rng.integers(-8, 9, (rows, columns)).astype("f4")) for _ in range(CLUSTERS)]
    weights = [fmt.tile(raw) for raw in raws]
    decoded = [fmt.decode(raw).astype(np.float64) for raw in raws]
    places = np.array([one.ctypes.data for one in weights], np.int64)
    stored, words = None, 0
    if in_store:
        stored = Store(weights)
        places, words = 64 * np.arange(CLUSTERS), stored.words
    width = CLUSTERS * SIZE if part == "up" else ROWS
    y = np.full((padded, width), np.nan, np.float32)
    count, bias = np.array([tokens], np.int64), np.zeros(rows, np.float32)
    private = np.concatenate([packed] * max(THREADS)) if group == 1 else packed
    product = np.zeros(PRODUCT_SLOTS, np.int64)
    product[:10] = (
        0, private.ctypes.data, y.ctypes.data, columns // fmt.block, 0, count.ctypes.data,
        packed.nbytes if group == 1 else 0, y.strides[0], bias.ctypes.data, packed[0].nbytes,
    )  # fmt: skip
    kernel = linear.kernels(fmt)[operation]
    calls = np.zeros((max(THREADS), CALL_BYTES), np.uint8)
    slots = [
        address_of(kernel), product, calls, np.array([len(fires), *fires], np.int64),
        places, words, FIRST if in_store else 0, rows // 16,
        fmt.tiled_bytes(16, columns),
    ]  # fmt: skip
    if part == "up":
        slots.append(SIZE * 4)
        found, expected = y, np.full(y.shape, np.nan)
        size = np.zeros(y.shape)
        for c in fires:
            own = slice(c * SIZE, (c + 1) * SIZE)
            expected[:, own] = exact @ decoded[c].T
            size[:, own] = np.abs(exact) @ np.abs(decoded[c]).T
    else:
        found = np.full((padded, width), np.nan, np.float32)
        expected, size = np.zeros(y.shape), np.zeros(y.shape)
        for c in fires:
            own = exact[:, c * SIZE : (c + 1) * SIZE]
            expected += own @ decoded[c].T
            size += np.abs(own) @ np.abs(decoded[c]).T
        between = linear.activation_bytes(kind, SIZE) * group
        slots += [between, found, y.strides[0], count]
    # Products of whole numbers are exact as floats.
    tolerance = size * (16 * 2.0**-23 if kind == "q8" else 0)
    alive = [weights, private, y, bias, count]
    cut = slice(tokens)
    return Made(slots, found[cut], expected[cut], tolerance[cut], alive, stored)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("operation", "name"), PRODUCTS)
def test_products_of_what_fires(part: str, operation: str, name: str) -> None:
    """Only what fires is written or added, by any number of threads, from memory or a store."""
    address = address_of(clusters.kernels()[part])
    for fires in ([0, 2, 3], [4], [], list(range(CLUSTERS))):
        first = None
        for in_store in (False, True):
            for n_threads in THREADS:
                made = prepare(part, operation, name, fires, in_store)
                call(address, made.slots, n_threads)
                nothing = np.isnan(made.expected)
                assert np.array_equal(np.isnan(made.found), nothing)
                error = np.abs(made.found - made.expected)[~nothing]
                assert (error <= made.tolerance[~nothing]).all()
                bits = made.found.tobytes()
                first = bits if first is None else first
                assert bits == first


@pytest.mark.parametrize("part", PARTS)
def test_a_cancelled_job_ends_the_wait(part: str) -> None:
    """A thread computes nothing behind a cluster that does not come, whichever are there."""
    address = address_of(clusters.kernels()[part])
    expected = prepare(part, "gemv", "f32", [0]).expected
    for n_threads in (1, 2, 3):  # each has some of every cluster
        made = prepare(part, "gemv", "f32", [0, 1, 3])
        assert made.stored is not None
        made.stored.experts[FIRST + 1, store.STATE] = store.COMING
        made.stored.cancel[0] = 1
        call(address, made.slots, n_threads)
        assert np.array_equal(made.found, expected, equal_nan=True)


@pytest.mark.parametrize("n_slots", [EXPERTS, 13, LAYERS * EXPERTS])
def test_what_fires_is_brought(tmp_path: Path, n_slots: int) -> None:
    """Listed in their order; what is there keeps its slot; hits, misses and shares are counted."""
    mode = next(mode for mode in MODES if not mode.direct)
    harness = Harness(tmp_path / "clusters", n_slots, store.NEXT_USE, mode, True)
    row = clusters.kernels()["claim"]
    harness.entry[row.name] = ENTRY(harness.kernels.load([row])[row.name])
    harness.begin()
    words = harness.cache.words
    table = harness.cache._experts.reshape(-1, store.EXPERT_WORDS)
    shares = table[:, store.SHARE].tolist()
    hits = misses = 0
    rng = np.random.default_rng(2)
    try:
        for turn in range(60):
            layer, tokens = turn % LAYERS, int(rng.integers(1, 5))
            counts = rng.integers(0, tokens + 1, EXPERTS) * (rng.random(EXPERTS) < 0.4 + turn / 60)
            fires = np.flatnonzero(counts)
            base = harness.cache.first[layer]
            own = table[base : base + EXPERTS]
            there = [int(c) for c in fires if own[c, store.STATE] == store.THERE]
            places = own[there, store.SLOT].tolist()
            hits, misses = hits + len(there), misses + len(fires) - len(there)
            for c in range(EXPERTS):
                faded = shares[base + c] * FADES + int(counts[c]) * store.ALWAYS
                shares[base + c] = faded // (FADES + tokens)
            listed = np.full(1 + EXPERTS, -1, np.int64)
            harness.call(row.name, [
                counts.astype(np.int64), EXPERTS, listed, words, base, layer,
                np.array([tokens], np.int64),
            ])  # fmt: skip
            assert listed[: 1 + len(fires)].tolist() == [len(fires), *fires.tolist()]
            assert (listed[1 + len(fires) :] == -1).all()
            until = time.monotonic() + 60
            while not (own[fires, store.STATE] == store.THERE).all():
                assert time.monotonic() < until
                time.sleep(0.0001)
            assert own[there, store.SLOT].tolist() == places
            for c in fires.tolist():
                found, entry = harness.cache.expert_bytes(base + c), harness.directories[layer, c]
                assert found is not None
                for data, at in zip(harness.content[base + c], entry[:3].tolist(), strict=True):
                    assert np.array_equal(found[at : at + data.size], data)
            assert (words[store.HITS], words[store.MISSES]) == (hits, misses)
            assert table[:, store.SHARE].tolist() == shares
        assert hits and misses
        assert words[store.CLOCK] == 60 and words[store.LATE] == words[store.ASKED] == 0
        assert (misses <= LAYERS * EXPERTS) == (n_slots == LAYERS * EXPERTS)
    finally:
        harness.close()
