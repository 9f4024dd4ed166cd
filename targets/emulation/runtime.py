"""The program around a kernel: a static executable without libc, written in LLVM IR.

It reads an image (see `headrace.targets.emulation.image`) from stdin, turns the offsets that the
image names into addresses, makes the calls that it lists and writes the image to stdout. On a
board without a system it reads and writes files instead (see `headrace.targets.bare_metal`).
"""

from __future__ import annotations

from functools import cache

from headrace.targets import backend, bare_metal
from headrace.targets.bare_metal import Board
from headrace.targets.linux import SystemCalls, asked_for, start, support, system_of
from headrace.targets.target import Target

ROOM = 128 << 20  # bytes of the largest image; untouched pages cost nothing
KERNEL = "headrace_emulated_kernel"
TOO_LARGE = 3  # exit status


def _on_linux(system: SystemCalls, target: Target) -> str:
    """Reads stdin into the image and writes it to stdout."""
    w = system.word
    body = asked_for(target)
    body += f"  call void @main()\n  call void @exit_with({w} 0)"
    return f"""
@image = internal global [{ROOM} x i8] zeroinitializer, align 4096

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
  %got = call {w} @system({w} {system.read}, {w} 0, {w} %at, {w} %room, {w} 0)
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
  %put = call {w} @system({w} {system.write}, {w} 1, {w} %at, {w} %left, {w} 0)
  %more = add {w} %n, %put
  br label %next
done:
  ret void
}}
{start(system, body)}
{support(system)}"""


def _on_board(board: Board) -> str:
    """Reads a file of the host into the board's memory, and writes another."""
    return f"""
@image = internal global [{board.image_bytes} x i8] zeroinitializer, section ".arena", align 4096

define i32 @read_image() noinline {{
  %n = call i32 @read_all(ptr @image, i32 {board.image_bytes})
  ret i32 %n
}}

define void @write_image(i32 %total) noinline {{
  call void @write_all(ptr @image, i32 %total)
  ret void
}}
{bare_metal.start(board)}
{bare_metal.support()}"""


def _calls(w: str) -> str:
    """IR of `@main`, in words of type `w`."""
    return f"""
declare void @{KERNEL}(ptr, i64, i64)

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
"""


def surroundings(target: Target, board: Board | None) -> tuple[str, str]:
    """IR of `@_start`, which calls `@main`, and of what that reads and writes an image with.

    `@read_image` fills `@image` and gives the number of bytes, `@write_image` takes that.

    Returns:
        The text, and the type of a word in it.

    Raises:
        KernelError: no system calls are known for the target's architecture.
    """
    if board is not None:
        return _on_board(board), "i32"
    system = system_of(target)
    return _on_linux(system, target), system.word


@cache
def runtime_object(target: Target, board: Board | None = None) -> bytes:
    """Object code of the program; it calls the kernel by the symbol `KERNEL`.

    Args:
        board: that it runs on; None: on Linux.

    Raises:
        KernelError: no system calls are known for the target's architecture.
    """
    text, word = surroundings(target, board)
    return backend.emit_plain(text + _calls(word), target)
