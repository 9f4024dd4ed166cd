"""Compiled kernels on disk, keyed by everything that decides their code.

A hit needs llvmlite alone; a miss starts the compiler, in processes of its own where it can.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.atomic_file import write_whole
from headrace.folders import cache_root, why_unusable
from headrace.targets.keys import COMPILER, kernel_key
from headrace.targets.need import compiler_needed
from headrace.targets.table import Kernel
from headrace.targets.target import Target

if TYPE_CHECKING:
    from headrace.targets.loading import LoadedKernels

Progress = Callable[[int, int, str], None]

COMPILING = "compiling kernels"


def _read(path: Path) -> bytes | None:
    """Object code of the cache; None when there is none or the file is damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    code = data[32:]
    return code if hashlib.sha256(code).digest() == data[:32] else None


class KernelStore:
    """Kernels of one target: memory, then disk, then the compiler."""

    def __init__(self, target: Target, n_workers: int = 1) -> None:
        self.target = target
        self.n_workers = n_workers  # processes that compile what is missing
        self._loaded: LoadedKernels | None = None
        self._addresses: dict[str, int] = {}
        self.compiled = 0

    def load(self, kernels: Iterable[Kernel], progress: Progress | None = None) -> dict[str, int]:
        """Addresses of kernels by name; compiles what neither memory nor disk has.

        Raises:
            KernelError: a kernel does not compile for this target.
            NoCompilerError: it would have to be compiled.
        """
        wanted = {kernel.name: kernel for kernel in kernels}
        absent = [kernel for name, kernel in wanted.items() if name not in self._addresses]
        if objects := self.objects(absent, progress):
            if self._loaded is None:
                with compiler_needed():
                    from headrace.targets.loading import LoadedKernels

                    self._loaded = LoadedKernels(self.target)
            self._addresses.update(self._loaded.add(objects))
        return {name: self._addresses[name] for name in wanted}

    def objects(
        self, kernels: Iterable[Kernel], progress: Progress | None = None
    ) -> dict[str, bytes]:
        """Object code of kernels by name; compiles what the disk does not have.

        Raises:
            KernelError: a kernel does not compile for this target.
            NoCompilerError: it would have to be compiled.
        """
        kernels = list(kernels)
        with compiler_needed():
            paths = {kernel.name: self._path(kernel) for kernel in kernels}
        objects = {name: code for name, path in paths.items() if (code := _read(path)) is not None}
        missing = [kernel for kernel in kernels if kernel.name not in objects]
        if progress is not None and missing:
            progress(0, len(missing), COMPILING)
        for done, (kernel, code) in enumerate(self._compile(missing), 1):
            try:
                data = hashlib.sha256(code).digest() + code
                write_whole(paths[kernel.name], data, durable=False)
            except OSError as error:  # that costs time, not correctness
                reason = why_unusable(paths[kernel.name].parent) or str(error)
                warnings.warn(
                    f"compiled kernels cannot be kept for the next start: {reason}", stacklevel=2
                )
            objects[kernel.name] = code
            self.compiled += 1
            if progress is not None:
                progress(done, len(missing), COMPILING)
        return objects

    def missing(self, kernels: Iterable[Kernel]) -> list[Kernel]:
        """Those that would have to be compiled."""
        return [k for k in kernels if k.name not in self._addresses and not _read(self._path(k))]

    def _path(self, kernel: Kernel) -> Path:
        key = kernel_key(kernel, self.target, *COMPILER)
        return cache_root() / "kernels" / self.target.name / f"{kernel.name}-{key}.o"

    def _compile(self, missing: list[Kernel]) -> Iterator[tuple[Kernel, bytes]]:
        from headrace.targets import workers

        # What takes longest first, so that no process is left alone with it at the end.
        rest = {
            k.name: k for k in sorted(missing, key=lambda k: not k.name.startswith("attention"))
        }
        if workers.available():
            pairs = [(kernel, self.target) for kernel in rest.values() if kernel.owner]
            with (
                contextlib.suppress(OSError),  # no process to be had: here, then
                contextlib.closing(workers.compile_aside(pairs, self.n_workers)) as results,
            ):
                for kernel, _, code in results:
                    del rest[kernel.name]
                    yield kernel, code
        for kernel in rest.values():
            from headrace.targets.compiler import compile_kernel

            yield (
                kernel,
                compile_kernel(kernel.build(self.target), self.target, name=kernel.name),
            )
