"""A program for a chip as code: constants, argument blocks and functions that C calls.

Symbols: `headrace_arena` (SRAM), `headrace_init`, which is called once, and the program's
functions, which compute outputs from inputs, both at offsets of the arena that the plan says.
"""

from __future__ import annotations

from collections.abc import Sequence

from headrace.micro.kernels.table import kernel_table
from headrace.micro.lowered import At
from headrace.micro.program import ARENA, CONSTANTS, Call, Program
from headrace.targets import backend
from headrace.targets.bare_metal import LARGE
from headrace.targets.cache import KernelStore, Progress
from headrace.targets.ir_text import Place, argument_words, constant_bytes
from headrace.targets.soft_float_calls import with_routines
from headrace.targets.table import symbol_of

ARENA_SYMBOL, CONSTANTS_SYMBOL, INIT = "headrace_arena", "headrace_constants", "headrace_init"
_SYMBOLS = {ARENA: ARENA_SYMBOL, CONSTANTS: CONSTANTS_SYMBOL}


def firmware_ir(program: Program, behind: int = 0) -> str:
    """IR of everything but kernels.

    Args:
        behind: bytes of SRAM that follow the arena, where nothing may be written.
    """
    kernels = sorted(symbol_of(name) for name in program.kernels)
    blocks: dict[tuple[int | float | At, ...], str] = {}  # functions share calls
    for calls in program.functions.values():
        for call in calls:
            blocks.setdefault(call.slots, f"block_{len(blocks)}")
    word = program.target.word_bytes
    return f"""
@{CONSTANTS_SYMBOL} = constant {constant_bytes(program.constants)}, section "{LARGE}", \
align 16
@{ARENA_SYMBOL} = global [{program.arena_bytes + behind} x i8] zeroinitializer, align 16
{"".join(f"declare void @{kernel}(ptr, i64, i64)" + chr(10) for kernel in kernels)}
{"".join(_block(name, slots, word) for slots, name in blocks.items())}
{"".join(_function(name, calls, blocks) for name, calls in program.functions.items())}
declare void @llvm.memcpy.p0.p0.i32(ptr, ptr, i32, i1)

define void @{INIT}() {{
{"".join(_copy(*one) for one in program.initial)}  ret void
}}
"""


def _block(name: str, slots: tuple[int | float | At, ...], word_bytes: int) -> str:
    values = [Place(_SYMBOLS[s.name], s.offset) if isinstance(s, At) else s for s in slots]
    return argument_words(name, values, word_bytes, "constant")


def _copy(arena: int, constants: int, n_bytes: int) -> str:
    ends = ", ".join(
        f"ptr align 16 getelementptr (i8, ptr @{symbol}, i32 {offset})"
        for symbol, offset in ((ARENA_SYMBOL, arena), (CONSTANTS_SYMBOL, constants))
    )
    return f"  call void @llvm.memcpy.p0.p0.i32({ends}, i32 {n_bytes}, i1 false)\n"


def _function(
    name: str, calls: Sequence[Call], blocks: dict[tuple[int | float | At, ...], str]
) -> str:
    entries = ", ".join(
        f"{{ ptr, ptr }} {{ ptr @{symbol_of(call.kernel)}, ptr @{blocks[call.slots]} }}"
        for call in calls
    )
    return f"""
@{name}_calls = internal constant [{len(calls)} x {{ ptr, ptr }}] [{entries}]

define void @{name}() {{
entry:
  br label %next
next:
  %i = phi i32 [ 0, %entry ], [ %i1, %call ]
  %end = icmp eq i32 %i, {len(calls)}
  br i1 %end, label %done, label %call
call:
  %at = getelementptr {{ ptr, ptr }}, ptr @{name}_calls, i32 %i
  %kernel = load ptr, ptr %at
  %block_at = getelementptr {{ ptr, ptr }}, ptr %at, i32 0, i32 1
  %block = load ptr, ptr %block_at
  call void %kernel(ptr %block, i64 0, i64 1)
  %i1 = add i32 %i, 1
  br label %next
done:
  ret void
}}
"""


def kernel_objects(program: Program, progress: Progress | None = None) -> list[bytes]:
    """Object code of the kernels that a program calls, and of what these call in the place of a
    floating-point unit.

    Raises:
        KernelError: a kernel does not compile for the chip.
    """
    table = kernel_table()
    kernels = [table[name] for name in program.kernels]
    objects = KernelStore(program.target).objects(kernels, progress)
    return with_routines(list(objects.values()), program.target)


def firmware_object(program: Program, behind: int = 0) -> bytes:
    """Object code of everything but kernels."""
    return backend.emit_plain(firmware_ir(program, behind), program.target)
