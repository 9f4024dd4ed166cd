"""Functions for a chip as lists of calls of kernels, with what they need to be linked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from headrace.micro.lowered import At, Step
from headrace.micro.packing import ALIGNED
from headrace.targets.target import Target

SLOT_BYTES = 8
READ_BEHIND = 16  # bytes behind a value or constant that kernels may read
ARENA, CONSTANTS = "arena", "constants"
# Functions that C calls by these names: outputs of inputs; that, and one step of learning.
RUN, TRAIN = "headrace_run", "headrace_train_step"


class Call(NamedTuple):
    """Of a kernel: addresses are in the arena (`ARENA`) or in the constants (`CONSTANTS`)."""

    kernel: str
    slots: tuple[int | float | At, ...]
    layer: int


def call_of(step: Step, places: Mapping[str, At], layer: int) -> Call:
    """A step whose names have places."""
    slots = tuple(
        places[slot.name].behind(slot.offset) if isinstance(slot, At) else slot
        for slot in step.slots
    )
    return Call(step.kernel, slots, layer)


class ConstantPool:
    """Constants in one piece; those of the same content are there once."""

    def __init__(self) -> None:
        self._whole = bytearray()
        self._known: dict[bytes, int] = {}

    def add(self, array: np.ndarray) -> At:
        """Where an array lies."""
        data = np.ascontiguousarray(array).tobytes()
        if data not in self._known:
            self._whole += bytes(-len(self._whole) % ALIGNED)
            self._known[data] = len(self._whole)
            self._whole += data
        return At(CONSTANTS, self._known[data])

    def content(self) -> bytes:
        """All of them, and behind them what kernels may read."""
        return bytes(self._whole) + bytes(READ_BEHIND)


class Initial(NamedTuple):
    """What a piece of the arena holds before anything runs: where, from where, how much."""

    arena: int
    constants: int
    n_bytes: int


@dataclass(frozen=True)
class PlacedArray:
    """An array in the arena.

    Attributes:
        about: for people: what it is in the file, and how its elements stand for numbers.
    """

    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    about: str = ""

    @property
    def n_bytes(self) -> int:
        """Of all elements."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


@dataclass(frozen=True)
class Program:
    """Functions for a chip.

    Attributes:
        name: for people.
        functions: calls by the names of functions, which have no arguments.
        constants: in flash, in one piece.
        initial: what of them goes to the arena first.
        arena_bytes: of SRAM.
        inputs, outputs: arrays that are there before a function runs, and behind it.
        state: arrays that stay from one call to the next.
    """

    name: str
    target: Target
    functions: Mapping[str, tuple[Call, ...]]
    constants: bytes
    initial: tuple[Initial, ...]
    arena_bytes: int
    inputs: tuple[PlacedArray, ...]
    outputs: tuple[PlacedArray, ...]
    state: tuple[PlacedArray, ...] = ()

    @property
    def block_bytes(self) -> int:
        """Flash for argument blocks, which functions share, and lists of calls."""
        calls = [call for calls in self.functions.values() for call in calls]
        return SLOT_BYTES * (len(calls) + sum(len(slots) for slots in {c.slots for c in calls}))

    @property
    def kernels(self) -> list[str]:
        """Names of those that functions call."""
        calls = (call for calls in self.functions.values() for call in calls)
        return list(dict.fromkeys(call.kernel for call in calls))
