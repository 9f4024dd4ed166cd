"""Kernels that bring the tokens of a chunk together by expert, each expert once.

`group` says which experts are visited; the steps between `pick` and the end of the loop run once
for each of them: `pick` says which, for how many tokens, `gather` copies their rows, and `scatter`
takes what the expert makes of them to the rows of their choices (`headrace.kernels.experts`).

Visits (int64): 0 visits left, 1 tokens of this visit, 2 its first row, 3 next visit, then, from 8
on, (expert, tokens, first row) of each visit, then a count for each expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from headrace.kernels.experts import DIRECTORY_SLOTS, point, pointed, random_directory
from headrace.targets.simd import arg_int, arg_ptr, get_i64, load_f32, put_i64, store_f32
from headrace.targets.table import Case, Kernel, KernelFunction, same_for_all
from headrace.targets.target import Target

if TYPE_CHECKING:
    import numpy as np

LEFT, TOKENS, FIRST, NEXT, VISITS = 0, 1, 2, 3, 8  # words of visits


def visit_words(experts: int) -> int:
    """Words of the visits of a layer with so many experts."""
    return VISITS + 4 * experts


def group(args: Any, thread: Any, n_threads: Any) -> None:
    """Group the tokens of a chunk by expert; thread 0 does it.

    Slots: 0 chosen experts (int64 [tokens][active]), 1 experts, 2 active, 3 address of the token
    count, 4 order (int64): choices (token x active + its place), expert by expert, 5 visits,
    6 experts that have visits, the first ones. If no token has chosen one of these there is a visit
    of no tokens to the one behind them.
    """
    if thread == 0:
        chosen = arg_ptr(args, 0)
        experts = arg_int(args, 1)
        active = arg_int(args, 2)
        total = get_i64(arg_ptr(args, 3)) * active
        visits = arg_ptr(args, 5)
        counts = visits + (VISITS + 3 * experts) * 8
        for e in range(experts):
            put_i64(counts + e * 8, 0)
        for i in range(total):
            at = counts + get_i64(chosen + i * 8) * 8
            put_i64(at, get_i64(at) + 1)
        first = 0
        n = 0
        for e in range(experts):
            tokens = get_i64(counts + e * 8)
            put_i64(counts + e * 8, first)
            if tokens > 0 and e < arg_int(args, 6):
                visit = visits + (VISITS + 3 * n) * 8
                put_i64(visit, e)
                put_i64(visit + 8, tokens)
                put_i64(visit + 16, first)
                n += 1
            first += tokens
        for i in range(total):
            at = counts + get_i64(chosen + i * 8) * 8
            row = get_i64(at)
            put_i64(at, row + 1)
            put_i64(arg_ptr(args, 4) + row * 8, i)
        if n == 0:
            put_i64(visits + VISITS * 8, arg_int(args, 6))
            put_i64(visits + (VISITS + 1) * 8, 0)
            put_i64(visits + (VISITS + 2) * 8, 0)
            n = 1
        put_i64(visits + LEFT * 8, n)
        put_i64(visits + NEXT * 8, 0)


def pick(args: Any, thread: Any, n_threads: Any) -> None:
    """Take up the next visit; thread 0 does it.

    Slots: 0 visits, 1 directory, 2 table of pairs of addresses for `point`, 3 products.
    """
    if thread == 0:
        visits = arg_ptr(args, 0)
        n = get_i64(visits + NEXT * 8)
        visit = visits + (VISITS + 3 * n) * 8
        expert = arg_ptr(args, 1) + get_i64(visit) * (DIRECTORY_SLOTS * 8)
        point(expert, 0, arg_ptr(args, 2), arg_int(args, 3))
        put_i64(visits + TOKENS * 8, get_i64(visit + 8))
        put_i64(visits + FIRST * 8, get_i64(visit + 16))
        put_i64(visits + NEXT * 8, n + 1)
        put_i64(visits + LEFT * 8, get_i64(visits + LEFT * 8) - 1)


def _copy_row(row: Any, to: Any, n_bytes: Any) -> None:
    for at in range(0, n_bytes, 64):
        store_f32(to + at, load_f32(row + at, 1, 0), 0)


def gather(args: Any, thread: Any, n_threads: Any) -> None:
    """Copy the rows of this visit's tokens; threads share them.

    Slots: 0 visits, 1 order, 2 rows (float32), 3 bytes of a row, 4 copies, 5 active.
    """
    visits = arg_ptr(args, 0)
    count = get_i64(visits + TOKENS * 8)
    order = arg_ptr(args, 1) + get_i64(visits + FIRST * 8) * 8
    n_bytes = arg_int(args, 3)
    for i in range(count * thread // n_threads, count * (thread + 1) // n_threads):
        token = get_i64(order + i * 8) // arg_int(args, 5)
        _copy_row(arg_ptr(args, 2) + token * n_bytes, arg_ptr(args, 4) + i * n_bytes, n_bytes)


def scatter(args: Any, thread: Any, n_threads: Any) -> None:
    """Bring this visit's outputs to the rows of their choices; threads share them.

    Slots: 0 visits, 1 order, 2 outputs of this visit (float32), 3 bytes of a row, 4 outputs of all
    choices.
    """
    visits = arg_ptr(args, 0)
    count = get_i64(visits + TOKENS * 8)
    order = arg_ptr(args, 1) + get_i64(visits + FIRST * 8) * 8
    n_bytes = arg_int(args, 3)
    for i in range(count * thread // n_threads, count * (thread + 1) // n_threads):
        choice = get_i64(order + i * 8)
        _copy_row(arg_ptr(args, 2) + i * n_bytes, arg_ptr(args, 4) + choice * n_bytes, n_bytes)


# --- references -----------------------------------------------------------------------------------


def _grouped(chosen: np.ndarray, experts: int) -> tuple[np.ndarray, list[list[int]]]:
    """(choices by expert, visits)."""
    import numpy as np

    counts = np.bincount(chosen.ravel(), minlength=experts)
    firsts = np.cumsum(counts) - counts
    visits = [[e, int(counts[e]), int(firsts[e])] for e in range(experts) if counts[e]]
    return np.argsort(chosen.ravel(), kind="stable"), visits


def _tokens(rng: np.random.Generator, tokens: int, experts: int, active: int) -> np.ndarray:
    import numpy as np

    choice = [rng.permutation(experts)[:active] for _ in range(tokens)]
    return np.array(choice, np.int64).reshape(tokens, active)


def _group_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for tokens, experts, active, computed in (
        (1, 8, 2, 8), (33, 16, 4, 12), (7, 64, 8, 64), (5, 4, 1, 4), (3, 8, 1, 0),
    ):  # fmt: skip
        chosen = _tokens(rng, tokens, experts, active)
        order, visits = _grouped(chosen, experts)
        visits = [one for one in visits if one[0] < computed] or [[computed, 0, 0]]
        words = np.zeros(visit_words(experts), np.int64)
        expected = words.copy()
        expected[LEFT] = len(visits)
        expected[VISITS : VISITS + 3 * len(visits)] = np.ravel(visits)
        ends = np.cumsum(np.bincount(chosen.ravel(), minlength=experts))
        expected[VISITS + 3 * experts :] = ends
        found = np.full_like(order, -1)
        slots = [chosen, experts, active, np.array([tokens], np.int64), found, words, computed]
        yield Case(
            slots, [(found, order), (words, expected)], 0, f"{tokens}: {active} of {experts}"
        )


def _pick_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    visits = np.zeros(visit_words(4), np.int64)
    visits[LEFT], visits[NEXT] = 1, 1
    visits[VISITS : VISITS + 6] = (0, 5, 0, 3, 2, 5)
    expected = visits.copy()
    expected[:4] = (0, 2, 5, 2)
    directory, products = random_directory(rng, 4)
    slots_of = rng.integers(1, 9, (products, 2))
    table = slots_of.ctypes.data + 8 * np.arange(slots_of.size)
    said = pointed(directory[3], slots_of)
    yield Case(
        [visits, directory, table, products], [(visits, expected), (slots_of, said)], 0,
        "the second of two",
    )  # fmt: skip


def _gather_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    rows = rng.standard_normal((6, 48)).astype(np.float32)
    order = np.array([9, 9, 9, 0, 11], np.int64)
    visits = np.zeros(visit_words(2), np.int64)
    visits[TOKENS], visits[FIRST] = 3, 2
    copies = np.zeros((3, 48), np.float32)
    slots = [visits, order, rows, 48 * 4, copies, 2]
    yield Case(slots, [(copies, rows[[4, 0, 5]])], 0, "3 of 6")


def _scatter_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    rows = rng.standard_normal((3, 48)).astype(np.float32)
    order = np.array([9, 9, 4, 0, 5], np.int64)
    visits = np.zeros(visit_words(2), np.int64)
    visits[TOKENS], visits[FIRST] = 3, 2
    outputs = np.zeros((6, 48), np.float32)
    expected = outputs.copy()
    expected[[4, 0, 5]] = rows
    yield Case([visits, order, rows, 48 * 4, outputs], [(outputs, expected)], 0, "3 of 6")


_ROWS: dict[str, tuple[KernelFunction, Callable[..., Iterator[Case]]]] = {
    "group": (group, _group_cases),
    "pick": (pick, _pick_cases),
    "gather": (gather, _gather_cases),
    "scatter": (scatter, _scatter_cases),
}


def all_kernels() -> list[Kernel]:
    """Every row of this module."""
    sources = (__name__, "headrace.kernels.experts", "headrace.kernels.math")
    return [
        Kernel(f"experts_{name}", same_for_all(fn), sources, cases, __name__)
        for name, (fn, cases) in _ROWS.items()
    ]


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
