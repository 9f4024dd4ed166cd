"""Calls of kernels in numpy, bit for bit: memory is arrays of bytes by name.

What a call reads and writes are views that its argument block describes; one that leaves its array
is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from headrace.micro.kernels import (
    depthwise,
    elementwise,
    learning,
    matmul,
    pad,
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


class Call:
    """A step with the views that it works on.

    Args:
        memory: arrays of bytes by name.
    """

    def __init__(self, step: Step, target: Target, memory: Memory) -> None:
        self.target, self.slots, self._memory = target, step.slots, memory
        self._meaning, self.kind = _MEANINGS[step.kernel]
        self._dtype = dtype_of(self.kind)
        self.size = self._dtype.itemsize
        self.seen: list[np.ndarray] = []

    def run(self) -> None:
        """Do what the kernel does."""
        self._meaning(self)

    def view(self, slot: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
        """Numbers from the address in a slot on."""
        at = self.slots[slot]
        found = np.ndarray(
            shape, self._dtype, self._memory[at.name].data, at.offset, (*strides, self.size)
        )
        self.seen.append(found)
        return found

    def row(self, slot: int, *shape: int) -> Any:
        """Numbers in one piece."""
        sizes = [math.prod(shape[i + 1 :]) * self.size for i in range(len(shape) - 1)]
        return self.view(slot, shape, tuple(sizes))

    def state(self, slot: int) -> np.ndarray:
        """The state of learning."""
        at = self.slots[slot]
        return np.ndarray((4,), np.float32, self._memory[at.name].data, at.offset)

    def bounds(self, slot: int) -> Bounds:
        """Those behind the slot that says whether there are any."""
        return tuple(self.slots[slot + 1 : slot + 3]) if self.slots[slot] else UNBOUNDED  # type: ignore[return-value]


def _matmul(call: Call) -> None:
    lines, n, k_lines, k, m, a_row, a_step, a_line, a_k_line, b_row, c_row, c_line = call.slots[
        4:16
    ]
    start_row, start_line = call.slots[16:18]
    # The last stride of a view is a number's size: elements of `a` may have another.
    whole = call.view(0, (lines, n, k_lines, k, 1), (a_line, a_row, a_k_line, a_step))
    b = call.view(1, (k_lines * k, m), (b_row,))
    c = call.view(2, (lines, n, m), (c_line, c_row))
    start = call.view(3, (lines, n, m), (start_line, start_row))
    made = matmul.reference(
        numbers_of(call.target, call.kind), whole.reshape(lines * n, -1), b,
        start.reshape(lines * n, m), call.bounds(18),
    )  # fmt: skip
    c[...] = made.reshape(c.shape)


def _pad(call: Call) -> None:
    _, _, rows, n, source_row, left, right, above, below = call.slots
    wide = left + n + right
    to = call.view(1, (above + rows + below, wide // call.size), (wide,))
    if rows:
        source = call.view(0, (rows, n // call.size), (source_row,))
        to[above : above + rows, left // call.size : (left + n) // call.size] = source
        to[above : above + rows, : left // call.size] = 0
        to[above : above + rows, (left + n) // call.size :] = 0
    to[:above], to[above + rows :] = 0, 0


def _depthwise(call: Call) -> None:
    rows, columns, n, lines, taps, x_tap, x_line, w_tap, w_line, pixel, row = call.slots[4:15]
    seen = call.view(0, (rows, columns, lines, taps, n), (row, pixel, x_line, x_tap))
    w = call.view(1, (lines, taps, n), (w_line, w_tap))
    c = call.view(3, (rows, columns, n), (call.slots[16], call.slots[15]))
    numbers = numbers_of(call.target, call.kind)
    c[...] = depthwise.reference(numbers, seen, w, call.row(2, n), call.bounds(17))


def _depthwise_gradient(call: Call) -> None:
    rows, columns, n, lines, taps, x_tap, x_line, pixel, row, dy_pixel, dy_row, stays, c_tap = (
        call.slots[3:]
    )
    seen = call.view(0, (rows, columns, lines, taps, n), (row, pixel, x_line, x_tap))
    dy = call.view(1, (rows, columns, n), (dy_row, dy_pixel))
    c = call.view(2, (lines, taps, n), (taps * c_tap, c_tap))
    start = c if stays else np.zeros(c.shape)
    c[...] = depthwise.gradient_reference(numbers_of(call.target, call.kind), seen, dy, start)


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


def _turn(call: Call) -> None:
    lines, taps, n, m, line, tap, row = call.slots[2:]
    source = call.view(0, (lines, taps, n, m), (line, tap, row))
    call.row(1, lines, taps, m, n)[...] = source.transpose(0, 1, 3, 2)


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
            (depthwise.GRADIENT_NAMES, _depthwise_gradient), (softmax.NAMES, _softmax),
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
    for block in matmul.VARIANTS:
        yield matmul.variant("half", *block), (_matmul, "half")


_MEANINGS = dict(_meanings())


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
