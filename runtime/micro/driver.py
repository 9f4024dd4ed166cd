"""What an emulated chip does with a network: inputs from an image, runs, outputs into the image.

The image begins with words: the number of runs; whether memory is painted to see what of it is used
(then there is one run, made twice, with two paints, and no output); the offset of outputs; that of
bytes that say of each run which function it is; and that of what stays from run to run, as it is at
first (0: as the program has it). Inputs of all runs follow. Behind outputs of all runs there is
what stays, as it is then, and two words: bytes of the arena up to the last one that was written to,
and bytes of the stack below this function, at least `CLOSE`, as less is not seen.
"""

from __future__ import annotations

from typing import Any

from headrace.micro import packing
from headrace.micro.packing import ALIGNED
from headrace.targets.simd import (
    arg_int,
    arg_ptr,
    call_void,
    get_i64,
    get_u8,
    int_to_ptr,
    larger,
    put_i64,
    put_u8,
)
from headrace.targets.table import Kernel, no_cases, same_for_all

HEADER = 48
BEHIND = 256  # bytes behind the arena that are painted, too
STACK = 4096  # bytes below this function that are painted
CLOSE = 64  # bytes of stack that what paints takes for itself


def _copy(to: Any, source: Any, n_bytes: Any) -> None:
    for i in range(n_bytes):
        put_u8(to + i, get_u8(source + i))


def _moved(at: Any, arena: Any, ports: Any, count: Any, into: Any) -> Any:
    """Copy what ports say (offset, bytes) into the arena, or from it; the end in the image."""
    for i in range(count):
        offset, n_bytes = get_i64(ports + 16 * i), get_i64(ports + 16 * i + 8)
        if into:
            _copy(arena + offset, at, n_bytes)
        else:
            _copy(at, arena + offset, n_bytes)
        at = at + ((n_bytes + ALIGNED - 1) & -ALIGNED)
    return at


def _driver(args: Any, thread: Any, n_threads: Any) -> None:
    image, arena, arena_bytes = arg_ptr(args, 0), arg_ptr(args, 1), arg_int(args, 2)
    functions, init = arg_ptr(args, 3), arg_ptr(args, 4)
    inputs, n_inputs = arg_ptr(args, 5), arg_int(args, 6)
    outputs, n_outputs = arg_ptr(args, 7), arg_int(args, 8)
    state, n_state = arg_ptr(args, 9), arg_int(args, 10)
    mark, marked = arg_ptr(args, 11), arg_ptr(args, 12)
    runs, painting = get_i64(image), get_i64(image + 8)
    at, kinds = image + get_i64(image + 16), image + get_i64(image + 24)
    known = get_i64(image + 32)
    call_void(init)
    if known > 0:
        _moved(image + known, arena, state, n_state, 1)
    used, deep = 0, CLOSE
    call_void(mark)  # where the stack of what is called begins
    stack = int_to_ptr(get_i64(marked) - CLOSE - STACK)
    times = runs
    if painting:
        times = 2
    source, paint = image + HEADER, 0xA5
    for i_run in range(times):
        if painting:
            for i in range(arena_bytes + BEHIND):
                put_u8(arena + i, paint)
            for i in range(STACK):
                put_u8(stack + i, paint)
            source = image + HEADER
            call_void(init)
        source = _moved(source, arena, inputs, n_inputs, 1)
        kind = get_u8(kinds)
        if not painting:
            kind = get_u8(kinds + i_run)
        call_void(arg_ptr(functions + 8 * kind, 0))
        if painting:
            for i in range(arena_bytes + BEHIND):
                if get_u8(arena + i) != paint:
                    used = larger(used, i + 1)
            for i in range(STACK):
                if get_u8(stack + i) != paint:
                    deep = larger(deep, STACK - i + CLOSE)
            paint = 0x5A
        else:
            at = _moved(at, arena, outputs, n_outputs, 0)
    if not painting:
        at = _moved(at, arena, state, n_state, 0)
    put_i64(at, used)
    put_i64(at + 8, deep)


DRIVER = Kernel("micro_driver", same_for_all(_driver), (__name__, packing.__name__), no_cases)
