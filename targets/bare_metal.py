"""How a program without a system runs on an emulated board, and reads and writes files there.

Its first words are the table of exceptions; everything unexpected, such as an instruction that the
chip does not have, ends the program with a status of its own. Files and the end of the program are
semihosting calls (Arm's "Semihosting for AArch32 and AArch64", which QEMU answers). LLVM as a
library has no assembler for foreign CPUs: what IR cannot say is machine code in front of an empty
function, as in `headrace.targets.linux`.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace

from headrace.errors import KernelError
from headrace.targets.ir_text import constant_bytes

INPUT, OUTPUT = "in.bin", "out.bin"  # in the emulator's working directory
FAULT, TOO_LARGE, NO_FILE = 132, 3, 4  # exit statuses


@dataclass(frozen=True)
class Board:
    """An emulated board: where its memories lie.

    Attributes:
        code: where the table of exceptions and code go.
        data: where constants and variables go, and `data_bytes` of them.
        stack: the end of the memory that the stack grows down into.
        arena: where arrays go, and `arena_bytes` of them, half of which is for an image.
    """

    code: int
    code_bytes: int
    data: int
    data_bytes: int
    stack: int
    arena: int
    arena_bytes: int

    @property
    def image_bytes(self) -> int:
        """Of the largest image that goes to the board and comes back."""
        return self.arena_bytes // 2

    def with_data(self, n_bytes: int) -> Board:
        """The same with so many bytes of variables, in the second half of the arena's memory where
        they do not fit in their own."""
        if n_bytes <= self.data_bytes:
            return self
        half = self.arena_bytes // 2
        return replace(self, data=self.arena + half, data_bytes=half, arena_bytes=half)


# From QEMU's documentation of these boards ("Arm MPS2 and MPS3 boards"), and the application notes
# of Arm that they are called after.
BOARDS = {
    "mps3-an547": Board(0, 512 << 10, 0x20000000, 256 << 10, 0x20080000, 0x60000000, 64 << 20),
    "mps2-an385": Board(0, 4 << 20, 0x20000000, 2 << 20, 0x20400000, 0x21000000, 16 << 20),
    "mps2-an386": Board(0, 4 << 20, 0x20000000, 2 << 20, 0x20400000, 0x21000000, 16 << 20),
    "mps2-an500": Board(0, 4 << 20, 0x20000000, 2 << 20, 0x20400000, 0x60000000, 16 << 20),
    "mps2-an505": Board(0x10000000, 4 << 20, 0x38000000, 1 << 20, 0x38200000, 0x38200000, 14 << 20),
}
_EMULATOR = "qemu-system-arm"
_OPTIONS = (
    "-nographic -monitor none -serial none -semihosting-config enable=on,target=native -kernel"
)


def board_of(machine: str) -> Board | None:
    """The board that a command line such as "qemu-system-arm -M mps3-an547" emulates, if any.

    Raises:
        KernelError: it is none that is known.
    """
    words = shlex.split(machine)
    if not words or words[0] != _EMULATOR:
        return None
    board = BOARDS.get(words[words.index("-M") + 1]) if "-M" in words[:-1] else None
    if board is None:
        raise KernelError(f"{machine}: only {', '.join(BOARDS)} are known")
    return board


def command_options() -> list[str]:
    """Options of the emulator between those that choose a board and the program's path."""
    return shlex.split(_OPTIONS)


_CPACR, _FPU = 0xE000ED88, 0xF << 20  # lets the floating-point unit and vectors run
_CCR, _LOOPS = 0xE000ED14, 1 << 19  # and loops whose end is a branch of its own (Armv8.1-M)
_SEMIHOSTING = bytes.fromhex("abbe7047")  # bkpt 0xab; bx lr
_OPEN, _CLOSE, _WRITE, _READ, _EXIT = 0x01, 0x02, 0x05, 0x06, 0x20
_STOPPED = 0x20026
_READ_ONLY, _WRITE_ANEW = 1, 5  # "rb", "wb"


def start(board: Board) -> str:
    """IR of the table of exceptions and of what runs first: it calls `@main`, which returns."""
    fault = ", ".join(["ptr @fault"] * 14)
    return f"""
@vectors = constant [16 x ptr] [ptr inttoptr (i32 {board.stack} to ptr), ptr @_start, {fault}],\
 section ".vectors", align 128

define void @fault() noinline {{
  call void @exit_with(i32 {FAULT})
  unreachable
}}

define void @_start() noinline {{
  %cpacr = inttoptr i32 {_CPACR} to ptr
  %may = load volatile i32, ptr %cpacr
  %all = or i32 %may, {_FPU}
  store volatile i32 %all, ptr %cpacr
  %ccr = inttoptr i32 {_CCR} to ptr
  %control = load volatile i32, ptr %ccr
  %loops = or i32 %control, {_LOOPS}
  store volatile i32 %loops, ptr %ccr
  call void @llvm.arm.dsb(i32 15)
  call void @llvm.arm.isb(i32 15)
  call void @main()
  call void @exit_with(i32 0)
  unreachable
}}

declare void @llvm.arm.dsb(i32)
declare void @llvm.arm.isb(i32)
"""


def support() -> str:
    """IR of `@exit_with`, `@read_all` (place, room; the number of bytes) and `@write_all`."""
    return f"""
define internal i32 @host(i32 %operation, ptr %block) noinline optnone align 16 \
prologue {constant_bytes(_SEMIHOSTING)} {{
  unreachable
}}

@input_name = internal constant [{len(INPUT) + 1} x i8] c"{INPUT}\\00"
@output_name = internal constant [{len(OUTPUT) + 1} x i8] c"{OUTPUT}\\00"
@block = internal global [4 x i32] zeroinitializer, align 4

define internal i32 @ask(i32 %operation, i32 %a, i32 %b, i32 %c) noinline {{
  %second = getelementptr i32, ptr @block, i32 1
  %third = getelementptr i32, ptr @block, i32 2
  store volatile i32 %a, ptr @block
  store volatile i32 %b, ptr %second
  store volatile i32 %c, ptr %third
  %r = call i32 @host(i32 %operation, ptr @block)
  ret i32 %r
}}

define internal void @exit_with(i32 %status) noinline {{
  %r = call i32 @ask(i32 {_EXIT}, i32 {_STOPPED}, i32 %status, i32 0)
  unreachable
}}

define internal i32 @opened(ptr %name, i32 %mode, i32 %length) noinline {{
  %at = ptrtoint ptr %name to i32
  %handle = call i32 @ask(i32 {_OPEN}, i32 %at, i32 %mode, i32 %length)
  %bad = icmp slt i32 %handle, 0
  br i1 %bad, label %none, label %good
none:
  call void @exit_with(i32 {NO_FILE})
  unreachable
good:
  ret i32 %handle
}}

define internal i32 @read_all(ptr %to, i32 %room) noinline {{
  %handle = call i32 @opened(ptr @input_name, i32 {_READ_ONLY}, i32 {len(INPUT)})
  %at = ptrtoint ptr %to to i32
  %left = call i32 @ask(i32 {_READ}, i32 %handle, i32 %at, i32 %room)
  %n = sub i32 %room, %left
  %full = icmp eq i32 %left, 0
  br i1 %full, label %large, label %good
large:
  call void @exit_with(i32 {TOO_LARGE})
  unreachable
good:
  %closed = call i32 @ask(i32 {_CLOSE}, i32 %handle, i32 0, i32 0)
  ret i32 %n
}}

define internal void @write_all(ptr %from, i32 %n) noinline {{
  %handle = call i32 @opened(ptr @output_name, i32 {_WRITE_ANEW}, i32 {len(OUTPUT)})
  %at = ptrtoint ptr %from to i32
  %left = call i32 @ask(i32 {_WRITE}, i32 %handle, i32 %at, i32 %n)
  %closed = call i32 @ask(i32 {_CLOSE}, i32 %handle, i32 0, i32 0)
  ret void
}}
"""


LARGE = ".rodata.headrace_constants"  # of what may be more than a board's memory for code holds


def linker_script(board: Board, large_bytes: int = 0) -> str:
    """Where the linker puts what; arrays of section `.arena` are not part of the file.

    Args:
        large_bytes: of section `LARGE`: beside code, or, if that has no room, beside arrays.
    """
    large = "code" if large_bytes <= board.code_bytes // 2 else "arena"
    return f"""
ENTRY(_start)
MEMORY {{
  code : ORIGIN = {board.code:#x}, LENGTH = {board.code_bytes}
  data : ORIGIN = {board.data:#x}, LENGTH = {board.data_bytes}
  arena : ORIGIN = {board.arena:#x}, LENGTH = {board.arena_bytes}
}}
SECTIONS {{
  .text : {{ KEEP(*(.vectors)) *(.text .text.*) *(.rodata) }} > code
  .constants : {{ *({LARGE}) }} > {large}
  .rodata : {{ *(.rodata.*) }} > code
  .data : {{ *(.data .data.*) }} > data
  .bss (NOLOAD) : {{ *(.bss .bss.*) *(COMMON) }} > data
  .arena (NOLOAD) : {{ *(.arena) }} > arena
  /DISCARD/ : {{ *(.ARM.exidx*) *(.ARM.attributes) *(.comment) *(.note*) }}
}}
"""
