"""A training step on a chip: where everything lies, and the functions that C calls."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.micro.lowered import At
from headrace.micro.network import MicroNetwork
from headrace.micro.packing import Packing, packed
from headrace.micro.ports import about
from headrace.micro.program import (
    ARENA,
    RUN,
    TRAIN,
    ConstantPool,
    Initial,
    PlacedArray,
    Program,
    call_of,
)
from headrace.micro.training import TrainingStep
from headrace.targets.target import Target


@dataclass(frozen=True)
class TrainingPlan:
    """A training step on a chip.

    Attributes:
        packing: of the arena: values, gradients, and what stays: trained numbers and velocities.
        program: `headrace_run` is the forward pass with the weights as they are by then,
            `headrace_train_step` that and an update.
    """

    packing: Packing
    program: Program

    @property
    def state_bytes(self) -> int:
        """Of what stays."""
        return sum(one.n_bytes for one in self.program.state)


def plan_training(network: MicroNetwork, target: Target, step: TrainingStep) -> TrainingPlan:
    """Place a training step in a chip's memories.

    Args:
        step: made by `headrace.micro.training.training_step` of this network for this chip.
    """
    packing = packed(step.lives())
    pool = ConstantPool()
    known = {name: pool.add(array) for name, array in step.constants.items()}
    initial = tuple(
        Initial(packing.offsets[name], pool.add(array).offset, array.nbytes)
        for name, array in step.state.items()
    )
    for name, offset in packing.offsets.items():
        known[name] = At(ARENA, offset)
    calls = tuple(call_of(one, known, -1) for one in step.steps)
    forward = step.phases.index("loss")
    given, made = network.inputs[0].value, network.outputs[0].value
    texts = (about(network.inputs[0]), "the output that is wanted, for headrace_train_step")
    inputs = tuple(
        PlacedArray(name, packing.offsets[name], value.shape, step.dtype, text)
        for name, value, text in zip(step.given, (given, made), texts, strict=True)
    )
    output = PlacedArray(
        step.made, packing.offsets[step.made], made.shape, step.dtype, about(network.outputs[0])
    )
    state = tuple(
        PlacedArray(name, packing.offsets[name], array.shape, array.dtype)
        for name, array in step.state.items()
    )
    program = Program(
        network.name, target, {RUN: calls[:forward], TRAIN: calls}, pool.content(), initial,
        packing.n_bytes, inputs, (output,), state,
    )  # fmt: skip
    return TrainingPlan(packing, program)
