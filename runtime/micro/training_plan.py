"""A training step on a chip: where everything lies, as a plan that an emulator runs.

What stays from step to step (trained weights, velocities, the loss scale) is an input and an
output, in the same place: whoever runs the program gives it and gets it back. Inputs and outputs
are arrays of halves, two of which are a float32 where numbers are such.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from headrace.micro.lowered import At
from headrace.micro.network import MicroNetwork, Port, Value
from headrace.micro.packing import ALIGNED, packed
from headrace.micro.plan import ARENA, CONSTANTS, READ_BEHIND, Call, MicroPlan
from headrace.micro.training import TrainingStep
from headrace.targets.target import Target


def plan_training(name: str, step: TrainingStep, target: Target) -> MicroPlan:
    """Places for a training step."""
    packing = packed(step.lives())
    known = {one: At(ARENA, offset) for one, offset in packing.offsets.items()}
    constants, at = _constants(step.constants)
    known |= at
    calls = [
        Call(
            one.kernel,
            tuple(
                At(known[slot.name].name, known[slot.name].offset + slot.offset)
                if isinstance(slot, At)
                else slot
                for slot in one.slots
            ),
            i,
        )
        for i, one in enumerate(step.steps)
    ]
    kept = [_port(one, array.nbytes) for one, array in step.state.items()]
    inputs = [_port(one, step.values[one] - READ_BEHIND) for one in step.given]
    output = _port(step.made, step.values[step.made] - READ_BEHIND)
    network = MicroNetwork(name, (), (*inputs, *kept), (output, *kept))
    places = {port.name: packing.offsets[port.name] for port in (*inputs, output, *kept)}
    return MicroPlan(network, target, tuple(calls), constants, packing, places)


def first_arrays(step: TrainingStep) -> dict[str, np.ndarray]:
    """What stays from step to step, in front of the first one."""
    return {name: as_halves(array) for name, array in step.state.items()}


def as_halves(array: np.ndarray) -> np.ndarray:
    """An array's bytes, as ports have them."""
    return np.ascontiguousarray(array).reshape(-1).view(np.float16)


def _port(name: str, n_bytes: int) -> Port:
    value = Value(name, (n_bytes // 2,), None)
    return Port(name, value.shape, value)


def _constants(arrays: Mapping[str, np.ndarray]) -> tuple[bytes, dict[str, At]]:
    whole, at = bytearray(), {}
    for name, array in arrays.items():
        whole += bytes(-len(whole) % ALIGNED)
        at[name] = At(CONSTANTS, len(whole))
        whole += np.ascontiguousarray(array).tobytes()
    return bytes(whole + bytes(READ_BEHIND)), at
