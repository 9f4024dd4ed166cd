"""The program around a kernel: a static Linux executable without libc, written in LLVM IR.

It reads an image (see `headrace.targets.emulation.image`) from stdin, turns the offsets that the
image names into addresses, makes the calls that it lists and writes the image to stdout.

LLVM as a library has no assembler for foreign CPUs, so the one thing that IR cannot say, a system
call, is machine code in front of an empty function (its "prologue data").
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from headrace.errors import KernelError
from headrace.targets import backend
from headrace.targets.target import Target

ROOM = 128 << 20  # bytes of the largest image; untouched pages cost nothing
KERNEL = "headrace_emulated_kernel"
TOO_LARGE = 3  # exit status


@dataclass(frozen=True)
class System:
    """How one architecture calls Linux.

    Attributes:
        word: LLVM's type of a register.
        call: machine code of a function of (number, 3 arguments).
        start: machine code in front of the program that makes the stack as its functions want it.
        read, write, exit: numbers of the system calls.
    """

    word: str
    call: bytes
    read: int
    write: int
    exit: int
    start: bytes = b""


def _words(*words: int) -> bytes:
    return b"".join(word.to_bytes(4, "little") for word in words)


SYSTEMS = {
    # mov x8, x0; mov x0, x1; mov x1, x2; mov x2, x3; svc #0; ret
    "aarch64": System(
        "i64",
        _words(0xAA0003E8, 0xAA0103E0, 0xAA0203E1, 0xAA0303E2, 0xD4000001, 0xD65F03C0),
        read=63,
        write=64,
        exit=93,
    ),
    # push {r7, lr}; mov r7, r0; mov r0, r1; mov r1, r2; mov r2, r3; svc #0; pop {r7, pc}
    "armv7a": System(
        "i32",
        _words(0xE92D4080, 0xE1A07000, 0xE1A00001, 0xE1A01002, 0xE1A02003, 0xEF000000, 0xE8BD8080),
        read=3,
        write=4,
        exit=1,
    ),
    # mv a7, a0; mv a0, a1; mv a1, a2; mv a2, a3; ecall; ret
    "riscv64": System(
        "i64",
        _words(0x00050893, 0x00058513, 0x00060593, 0x00068613, 0x00000073, 0x00008067),
        read=63,
        write=64,
        exit=93,
    ),
    # mov rax, rdi; mov rdi, rsi; mov rsi, rdx; mov rdx, rcx; syscall; ret
    # A call leaves the stack 8 bytes off what Linux starts with: sub rsp, 8.
    "x86_64": System(
        "i64",
        bytes.fromhex("4889f8 4889f7 4889d6 4889ca 0f05 c3"),
        read=0,
        write=1,
        exit=60,
        start=bytes.fromhex("4883ec08"),
    ),
}


def _text(system: System) -> str:
    w = system.word
    start = f"prologue {backend.constant_bytes(system.start)} " if system.start else ""
    return f"""
@image = internal global [{ROOM} x i8] zeroinitializer, align 4096

declare void @{KERNEL}(ptr, i64, i64)

define internal {w} @system({w} %number, {w} %a, {w} %b, {w} %c) noinline optnone align 16 \
prologue {backend.constant_bytes(system.call)} {{
  unreachable
}}

define void @exit_with({w} %status) noinline {{
  %r = call {w} @system({w} {system.exit}, {w} %status, {w} 0, {w} 0)
  unreachable
}}

; All of stdin; the number of bytes.
define {w} @read_image() noinline {{
entry:
  br label %next
next:
  %n = phi {w} [ 0, %entry ], [ %more, %step ]
  %room = sub {w} {ROOM}, %n
  %full = icmp eq {w} %room, 0
  br i1 %full, label %large, label %read
large:
  call void @exit_with({w} {TOO_LARGE})
  unreachable
read:
  %to = getelementptr i8, ptr @image, {w} %n
  %at = ptrtoint ptr %to to {w}
  %got = call {w} @system({w} {system.read}, {w} 0, {w} %at, {w} %room)
  %end = icmp sle {w} %got, 0
  br i1 %end, label %done, label %step
step:
  %more = add {w} %n, %got
  br label %next
done:
  ret {w} %n
}}

define void @write_image({w} %total) noinline {{
entry:
  br label %next
next:
  %n = phi {w} [ 0, %entry ], [ %more, %step ]
  %left = sub {w} %total, %n
  %end = icmp eq {w} %left, 0
  br i1 %end, label %done, label %step
step:
  %from = getelementptr i8, ptr @image, {w} %n
  %at = ptrtoint ptr %from to {w}
  %put = call {w} @system({w} {system.write}, {w} 1, {w} %at, {w} %left)
  %more = add {w} %n, %put
  br label %next
done:
  ret void
}}

; Word i of the image's header and tables.
define i64 @word(i64 %i) noinline {{
  %p = getelementptr i64, ptr @image, i64 %i
  %v = load i64, ptr %p
  ret i64 %v
}}

define void @place(i64 %i) noinline {{
  %offset = call i64 @word(i64 %i)
  %slot = getelementptr i8, ptr @image, i64 %offset
  %target = load i64, ptr %slot
  %address = getelementptr i8, ptr @image, i64 %target
  %value = ptrtoint ptr %address to i64
  store i64 %value, ptr %slot
  ret void
}}

define void @make_call(i64 %i) noinline {{
  %offset = call i64 @word(i64 %i)
  %i1 = add i64 %i, 1
  %thread = call i64 @word(i64 %i1)
  %i2 = add i64 %i, 2
  %threads = call i64 @word(i64 %i2)
  %args = getelementptr i8, ptr @image, i64 %offset
  call void @{KERNEL}(ptr %args, i64 %thread, i64 %threads)
  ret void
}}

define void @main() noinline {{
entry:
  %total = call {w} @read_image()
  %places = call i64 @word(i64 0)
  %calls = call i64 @word(i64 1)
  br label %place_next
place_next:
  %i = phi i64 [ 0, %entry ], [ %i1, %place_step ]
  %placed = icmp eq i64 %i, %places
  br i1 %placed, label %call_next, label %place_step
place_step:
  %place_at = add i64 %i, 2
  call void @place(i64 %place_at)
  %i1 = add i64 %i, 1
  br label %place_next
call_next:
  %j = phi i64 [ 0, %place_next ], [ %j1, %call_step ]
  %called = icmp eq i64 %j, %calls
  br i1 %called, label %done, label %call_step
call_step:
  %j3 = mul i64 %j, 3
  %first = add i64 %places, 2
  %call_at = add i64 %first, %j3
  call void @make_call(i64 %call_at)
  %j1 = add i64 %j, 1
  br label %call_next
done:
  call void @write_image({w} %total)
  ret void
}}

define void @_start() noinline {start}{{
  call void @main()
  call void @exit_with({w} 0)
  unreachable
}}
"""


@cache
def runtime_object(target: Target) -> bytes:
    """Object code of the program; it calls the kernel by the symbol `KERNEL`.

    Raises:
        KernelError: no system calls are known for the target's architecture.
    """
    system = SYSTEMS.get(target.architecture)
    if system is None or "-linux" not in target.triple:
        raise KernelError(
            f"no program to run kernels of {target.name}: it is for {', '.join(SYSTEMS)} on Linux"
        )
    return backend.emit_plain(_text(system), target)
