"""A network for a chip as files: objects to link, a C header, and an image for an emulated board.

`network.o` has the network (constants, kernels, `headrace_run`), `network.h` declares what C calls,
`support.o` fills and copies memory and has what the chip has no instruction for, where no C library
does, and `network.elf` runs in the emulator (`headrace run --emulate` does that, too).
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from headrace.atomic_file import write_whole
from headrace.errors import KernelError
from headrace.micro.emulate import EmulatedNetwork
from headrace.micro.firmware import ARENA_SYMBOL, RUN, firmware_object, kernel_objects
from headrace.micro.network import Port
from headrace.micro.plan import MicroPlan
from headrace.targets.freestanding import functions_object
from headrace.targets.linker import link_together


@dataclass(frozen=True)
class ExportedNetwork:
    """Files that were written.

    Attributes:
        no_image: why there is no image for an emulator; None: there is one.
    """

    paths: tuple[Path, ...]
    no_image: str | None


def export_network(plan: MicroPlan, folder: str | Path) -> ExportedNetwork:
    """Write a planned network into a folder, which may be there.

    Raises:
        KernelError: a kernel does not compile, or there is no linker.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kernels = kernel_objects(plan)
    files = {
        "network.o": link_together([firmware_object(plan), *kernels]),
        "support.o": functions_object(plan.target),
        "network.h": header(plan).encode(),
    }
    no_image = None
    try:
        with tempfile.TemporaryDirectory(prefix="headrace-micro-") as built:
            EmulatedNetwork(plan, built)
            files["network.elf"] = Path(built, "network.elf").read_bytes()
    except KernelError as error:
        no_image = str(error)
    for name, content in files.items():
        write_whole(folder / name, content)
    return ExportedNetwork(tuple(folder / name for name in files), no_image)


def header(plan: MicroPlan) -> str:
    """C declarations of a network's inputs, outputs and entry points."""
    network = plan.network
    kind = "int8_t" if network.is_quantised else "uint16_t"
    lines = [
        f"/* {_comment(network.name)} for {plan.target.name}, made by Headrace. */",
        "#ifndef HEADRACE_NETWORK_H",
        "#define HEADRACE_NETWORK_H",
        "",
        "#include <stdint.h>",
        "",
        "#ifdef __cplusplus",
        'extern "C" {',
        "#endif",
        "",
        f"#define HEADRACE_ARENA_BYTES {plan.arena_bytes}",
        "",
        "/* Memory of all values; inputs may be overwritten by a run. */",
        f"extern uint8_t {ARENA_SYMBOL}[];",
        "",
    ]
    for role, ports in (("input", network.inputs), ("output", network.outputs)):
        for i, port in enumerate(ports):
            at = plan.places[port.value.name]
            lines += [
                f"/* {_about(port)} */",
                f"#define HEADRACE_{role.upper()}_{i}_ELEMENTS {port.value.elements}",
                f"#define HEADRACE_{role.upper()}_{i} (({kind} *)({ARENA_SYMBOL} + {at}))",
                "",
            ]
    lines += [
        "/* Outputs of the inputs. */",
        f"void {RUN}(void);",
        "",
        "#ifdef __cplusplus",
        "}",
        "#endif",
        "#endif",
        "",
    ]
    return "\n".join(lines)


def _comment(text: str) -> str:
    """A file's text where it ends no comment."""
    return re.sub(r"[^ -~]", "?", text).replace("*/", "* /").replace("/*", "/ *")


def _about(port: Port) -> str:
    codes, shape = port.value.codes, list(port.value.shape)
    what = "halves (IEEE 754 binary16)"
    if codes is not None:
        what = f"codes; a number is (code - {codes.zero}) * {codes.scale!r}"
    order = ", channels last" if len(shape) == 3 else ""
    return _comment(f"{port.name}: {shape}{order}, {what}")
