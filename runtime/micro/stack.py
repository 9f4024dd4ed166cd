"""How deep the stack gets below the functions that C calls: a bound that holds in any run.

Kernels call neither pointers nor themselves, and take a number of bytes that stands in their code
(`headrace.targets.frames`): the function's own frame, the largest of a kernel, and, where that
calls what fills or copies memory or divides, all of these together, or the largest of what stands
in for a floating-point unit, which calls nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from headrace.micro.firmware import firmware_object, kernel_objects
from headrace.micro.program import Program
from headrace.targets.cache import Progress
from headrace.targets.frames import frames, wanted
from headrace.targets.freestanding import functions_object


def stack_bytes(program: Program, progress: Progress | None = None) -> int:
    """Bytes of stack that a call of the program takes at most, interrupts apart.

    Raises:
        KernelError: a kernel does not compile for the chip.
    """
    target = program.target
    helpers = frames(functions_object(target), target)

    objects = [(frames(code, target), wanted(code)) for code in kernel_objects(program, progress)]
    every = {name: size for found, _ in objects for name, size in found.items()}

    def deepest(found: Mapping[str, int], names: set[str]) -> int:
        beside = sum(helpers.values()) if names & helpers.keys() else 0
        return sum(found.values()) + max([beside, *(every.get(name, 0) for name in names)])

    own = max(frames(firmware_object(program), target).values())
    return own + max(deepest(*one) for one in objects)
