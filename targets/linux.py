"""How a program without libc calls Linux: machine code and IR that every static executable needs.

LLVM as a library has no assembler for foreign CPUs, so the one thing that IR cannot say, a system
call, is machine code in front of an empty function (its "prologue data").
"""

from __future__ import annotations

from dataclasses import dataclass

from headrace.errors import KernelError
from headrace.targets import host_amx
from headrace.targets.ir_text import constant_bytes
from headrace.targets.target import Target


@dataclass(frozen=True)
class SystemCalls:
    """How one architecture calls Linux.

    Attributes:
        word: LLVM's type of a register.
        call: machine code of a function of (number, 4 arguments).
        start: machine code in front of `_start` that makes the stack's address its argument, and
            the stack as functions want it.
        read, write, exit, sigaction: numbers of the system calls (the last is `rt_sigaction`).
        sigaction_flags: what the system wants in every action.
    """

    word: str
    call: bytes
    start: bytes
    read: int
    write: int
    exit: int
    sigaction: int
    sigaction_flags: int = 0


_SIGILL = 4


def _words(*words: int) -> bytes:
    return b"".join(word.to_bytes(4, "little") for word in words)


SYSTEM_CALLS = {
    # mov x8, x0; mov x0, x1; mov x1, x2; mov x2, x3; mov x3, x4; svc #0; ret
    # mov x0, sp
    "aarch64": SystemCalls(
        "i64",
        _words(0xAA0003E8, 0xAA0103E0, 0xAA0203E1, 0xAA0303E2, 0xAA0403E3, 0xD4000001, 0xD65F03C0),
        _words(0x910003E0),
        read=63,
        write=64,
        exit=93,
        sigaction=134,
    ),
    # push {r7, lr}; mov r7, r0; mov r0, r1; mov r1, r2; mov r2, r3; ldr r3, [sp, #8]; svc #0;
    # pop {r7, pc}
    # mov r0, sp
    "armv7a": SystemCalls(
        "i32",
        _words(
            0xE92D4080,
            0xE1A07000,
            0xE1A00001,
            0xE1A01002,
            0xE1A02003,
            0xE59D3008,
            0xEF000000,
            0xE8BD8080,
        ),
        _words(0xE1A0000D),
        read=3,
        write=4,
        exit=1,
        sigaction=174,
    ),
    # mv a7, a0; mv a0, a1; mv a1, a2; mv a2, a3; mv a3, a4; ecall; ret
    # mv a0, sp
    "riscv64": SystemCalls(
        "i64",
        _words(0x00050893, 0x00058513, 0x00060593, 0x00068613, 0x00070693, 0x00000073, 0x00008067),
        _words(0x00010513),
        read=63,
        write=64,
        exit=93,
        sigaction=134,
    ),
    "riscv32": SystemCalls(
        "i32",
        _words(0x00050893, 0x00058513, 0x00060593, 0x00068613, 0x00070693, 0x00000073, 0x00008067),
        _words(0x00010513),
        read=63,
        write=64,
        exit=93,
        sigaction=134,
    ),
    # mov rax, rdi; mov rdi, rsi; mov rsi, rdx; mov rdx, rcx; mov r10, r8; syscall; ret
    # mov rdi, rsp; sub rsp, 8: a call leaves the stack 8 bytes off what Linux starts with
    "x86_64": SystemCalls(
        "i64",
        bytes.fromhex("4889f8 4889f7 4889d6 4889ca 4d89c2 0f05 c3"),
        bytes.fromhex("4889e7 4883ec08"),
        read=0,
        write=1,
        exit=60,
        sigaction=13,
        sigaction_flags=0x4000000,  # SA_RESTORER
    ),
}


def system_of(target: Target) -> SystemCalls:
    """How a target's architecture calls Linux.

    Raises:
        KernelError: it is not known, or the target is for another system.
    """
    system = SYSTEM_CALLS.get(target.architecture)
    if system is None or "-linux" not in target.triple:
        raise KernelError(
            f"no executables for {target.triple}: they are for {', '.join(SYSTEM_CALLS)} on Linux"
        )
    return system


def support(system: SystemCalls) -> str:
    """IR of `@system` (number, 4 arguments) and `@exit_with`."""
    w = system.word
    return f"""
define internal {w} @system({w} %number, {w} %a, {w} %b, {w} %c, {w} %d) noinline optnone align 16 \
prologue {constant_bytes(system.call)} {{
  unreachable
}}

define internal void @exit_with({w} %status) noinline {{
  %r = call {w} @system({w} {system.exit}, {w} %status, {w} 0, {w} 0, {w} 0)
  unreachable
}}
"""


def at_illegal_instruction(system: SystemCalls, message: str, status: int) -> tuple[str, str]:
    """What ends a program with a message where the CPU lacks an instruction of it.

    Gives IR of the functions, and of the call for the body of `_start`; both need `support`.
    """
    w = system.word
    data = message.encode()
    # Of the kernel's struct sigaction: the handler, flags, and zeros. Nothing returns from it.
    words = (f"{w} ptrtoint (ptr @illegal to {w})", f"{w} {system.sigaction_flags}")
    action = ", ".join([*words, *[f"{w} 0"] * 4])
    functions = f"""
@illegal_text = internal constant {constant_bytes(data)}
@illegal_action = internal global <{{ {", ".join([w] * 6)} }}> <{{ {action} }}>, align 8

define internal void @illegal() noinline {{
  %at = ptrtoint ptr @illegal_text to {w}
  %n = call {w} @system({w} {system.write}, {w} 2, {w} %at, {w} {len(data)}, {w} 0)
  call void @exit_with({w} {status})
  unreachable
}}
"""
    call = f"""\
  %action = ptrtoint ptr @illegal_action to {w}
  %set = call {w} @system({w} {system.sigaction}, {w} {_SIGILL}, {w} %action, {w} 0, {w} 8)
"""
    return functions, call


def asked_for(target: Target) -> str:
    """IR for the body of `_start` that asks for what Linux gives to who asks; needs `support`."""
    if not target.byte_matrix:
        return ""
    ask = f"i64 {host_amx.SYSTEM_CALL}, i64 {host_amx.ASK}, i64 {host_amx.REGISTERS}"
    return f"  %asked = call i64 @system({ask}, i64 0, i64 0)\n"


def start(system: SystemCalls, body: str) -> str:
    """IR of `_start` with a body that may use `%stack`: the number of arguments lies there."""
    return f"""
define void @_start(ptr %stack) noinline prologue {constant_bytes(system.start)} {{
{body}
  unreachable
}}
"""
