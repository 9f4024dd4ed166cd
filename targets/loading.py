"""Load compiled kernels into this process: object code in, function addresses out."""

from __future__ import annotations

import llvmlite.binding as llvm

from headrace.errors import KernelError
from headrace.targets.target import Target

SYMBOL = "headrace_kernel"


class LoadedKernels:
    """Keeps object code in executable memory for as long as it lives."""

    def __init__(self, target: Target) -> None:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        self._target = target
        self._engines: list[llvm.ExecutionEngine] = []

    def add(self, name: str, object_code: bytes) -> int:
        """Load one kernel's object; gives the address of its entry point.

        Raises:
            KernelError: the object has no entry point.
        """
        machine = llvm.Target.from_triple(self._target.triple).create_target_machine()
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        engine.add_object_file(llvm.ObjectFileRef.from_data(object_code))
        engine.finalize_object()
        address = engine.get_function_address(SYMBOL)
        if not address:
            raise KernelError(f"object of kernel {name} has no symbol {SYMBOL}")
        self._engines.append(engine)
        return int(address)
