"""Run a kernel that is built for another CPU, in an emulator of that CPU."""

from __future__ import annotations

import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from headrace.errors import KernelError
from headrace.targets import bare_metal
from headrace.targets.bare_metal import Board
from headrace.targets.emulation import wasm
from headrace.targets.emulation.image import Image, Launch
from headrace.targets.emulation.machines import command_of
from headrace.targets.emulation.runtime import KERNEL, runtime_object
from headrace.targets.freestanding import functions_object
from headrace.targets.linker import link_bare, link_static
from headrace.targets.soft_float_calls import with_routines
from headrace.targets.table import symbol_of
from headrace.targets.target import Target

RUN_LIMIT_S = 300.0


class IllegalInstructionError(KernelError):
    """A kernel uses an instruction that the emulated CPU does not have."""


def link_kernel(
    kernel: str, code: bytes, target: Target, path: Path, board: Board | None = None
) -> None:
    """Link a kernel's object code with the program that calls it, as an executable at `path`.

    Args:
        board: that it runs on; None: on Linux.
    """
    objects = [runtime_object(target, board), functions_object(target)]
    objects += with_routines([code], target)
    names = {KERNEL: symbol_of(kernel)}
    if board is None:
        link_static(objects, path, names)
    else:
        link_bare(objects, path, bare_metal.linker_script(board), names)


class Exchange(Protocol):
    """What a program reads, and what it gives back."""

    data: bytes

    def restore(self, data: bytes) -> None:
        """Take what came back; KernelError: it cannot be that."""


def run_image(
    command: Sequence[str], image: Exchange, what: str, folder: str | None = None
) -> None:
    """Run an emulator with an image and give the image's arrays what comes back.

    Args:
        folder: where a program without a system finds the image, and leaves it; None: it goes
            through stdin and stdout.
    """
    data = image.data
    if folder is not None:
        Path(folder, bare_metal.INPUT).write_bytes(image.data)
        data = b""
    try:
        done = subprocess.run(
            command, input=data, capture_output=True, timeout=RUN_LIMIT_S, cwd=folder
        )
    except subprocess.TimeoutExpired as error:
        raise KernelError(f"{what}: not done after {RUN_LIMIT_S:.0f} s") from error
    if done.returncode in (-signal.SIGILL, bare_metal.FAULT):
        raise IllegalInstructionError(f"{what}: illegal instruction")
    # QEMU ends itself where an exception has no handler that could run.
    if folder is not None and b"Lockup" in done.stderr:
        raise IllegalInstructionError(f"{what}: illegal instruction, and none of its handler's")
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        raise KernelError(f"{what}: exit status {done.returncode} {said}".rstrip())
    came = done.stdout if folder is None else Path(folder, bare_metal.OUTPUT).read_bytes()
    try:
        image.restore(came)
    except KernelError as error:
        raise KernelError(f"{what}: {error}") from error


def program_words(machine: str, path: Path) -> list[str]:
    """What an emulator's command line ends with to run a program."""
    options = [] if bare_metal.board_of(machine) is None else bare_metal.command_options()
    return [*options, str(path)]


def run(kernel: str, code: bytes, target: Target, machine: str, launches: Sequence[Launch]) -> None:
    """Call a kernel as `launches` say, in one process; their arrays change as they would here.

    The threads of a launch run one after the other: no kernel of the table waits for another.

    Args:
        kernel: its name in the table.
        code: its object code for `target`.
        machine: command line of the emulator, such as "qemu-aarch64 -cpu cortex-a53", or
            "wasmtime", which runs in this process.

    Raises:
        IllegalInstructionError: the machine lacks an instruction.
        KernelError: the program fails otherwise, or stores beside an array.
    """
    if machine == wasm.MACHINE:
        wasm.run(kernel, code, target, launches)
        return
    with tempfile.TemporaryDirectory(prefix="headrace-run-") as folder:
        path, board = Path(folder, kernel), bare_metal.board_of(machine)
        link_kernel(kernel, code, target, path, board)
        command = [*(command_of(machine) or []), *program_words(machine, path)]
        what = f"kernel {kernel} of {target.name} on {machine}"
        run_image(command, Image(launches), what, None if board is None else folder)
