"""What the commands do with networks on microcontrollers."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from headrace.cli_networks import first_elements, named_inputs, read_array, write_arrays
from headrace.cli_output import print_json, progress_bar, say, show
from headrace.errors import BudgetError, HeadraceError, UnsupportedError
from headrace.sizes import format_size

if TYPE_CHECKING:
    from headrace.micro.network import MicroNetwork
    from headrace.micro.plan import MicroPlan
    from headrace.micro.training_plan import TrainingPlan

LOSS_SCALE = 128.0  # so that gradients of halves do not vanish
_NO_MEANING = (
    "threads", "memory", "kernels", "context", "patches", "prompt", "cpu", "input",
)  # fmt: skip


def refuse(options: Mapping[str, Any]) -> None:
    """Options that say nothing to a chip are not ignored."""
    for name in _NO_MEANING:
        if options.get(name) not in (None, (), False):
            raise HeadraceError(f"a microcontroller takes no --{name}; leave it out")


class Taught(NamedTuple):
    """How a network learns on a chip; see `headrace.micro.training.Learning`.

    Attributes:
        layers: the last so many with weights are trained; None: it does not learn.
    """

    layers: int | None = None
    rate: float = 0.01
    momentum: float = 0.9


def _network(model: str) -> MicroNetwork:
    from headrace.loaders.sources import resolve
    from headrace.micro.reading import read_network

    return read_network(resolve(model))


@contextmanager
def _of_file(model: str) -> Iterator[None]:
    """Errors name the file."""
    try:
        yield
    except UnsupportedError as error:
        raise UnsupportedError(str(error), path=model) from None


def _learning(model: str, target: str, taught: Taught, sram: int | None) -> TrainingPlan:
    from headrace.micro.network import Softmax
    from headrace.micro.training import Learning, Loss, last_layers, training_step
    from headrace.micro.training_plan import plan_training
    from headrace.targets.target import microcontrollers

    network, chip = _network(model), microcontrollers()[target]
    assert taught.layers is not None
    trained = last_layers(network, taught.layers)
    if not (math.isfinite(taught.rate) and math.isfinite(taught.momentum) and taught.rate > 0):
        raise HeadraceError(f"--rate {taught.rate} and --momentum {taught.momentum}: no such rate")
    # Probabilities are taught by their logarithm, and anything else by squares of differences.
    loss: Loss = "cross entropy" if isinstance(network.layers[-1], Softmax) else "squares"
    how = Learning(trained, taught.rate, taught.momentum, loss, LOSS_SCALE)
    with _of_file(model):
        made = plan_training(network, chip, training_step(network, chip, how))
    say(f"it learns by {loss}")
    needed = made.program.arena_bytes
    if sram is not None and needed > sram:
        raise BudgetError(
            f"{model} does not learn in {format_size(sram)} of SRAM on {target}: values, gradients "
            f"and what is trained take {format_size(needed)}; allow that (--sram), or train fewer "
            "layers (--train)",
            needed_bytes=needed,
        )
    return made


def _planned(model: str, target: str, sram: int | None) -> MicroPlan:
    from headrace.micro.choice import plan_within
    from headrace.targets.target import microcontrollers

    network = _network(model)
    with _of_file(model), progress_bar() as progress:
        return plan_within(network, microcontrollers()[target], sram, progress)


def plan(
    *, model: str, target: str, sram: int | None, flash: int | None, taught: Taught, json: bool
) -> int:
    """Say what a network takes on a chip, and whether it fits."""
    from headrace.micro.report import report, report_learning

    if taught.layers is not None:
        found = report_learning(_learning(model, target, taught, sram))
    else:
        found = report(_planned(model, target, sram))
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
    from headrace.micro.emulate import Emulated, total
    from headrace.micro.ports import from_chip, to_chip

    made = _planned(model, target, sram)
    network = made.network
    files = {name: read_array(Path(value)) for name, value in named_inputs(inputs).items()}
    given = to_chip(network, files)
    with tempfile.TemporaryDirectory(prefix="headrace-micro-") as folder:
        program = Emulated(made.program, folder)
        (values,) = program.run([given])
        counts, used = total(program.counts(given)), program.used(given)
    found = from_chip(network, values)
    facts = {
        "target": target,
        "instructions": counts.instructions,
        "cycles": counts.cycles,
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


def export(*, model: str, target: str, sram: int | None, taught: Taught, output: str) -> int:
    """Write a network for a chip into a folder."""
    from headrace.micro.export import export_program

    if taught.layers is not None:
        program = _learning(model, target, taught, sram).program
    else:
        program = _planned(model, target, sram).program
    try:
        written = export_program(program, output)
    except OSError as error:
        raise HeadraceError(f"cannot write {output}: {error.strerror or error}") from error
    for path in written.paths:
        say(f"{path}: {format_size(path.stat().st_size)}")
    say(f"{format_size(program.arena_bytes)} of SRAM")
    if written.no_image is not None:
        say(f"no image for an emulator: {written.no_image}")
    return 0
