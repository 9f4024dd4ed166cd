"""What the commands do with networks on microcontrollers."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.cli_networks import first_elements, named_inputs, read_array, write_arrays
from headrace.cli_output import print_json, progress_bar, say, show
from headrace.errors import HeadraceError
from headrace.sizes import format_size

if TYPE_CHECKING:
    from headrace.micro.plan import MicroPlan

_NO_MEANING = (
    "threads", "memory", "kernels", "context", "patches", "prompt", "cpu", "input",
)  # fmt: skip


def refuse(options: Mapping[str, Any]) -> None:
    """Options that say nothing to a chip are not ignored."""
    for name in _NO_MEANING:
        if options.get(name) not in (None, (), False):
            raise HeadraceError(f"a microcontroller takes no --{name}; leave it out")


def _planned(model: str, target: str, sram: int | None) -> MicroPlan:
    from headrace.loaders.sources import resolve
    from headrace.micro.choice import plan_within
    from headrace.micro.reading import read_network
    from headrace.targets.target import microcontrollers

    network = read_network(resolve(model))
    with progress_bar() as progress:
        return plan_within(network, microcontrollers()[target], sram, progress)


def plan(*, model: str, target: str, sram: int | None, flash: int | None, json: bool) -> int:
    """Say what a network takes on a chip, and whether it fits."""
    from headrace.micro.report import report

    found = report(_planned(model, target, sram), sram=sram, flash=flash)
    show(found, json)
    if flash is not None and found["flash_bytes"] > flash:
        raise HeadraceError(
            f"{model} takes {format_size(found['flash_bytes'])} of flash on {target}, and "
            f"{format_size(flash)} are there (--flash): take a network with fewer weights"
        )
    return 0


def run(
    *, model: str, target: str, sram: int | None, inputs: Sequence[str], output: str | None,
    json: bool,
) -> int:  # fmt: skip
    """Run a network once on an emulated chip: outputs, instructions and the memory it took."""
    from headrace.micro.emulate import EmulatedNetwork
    from headrace.micro.ports import from_chip, to_chip

    made = _planned(model, target, sram)
    network = made.network
    files = {name: read_array(Path(value)) for name, value in named_inputs(inputs).items()}
    given = to_chip(network, files)
    with tempfile.TemporaryDirectory(prefix="headrace-micro-") as folder:
        program = EmulatedNetwork(made, folder)
        (values,) = program.run([given])
        counts, used = program.instructions(given), program.used(given)
    found = from_chip(network, values)
    facts = {
        "target": target,
        "instructions": sum(counts.values()),
        "arena_bytes": used.arena_bytes,
        "stack_bytes": used.stack_bytes,
    }
    if output is not None:
        for path in write_arrays(Path(output), found):
            say(f"{path} written")
    if json:
        outputs = [{"output": name, "values": array} for name, array in found.items()]
        print_json({"model": model, **facts, "outputs": outputs if output is None else []})
        return 0
    for name, array in found.items():
        row = {"output": name, "type": str(array.dtype), "shape": list(array.shape)}
        show(row if output is not None else row | {"values": first_elements(array)}, False)
    show(facts, False)
    return 0


def export(*, model: str, target: str, sram: int | None, output: str) -> int:
    """Write a network for a chip into a folder."""
    from headrace.micro.export import export_network

    made = _planned(model, target, sram)
    try:
        written = export_network(made, output)
    except OSError as error:
        raise HeadraceError(f"cannot write {output}: {error.strerror or error}") from error
    for path in written.paths:
        say(f"{path}: {format_size(path.stat().st_size)}")
    say(f"{format_size(made.arena_bytes)} of SRAM for values")
    if written.no_image is not None:
        say(f"no image for an emulator: {written.no_image}")
    return 0
