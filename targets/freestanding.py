"""Functions that LLVM calls by itself, so that kernels are linked with no library of a system.

They fill and copy memory, look for the end of a text, and do what an architecture has no
instruction for.
"""

from __future__ import annotations

from functools import cache

from headrace.targets import backend
from headrace.targets.arm_helpers import HELPERS, OF_DOUBLES, OF_MEMORY
from headrace.targets.systems import system_name
from headrace.targets.target import Target

# What is needed besides filling and copying, by system.
_CLEAR = """
define hidden void @{name}(ptr %to, i64 %n) "no-builtins" {{
  %end = call ptr @memset(ptr %to, i32 0, i64 %n)
  ret void
}}
"""
# AArch64 Windows: touch each page of x15 * 16 bytes below the stack; may change x16 and x17 only.
# lsl x16, x15, 4; mov x17, sp; 1: sub x17, x17, 4096; subs x16, x16, 4096; ldr xzr, [x17];
# b.gt 1b; ret
_CHECK_STACK = (
    0xD37CEDF0, 0x910003F1, 0xD1400631, 0xF1400610, 0xF940023F, 0x54FFFFAC, 0xD65F03C0,
)  # fmt: skip
_OF_BOTH = {
    # As data among code: there is no room in front of a function (`headrace.targets.systems`).
    ("aarch64", "windows"): "@__chkstk = constant [7 x i32] ["
    + ", ".join(f"i32 {word}" for word in _CHECK_STACK)
    + '], section ".text", align 4\n',
}
_OF_SYSTEM = {
    "macos": _CLEAR.format(name="bzero") + _CLEAR.format(name="__bzero"),
    "windows": "@_fltused = global i32 0\n",  # says that a program uses floats
}

# 16 bytes at a time, then single ones. LLVM makes no call of memset of a loop in memset.
_TEXT = """
define hidden ptr @memset(ptr %to, i32 %value, {w} %n) "no-builtins" {{
entry:
  %byte = trunc i32 %value to i8
  %first = insertelement <16 x i8> poison, i8 %byte, i32 0
  %bytes = shufflevector <16 x i8> %first, <16 x i8> poison, <16 x i32> zeroinitializer
  br label %wide_next
wide_next:
  %i = phi {w} [ 0, %entry ], [ %i16, %wide ]
  %i16 = add {w} %i, 16
  %fits = icmp ule {w} %i16, %n
  br i1 %fits, label %wide, label %next
wide:
  %wide_at = getelementptr i8, ptr %to, {w} %i
  store <16 x i8> %bytes, ptr %wide_at, align 1
  br label %wide_next
next:
  %j = phi {w} [ %i, %wide_next ], [ %j1, %step ]
  %end = icmp eq {w} %j, %n
  br i1 %end, label %done, label %step
step:
  %at = getelementptr i8, ptr %to, {w} %j
  store i8 %byte, ptr %at
  %j1 = add {w} %j, 1
  br label %next
done:
  ret ptr %to
}}

define hidden ptr @memcpy(ptr %to, ptr %from, {w} %n) "no-builtins" {{
entry:
  br label %wide_next
wide_next:
  %i = phi {w} [ 0, %entry ], [ %i16, %wide ]
  %i16 = add {w} %i, 16
  %fits = icmp ule {w} %i16, %n
  br i1 %fits, label %wide, label %next
wide:
  %wide_from = getelementptr i8, ptr %from, {w} %i
  %wide_at = getelementptr i8, ptr %to, {w} %i
  %bytes = load <16 x i8>, ptr %wide_from, align 1
  store <16 x i8> %bytes, ptr %wide_at, align 1
  br label %wide_next
next:
  %j = phi {w} [ %i, %wide_next ], [ %j1, %step ]
  %end = icmp eq {w} %j, %n
  br i1 %end, label %done, label %step
step:
  %source = getelementptr i8, ptr %from, {w} %j
  %byte = load i8, ptr %source
  %at = getelementptr i8, ptr %to, {w} %j
  store i8 %byte, ptr %at
  %j1 = add {w} %j, 1
  br label %next
done:
  ret ptr %to
}}

define hidden {w} @strlen(ptr %text) "no-builtins" {{
entry:
  br label %next
next:
  %i = phi {w} [ 0, %entry ], [ %more, %next ]
  %more = add {w} %i, 1
  %at = getelementptr i8, ptr %text, {w} %i
  %byte = load i8, ptr %at
  %end = icmp eq i8 %byte, 0
  br i1 %end, label %done, label %next
done:
  ret {w} %i
}}
"""


def _more(target: Target) -> str:
    """What else an architecture has no instruction for."""
    if target.architecture == "armv7a":
        return HELPERS + OF_DOUBLES
    return HELPERS + OF_MEMORY if target.architecture.startswith("thumb") else ""


@cache
def functions_object(target: Target) -> bytes:
    """Object code of the functions, to be linked with kernels of a target."""
    text = _TEXT.format(w=f"i{8 * target.word_bytes}") + _more(target)
    system = system_name(target)
    text += _OF_SYSTEM.get(system, "") + _OF_BOTH.get((target.architecture, system), "")
    code: bytes = backend.target_machine(target, 2).emit_object(backend.parse(text, target))
    return code
