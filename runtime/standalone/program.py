"""The executable's own IR: the plan as data, its buffers, the system calls and the start."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from headrace.kernels.execute import STEP_SLOTS
from headrace.standalone import driver
from headrace.standalone.places import BUFFERS, DATA, KV, place_of
from headrace.step import Step
from headrace.targets.ir_text import Place, argument_words, constant_bytes
from headrace.targets.linux import asked_for, at_illegal_instruction, start, support, system_of
from headrace.targets.table import symbol_of
from headrace.targets.target import Target

Value = int | float | Place
Argument = int | float | str | list[int]

_WRITE, _EXIT, _ARGUMENTS = "headrace_write", "headrace_exit", "headrace_arguments"


def _slots(name: str, values: Iterable[Value], word_bytes: int) -> str:
    """A global of 8-byte slots, of which some are places as numbers."""
    places = (
        value if (place := place_of(value) if isinstance(value, int) else None) is None else place
        for value in values
    )
    return argument_words(name, places, word_bytes)


def _text(name: str, text: str) -> str:
    data = text.encode() + b"\0"
    return f"@{name} = internal constant {constant_bytes(data)}\n"


def _program(name: str, steps: Sequence[Step], state: Place, zero: int, word_bytes: int) -> str:
    """A program's argument blocks, its table of steps and its job."""
    width = max(len(step.slots) for step in steps)
    blocks: list[Value] = []
    table: list[Value] = []
    for i, step in enumerate(steps):
        blocks += [*step.slots, *[0] * (width - len(step.slots))]
        row = [Place(symbol_of(step.kernel)), Place(f"{name}_blocks", i * width * 8)]
        table += [*row, *[0] * (STEP_SLOTS - len(row))]
    # One thread: nobody waits at a barrier, nobody cancels.
    nothing = Place(state.symbol, state.offset + 8 * zero)
    job: list[Value] = [Place(f"{name}_steps"), len(steps), nothing, nothing, 0, 0, 0, 0]
    return "".join(
        _slots(f"{name}_{what}", values, word_bytes)
        for what, values in (("blocks", blocks), ("steps", table), ("job", job))
    )


def program_ir(
    target: Target, programs: Mapping[str, Sequence[Step]], arguments: Mapping[str, Argument],
    state: Place, zero: int, buffer_bytes: int, kv_bytes: int,
) -> str:  # fmt: skip
    """IR of everything in an executable but kernels and constants.

    Args:
        target: what it is for.
        programs: steps by the names of `headrace.plan.modes`, at `headrace.standalone.places`.
        arguments: the driver's slots by name, but for those that are made here; a text or a list
            stands for its address.
        state: where the words lie that steps read at run time; word `zero` stays zero.
        buffer_bytes, kv_bytes: sizes of what begins zeroed.

    Raises:
        KernelError: the target is for no system that executables can be made for.
    """
    system = system_of(target)
    w, word_bytes = system.word, target.word_bytes
    made: dict[str, Value] = {
        "stack": 0,
        "write": Place(_WRITE),
        "exit": Place(_EXIT),
        **{name: Place(f"{name}_job") for name in programs},
    }
    values: dict[str, Value] = dict(made)
    held = []  # what arguments stand for the address of
    for name, value in arguments.items():
        held_name = f"argument_{name}"
        if isinstance(value, int | float):
            values[name] = value
        elif isinstance(value, str):
            values[name] = Place(held_name)
            held.append(_text(held_name, value))
        else:
            values[name] = Place(held_name)
            held.append(_slots(held_name, value, word_bytes))
    illegal, set_handler = at_illegal_instruction(
        system,
        f"this executable is for {target.name} ({' '.join(sorted(target.needs))}), and this CPU "
        "lacks some of it: export the model for this CPU\n",
        driver.USAGE_STATUS,
    )
    kernels = {symbol_of(step.kernel) for steps in programs.values() for step in steps}
    parts = [
        f"@{DATA} = external hidden global [0 x i8]\n",
        f"@{BUFFERS} = internal global [{buffer_bytes} x i8] zeroinitializer, align 4096\n",
        f"@{KV} = internal global [{kv_bytes} x i8] zeroinitializer, align 4096\n",
        *(f"declare void @{kernel}(ptr, i64, i64)\n" for kernel in sorted(kernels)),
        f"declare void @{symbol_of(driver.ROW.name)}(ptr, i64, i64)\n",
        *held,
        *(_program(name, steps, state, zero, word_bytes) for name, steps in programs.items()),
        _slots(_ARGUMENTS, [values[name] for name in driver.SLOTS], word_bytes),
        f"""
; Slots: file, address, bytes. What cannot be written ends the program.
define internal void @{_WRITE}(ptr %args, i64 %thread, i64 %threads) noinline {{
entry:
  %file = load {w}, ptr %args
  %from_slot = getelementptr i64, ptr %args, i64 1
  %from = load {w}, ptr %from_slot
  %size_slot = getelementptr i64, ptr %args, i64 2
  %size = load {w}, ptr %size_slot
  br label %next
next:
  %at = phi {w} [ %from, %entry ], [ %at, %failed ], [ %at1, %step ]
  %left = phi {w} [ %size, %entry ], [ %left, %failed ], [ %left1, %step ]
  %end = icmp eq {w} %left, 0
  br i1 %end, label %done, label %put
put:
  %n = call {w} @system({w} {system.write}, {w} %file, {w} %at, {w} %left, {w} 0)
  %good = icmp sgt {w} %n, 0
  br i1 %good, label %step, label %failed
failed:
  %again = icmp eq {w} %n, -4 ; EINTR
  br i1 %again, label %next, label %stop
stop:
  call void @exit_with({w} 1)
  unreachable
step:
  %at1 = add {w} %at, %n
  %left1 = sub {w} %left, %n
  br label %next
done:
  ret void
}}

define internal void @{_EXIT}(ptr %args, i64 %thread, i64 %threads) noinline {{
  %status = load {w}, ptr %args
  call void @exit_with({w} %status)
  unreachable
}}
""",
        illegal,
        start(
            system,
            asked_for(target)
            + set_handler
            + f"""  %stack_word = ptrtoint ptr %stack to i64
  store i64 %stack_word, ptr @{_ARGUMENTS}
  call void @{symbol_of(driver.ROW.name)}(ptr @{_ARGUMENTS}, i64 0, i64 1)""",
        ),
        support(system),
    ]
    return "".join(parts)
