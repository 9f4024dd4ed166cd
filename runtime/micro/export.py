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
from headrace.micro.emulate import FILE, Emulated
from headrace.micro.firmware import ARENA_SYMBOL, INIT, firmware_object, kernel_objects
from headrace.micro.program import RUN, TRAIN, Program
from headrace.targets.freestanding import functions_object
from headrace.targets.linker import link_together


@dataclass(frozen=True)
class ExportedProgram:
    """Files that were written.

    Attributes:
        no_image: why there is no image for an emulator; None: there is one.
    """

    paths: tuple[Path, ...]
    no_image: str | None


def export_program(program: Program, folder: str | Path) -> ExportedProgram:
    """Write a program into a folder, which may be there.

    Raises:
        KernelError: a kernel does not compile, or there is no linker.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kernels = kernel_objects(program)
    files = {
        "network.o": link_together([firmware_object(program), *kernels]),
        "support.o": functions_object(program.target),
        "network.h": header(program).encode(),
    }
    no_image = None
    try:
        with tempfile.TemporaryDirectory(prefix="headrace-micro-") as built:
            Emulated(program, built)
            files[FILE] = Path(built, FILE).read_bytes()
    except KernelError as error:
        no_image = str(error)
    for name, content in files.items():
        write_whole(folder / name, content)
    return ExportedProgram(tuple(folder / name for name in files), no_image)


_MACRO = "HEADRACE"  # what names of macros begin with
_C_TYPES = {"int8": "int8_t", "int32": "int32_t", "float16": "uint16_t", "float32": "float"}
_DOES = {
    RUN: "Outputs of the inputs.",
    TRAIN: "The same, and one step of learning from what is wanted.",
}


def header(program: Program) -> str:
    """C declarations of a program's inputs, outputs and functions."""
    lines = [
        f"/* {_comment(program.name)} for {program.target.name}, made by Headrace. */",
        f"#ifndef {_MACRO}_NETWORK_H",
        f"#define {_MACRO}_NETWORK_H",
        "",
        "#include <stdint.h>",
        "",
        "#ifdef __cplusplus",
        'extern "C" {',
        "#endif",
        "",
        f"#define {_MACRO}_ARENA_BYTES {program.arena_bytes}",
        "",
        "/* Memory of all values; inputs may be overwritten by a run. */",
        f"extern uint8_t {ARENA_SYMBOL}[];",
        "",
    ]
    for role, arrays in (("INPUT", program.inputs), ("OUTPUT", program.outputs)):
        for i, one in enumerate(arrays):
            kind = _C_TYPES[str(one.dtype)]
            lines += [
                f"/* {_comment(one.about)} */",
                f"#define {_MACRO}_{role}_{i}_ELEMENTS {one.n_bytes // one.dtype.itemsize}",
                f"#define {_MACRO}_{role}_{i} (({kind} *)({ARENA_SYMBOL} + {one.offset}))",
                "",
            ]
    lines += ["/* Once, before anything else. */", f"void {INIT}(void);"]
    for name in program.functions:
        lines += [f"/* {_DOES[name]} */", f"void {name}(void);"]
    lines += ["", "#ifdef __cplusplus", "}", "#endif", "#endif", ""]
    return "\n".join(lines)


def _comment(text: str) -> str:
    """A file's text where it ends no comment."""
    return re.sub(r"[^ -~]", "?", text).replace("*/", "* /").replace("/*", "/ *")
