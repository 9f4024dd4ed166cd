"""A network layer by layer: what it is, what it takes on each chip, and what its layers cost."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from headrace.errors import UnsupportedError
from headrace.micro.arithmetic import kinds_of
from headrace.micro.emulate import Emulated, total
from headrace.micro.learning import short_names, with_weights
from headrace.micro.network import Layer, MicroNetwork, Value
from headrace.micro.plan import MicroPlan, plan_network
from headrace.micro.program import RUN
from headrace.micro.report import layer_rows, random_inputs
from headrace.targets.target import microcontrollers

Progress = Callable[[int, int, str], None]


def describe(network: MicroNetwork) -> dict[str, Any]:
    """Layers with their quantisation, and what values and weights take on each chip.

    Nothing is compiled: the stack and code, which `headrace plan` says, come on top.
    """
    return {
        "numbers": " and ".join(kinds_of(network)),
        "multiply_adds": network.macs,
        "layers": [
            row | {"quantisation": _quantisation(layer)}
            for row, layer in zip(layer_rows(network), network.layers, strict=True)
        ],
        "chips": [_on_chip(network, name) for name in microcontrollers()],
    }


def _on_chip(network: MicroNetwork, name: str) -> dict[str, Any]:
    try:
        plan = plan_network(network, microcontrollers()[name])
    except UnsupportedError as error:
        return {"chip": name, "arena_bytes": "", "constants_bytes": "", "why_not": str(error)}
    return {
        "chip": name, "arena_bytes": plan.arena_bytes, "constants_bytes": len(plan.constants),
        "why_not": "",
    }  # fmt: skip


def _quantisation(layer: Layer) -> str:
    """Scale and zero of what a layer makes, and of how many scales its weights have."""
    text = _codes(layer.makes)
    scales = getattr(layer, "scales", None)
    if scales is not None:
        count = len(set(scales.reshape(-1).tolist()))
        text += f"; weights {count} scale{'s' * (count != 1)}"
    return text


def _codes(value: Value) -> str:
    if value.codes is not None:
        return f"{value.codes.scale:.4g} * (code - {value.codes.zero})"
    return "sums" if value.sums is not None else "real"


def bench(plan: MicroPlan, progress: Progress | None = None) -> dict[str, Any]:
    """Instructions and predicted cycles of a network, layer by layer, counted in the emulator.

    Raises:
        KernelError: nothing here emulates the chip, or counts.
    """
    network, program = plan.network, plan.program
    calls = {
        f"headrace_layer_{i}": tuple(call for call in plan.calls if call.layer == i)
        for i in range(len(network.layers))
    }
    parts = {name: of for name, of in calls.items() if of}
    given = random_inputs(network)
    with tempfile.TemporaryDirectory(prefix="headrace-micro-") as folder:
        program = replace(program, functions={**program.functions, **parts})
        emulated = Emulated(program, folder)
        whole = total(emulated.counts(given, RUN))
        rows = list(_counted(network, emulated, list(calls), list(parts), whole.cycles, progress))
    return {
        "network": network.name,
        "target": plan.target.name,
        "numbers": " and ".join(kinds_of(network)),
        "multiply_adds": network.macs,
        "instructions": whole.instructions,
        "cycles": whole.cycles,
        "multiply_adds_per_instruction": round(network.macs / whole.instructions, 3),
        "layers": rows,
    }


def _counted(
    network: MicroNetwork, emulated: Emulated, names: list[str], parts: list[str], cycles: int,
    progress: Progress | None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    given, short = random_inputs(network), short_names(with_weights(network))
    for i, (name, layer) in enumerate(zip(names, network.layers, strict=True)):
        if progress is not None:
            progress(i, len(names), "counting instructions")
        row = {"layer": type(layer).__name__, "name": short.get(layer.name, "")}
        if name not in parts:  # a view: no work
            continue
        found = total(emulated.counts(given, name))
        yield row | {
            "multiply_adds": layer.macs,
            "instructions": found.instructions,
            "each": f"{layer.macs / found.instructions:.2f}" if layer.macs else "",
            "cycles": found.cycles,
            "share": f"{found.cycles / cycles:.1%}",
        }
    if progress is not None:
        progress(len(names), len(names), "counting instructions")
