"""What a network takes on a chip, for `headrace plan`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from headrace.errors import KernelError
from headrace.micro.arithmetic import numbers_of
from headrace.micro.emulate import Arrays, EmulatedNetwork
from headrace.micro.firmware import RUN, firmware_object, kernel_objects
from headrace.micro.network import Layer, MicroNetwork, Port, Value
from headrace.micro.plan import MicroPlan
from headrace.targets.emulation.symbols import section_bytes


def report(plan: MicroPlan, *, sram: int | None, flash: int | None) -> dict[str, Any]:
    """Bytes of SRAM and flash, whether they are there, and instructions where they can be counted.

    Args:
        sram, flash: bytes that there are; None: not said.

    Raises:
        KernelError: a kernel does not compile for the chip.
    """
    network = plan.network
    code = code_bytes(plan)
    needed = len(plan.constants) + plan.block_bytes + code
    facts: dict[str, Any] = {
        "network": network.name,
        "target": plan.target.name,
        "numbers": numbers_of(network).name,
        "inputs": [port_text(port) for port in network.inputs],
        "outputs": [port_text(port) for port in network.outputs],
        "multiply_adds": network.macs,
        "arena_bytes": plan.arena_bytes,
        "arena_least_bytes": plan.packing.least,
        "packed": plan.packing.packer,
        "flash_bytes": needed,
        "flash": {"constants": f"{len(plan.constants):,}", "arguments": f"{plan.block_bytes:,}",
                  "code": f"{code:,}"},
        "by_rows": [
            {"from": network.layers[one.first].name, "to": network.layers[one.last - 1].name,
             "rows": one.rows}
            for one in plan.by_rows
        ],
        "fits": (sram is None or plan.arena_bytes <= sram) and (flash is None or needed <= flash),
    }  # fmt: skip
    facts |= _counted(plan)
    facts["layers"] = list(_layers(network))
    return facts


def code_bytes(plan: MicroPlan) -> int:
    """Of kernels and what calls them."""
    kernels = kernel_objects(plan)
    own = sum(section_bytes(one, name) for one in kernels for name in (".text", ".rodata"))
    return own + section_bytes(firmware_object(plan), ".text")


def port_text(port: Port) -> str:
    """`input_1: int8 [1, 49, 10, 1]`, as the file has it."""
    return f"{port.name}: {port.type} {list(port.shape)}"


def _layers(network: MicroNetwork) -> Iterator[dict[str, Any]]:
    for layer in network.layers:
        yield {
            "layer": type(layer).__name__,
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
            found[value.name] = rng.standard_normal(value.shape).astype(np.float16)
        else:
            found[value.name] = rng.integers(-128, 128, value.shape).astype(np.int8)
    return found


def _counted(plan: MicroPlan) -> dict[str, Any]:
    """Instructions of an inference, counted in an emulator; why not, where there is none."""
    try:
        with tempfile.TemporaryDirectory(prefix="headrace-micro-") as folder:
            program = EmulatedNetwork(plan, folder)
            given = random_inputs(plan.network)
            counts, used = program.instructions(given), program.used(given)
    except KernelError as error:
        return {"not_counted": str(error)}
    total = sum(counts.values())
    return {
        "stack_bytes": used.stack_bytes,
        "instructions": total,
        "multiply_adds_per_instruction": round(plan.network.macs / total, 3),
        "kernels": [
            {"kernel": "(calls)" if name == RUN else name, "instructions": count,
             "share": f"{count / total:.1%}"}
            for name, count in sorted(counts.items(), key=lambda one: -one[1])
        ],
    }  # fmt: skip
