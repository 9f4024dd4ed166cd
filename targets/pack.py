"""Kernel packs: kernels built ahead as shared libraries, for machines without a compiler.

A pack is a folder: `manifest.json`, and for each CPU level in it a shared library with one symbol
for each kernel. The manifest has the library's SHA-256 and each kernel's key
(`headrace.targets.keys`), so that code of another release is refused and not called.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from headrace.atomic_file import write_whole
from headrace.errors import KernelError
from headrace.targets.cache import KernelStore
from headrace.targets.keys import kernel_key
from headrace.targets.manifest import (
    LAYOUT,
    MANIFEST,
    Level,
    library_name,
    old_libraries,
    read_levels,
)
from headrace.targets.need import compiler_needed
from headrace.targets.systems import for_system, system_name
from headrace.targets.table import Kernel, symbol_of
from headrace.targets.target import Target

Progress = Callable[[int, int, str], None]

Kernels: TypeAlias = "KernelStore | PackedKernels"

LIBRARY_BYTES = 64 << 20
SHIPPED = Path(__file__).parent / "packs"  # what a wheel brings: a pack for each architecture


class Pack:
    """A folder of kernels; nothing of it is loaded before it is needed.

    Raises:
        KernelError: there is no pack, it is damaged, or of another layout.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.levels = read_levels(self.folder)

    @property
    def n_bytes(self) -> int:
        """Bytes of its files."""
        files = [MANIFEST, *(level.file for level in self.levels.values())]
        return sum((self.folder / file).stat().st_size for file in files)

    def lacking(self, kernels: Iterable[Kernel], target: Target) -> list[str]:
        """Names of kernels that the pack does not have, or has from other sources."""
        level = self.levels.get(target.name)
        known = {} if level is None else level.kernels
        return [one.name for one in kernels if known.get(one.name) != kernel_key(one, target)]

    def store(self, target: Target) -> PackedKernels:
        """The kernels of one of its targets."""
        return PackedKernels(self, target)


class PackedKernels:
    """Kernels of one target out of a pack, as `headrace.targets.cache.KernelStore` gives them."""

    compiled = 0

    def __init__(self, pack: Pack, target: Target) -> None:
        self.target = target
        self._pack = pack
        self._library: ctypes.CDLL | None = None

    def load(self, kernels: Iterable[Kernel], progress: Progress | None = None) -> dict[str, int]:
        """Addresses of kernels by name.

        Raises:
            KernelError: the pack lacks a kernel, or has it from other sources; or it is damaged.
        """
        wanted = list(kernels)
        level = self._pack.levels.get(self.target.name)
        if level is not None and level.triple != self.target.triple:
            raise KernelError(
                f"the kernel pack {self._pack.folder} is for {level.triple}, and this is "
                f"{self.target.triple}"
            )
        if lacking := self._pack.lacking(wanted, self.target):
            raise KernelError(
                f"the kernel pack {self._pack.folder} has no {', '.join(lacking[:3])} of this "
                f"release for {self.target.name}: build it again with `headrace targets build`"
            )
        if self._library is None:
            self._library = _open(self._pack.folder, self._pack.levels[self.target.name])
        return {one.name: self._address(one.name) for one in wanted}

    def _address(self, kernel: str) -> int:
        try:
            function = getattr(self._library, symbol_of(kernel))
        except AttributeError:
            raise KernelError(
                f"a library of the kernel pack {self._pack.folder} has no {symbol_of(kernel)}, "
                "which its manifest promises"
            ) from None
        return ctypes.cast(function, ctypes.c_void_p).value or 0


def shipped(kernels: Iterable[Kernel], target: Target) -> PackedKernels | None:
    """Kernels that this installation brought with it; None if it has not all of them.

    Raises:
        KernelError: it has a pack, but a damaged one.
    """
    folder = SHIPPED / target.architecture
    if not (folder / MANIFEST).is_file():
        return None
    pack = Pack(folder)
    return None if pack.lacking(kernels, target) else pack.store(target)


def _open(folder: Path, level: Level) -> ctypes.CDLL:
    # The system's loader takes a name, so it reads the file again after us. The hash finds damage:
    # who can change a library between the two can change the manifest as well.
    path = folder / level.file
    try:
        with path.open("rb") as file:
            data = file.read(LIBRARY_BYTES + 1)
        if len(data) > LIBRARY_BYTES or hashlib.sha256(data).hexdigest() != level.sha256:
            raise KernelError(
                f"{path} is not the library that the pack's manifest describes: copy the pack "
                "again, or build it again with `headrace targets build`"
            )
        return ctypes.CDLL(str(path.resolve()))
    except OSError as error:
        raise KernelError(
            f"{path} cannot be loaded ({error.strerror or error}): copy the pack again, all of it"
        ) from error


def build(
    targets: Sequence[Target],
    kernels: Sequence[Kernel],
    folder: str | Path,
    *,
    n_workers: int = 1,
    progress: Progress | None = None,
) -> Path:
    """Compile and link a pack; gives its folder. The manifest is written last.

    Where a pack is already, it is replaced: libraries that its manifest names are removed.

    Raises:
        KernelError: a kernel does not compile; or there is no compiler, no linker or no folder.
        OSError: the folder cannot be written.
    """
    with compiler_needed():
        from headrace.targets.freestanding import functions_object
    from headrace.targets.linker import find_linker, link_shared, linker_for

    if not os.fspath(folder):
        raise KernelError("a kernel pack needs a folder: name one, such as pack/")
    for target in targets:  # compiling takes a minute: better now than after it
        for_system(target, system_name(target))
        find_linker(linker_for(target.triple))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    described: dict[str, Any] = {}
    # Beside the pack: one that is there is whole until all of the new one is.
    with tempfile.TemporaryDirectory(prefix=".headrace-", dir=folder) as made:
        for target in targets:
            objects = KernelStore(target, n_workers).objects(kernels, _for_target(progress, target))
            path = Path(made, library_name(target))
            codes = [*(objects[kernel.name] for kernel in kernels), functions_object(target)]
            link_shared(codes, path, [symbol_of(kernel.name) for kernel in kernels], target.triple)
            described[target.name] = {
                "file": path.name,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "triple": target.triple,
                "cpu": target.cpu,
                "features": target.features,
                "needs": sorted(target.needs),
                "kernels": {kernel.name: kernel_key(kernel, target) for kernel in kernels},
            }
        old = old_libraries(folder) - {level["file"] for level in described.values()}
        with contextlib.suppress(FileNotFoundError):  # it describes other libraries
            (folder / MANIFEST).unlink()
        for level in described.values():
            os.replace(Path(made, level["file"]), folder / level["file"])
    manifest = {"layout": LAYOUT, "targets": described}
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=1).encode() + b"\n")
    for file in old:
        (folder / file).unlink(missing_ok=True)
    return folder


def _for_target(progress: Progress | None, target: Target) -> Progress | None:
    if progress is None:
        return None
    return lambda done, total, what: progress(done, total, f"{what} for {target.name}")
