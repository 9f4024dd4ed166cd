"""Calls of kernels in numpy, bit for bit: memory is arrays of bytes by name.

What a call reads and writes are views that its argument block describes; one that leaves its array
is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from headrace.micro.kernels import (
    depthwise,
    depthwise_gradient,
    elementwise,
    learning,
    matmul,
    pad,
    place,
    pool,
    softmax,
    turn,
)
from headrace.micro.kernels.numbers import KINDS, UNBOUNDED, Kind, dtype_of, numbers_of
from headrace.micro.lowered import At, Step
from headrace.micro.network import Windows
from headrace.targets.target import Target

Memory = Mapping[str, np.ndarray]
Bounds = tuple[float, float]
Slots = tuple[Any, ...]


class Operand(NamedTuple):
    """What a call reads or writes: numbers from the address in a slot on; strides in bytes."""

    slot: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _row(slot: int, size: int, *shape: int) -> Operand:
    """Numbers in one piece."""
    return Operand(slot, shape, tuple(math.prod(shape[i + 1 :]) * size for i in range(len(shape))))


class Call:
    """A step with the views that it works on.

    Args:
        memory: arrays of bytes by name.
    """

    def __init__(self, step: Step, target: Target, memory: Memory) -> None:
        self.target, self._memory = target, memory
        self.slots: Slots = step.slots
        self._meaning, self.kind = _MEANINGS[step.kernel]
        self._dtype = dtype_of(self.kind)
        self.size = self._dtype.itemsize

    def run(self) -> None:
        """Do what the kernel does."""
        self._meaning(self)

    def view(self, of: Operand) -> Any:
        """Numbers from the address in a slot on."""
        at = self.slots[of.slot]
        data = self._memory[at.name].data
        return np.ndarray(of.shape, self._dtype, data, at.offset, of.strides)

    def bytes(self, slot: int, rows: int, n: int, row: int) -> np.ndarray:
        """Rows of bytes, so many bytes apart, from the address in a slot on."""
        at = self.slots[slot]
        return np.ndarray((rows, n), np.uint8, self._memory[at.name].data, at.offset, (row, 1))

    def operands(self) -> list[Any]:
        """Views of what the call reads and writes, of kernels that say so."""
        return [self.view(one) for one in _OPERANDS[self._meaning](self.slots, self.size)]

    def row(self, slot: int, *shape: int) -> Any:
        """Numbers in one piece."""
        return self.view(_row(slot, self.size, *shape))

    def state(self, slot: int) -> np.ndarray:
        """The state of learning."""
        at = self.slots[slot]
        return np.ndarray((5,), np.float32, self._memory[at.name].data, at.offset)

    def bounds(self, slot: int) -> Bounds:
        """Those behind the slot that says whether there are any."""
        return tuple(self.slots[slot + 1 : slot + 3]) if self.slots[slot] else UNBOUNDED


def _matmul_operands(slots: Slots, size: int) -> list[Operand]:
    lines, n, k_lines, k, m, a_row, a_step, a_line, a_k_line, b_row, c_row, c_line = slots[4:16]
    start_row, start_line = slots[16:18]
    return [
        Operand(0, (lines, n, k_lines, k), (a_line, a_row, a_k_line, a_step)),
        Operand(1, (k_lines * k, m), (b_row, size)),
        Operand(2, (lines, n, m), (c_line, c_row, size)),
        Operand(3, (lines, n, m), (start_line, start_row, size)),
    ]


def _matmul(call: Call) -> None:
    a, b, c, start = call.operands()
    m = b.shape[1]
    made = matmul.reference(
        numbers_of(call.target, call.kind), a.reshape(-1, len(b)), b, start.reshape(-1, m),
        call.bounds(18),
    )  # fmt: skip
    c[...] = made.reshape(c.shape)


def _pad_operands(slots: Slots, size: int) -> list[Operand]:
    rows, n, source_row, left, right, above, below = slots[2:]
    wide = left + n + right
    found = [Operand(1, (above + rows + below, wide // size), (wide, size))]
    return [*found, Operand(0, (rows, n // size), (source_row, size))] if rows else found


def _pad(call: Call) -> None:
    to, *source = call.operands()
    _, n, _, left, _, above, below = call.slots[2:]
    to[...] = 0
    if source:
        inside = to[above : len(to) - below]
        inside[:, left // call.size : (left + n) // call.size] = source[0]


def _depthwise_operands(slots: Slots, size: int) -> list[Operand]:
    rows, columns, n, lines, taps, x_tap, x_line, w_tap, w_line, pixel, row = slots[4:15]
    return [
        Operand(0, (rows, columns, lines, taps, n), (row, pixel, x_line, x_tap, size)),
        Operand(1, (lines, taps, n), (w_line, w_tap, size)),
        Operand(2, (n,), (size,)),
        Operand(3, (rows, columns, n), (slots[16], slots[15], size)),
    ]


def _depthwise(call: Call) -> None:
    seen, w, start, c = call.operands()
    numbers = numbers_of(call.target, call.kind)
    c[...] = depthwise.reference(numbers, seen, w, start, call.bounds(17))


def _depthwise_gradient_operands(slots: Slots, size: int) -> list[Operand]:
    rows, columns, n, lines, taps, x_tap, x_line, pixel, row, dy_pixel, dy_row, _, c_tap = slots[3:]
    return [
        Operand(0, (rows, columns, lines, taps, n), (row, pixel, x_line, x_tap, size)),
        Operand(1, (rows, columns, n), (dy_row, dy_pixel, size)),
        Operand(2, (lines, taps, n), (taps * c_tap, c_tap, size)),
    ]


def _depthwise_gradient(call: Call) -> None:
    seen, dy, c = call.operands()
    start = c if call.slots[14] else np.zeros(c.shape)
    c[...] = depthwise_gradient.reference(numbers_of(call.target, call.kind), seen, dy, start)


def _elementwise(operation: str) -> Callable[[Call], None]:
    def run(call: Call) -> None:
        n, *constants = call.slots[3:]
        a, b = (call.row(i, n) for i in (0, 1))
        numbers = elementwise.arithmetic_of(call.target, call.kind, operation)
        call.row(2, n)[...] = elementwise.reference(operation, numbers, a, b, tuple(constants))

    return run


def _softmax(call: Call) -> None:
    pixels, n, beta = call.slots[2:]
    numbers = numbers_of(call.target, call.kind, wide=True)
    call.row(1, pixels, n)[...] = softmax.reference(numbers, call.row(0, pixels, n), beta)


def _pool(kind_of_pool: str, gradient: bool) -> Callable[[Call], None]:
    def run(call: Call) -> None:
        image, made, pairs = call.slots[4:7], call.slots[7:9], call.slots[9:15]
        windows = Windows(pairs[:2], pairs[2:4], pairs[4:])
        numbers = numbers_of(call.target, call.kind, wide=True)
        x, y = call.row(0, *image), call.row(1, *made, image[2])
        if gradient:
            dx, dy = call.row(2, *image), call.row(3, *made, image[2])
            found = pool.gradient_reference(kind_of_pool, numbers, x, y, dy, windows)
            dx[...] = numbers.stored(numbers.arithmetic.add(dx, found))
        else:
            bounds = call.slots[15:17]
            y[...] = pool.reference(kind_of_pool, numbers, x, windows, made, bounds)

    return run


def _place(call: Call) -> None:
    rows, n, source_row, to_row = call.slots[2:]
    call.bytes(1, rows, n, to_row)[...] = call.bytes(0, rows, n, source_row)


def _fill(call: Call) -> None:
    call.bytes(0, 1, call.slots[1], 0)[...] = call.slots[2] & 255


def _turn_operands(slots: Slots, size: int) -> list[Operand]:
    lines, taps, n, m, line, tap, row = slots[2:]
    return [
        Operand(0, (lines, taps, n, m), (line, tap, row, size)),
        _row(1, size, lines, taps, m, n),
    ]


def _turn(call: Call) -> None:
    source, to = call.operands()
    to[...] = source.transpose(0, 1, 3, 2)


def _loss(call: Call) -> None:
    n = call.slots[3]
    numbers = numbers_of(call.target, call.kind, wide=True)
    y, t = call.row(0, n), call.row(1, n)
    call.row(2, n)[...] = learning.loss_reference(numbers, y, t, call.state(4), call.slots[5])


def _finite(call: Call) -> None:
    learning.finite_reference(call.row(0, call.slots[1]), call.state(2))


def _update(call: Call) -> None:
    n, _, rate, momentum = call.slots[4:]
    w, v, g = (call.row(i, n) for i in (0, 2, 3))
    rest = call.row(1, n) if call.kind == "half" else None
    numbers = numbers_of(call.target, call.kind, wide=True)
    learning.update_reference(numbers, w, rest, v, g, call.state(5), rate, momentum)


def _rescale(call: Call) -> None:
    learning.rescale_reference(call.state(0), call.slots[1])


def _meanings() -> Iterator[tuple[str, tuple[Callable[[Call], None], Kind]]]:
    for kind in KINDS:
        for names, meaning in (
            (matmul.NAMES, _matmul), (pad.NAMES, _pad), (depthwise.NAMES, _depthwise),
            (depthwise_gradient.NAMES, _depthwise_gradient), (softmax.NAMES, _softmax),
            (turn.NAMES, _turn), (learning.LOSS, _loss), (learning.FINITE, _finite),
            (learning.UPDATE, _update),
        ):  # fmt: skip
            yield names[kind], (meaning, kind)
        for operation in elementwise.OPERATIONS:
            yield elementwise.name_of(operation, kind), (_elementwise(operation), kind)
        for one in pool.POOLS:
            for gradient in (False, True):
                yield pool.name_of(one, kind, gradient=gradient), (_pool(one, gradient), kind)
    yield learning.RESCALE, (_rescale, "single")
    yield place.PLACE, (_place, "half")
    yield place.FILL, (_fill, "half")
    for block in matmul.VARIANTS:
        yield matmul.variant("half", *block), (_matmul, "half")


_MEANINGS = dict(_meanings())
_OPERANDS: dict[Callable[[Call], None], Callable[[Slots, int], list[Operand]]] = {
    _matmul: _matmul_operands,
    _pad: _pad_operands,
    _depthwise: _depthwise_operands,
    _depthwise_gradient: _depthwise_gradient_operands,
    _turn: _turn_operands,
}

# The slot that says how many lines a kernel does the same for.
_LINES = {_matmul: 4, _pad: 2, _depthwise: 4, _depthwise_gradient: 3, _turn: 2}
LINES_OF = {name: _LINES[meaning] for name, (meaning, _) in _MEANINGS.items() if meaning in _LINES}


def operands_of(step: Step) -> list[Operand]:
    """What a call of a convolution reads and writes; of others nothing is said."""
    meaning, kind = _MEANINGS[step.kernel]
    found = _OPERANDS.get(meaning)
    return [] if found is None else found(step.slots, dtype_of(kind).itemsize)


def touched_bytes(step: Step) -> int:
    """Bytes that a call of a convolution reads or writes, each counted once."""
    _, kind = _MEANINGS[step.kernel]
    size = dtype_of(kind).itemsize
    slots: Slots = step.slots
    seen: dict[str, list[np.ndarray]] = {}
    for one in operands_of(step):
        at = slots[one.slot]
        places = np.array([at.offset])
        for n, stride in zip(one.shape, one.strides, strict=True):
            places = np.unique(places[:, None] + np.arange(n) * stride)
        seen.setdefault(at.name, []).append(places)
    return sum(int(np.unique(np.concatenate(all_of)).size) * size for all_of in seen.values())


def run(steps: tuple[Step, ...], target: Target, memory: Memory) -> None:
    """Do what kernels do, one after the other."""
    for step in steps:
        Call(step, target, memory).run()


def macs_of(step: Step) -> int:
    """Multiply-adds of a call, those with zeros around images included."""
    slots: tuple[Any, ...] = step.slots
    meaning, _ = _MEANINGS[step.kernel]
    if meaning in (_matmul, _depthwise):
        return math.prod(slots[4:9])
    return math.prod(slots[3:8]) if meaning is _depthwise_gradient else 0


def names_of(step: Step) -> Iterator[str]:
    """Names of what a call reads or writes."""
    yield from (slot.name for slot in step.slots if isinstance(slot, At))
