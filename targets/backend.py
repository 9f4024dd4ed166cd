"""LLVM's half of the compiler: the front end's IR text in, object code out.

LLVM ends the process at some errors of a code generator, which for the host's own are not to be
expected. So code for a foreign architecture is generated in a child process (this module run as a
program), which needs llvmlite alone; and so is code that wants a switch of LLVM's own.
"""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import llvmlite.binding as llvm

from headrace.errors import KernelError
from headrace.targets.host import same_architecture
from headrace.targets.table import symbol_of
from headrace.targets.target import Target

CHILD_LIMIT_S = 300.0
# A module with this named metadata keeps the order of instructions that its source has. LLVM's
# scheduler brings the loads of all columns of a product to the front, and then spills. The switches
# (`Target.in_order_options`) are for a whole process, so a child's.
IN_ORDER_MARK = "headrace.in_order"

llvm.initialize_all_targets()
llvm.initialize_all_asmprinters()


def target_machine(target: Target, level: int = 3) -> llvm.TargetMachine:
    """LLVM's code generator for a target, at an optimisation level from 0 to 3."""
    return llvm.Target.from_triple(target.triple).create_target_machine(
        cpu=target.cpu,
        features=target.features,
        opt=level,
        reloc="static" if target.bare_metal or target.architecture == "wasm32" else "pic",
        codemodel="small",
        abiname=target.abi,
    )


def parse(text: str, target: Target) -> llvm.ModuleRef:
    """A module of IR text that does not say what it is for."""
    layout = target_machine(target).target_data
    header = f'target triple = "{target.triple}"\ntarget datalayout = "{layout}"\n'
    return llvm.parse_assembly(header + text)


def optimise(text: str, target: Target, name: str) -> llvm.ModuleRef:
    """Optimised module of a kernel, with one external function, `symbol_of(name)`."""
    if target.attributes:
        text = re.sub(
            r"^(define .*?)((?: #\d+)?(?: prologue .*)?) \{$",
            rf"\1 {target.attributes}\2 {{",
            text,
            flags=re.M,
        )
    module = parse(text, target)
    for function in module.functions:
        if not function.is_declaration and function.name != symbol_of(name):
            function.linkage = "internal"
            function.add_function_attribute("alwaysinline")
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = True
    options.slp_vectorization = False  # kernels are vectors already; what is left is scalar
    options.loop_unrolling = True
    builder = llvm.create_pass_builder(target_machine(target), options)
    builder.getModulePassManager().run(module, builder)
    module.verify()
    return module


def _generate(text: str, target: Target, name: str) -> bytes:
    module = optimise(text, target, name)
    if os.environ.get("HEADRACE_DEBUG", "") == "2":
        folder = Path(os.environ.get("HEADRACE_DUMP", "headrace-dump")) / target.name
        folder.mkdir(parents=True, exist_ok=True)
        text = str(module)
        (folder / f"{name}.ll").write_text(text)
        # Of a copy: making code changes a module, and so what would be made of it the next time.
        assembly = target_machine(target).emit_assembly(llvm.parse_assembly(text))
        (folder / f"{name}.s").write_text(assembly)
    code: bytes = target_machine(target).emit_object(module)
    return code


def _generate_in_child(text: str, target: Target, name: str) -> bytes:
    # The target as a value: it may be a changed copy of the one that has its name.
    asked = pickle.dumps((text, target, name))
    command = [sys.executable, "-m", __name__]
    try:
        done = subprocess.run(command, input=asked, capture_output=True, timeout=CHILD_LIMIT_S)
    except subprocess.TimeoutExpired:
        reason = f"no code after {CHILD_LIMIT_S:.0f} s"
    else:
        if done.returncode == 0:
            return done.stdout
        said = done.stderr.decode(errors="replace").strip().splitlines()
        reason = f"exit status {done.returncode}: {said[-1] if said else 'no message'}"
    handle, path = tempfile.mkstemp(prefix=f"headrace-{target.name}-{name}-", suffix=".ll")
    with os.fdopen(handle, "w") as file:
        file.write(text)
    raise KernelError(
        f"LLVM makes no code of kernel {name} for {target.name} ({reason}); its IR is in {path}"
    )


def emit_object(text: str, target: Target, name: str) -> bytes:
    """Object code of a kernel whose one symbol is `symbol_of(name)`, in its system's format.

    With HEADRACE_DEBUG=2 the optimised IR and the assembly are written beside each other in
    `HEADRACE_DUMP` (default: ./headrace-dump).

    Raises:
        KernelError: LLVM refuses the code; its IR is kept in a file that the message names.
    """
    in_child = IN_ORDER_MARK in text or target.llvm_options or not same_architecture(target)
    return (_generate_in_child if in_child else _generate)(text, target, name)


def emit_plain(text: str, target: Target) -> bytes:
    """Object code of IR as it stands: machine code in front of functions bears no optimiser."""
    code: bytes = target_machine(target, 0).emit_object(parse(text, target))
    return code


def main() -> None:
    """Compile what stdin asks for to stdout; see `_generate_in_child`."""
    text, chosen, name = pickle.load(sys.stdin.buffer)
    # The target's own choice of an order comes first.
    by_mark = IN_ORDER_MARK in text and not chosen.llvm_options
    ordered = chosen.in_order_options if by_mark else ()
    for option in (*chosen.llvm_options, *ordered):
        llvm.set_option("headrace", option)
    sys.stdout.buffer.write(_generate(text, chosen, name))


if __name__ == "__main__":
    main()
