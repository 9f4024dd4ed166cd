"""What a network takes on a chip, for `headrace plan`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from headrace.errors import KernelError
from headrace.micro.arithmetic import kinds_of
from headrace.micro.emulate import Arrays, Emulated, total
from headrace.micro.firmware import firmware_object, kernel_objects
from headrace.micro.learning import short_names, with_weights
from headrace.micro.network import Layer, MicroNetwork, Port, Value
from headrace.micro.plan import MicroPlan
from headrace.micro.program import RUN, TRAIN, Program
from headrace.micro.stack import stack_bytes
from headrace.micro.training_plan import TrainingPlan
from headrace.targets.emulation.symbols import section_bytes


def report(plan: MicroPlan) -> dict[str, Any]:
    """Bytes of SRAM and flash, and instructions where they can be counted.

    Raises:
        KernelError: a kernel does not compile for the chip.
    """
    network = plan.network
    code = code_bytes(plan.program)
    blocks = plan.program.block_bytes
    needed = len(plan.constants) + blocks + code
    facts: dict[str, Any] = {
        "network": network.name,
        "target": plan.target.name,
        "numbers": " and ".join(kinds_of(network)),
        "inputs": [port_text(port) for port in network.inputs],
        "outputs": [port_text(port) for port in network.outputs],
        "multiply_adds": network.macs,
        **sram_facts(plan.program),
        "arena_least_bytes": plan.packing.least,
        "packed": plan.packing.packer,
        "flash_bytes": needed,
        "flash": {"constants": f"{len(plan.constants):,}", "arguments": f"{blocks:,}",
                  "code": f"{code:,}"},
        "by_rows": [
            {"from": network.layers[one.first].name, "to": network.layers[one.last - 1].name,
             "rows": one.rows}
            for one in plan.by_rows
        ],
    }  # fmt: skip
    counted = _counted(plan.program, random_inputs(network), RUN)
    if instructions := counted.get("instructions"):
        facts["multiply_adds_per_instruction"] = round(network.macs / instructions, 3)
    facts |= counted
    facts["layers"] = list(layer_rows(network))
    return facts


def report_learning(plan: TrainingPlan) -> dict[str, Any]:
    """The same of a network that learns.

    Raises:
        KernelError: a kernel does not compile for the chip.
    """
    program, code = plan.program, code_bytes(plan.program)
    rng = np.random.default_rng(0)
    given = {one.name: rng.random(one.shape).astype(one.dtype) for one in program.inputs}
    facts: dict[str, Any] = {
        "network": program.name,
        "target": program.target.name,
        "inputs": [one.about for one in program.inputs],
        "outputs": [one.about for one in program.outputs],
        **sram_facts(program),
        "arena_least_bytes": plan.packing.least,
        "learned_bytes": plan.state_bytes,
        "flash_bytes": len(program.constants) + program.block_bytes + code,
    }
    for name, label in ((RUN, "inference"), (TRAIN, "training_step")):
        counted = _counted(program, given, name)
        facts |= {f"{label}_{k}" if k != "not_counted" else k: v for k, v in counted.items()}
    return facts


def sram_facts(program: Program) -> dict[str, int]:
    """All of SRAM that a program takes: its arena, and what its stack is at most.

    Raises:
        KernelError: a kernel does not compile for the chip.
    """
    arena, stack = program.arena_bytes, stack_bytes(program)
    return {"sram_bytes": arena + stack, "arena_bytes": arena, "stack_bytes": stack}


def code_bytes(program: Program) -> int:
    """Of kernels and what calls them."""
    kernels = kernel_objects(program)
    own = sum(section_bytes(one, name) for one in kernels for name in (".text", ".rodata"))
    return own + section_bytes(firmware_object(program), ".text")


def port_text(port: Port) -> str:
    """`input_1: int8 [1, 49, 10, 1]`, as the file has it."""
    return f"{port.name}: {port.type} {list(port.shape)}"


def layer_rows(network: MicroNetwork) -> Iterator[dict[str, Any]]:
    """What layers are, for a table."""
    names = short_names(with_weights(network))
    for layer in network.layers:
        yield {
            "layer": type(layer).__name__,
            "name": names.get(layer.name, ""),
            "reads": " ".join(_shape(value) for value in layer.reads),
            "makes": _shape(layer.makes),
            "windows": _windows(layer),
            "multiply_adds": layer.macs,
        }


def _shape(value: Value) -> str:
    return "x".join(map(str, value.shape))


def _windows(layer: Layer) -> str:
    windows = getattr(layer, "windows", None)
    if windows is None:
        return ""
    (rows, columns), (down, across) = windows.taps, windows.strides
    return f"{rows}x{columns}" + (f" by {down}x{across}" if (down, across) != (1, 1) else "")


def random_inputs(network: MicroNetwork) -> Arrays:
    """Something to run: what kernels execute hardly depends on it."""
    rng, found = np.random.default_rng(0), {}
    for port in network.inputs:
        value = port.value
        if value.codes is None:
            found[value.name] = rng.standard_normal(value.shape).astype(value.dtype)
        else:
            found[value.name] = rng.integers(-128, 128, value.shape).astype(np.int8)
    return found


def _counted(program: Program, given: Arrays, function: str) -> dict[str, Any]:
    """Instructions of a function, counted in an emulator; why not, where there is none."""
    try:
        with tempfile.TemporaryDirectory(prefix="headrace-micro-") as folder:
            counts = Emulated(program, folder).counts(given, function)
    except KernelError as error:
        return {"not_counted": str(error)}
    whole = total(counts)
    return {
        "instructions": whole.instructions,
        "cycles": whole.cycles,
        "kernels": [
            {"kernel": "(calls)" if name == function else name, "instructions": one.instructions,
             "cycles": one.cycles, "share": f"{one.cycles / whole.cycles:.1%}"}
            for name, one in sorted(counts.items(), key=lambda one: -one[1].cycles)
        ],
    }  # fmt: skip
