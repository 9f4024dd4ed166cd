"""The kernel table: one row per kernel; dispatch, tests and benchmarks are loops over it.

Rows are filled by whoever owns the kernels: the weight formats (`headrace.sparse`) and the kernels
that belong to no format (`headrace.kernels`). This module only says what a row is.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headrace.targets.target import Target

if TYPE_CHECKING:
    import numpy as np

KernelFunction = Callable[[Any, Any, Any], None]  # (args, thread, n_threads)
# What its address is called as; ctypes lets go of the interpreter's lock meanwhile.
ENTRY = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)


def symbol_of(kernel: str) -> str:
    """The one external symbol of a kernel's object."""
    return f"headrace_{kernel}"


@dataclass
class Case:
    """One call of a kernel with what the numpy reference says must come out.

    Attributes:
        slots: the argument block; an array stands for its address, an int or float for itself.
        expected: for each output array (an object that is in `slots`), its expected content.
        tolerance: largest allowed |difference| per element (0: bit for bit), by output or for all.
        label: shape and data, for the test's name.
    """

    slots: list[Any]
    expected: list[tuple[np.ndarray, np.ndarray]]
    tolerance: Any
    label: str

    @property
    def exact(self) -> bool:
        """Must outputs be equal bit for bit?"""
        return isinstance(self.tolerance, int) and self.tolerance == 0


@dataclass(frozen=True)
class Kernel:
    """A row of the table.

    Attributes:
        name: operation, then format or shape it is built for: `gemv_q4_0`.
        build: gives the function to compile for a target (blocking comes from the target).
        sources: modules whose text decides the code, besides the markers and the target's own.
        cases: test cases with their numpy reference; takes the target and a random generator.
        owner: module whose `kernel_named(name)` gives the row, so that another process can build
            it; a row without one is compiled where it is wanted.
    """

    name: str
    build: Callable[[Target], KernelFunction]
    sources: tuple[str, ...]
    cases: Callable[[Target, np.random.Generator], Iterator[Case]]
    owner: str | None = None

    def bit_exact(self, target: Target) -> bool:
        """Is the order of its operations fixed, so that every target gives the same bits?

        The cases say so: then each target is compared exactly with the one reference. Others have
        a bound that is derived from the operands.
        """
        import numpy as np

        return all(case.exact for case in self.cases(target, np.random.default_rng(1)))


def same_for_all(fn: KernelFunction) -> Callable[[Target], KernelFunction]:
    """For `Kernel.build`: this function, whatever the target."""
    return lambda target: fn


def no_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    """For `Kernel.cases` of what needs threads or files: other tests run it with these."""
    return iter(())
