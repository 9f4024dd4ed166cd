"""Scores of a mixture's experts by what the mixtures before it have chosen: sums of table rows.

They stand where a router's logits would: `experts_predict` asks for the best of them ahead of time.
Tables: `headrace.offload.recall`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from headrace.targets.simd import (
    arg_int,
    arg_ptr,
    get_i64,
    load_f16,
    store_f32,
    zeros_f32,
)
from headrace.targets.table import Case, Kernel, same_for_all
from headrace.targets.target import Target

if TYPE_CHECKING:
    import numpy as np


def recall(args: Any, thread: Any, n_threads: Any) -> None:
    """Add up the rows of what the only token has chosen; thread 0 does it.

    Slots: 0 scores (float32), 1 how many, a multiple of 16, 2 table (float16 rows of as many),
    3 experts chosen in the mixture before (int64), 4 their number, 5 those of the one before that,
    6 their number (1, and 5 a zero, where rows are for one mixture), 7 rows of one of these.
    """
    if thread == 0:
        n = arg_int(args, 1)
        for at in range(0, n, 16):
            total = zeros_f32(1)
            for i in range(arg_int(args, 6)):
                row = get_i64(arg_ptr(args, 5) + i * 8) * arg_int(args, 7)
                for k in range(arg_int(args, 4)):
                    number = row + get_i64(arg_ptr(args, 3) + k * 8)
                    total = total + load_f16(arg_ptr(args, 2) + (number * n + at) * 2, 1, 0)
            store_f32(arg_ptr(args, 0) + at * 4, total, 0)


def _cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for rows, n, now, before in ((8, 16, 2, 0), (64, 64, 8, 8), (17, 32, 16, 1), (3, 16, 1, 3)):
        table = rng.random((rows ** (2 if before else 1), n)).astype(np.float16)
        table[0, :3] = (0, 1, 6e-8)
        later = rng.permutation(rows)[:now]
        earlier = rng.permutation(rows)[:before] if before else np.zeros(1, np.int64)
        expected = np.zeros(n, np.float32)
        for e in earlier:
            for f in later:
                expected += table[e * rows + f]
        found = np.full(n, 9, np.float32)
        slots = [found, n, table, later, len(later), earlier, len(earlier), rows]
        yield Case(slots, [(found, expected)], 0, f"{now} and {before} of {rows}")


def kernel() -> Kernel:
    """The row of the kernel."""
    return Kernel("experts_recall", same_for_all(recall), (__name__,), _cases, __name__)


def all_kernels() -> list[Kernel]:
    """Every row of this module."""
    return [kernel()]


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
