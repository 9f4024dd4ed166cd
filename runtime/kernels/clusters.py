"""Kernels of clusters of neurons: which fire, and products by those that do.

A neuron of a ReLU feed-forward adds nothing to a token for which its gate is not above 0. Clusters
of which no neuron fires for any token of a pass are left out: exactly, as their outputs are zeros
and the others are added in the order of the clusters, whichever are in memory.

List of a layer's clusters that fire (int64): how many, then their numbers, ascending.
Up and down of a cluster are multiplied by the kernels that multiply whole matrices, which these
call with an argument block of each thread's own. Places of a layer's clusters (int64): where the
matrix of each lies; with a store (`headrace.offload.expert_store`), where in its slot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from headrace.kernels.expert_cache import age, demand, use, wait_for
from headrace.offload import expert_requests, expert_store
from headrace.offload.expert_store import (
    ABSENT,
    ADDRESS,
    ALL_PARTS,
    CLOCK,
    EARLY,
    STAYS,
    THERE,
    expert_at,
    slot_of,
)
from headrace.targets.simd import (
    arg_int,
    arg_ptr,
    atomic_get,
    call_kernel,
    get_i64,
    load_f32,
    max_f32,
    maximum,
    put_i64,
    store_f32,
    zeros_f32,
)
from headrace.targets.table import Case, Kernel, KernelFunction, no_cases, same_for_all
from headrace.targets.target import Target

if TYPE_CHECKING:
    import numpy as np

PRODUCT_SLOTS = 13  # of a product's argument block, those of formats that are unpacked among them
CALL_BYTES = 128  # of a thread's own argument block
# Slots of a product: see `headrace.sparse.linear` and `headrace.sparse.unpacking`.
_WEIGHTS, _X, _Y, _TILES, _PRIVATE, _SCRATCH, _SCRATCH_BYTES = 0, 1, 2, 4, 6, 10, 11


def fired(args: Any, thread: Any, n_threads: Any) -> None:
    """Count the tokens for which a neuron of each cluster fires; threads share clusters.

    Slots: 0 gates (float32 rows), 1 bytes between rows, 2 neurons of a cluster, 3 clusters,
    4 address of the token count, 5 counts (int64).
    """
    size = arg_int(args, 2)
    clusters = arg_int(args, 3)
    tokens = get_i64(arg_ptr(args, 4))
    for c in range(clusters * thread // n_threads, clusters * (thread + 1) // n_threads):
        count = 0
        for token in range(tokens):
            row = arg_ptr(args, 0) + (token * arg_int(args, 1) + c * size * 4)
            most = load_f32(row, 1, 0)
            for i in range(16, size, 16):
                most = maximum(most, load_f32(row + i * 4, 1, 0))
            if max_f32(most) > 0:
                count += 1
        put_i64(arg_ptr(args, 5) + c * 8, count)


def listed(args: Any, thread: Any, n_threads: Any) -> None:
    """List the clusters that fire; thread 0 does it.

    Slots: 0 counts, 1 clusters, 2 list.
    """
    if thread == 0:
        n = 0
        for c in range(arg_int(args, 1)):
            if get_i64(arg_ptr(args, 0) + c * 8) > 0:
                n += 1
                put_i64(arg_ptr(args, 2) + n * 8, c)
        put_i64(arg_ptr(args, 2), n)


def claim(args: Any, thread: Any, n_threads: Any) -> None:
    """List the clusters that fire and have those brought that are not there; thread 0 does it.

    Slots: 0 counts, 1 clusters, 2 list, 3 store, 4 number of the layer's first cluster, 5 layer,
    6 address of the token count.
    All have slots until the next layer: a store has as many at least as a layer has clusters.
    """
    if thread == 0:
        chosen = arg_ptr(args, 2)
        store = arg_ptr(args, 3)
        base = arg_int(args, 4)
        layer = arg_int(args, 5)
        tokens = get_i64(arg_ptr(args, 6))
        now = arg_int(store, CLOCK) + 1
        put_i64(store + CLOCK * 8, now)
        n = 0
        for c in range(arg_int(args, 1)):
            expert = expert_at(store, base + c)
            taken = get_i64(arg_ptr(args, 0) + c * 8)
            age(expert, taken, tokens)
            if taken > 0:
                use(store, expert, now)
                if atomic_get(expert) != ABSENT:
                    put_i64(slot_of(store, expert) + STAYS * 8, now)
                n += 1
                put_i64(chosen + n * 8, c)
        put_i64(chosen, n)
        for i in range(n):
            number = base + get_i64(chosen + (1 + i) * 8)
            expert = expert_at(store, number)
            if atomic_get(expert) != THERE:
                demand(store, number, layer)
            if atomic_get(expert) != ABSENT:  # else the job is cancelled
                put_i64(slot_of(store, expert) + STAYS * 8, now)
            put_i64(expert + EARLY * 8, 0)


def _weights_of(args: Any, cluster: Any, thread: Any) -> Any:
    """Address of the matrix of a cluster, when it is there; 0 if the job is cancelled."""
    address = get_i64(arg_ptr(args, 4) + cluster * 8)
    if arg_int(args, 5) != 0:
        store = arg_ptr(args, 5)
        expert = expert_at(store, arg_int(args, 6) + cluster)
        wait_for(store, expert, ALL_PARTS, thread)
        if atomic_get(expert) == THERE:
            address += arg_int(slot_of(store, expert), ADDRESS)
        else:
            address = 0
    return address


def _own_call(args: Any, thread: Any) -> Any:
    """A thread's own argument block for a product, which it makes alone, of its own input."""
    product = arg_ptr(args, 1)
    own = arg_ptr(args, 2) + thread * CALL_BYTES
    for i in range(PRODUCT_SLOTS):
        put_i64(own + i * 8, arg_int(product, i))
    put_i64(own + _X * 8, arg_int(product, _X) + arg_int(product, _PRIVATE) * thread)
    put_i64(own + _PRIVATE * 8, 0)
    scratch = arg_int(product, _SCRATCH) + arg_int(product, _SCRATCH_BYTES) * thread
    put_i64(own + _SCRATCH * 8, scratch)
    return own


def up(args: Any, thread: Any, n_threads: Any) -> None:
    """Multiply by the ups of the clusters that fire; threads share the rows of each.

    Slots: 0 kernel of a product, 1 its argument block, for the first cluster, 2 threads' argument
    blocks, 3 list, 4 places, 5 store (0: none), 6 number of the layer's first cluster, 7 tiles of a
    cluster, 8 bytes of a tile, 9 bytes of outputs between clusters.
    """
    product = arg_ptr(args, 1)
    own = _own_call(args, thread)
    n = get_i64(arg_ptr(args, 3))
    tiles = arg_int(args, 7)
    i = 0
    while i < n:
        cluster = get_i64(arg_ptr(args, 3) + (1 + i) * 8)
        turn = (thread + i) % n_threads  # else few tiles would always be the same threads'
        first = tiles * turn // n_threads
        last = tiles * (turn + 1) // n_threads
        i += 1
        if first < last:
            weights = _weights_of(args, cluster, thread)
            if weights == 0:
                i = n
            else:
                put_i64(own + _WEIGHTS * 8, weights + first * arg_int(args, 8))
                y = arg_int(product, _Y) + cluster * arg_int(args, 9) + first * 64
                put_i64(own + _Y * 8, y)
                put_i64(own + _TILES * 8, last - first)
                call_kernel(arg_ptr(args, 0), own, 0, 1)


def down(args: Any, thread: Any, n_threads: Any) -> None:
    """Add what the downs of the clusters that fire make, in their order; threads share outputs.

    Slots: 0 to 6 as in `up`, 7 tiles of outputs, 8 bytes of a tile, 9 bytes of inputs between
    clusters, 10 sums (float32 rows), 11 bytes between them and between the product's outputs,
    12 address of the token count.
    """
    product = arg_ptr(args, 1)
    own = _own_call(args, thread)
    x = arg_int(own, _X)
    n = get_i64(arg_ptr(args, 3))
    tiles = arg_int(args, 7)
    first = tiles * thread // n_threads
    last = tiles * (thread + 1) // n_threads
    stride = arg_int(args, 11)
    tokens = get_i64(arg_ptr(args, 12))
    sums = arg_ptr(args, 10)
    outputs = arg_ptr(product, _Y)
    for token in range(tokens):
        for tile in range(first, last):
            store_f32(sums + (token * stride + tile * 64), zeros_f32(1), 0)
    put_i64(own + _Y * 8, arg_int(product, _Y) + first * 64)
    put_i64(own + _TILES * 8, last - first)
    i = 0
    while i < n:
        cluster = get_i64(arg_ptr(args, 3) + (1 + i) * 8)
        weights = _weights_of(args, cluster, thread)
        i += 1
        if weights == 0:
            i = n
        else:
            put_i64(own + _WEIGHTS * 8, weights + first * arg_int(args, 8))
            put_i64(own + _X * 8, x + cluster * arg_int(args, 9))
            call_kernel(arg_ptr(args, 0), own, 0, 1)
            for token in range(tokens):
                for tile in range(first, last):
                    at = token * stride + tile * 64
                    value = load_f32(sums + at, 1, 0) + load_f32(outputs + at, 1, 0)
                    store_f32(sums + at, value, 0)


# --- references -----------------------------------------------------------------------------------


def _fired_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for tokens, clusters, size in ((1, 7, 32), (5, 3, 96), (3, 1, 64)):
        gates = rng.standard_normal((tokens, clusters * size + 16)).astype(np.float32) - 2.5
        gates[:, -16:] = 9  # beyond the neurons
        gates[0, :size] = -0.0
        gates[-1, 0] = 1e-45
        by_cluster = gates[:, : clusters * size].reshape(tokens, clusters, size)
        expected = (by_cluster > 0).any(axis=2).sum(axis=0)
        found = np.full(clusters, -1, np.int64)
        slots = [gates, gates.shape[1] * 4, size, clusters, np.array([tokens], np.int64), found]
        yield Case(slots, [(found, expected)], 0, f"{tokens}: {clusters} x {size}")


def _list_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for counts in ([0, 3, 0, 1, 2], [0, 0], [1]):
        expected = [n for n, count in enumerate(counts) if count]
        found = np.full(1 + len(counts), -1, np.int64)
        slots = [np.array(counts, np.int64), len(counts), found]
        rest = [-1] * (len(counts) - len(expected))
        yield Case(slots, [(found, np.array([len(expected), *expected, *rest]))], 0, str(counts))


# What calls other kernels or needs a store has no cases: tests/test_cluster_kernels.py runs it.
_ROWS: dict[str, tuple[KernelFunction, Callable[..., Iterator[Case]]]] = {
    "fired": (fired, _fired_cases),
    "list": (listed, _list_cases),
    "up": (up, no_cases),
    "down": (down, no_cases),
    "claim": (claim, no_cases),
}


def kernels() -> dict[str, Kernel]:
    """The rows by operation."""
    sources = (
        __name__, expert_requests.__name__, expert_store.__name__, "headrace.kernels.expert_cache",
        "headrace.kernels.expert_visits", "headrace.kernels.experts", "headrace.kernels.math",
    )  # fmt: skip
    return {
        name: Kernel(f"clusters_{name}", same_for_all(fn), sources, cases, __name__)
        for name, (fn, cases) in _ROWS.items()
    }


def all_kernels() -> list[Kernel]:
    """Every row of this module."""
    return list(kernels().values())


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
