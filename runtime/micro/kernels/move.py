"""Move bytes towards lower addresses, also to where some of them are: rows that stay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from headrace.micro.lowered import At, Lowered, Step
from headrace.targets.simd import (
    arg_int,
    arg_ptr,
    get_u8,
    load_u8,
    ptr_to_int,
    put_u8,
    store_u8,
    with_lanes,
)
from headrace.targets.table import Case, Kernel, same_for_all
from headrace.targets.target import Target

NAME = "move"
TO, FROM = "to", "from"
_PIECE, _LANES = 16, 4


def _kernel(args: Any, thread: Any, n_threads: Any) -> None:
    to, source, n_bytes = arg_ptr(args, 0), arg_ptr(args, 1), arg_int(args, 2)
    # Addresses have the chip's 32 bits, and counters would have 64.
    whole, end = ptr_to_int(source + (n_bytes & -_PIECE)), ptr_to_int(source + n_bytes)
    while ptr_to_int(source) != whole:
        store_u8(to, load_u8(source, 1, 0))
        to, source = to + _PIECE, source + _PIECE
    while ptr_to_int(source) != end:
        put_u8(to, get_u8(source))
        to, source = to + 1, source + 1


def lowered(n_bytes: int) -> Lowered:
    """A move of so many bytes, from `FROM` to `TO`."""
    return Lowered((Step(NAME, (At(TO), At(FROM), n_bytes)),))


def _cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    for n_bytes, back in ((1, 1), (16, 3), (40, 16), (77, 5), (64, 64), (0, 1)):
        array = rng.integers(0, 256, n_bytes + back, np.uint8)
        expected = array.copy()
        expected[:n_bytes] = array[back:]
        yield Case(
            [array, array[back:], n_bytes], [(array, expected)], 0, f"{n_bytes} bytes by {back}"
        )


def all_kernels() -> list[Kernel]:
    """One for all chips."""
    return [Kernel(NAME, same_for_all(with_lanes(_kernel, _LANES)), (__name__,), _cases)]
