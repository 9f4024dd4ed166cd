"""A planned network as code for a chip: constants, argument blocks and what runs them.

Symbols, which C calls by the same names: `headrace_arena` (SRAM), `headrace_run`, which computes
outputs from inputs, both at offsets of the arena that the plan says.
"""

from __future__ import annotations

from headrace.micro.kernels.table import kernel_table
from headrace.micro.lowered import At
from headrace.micro.plan import ARENA, CONSTANTS, MicroPlan
from headrace.targets import backend
from headrace.targets.cache import KernelStore, Progress
from headrace.targets.ir_text import Place, argument_words, constant_bytes
from headrace.targets.table import symbol_of

ARENA_SYMBOL, CONSTANTS_SYMBOL, RUN = "headrace_arena", "headrace_constants", "headrace_run"
_SYMBOLS = {ARENA: ARENA_SYMBOL, CONSTANTS: CONSTANTS_SYMBOL}


def firmware_ir(plan: MicroPlan, behind: int = 0) -> str:
    """IR of everything but kernels.

    Args:
        behind: bytes of SRAM that follow the arena, where nothing may be written.
    """
    word = plan.target.word_bytes
    blocks, table = [], []
    for i, call in enumerate(plan.calls):
        slots = [_place(slot) if isinstance(slot, At) else slot for slot in call.slots]
        blocks.append(argument_words(f"block_{i}", slots, word, "constant"))
        table.append(f"ptr @{symbol_of(call.kernel)}, ptr @block_{i}")
    count = len(plan.calls)
    entries = ", ".join(f"{{ ptr, ptr }} {{ {entry} }}" for entry in table)
    kernels = sorted({symbol_of(call.kernel) for call in plan.calls})
    return f"""
@{CONSTANTS_SYMBOL} = constant {constant_bytes(plan.constants)}, align 16
@{ARENA_SYMBOL} = global [{plan.arena_bytes + behind} x i8] zeroinitializer, align 16
{"".join(f"declare void @{kernel}(ptr, i64, i64)" + chr(10) for kernel in kernels)}
{"".join(blocks)}
@calls = internal constant [{count} x {{ ptr, ptr }}] [{entries}]

define void @{RUN}() {{
entry:
  br label %next
next:
  %i = phi i32 [ 0, %entry ], [ %i1, %call ]
  %end = icmp eq i32 %i, {count}
  br i1 %end, label %done, label %call
call:
  %at = getelementptr {{ ptr, ptr }}, ptr @calls, i32 %i
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


def _place(at: At) -> Place:
    return Place(_SYMBOLS[at.name], at.offset)


def kernel_objects(plan: MicroPlan, progress: Progress | None = None) -> list[bytes]:
    """Object code of the kernels that a plan calls.

    Raises:
        KernelError: a kernel does not compile for the chip.
    """
    table = kernel_table()
    kernels = [table[name] for name in dict.fromkeys(call.kernel for call in plan.calls)]
    return list(KernelStore(plan.target).objects(kernels, progress).values())


def firmware_object(plan: MicroPlan, behind: int = 0) -> bytes:
    """Object code of everything but kernels."""
    return backend.emit_plain(firmware_ir(plan, behind), plan.target)
