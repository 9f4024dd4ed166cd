"""Run a static Linux program of another CPU in Unicorn: for machines without QEMU.

As a program of its own it knows as much of Linux as those of `headrace.targets.emulation.runtime`
call: read, write and exit. Unicorn is QEMU 5 as a Python package; it has neither i8mm nor SVE nor
RISC-V vectors.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

from headrace.targets.emulation.symbols import segments
from headrace.targets.linux import SYSTEM_CALLS

# By QEMU's name of a CPU: architecture, and Unicorn's model with its instructions. There is none of
# the cortex-a76: MAX has more, so that a build which needs too much is not found out there.
MODELS = {
    "qemu-aarch64 -cpu cortex-a53": ("aarch64", "UC_CPU_ARM64_A53"),
    "qemu-aarch64 -cpu cortex-a76": ("aarch64", "UC_CPU_ARM64_MAX"),
    "qemu-arm -cpu cortex-a7": ("armv7a", "UC_CPU_ARM_CORTEX_A7"),
    "qemu-arm -cpu cortex-a15": ("armv7a", "UC_CPU_ARM_CORTEX_A15"),
}
PAGE = 1 << 12
STACK, STACK_BYTES = 0x7F000000, 1 << 20
_SUPERVISOR_CALL = 2  # QEMU's number of the exception


def command(machine: str) -> list[str] | None:
    """What runs programs of a machine in Unicorn; None if that lacks it, or is not installed."""
    name = shlex.join(shlex.split(machine))
    if name not in MODELS or importlib.util.find_spec("unicorn") is None:
        return None
    return [sys.executable, "-m", __name__, name]


def _engine(architecture: str, model: str) -> tuple[Any, Any, list[Any]]:
    """The engine with floating point on; its stack pointer; number and arguments of a call."""
    unicorn: Any = importlib.import_module("unicorn")
    if architecture == "aarch64":
        arm64_const = importlib.import_module("unicorn.arm64_const")
        uc = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
        uc.ctl_set_cpu_model(getattr(arm64_const, model))
        uc.reg_write(arm64_const.UC_ARM64_REG_CPACR_EL1, 3 << 20)
        names = ("X8", "X0", "X1", "X2")
        registers = [getattr(arm64_const, f"UC_ARM64_REG_{name}") for name in names]
        return uc, arm64_const.UC_ARM64_REG_SP, registers
    arm_const = importlib.import_module("unicorn.arm_const")
    uc = unicorn.Uc(unicorn.UC_ARCH_ARM, unicorn.UC_MODE_ARM)
    uc.ctl_set_cpu_model(getattr(arm_const, model))
    uc.reg_write(arm_const.UC_ARM_REG_C1_C0_2, 0xF << 20)
    uc.reg_write(arm_const.UC_ARM_REG_FPEXC, 1 << 30)
    registers = [getattr(arm_const, f"UC_ARM_REG_{name}") for name in ("R7", "R0", "R1", "R2")]
    return uc, arm_const.UC_ARM_REG_SP, registers


def run(machine: str, path: Path, low: int = 0, high: int = 0) -> tuple[int, int]:
    """Run a program on stdin and stdout; its exit status, and its instructions in low <= a < high.

    A negative status is a signal.
    """
    unicorn: Any = importlib.import_module("unicorn")
    architecture, model = MODELS[machine]
    system = SYSTEM_CALLS[architecture]
    uc, stack_pointer, registers = _engine(architecture, model)
    status: list[int] = []
    count = 0

    def call(engine: Any, number: int, data: object) -> None:
        wanted, a, b, c = (engine.reg_read(register) for register in registers)
        done = 0
        if number != _SUPERVISOR_CALL or wanted == system.exit:
            status.append(a & 0xFF if number == _SUPERVISOR_CALL else -signal.SIGILL)
            engine.emu_stop()
        elif wanted == system.read:
            got = sys.stdin.buffer.read(c)
            engine.mem_write(b, got)
            done = len(got)
        elif wanted == system.write:
            done = os.write(a, bytes(engine.mem_read(b, c)))
        engine.reg_write(registers[1], done)

    entry, loaded = segments(path)
    for address, size, content in loaded:
        first = address // PAGE * PAGE
        uc.mem_map(first, -(-(address + size - first) // PAGE) * PAGE)
        uc.mem_write(address, content)
    uc.mem_map(STACK, STACK_BYTES)
    # No arguments: zeros all the way.
    uc.reg_write(stack_pointer, STACK + STACK_BYTES - PAGE)

    def one(*_: object) -> None:
        nonlocal count
        count += 1

    uc.hook_add(unicorn.UC_HOOK_INTR, call)
    if low < high:
        uc.hook_add(unicorn.UC_HOOK_CODE, one, begin=low, end=high - 1)
    try:
        uc.emu_start(entry, 0)
    except unicorn.UcError as error:
        print(error, file=sys.stderr)
        illegal = error.errno in (unicorn.UC_ERR_INSN_INVALID, unicorn.UC_ERR_EXCEPTION)
        return -signal.SIGILL if illegal else 1, count
    return (status or [1])[0], count


def main() -> None:
    """Run MODEL PROGRAM [LOW HIGH FILE], count to the file, and end as the program does."""
    model, program, *more = sys.argv[1:]
    status, count = run(model, Path(program), *map(int, more[:2]))
    for path in more[2:]:
        Path(path).write_text(str(count))
    if status < 0:
        os.kill(os.getpid(), -status)
    sys.exit(status)


if __name__ == "__main__":
    main()
