"""Kernels of mixtures of experts: choose experts, and add what they say.

A token's choice is `active` (expert, weight) pairs, the best first. In decode `route` also writes
the addresses of the chosen experts' weights where the products that follow read theirs; in a chunk
tokens are grouped by expert (`headrace.kernels.expert_visits`). Outputs of experts lie in a row for
each choice until `combine` adds a token's in the order of its choice, so that sums depend neither
on the order of visits nor on what else is in the chunk.

Directory of a layer's experts (int64 [experts][8]): where gate, up and down lie, the numbers of
their products among those that a visit runs through (`headrace.expert_layout`; -1: the expert has
no such matrix), tiles of gate and up, tiles of down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from headrace.kernels.math import exp
from headrace.targets.simd import (
    arg_int,
    arg_ptr,
    fma,
    get_f32,
    get_i64,
    int_to_ptr,
    lane0,
    load_f32,
    max_f32,
    maximum,
    put_f32,
    put_i64,
    splat_f32,
    store_f32,
    sum_f32,
    zeros_f32,
)
from headrace.targets.table import Case, Kernel, KernelFunction, same_for_all
from headrace.targets.target import Target

if TYPE_CHECKING:
    import numpy as np

MATRICES = 3  # of an expert: gate, up, down
DIRECTORY_SLOTS, PRODUCTS, TILE_COUNTS = 8, 3, 6
# How weights of chosen experts come of their logits. COUNTED: the last expert has none.
OVER_ALL, OVER_CHOSEN, ONE_EACH, OVER_COUNTED = range(4)
LOWEST = -3.0e38  # below every logit that counts; what is no number counts as that


def point(entry: Any, base: Any, table: Any, products: Any) -> None:
    """Let the products of an expert read its weights, and those of other formats nothing.

    Args:
        entry: of the directory.
        base: what places in it are added to.
        table: (address of the slot of the weights, of the number of tiles) of each product.
        products: their number.
    """
    for p in range(products):
        put_i64(int_to_ptr(get_i64(table + (2 * p + 1) * 8)), 0)
    for m in range(MATRICES):
        product = get_i64(entry + (PRODUCTS + m) * 8)
        if product >= 0:
            to = table + product * 16
            tiles = get_i64(entry + TILE_COUNTS * 8)
            if m == MATRICES - 1:
                tiles = get_i64(entry + (TILE_COUNTS + 1) * 8)
            put_i64(int_to_ptr(get_i64(to)), base + get_i64(entry + m * 8))
            put_i64(int_to_ptr(get_i64(to + 8)), tiles)


def route(args: Any, thread: Any, n_threads: Any) -> None:
    """Choose experts for each token; threads share tokens.

    Slots: 0 logits (float32 rows; overwritten), 1 bytes between rows, 2 experts, 3 active,
    4 how weights come of logits (`OVER_ALL`, ...), 5 chosen experts (int64 [tokens][active]),
    6 weights (float32, the same), 7 address of the token count, 8 directory (0: none), 9 table of
    pairs of addresses for `point`, of the products of each choice of the only token, 10 their
    number, 11 rows that are added to the logits first (0: none), 12 rows that keep the sums (0:
    none), both as far apart as those, 13 address of a word (0: none) for the number of choices of
    the only token up to the last that has products.
    Of equal logits the first one counts.
    """
    experts = arg_int(args, 2)
    active = arg_int(args, 3)
    count = get_i64(arg_ptr(args, 7))
    for token in range(count * thread // n_threads, count * (thread + 1) // n_threads):
        row = arg_ptr(args, 0) + token * arg_int(args, 1)
        for at in range(0, experts * 4, 64):
            if arg_int(args, 11) != 0:
                more = arg_ptr(args, 11) + token * arg_int(args, 1)
                store_f32(row + at, load_f32(row + at, 1, 0) + load_f32(more + at, 1, 0), 0)
            if arg_int(args, 12) != 0:
                kept = arg_ptr(args, 12) + token * arg_int(args, 1)
                store_f32(kept + at, load_f32(row + at, 1, 0), 0)
        chosen = arg_ptr(args, 5) + token * active * 8
        weights = arg_ptr(args, 6) + token * active * 4
        for e in range((experts + 15) // 16 * 16):
            logit = get_f32(row + e * 4)
            if e >= experts or not logit > LOWEST:
                put_f32(row + e * 4, LOWEST)
        most = splat_f32(LOWEST)
        for e in range(0, experts, 16):
            most = maximum(most, load_f32(row + e * 4, 1, 0))
        peak = splat_f32(max_f32(most))
        whole = zeros_f32(1)
        for e in range(0, experts, 16):
            whole = whole + exp(load_f32(row + e * 4, 1, 0) - peak)
        total = sum_f32(whole)
        part = total - total
        counted = arg_int(args, 4) == OVER_COUNTED
        first = False  # of those that count, where the best one does not
        for k in range(active):
            best = 0
            high = LOWEST * 1.1
            for e in range(experts):
                logit = get_f32(row + e * 4)
                if logit > high:
                    high = logit
                    best = e
            if first:
                peak = splat_f32(high)
            first = counted and k == 0 and best == experts - 1
            weight = lane0(exp(splat_f32(high) - peak))
            if counted and best == experts - 1:
                weight = lane0(zeros_f32(1))
            put_f32(row + best * 4, LOWEST * 1.1)
            put_i64(chosen + k * 8, best)
            put_f32(weights + k * 4, weight)
            part = part + weight
        if counted or arg_int(args, 4) == OVER_CHOSEN:
            total = part
        for k in range(active):
            weight = get_f32(weights + k * 4) / total
            if arg_int(args, 4) == ONE_EACH:
                weight = lane0(splat_f32(1.0))
            put_f32(weights + k * 4, weight)
        if arg_int(args, 8) != 0:
            products = arg_int(args, 10)
            places = 0
            for k in range(active):
                expert = arg_ptr(args, 8) + get_i64(chosen + k * 8) * (DIRECTORY_SLOTS * 8)
                point(expert, 0, arg_ptr(args, 9) + k * products * 16, products)
                if get_i64(expert + (PRODUCTS + MATRICES - 1) * 8) >= 0:
                    places = k + 1
            if arg_int(args, 13) != 0:
                put_i64(arg_ptr(args, 13), places)


def combine(args: Any, thread: Any, n_threads: Any) -> None:
    """Add the outputs of each token's experts, in the order of its choice.

    Slots: 0 outputs of choices (float32 rows), 1 bytes of a row, 2 weights, 3 active, 4 address of
    the token count, 5 sums (float32 rows), 6 bytes between them, 7 values, 8 outputs of the shared
    expert (0: none), 9 bytes between them, 10 logits of its gates (0: its weight is 1), 11 bytes
    between them. Threads share runs of 16 values.
    """
    active = arg_int(args, 3)
    runs = (arg_int(args, 7) + 15) // 16
    total = get_i64(arg_ptr(args, 4)) * runs
    for i in range(total * thread // n_threads, total * (thread + 1) // n_threads):
        token = i // runs
        at = i % runs * 64
        value = zeros_f32(1)
        if arg_int(args, 8) != 0:
            value = load_f32(arg_ptr(args, 8) + (token * arg_int(args, 9) + at), 1, 0)
            if arg_int(args, 10) != 0:
                logit = splat_f32(get_f32(arg_ptr(args, 10) + token * arg_int(args, 11)))
                value = value / (splat_f32(1.0) + exp(zeros_f32(1) - logit))
        for k in range(active):
            row = token * active + k
            weight = splat_f32(get_f32(arg_ptr(args, 2) + row * 4))
            output = load_f32(arg_ptr(args, 0) + (row * arg_int(args, 1) + at), 1, 0)
            value = fma(weight, output, value)
        store_f32(arg_ptr(args, 5) + (token * arg_int(args, 6) + at), value, 0)


# --- references -----------------------------------------------------------------------------------


def choose(logits: np.ndarray, active: int, weighting: int) -> tuple[np.ndarray, np.ndarray]:
    """(experts, weights) of each row of logits: int64 and float64 [tokens, active]."""
    import numpy as np

    logits = np.where(logits > LOWEST, logits, LOWEST).astype(np.float64)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :active]
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    weights = np.take_along_axis(e, order, axis=1)
    if weighting == ONE_EACH:
        return order, np.ones_like(weights)
    if weighting == OVER_COUNTED:
        counts = order < logits.shape[1] - 1
        best = np.where(counts, np.take_along_axis(logits, order, axis=1), -np.inf)
        weights = np.exp(best - best.max(axis=1, keepdims=True))
    whole = e if weighting == OVER_ALL else weights
    return order, weights / whole.sum(axis=1, keepdims=True)


def random_directory(rng: np.random.Generator, experts: int) -> tuple[np.ndarray, int]:
    """A directory of experts of which gates have two formats, and downs three; their products."""
    import numpy as np

    entries = rng.integers(1, 1 << 40, (experts, DIRECTORY_SLOTS))
    first, kinds = (0, 2, 3), (2, 1, 3)
    for m in range(MATRICES):
        entries[:, PRODUCTS + m] = first[m] + rng.integers(0, kinds[m], experts)
    entries[::2, PRODUCTS] = -1  # without a gate
    entries[:, TILE_COUNTS] = 5
    entries[:, TILE_COUNTS + 1] = 7
    entries[-1, PRODUCTS : PRODUCTS + MATRICES] = -1  # without any
    return np.ascontiguousarray(entries), sum(kinds)


def pointed(entry: np.ndarray, before: np.ndarray) -> np.ndarray:
    """What `point` leaves of (weights, tiles) of products."""
    after = before.copy()
    after[:, 1] = 0
    for m, tiles in enumerate((5, 5, 7)):
        if entry[PRODUCTS + m] < 0:
            continue
        after[entry[PRODUCTS + m]] = entry[m], tiles
    return after


def _route_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for tokens, experts, active, weighting in (
        (1, 8, 2, OVER_CHOSEN), (5, 64, 8, OVER_ALL), (3, 17, 16, OVER_CHOSEN),
        (4, 3, 3, OVER_ALL), (2, 16, 1, OVER_ALL), (1, 16, 4, ONE_EACH),
        (1, 20, 2, OVER_COUNTED), (6, 20, 2, OVER_COUNTED),
    ):  # fmt: skip
        width = -(-experts // 16) * 16
        logits = np.full((tokens, width), 9.0, np.float32)  # beyond the experts: not to be seen
        logits[:, :experts] = rng.standard_normal((tokens, experts)) * 3
        logits[-1, : experts // 2] = logits[-1, 0]  # equals
        if tokens > 1 and weighting != OVER_COUNTED:
            logits[0, :experts] = (np.nan, -np.inf, 200.0, *logits[0, 3:experts])[:experts]
        more, kept = np.zeros_like(logits), np.full_like(logits, 9.0)
        joined = weighting == OVER_COUNTED
        if joined:
            logits[tokens // 2 :, experts - 1] = 150.0  # of the zero expert, beside which all are 0
            more[:, :experts] = rng.standard_normal((tokens, experts))
        sums = logits + more
        chosen, weights = choose(sums[:, :experts], active, weighting)
        found = np.full((tokens, active), -1, np.int64)
        said = np.zeros((tokens, active), np.float32)
        directory, products = random_directory(rng, experts)
        slots_of = rng.integers(1, 9, (active, products, 2))
        table = slots_of.ctypes.data + 8 * np.arange(slots_of.size)
        once = tokens == 1
        places = np.array([9], np.int64)
        slots = [
            logits, width * 4, experts, active, weighting, found, said,
            np.array([tokens], np.int64), directory if once else 0, table if once else 0, products,
            more if joined else 0, kept if joined else 0, places if once else 0,
        ]  # fmt: skip
        expected: list[tuple[np.ndarray, np.ndarray]] = [
            (found, chosen),
            (said, weights.astype(np.float32)),
            (kept, sums if joined else kept.copy()),
        ]
        if once:
            last = max(k for k in range(active) if directory[chosen[0, k], PRODUCTS + 2] >= 0)
            expected.append((places, np.array([last + 1])))
            pairs = zip(chosen[0], slots_of, strict=True)
            expected.append((slots_of, np.array([pointed(directory[e], to) for e, to in pairs])))
        yield Case(slots, expected, 3e-6, f"{tokens}: {active} of {experts}")


def _combine_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for tokens, active, shared, gated in (
        (1, 2, False, False), (5, 3, True, True), (4, 1, True, False),
    ):  # fmt: skip
        width = 80
        outputs = rng.standard_normal((tokens * active, width)).astype(np.float32)
        weights = rng.random((tokens, active)).astype(np.float32)
        beside = rng.standard_normal((tokens, width)).astype(np.float32)
        gates = rng.standard_normal((tokens, 16)).astype(np.float32)
        rows = outputs.reshape(tokens, active, width)
        expected = (rows * weights[..., None].astype(np.float64)).sum(1)
        if shared:
            expected = expected + beside / (1 + np.exp(-gates[:, :1].astype(float)) if gated else 1)
        found = np.zeros((tokens, width), np.float32)
        slots = [
            outputs, width * 4, weights, active, np.array([tokens], np.int64), found, width * 4,
            width, beside if shared else 0, width * 4, gates if gated else 0, 64,
        ]  # fmt: skip
        yield Case(slots, [(found, expected.astype(np.float32))], 3e-6, f"{tokens} x {active}")


_ROWS: dict[str, tuple[KernelFunction, Callable[..., Iterator[Case]]]] = {
    "route": (route, _route_cases),
    "combine": (combine, _combine_cases),
}


def all_kernels() -> list[Kernel]:
    """Every row of this module."""
    sources = (__name__, "headrace.kernels.math")
    return [
        Kernel(f"experts_{name}", same_for_all(fn), sources, cases, __name__)
        for name, (fn, cases) in _ROWS.items()
    ]


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
