"""What a matrix product costs on a target: instructions and loads, counted in an emulator."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from headrace.sparse.linear import activation_bytes, kernels, together
from headrace.sparse.registry import FORMATS
from headrace.sparse.unpacking import unpacking_slots
from headrace.targets.cache import KernelStore
from headrace.targets.emulation.count import count_instructions
from headrace.targets.emulation.machines import NATIVE
from headrace.targets.target import Target

ROWS, INPUTS = 32, 512
OPERATIONS = ("gemv", "gemm")


@dataclass(frozen=True)
class Cost:
    """A product's cost.

    Attributes:
        instructions: executed, for each multiply-add.
        loads: bytes loaded for each byte of weights; None where the machine does not show them.
    """

    instructions: float
    loads: float | None


def machine_for(target: Target) -> str:
    """Where its kernels are counted: natively, or on the weakest CPU that runs them."""
    return target.machines[0] if target.machines else NATIVE


def cost(target: Target, operation: str, format_name: str, machine: str | None = None) -> Cost:
    """Count one product of a matrix of zeros: its values decide nothing about what is executed.

    `machine`: where; default `machine_for(target)`.

    Raises:
        KernelError: the kernel cannot be compiled, run or counted here.
    """
    fmt = FORMATS[format_name]
    kernel = kernels(fmt)[operation]
    tokens = 1 if operation == "gemv" else target.tokens(fmt.activation)  # one group
    weights = np.zeros(fmt.tiled_bytes(ROWS, INPUTS), np.uint8)
    kind = fmt.activation if operation == "gemv" else together(fmt)
    entry = activation_bytes(kind, INPUTS) * tokens
    activations = np.zeros(entry, np.uint8)
    y = np.zeros((tokens, ROWS), np.float32)
    slots = [
        weights, activations, y, INPUTS // fmt.block, ROWS // 16, np.array([tokens]), 0,
        y.strides[0], np.zeros(ROWS, np.float32), entry,
        *unpacking_slots(fmt, INPUTS, target.gemm_tiles),
    ]  # fmt: skip
    code = KernelStore(target).objects([kernel])[kernel.name]
    where = machine_for(target) if machine is None else machine
    counts = count_instructions(kernel.name, code, target, where, [(slots, 1)])
    loaded = counts.loaded_bytes
    return Cost(
        counts.instructions / (ROWS * INPUTS * tokens),
        None if loaded is None else loaded / weights.nbytes,
    )
