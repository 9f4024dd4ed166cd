"""Load compiled kernels into this process: object code in, function addresses out."""

from __future__ import annotations

from collections.abc import Mapping

import llvmlite.binding as llvm

from headrace.errors import KernelError
from headrace.targets.table import symbol_of
from headrace.targets.target import Target


class LoadedKernels:
    """Keeps object code in executable memory for as long as it lives."""

    def __init__(self, target: Target) -> None:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        self._target = target
        self._engines: list[llvm.ExecutionEngine] = []

    def add(self, objects: Mapping[str, bytes]) -> dict[str, int]:
        """Load kernels' objects, by kernel name; gives the addresses of their entry points.

        Raises:
            KernelError: an object has no entry point.
        """
        machine = llvm.Target.from_triple(self._target.triple).create_target_machine()
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        for code in objects.values():
            engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        engine.finalize_object()
        addresses = {name: int(engine.get_function_address(symbol_of(name))) for name in objects}
        for name, address in addresses.items():
            if not address:
                raise KernelError(f"object of kernel {name} has no symbol {symbol_of(name)}")
        self._engines.append(engine)
        return addresses
