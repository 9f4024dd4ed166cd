"""What the commands do with networks on microcontrollers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.arrays import read_array
from headrace.cli_networks import first_elements, named_inputs, output_paths, write_arrays
from headrace.cli_options import is_given
from headrace.cli_output import print_json, progress_bar, say, show
from headrace.cli_sampling import given_of_sampling
from headrace.errors import HeadraceError, UnsupportedError
from headrace.sizes import format_size

if TYPE_CHECKING:
    from headrace.micro.learning import Trained
    from headrace.micro.network import MicroNetwork
    from headrace.micro.plan import MicroPlan

_NO_MEANING = (
    "threads", "memory", "kernels", "context", "patches", "prompt", "cpu", "input",
    "predictor", "whole_stack",
)  # fmt: skip


def refuse(options: Mapping[str, Any]) -> None:
    """Options that say nothing to a chip are not ignored."""
    given = [name for name in _NO_MEANING if is_given(options.get(name))]
    for name in given + given_of_sampling(options):
        option = name.replace("_", "-")
        raise HeadraceError(f"a microcontroller takes no --{option}; leave it out")


def _network(model: str, weights: str | None) -> tuple[MicroNetwork, dict[str, Trained]]:
    """A file's network, and what of it has learned weights (--weights)."""
    from headrace.loaders.sources import resolve
    from headrace.micro.learning import what_is_trained
    from headrace.micro.reading import read_network
    from headrace.micro.trained_weights import read_weights

    network = read_network(resolve(model))
    if weights is None:
        return network, {}
    with _of_file(model):
        network, learned = read_weights(network, weights)
    say(f"{', '.join(what_is_trained(network, learned))}: as learned, from {weights}")
    return network, learned


@contextmanager
def _of_file(model: str) -> Iterator[None]:
    """Errors name the file."""
    try:
        yield
    except UnsupportedError as error:
        raise UnsupportedError(str(error), path=model) from None


def _planned(model: str, target: str, sram: int | None, weights: str | None) -> MicroPlan:
    from headrace.micro.choice import plan_within
    from headrace.targets.target import microcontrollers

    network, _ = _network(model, weights)
    with _of_file(model), progress_bar() as progress:
        return plan_within(network, microcontrollers()[target], sram, progress)


def plan(
    *, model: str, target: str, weights: str | None, sram: int | None, flash: int | None,
    learning: Mapping[str, Any], json: bool,
) -> int:  # fmt: skip
    """Say what a network takes on a chip, and whether it fits."""
    from headrace.cli_learning import planned
    from headrace.micro.report import report, report_learning

    if learning:
        network, _ = _network(model, weights)
        found = report_learning(planned(model, network, target, learning, sram)[1])
    else:
        found = report(_planned(model, target, sram, weights))
    show(found, json)
    if flash is not None and found["flash_bytes"] > flash:
        raise HeadraceError(
            f"{model} takes {format_size(found['flash_bytes'])} of flash on {target}, and "
            f"{format_size(flash)} are there (--flash): take a network with fewer weights"
        )
    return 0


def run(
    *, model: str, target: str, weights: str | None, sram: int | None,
    learning: Mapping[str, Any], inputs: Sequence[str], output: str | None, json: bool,
) -> int:  # fmt: skip
    """Run a network once on an emulated chip: outputs, instructions and the memory it took."""
    if learning:
        from headrace import cli_learning

        network, known = _network(model, weights)
        return cli_learning.run(
            model=model, network=network, target=target, given=learning, sram=sram, known=known,
            inputs=inputs, output=output, json=json,
        )  # fmt: skip
    from headrace.micro.emulate import Emulated, total
    from headrace.micro.ports import from_chip, to_chip
    from headrace.micro.report import sram_facts

    made = _planned(model, target, sram, weights)
    network = made.network
    files = {name: read_array(Path(value)) for name, value in named_inputs(inputs).items()}
    given = to_chip(network, files)
    paths: dict[str, Path] = {}
    if output is not None:
        paths = output_paths(Path(output), [port.name for port in network.outputs], inputs)
    with tempfile.TemporaryDirectory(prefix="headrace-micro-") as folder:
        program = Emulated(made.program, folder)
        (values,) = program.run([given])
        counts, used = total(program.counts(given)), program.used(given)
    found = from_chip(network, values)
    facts = {
        "target": target,
        "instructions": counts.instructions,
        "cycles": counts.cycles,
        **sram_facts(made.program),
        "arena_used_bytes": used.arena_bytes,
        "stack_used_bytes": used.stack_bytes,
    }
    if output is not None:
        for path in write_arrays(paths, found):
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


def bench(*, model: str, target: str, weights: str | None, sram: int | None, json: bool) -> int:
    """Count what layers do on an emulated chip."""
    from headrace.micro.survey import bench as count

    made = _planned(model, target, sram, weights)
    with progress_bar() as progress:
        found = count(made, progress)
    show(found, json)
    return 0


def inspect(*, model: str, json: bool) -> int:
    """Show layers, their quantisation, and what a network takes on each chip."""
    from headrace.micro.survey import describe

    with _of_file(model):
        network, _ = _network(model, None)
    show({"network": network.name, **describe(network)}, json)
    return 0


def export(
    *, model: str, target: str, weights: str | None, sram: int | None,
    learning: Mapping[str, Any], output: str,
) -> int:  # fmt: skip
    """Write a network for a chip into a folder."""
    from headrace.cli_learning import planned
    from headrace.micro.export import export_program
    from headrace.micro.report import sram_facts

    if learning:
        network, _ = _network(model, weights)
        program = planned(model, network, target, learning, sram)[1].program
    else:
        program = _planned(model, target, sram, weights).program
    try:
        written = export_program(program, output)
    except OSError as error:
        raise HeadraceError(f"cannot write {output}: {error.strerror or error}") from error
    for path in written.paths:
        say(f"{path}: {format_size(path.stat().st_size)}")
    facts = sram_facts(program)
    say(
        f"{format_size(facts['sram_bytes'])} of SRAM, of which the stack is "
        f"{format_size(facts['stack_bytes'])} at most"
    )
    if written.no_image is not None:
        say(f"no image for an emulator: {written.no_image}")
    return 0
