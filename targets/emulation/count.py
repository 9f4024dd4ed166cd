"""Count the instructions that a kernel executes: a measure of speed that is always the same.

In QEMU by a plugin (`count.c`, built with the C compiler that is here), which also sees the bytes
that it loads, or else from the log of executed instructions; WebAssembly's engine counts by itself;
natively (machine "") by single steps.
An instruction on several registers at once counts as so many (`lmul.py`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from headrace.atomic_file import write_whole
from headrace.errors import KernelError
from headrace.folders import cache_root
from headrace.targets.bare_metal import board_of
from headrace.targets.emulation import lmul, thumb, unicorn_user, wasm
from headrace.targets.emulation.image import Image, Launch
from headrace.targets.emulation.machines import NATIVE, command_of
from headrace.targets.emulation.run import Exchange, link_kernel, program_words, run_image
from headrace.targets.emulation.stepping import count_steps
from headrace.targets.emulation.symbols import code_between, function_range
from headrace.targets.soft_float_calls import routines_in
from headrace.targets.table import symbol_of
from headrace.targets.target import Target

BUILD_LIMIT_S = 120.0
NO_PLUGIN = "no C compiler to build the counting plugin with (cc, or `pip install ziglang`)"
PROGRAM = (0x10000, 0x4000000)  # where static programs have their code


def _compilers() -> list[list[str]]:
    found = [[path] for name in ("cc", "gcc", "clang") if (path := shutil.which(name))]
    if importlib.util.find_spec("ziglang"):
        found.append([sys.executable, "-m", "ziglang", "cc"])
    return found


@cache
def plugin() -> Path | None:
    """The built plugin, from the cache if it is there; None without a C compiler."""
    source = Path(__file__).with_suffix(".c")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    path = cache_root() / "plugins" / f"count-{digest}.so"
    if path.is_file():
        return path
    for compiler in _compilers():
        with tempfile.TemporaryDirectory(prefix="headrace-plugin-") as folder:
            built = Path(folder, path.name)
            command = [*compiler, "-shared", "-fPIC", "-O2", "-Wl,-z,undefs", str(source), "-o"]
            done = subprocess.run(
                [*command, str(built)], capture_output=True, timeout=BUILD_LIMIT_S
            )
            if done.returncode == 0:
                write_whole(path, built.read_bytes(), durable=False)
                return path
    return None


@cache
def _step_option(emulator: str) -> str:
    """What makes every instruction a block of its own; QEMU renamed it in version 8."""
    help_text = subprocess.run([emulator, "--help"], capture_output=True, text=True).stdout
    return "-one-insn-per-tb" if "-one-insn-per-tb" in help_text else "-singlestep"


def _counted(options: list[str], machine: str, path: Path, image: Exchange, what: str) -> None:
    emulator, *own = shlex.split(machine)
    run_image(
        [emulator, *own, *options, *program_words(machine, path)], image, what,
        None if board_of(machine) is None else str(path.parent),
    )  # fmt: skip


def _by_plugin(
    library: Path, machine: str, path: Path, low: int, high: int, image: Exchange, what: str,
    *, loads: bool = True,
) -> tuple[dict[int, int], int]:  # fmt: skip
    out = path.with_suffix(".count")
    option = f"{library},lo={low:#x},hi={high:#x},out={out}{',loads=1' * loads}"
    _counted(["-plugin", option], machine, path, image, what)
    found = dict(line.split() for line in out.read_text().splitlines())
    loaded = int(found.pop("loaded", 0))
    return {int(address): int(count) for address, count in found.items()}, loaded


def count_program(machine: str, command: Sequence[str]) -> tuple[int, str]:
    """Instructions of a whole static program in QEMU, and what it prints.

    Raises:
        KernelError: there is no plugin to count with, or the program fails.
    """
    library = plugin()
    if library is None:
        raise KernelError(NO_PLUGIN)
    low, high = PROGRAM
    with tempfile.TemporaryDirectory(prefix="headrace-count-") as folder:
        out = Path(folder, "counts")
        option = f"{library},lo={low:#x},hi={high:#x},out={out}"
        whole = [*shlex.split(machine), "-plugin", option, *command]
        done = subprocess.run(whole, capture_output=True, text=True)
        if done.returncode:
            raise KernelError(f"{shlex.join(command)}: exit status {done.returncode} {done.stderr}")
        with out.open() as lines:
            return sum(int(line.split()[1]) for line in lines), done.stdout.strip()


def _by_log(
    machine: str, path: Path, low: int, high: int, image: Image, what: str
) -> dict[int, int]:
    log = path.with_suffix(".log")
    options = ["-d", "exec,nochain", "-D", str(log), "-dfilter", f"{low:#x}+{high - low:#x}"]
    _counted([_step_option(shlex.split(machine)[0]), *options], machine, path, image, what)
    with log.open("rb") as file:  # Trace 0: ... [flags/address/...
        return Counter(int(line.split(b"/")[1], 16) for line in file if line.startswith(b"Trace"))


def _in_unicorn(
    command: list[str], path: Path, low: int, high: int, image: Image, what: str
) -> int:
    out = path.with_suffix(".count")
    run_image([*command, str(path), f"{low}", f"{high}", str(out)], image, what)
    return int(out.read_text())


def _within(counts: Mapping[int, int], ranges: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Those of some functions."""
    return {at: n for at, n in counts.items() if any(low <= at < high for low, high in ranges)}


def _weighted(counts: Mapping[int, int], target: Target, path: Path, low: int, high: int) -> int:
    if not target.architecture.startswith("riscv"):
        return sum(counts.values())
    weights = lmul.costs(code_between(path, low, high))
    return sum(weights[address - low] * count for address, count in counts.items())


@dataclass(frozen=True)
class FunctionCounts:
    """What a function did: instructions, and cycles as the target's `cycles` say."""

    instructions: int
    cycles: int


def count_functions(
    names: Sequence[str], target: Target, machine: str, path: Path, image: Exchange, what: str
) -> dict[str, FunctionCounts]:
    """What functions of a linked program do, each without those that it calls.

    Args:
        names: of the functions.
        path: of the program.
        image: what it reads, and gets back (`headrace.targets.emulation.run.run_image`).

    Raises:
        KernelError: the program cannot be run or counted, or lacks a function.
    """
    ranges = {name: function_range(path, name) for name in names}
    low = min(first for first, _ in ranges.values())
    high = max(end for _, end in ranges.values())
    library = plugin()
    if library is None:
        raise KernelError(f"{what}: {NO_PLUGIN}")
    counts, _ = _by_plugin(library, machine, path, low, high, image, what, loads=False)
    found = {}
    for name, (first, end) in ranges.items():
        own = {address: count for address, count in counts.items() if first <= address < end}
        count = _weighted(own, target, path, first, end)
        more = 0
        if target.cycles:
            known = dict(target.cycles)
            code = code_between(path, first, end)
            costs = {first + at: known.get(kind, 1) - 1 for at, kind in thumb.kinds(code)}
            more = sum(costs.get(address, 0) * n for address, n in own.items())
        found[name] = FunctionCounts(count, count + more)
    return found


@dataclass(frozen=True)
class Counts:
    """What a kernel did: instructions executed, and bytes loaded where that was seen."""

    instructions: int
    loaded_bytes: int | None = None


def count_instructions(
    kernel: str,
    code: bytes,
    target: Target,
    machine: str,
    launches: Sequence[Launch],
    *,
    compiled_plugin: bool = True,
    loads: bool = True,
) -> Counts:
    """Instructions that a kernel itself executes in all of `launches`, and the bytes it loads.

    What stands in for a floating-point unit (`headrace.targets.soft_float`) counts as its own.

    Args:
        kernel, code, target, machine, launches: as in `headrace.targets.emulation.run.run`; machine
            `NATIVE` is this one.
        compiled_plugin: use the plugin where it can be built.
        loads: have it see loaded bytes, which takes longer.

    Raises:
        KernelError: the program cannot be run or counted.
    """
    if machine == wasm.MACHINE:
        return Counts(wasm.run(kernel, code, target, launches))
    what = f"kernel {kernel} of {target.name} on {machine or 'this CPU'}"
    with tempfile.TemporaryDirectory(prefix="headrace-count-") as folder:
        path = Path(folder, kernel)
        link_kernel(kernel, code, target, path, board_of(machine))
        names = [kernel, *(() if target.floats else routines_in([code]))]
        ranges = [function_range(path, symbol_of(name)) for name in names]
        low, high = min(at for at, _ in ranges), max(end for _, end in ranges)
        image = Image(launches)
        if machine == NATIVE:
            count, output = count_steps([str(path)], image.data, low, high)
            image.restore(output)
            return Counts(count)
        if (command := unicorn_user.command(machine)) and command_of(machine) == command:
            return Counts(_in_unicorn(command, path, low, high, image, what))
        if compiled_plugin and (library := plugin()):
            try:
                counts, loaded = _by_plugin(
                    library, machine, path, low, high, image, what, loads=loads
                )
                whole = _weighted(_within(counts, ranges), target, path, low, high)
                return Counts(whole, loaded if loads else None)
            except KernelError:
                pass  # this QEMU has another plugin interface, or none
        counts = _by_log(machine, path, low, high, image, what)
        return Counts(_weighted(_within(counts, ranges), target, path, low, high))
