"""Link object code with LLVM's linker, from wherever it is installed."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from headrace.errors import KernelError

LINK_LIMIT_S = 60.0


ELF, WASM = "ld.lld", "wasm-ld"


def _versioned(name: str) -> list[str]:
    """Linkers that a distribution installs with their version in the name, the newest first."""
    found: dict[int, str] = {}
    for folder in os.environ.get("PATH", os.defpath).split(os.pathsep):
        for path in Path(folder or ".").glob(f"{name}-*"):
            if match := re.fullmatch(rf"{re.escape(name)}-(\d+)", path.name):
                found.setdefault(int(match[1]), str(path))
    return [found[version] for version in sorted(found, reverse=True)]


@cache
def find_linker(name: str = ELF) -> tuple[str, ...]:
    """The command that runs the linker for ELF or for WebAssembly.

    Raises:
        KernelError: there is none; the message says how to install one.
    """
    if path := shutil.which(name):
        return (path,)
    if versioned := _versioned(name):
        return (versioned[0],)
    if importlib.util.find_spec("ziglang"):
        return (sys.executable, "-m", "ziglang", name)
    raise KernelError(
        f"no linker {name} here: install Debian's package lld, or `pip install ziglang`"
    )


def _link(
    options: Sequence[str], objects: Sequence[bytes], path: Path, linker: str,
    more: Sequence[str] = (),
) -> None:  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="headrace-link-") as folder:
        files = [Path(folder, f"{i}.o") for i in range(len(objects))]
        for file, code in zip(files, objects, strict=True):
            file.write_bytes(code)
        command = [*find_linker(linker), *options, "-o", str(path), *map(str, files), *more]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LINK_LIMIT_S)
    if done.returncode:
        raise KernelError(f"{path.name} cannot be linked: {done.stderr.strip()}")


def link_static(
    objects: Sequence[bytes], path: Path, symbols: Mapping[str, str] | None = None
) -> None:
    """Link objects to a static executable at `path`; `symbols` gives names to defined symbols.

    Raises:
        KernelError: there is no linker, or it finds an error.
    """
    defined = [f"--defsym={name}={value}" for name, value in (symbols or {}).items()]
    _link(["-static", *defined], objects, path, ELF)


# Code first, so that it reaches what it names; what may be larger than that reach comes last.
_PROGRAM = """
ENTRY(_start)
PHDRS {{
  text PT_LOAD FLAGS(5); rest PT_LOAD FLAGS(6); data PT_LOAD FLAGS(4); stack 0x6474e551 FLAGS(6);
}}
SECTIONS {{
  . = {base};
  .text : {{ *(.text .text.*) *(.rodata .rodata.*) }} :text
  . = ALIGN(CONSTANT(MAXPAGESIZE));
  .data : {{ *.o(.data .data.*) }} :rest
  .bss : {{ *(.bss .bss.*) }} :rest
  . = ALIGN(CONSTANT(MAXPAGESIZE));
  .headrace : {{ {symbol} = .; *.bin(.data) }} :data
  /DISCARD/ : {{ *(.ARM.exidx* .eh_frame* .comment .note*) }}
}}
"""
_BASE = 0x400000


def link_program(objects: Sequence[bytes], data: Path, symbol: str, path: Path) -> None:
    """Link objects and a file of constants (*.bin), which `symbol` names, to a program at `path`.

    Raises:
        KernelError: there is no linker, or it finds an error.
    """
    with tempfile.TemporaryDirectory(prefix="headrace-link-") as folder:
        script = Path(folder, "program.ld")
        script.write_text(_PROGRAM.format(base=_BASE, symbol=symbol))
        options = ["-static", f"--script={script}", "--strip-all"]
        _link(options, objects, path, ELF, ["--format=binary", str(data.resolve())])


def link_shared(objects: Sequence[bytes], path: Path) -> None:
    """Link objects to a shared library at `path`; what they leave undefined, its user defines.

    Raises:
        KernelError: there is no linker, or it finds an error.
    """
    options = ["-shared", f"-soname={path.name}", "--hash-style=gnu", "--build-id=none"]
    # 16 KiB pages are what newer ARM systems have; relocations are done at once and then locked.
    options += ["-zmax-page-size=16384", "-zrelro", "-znow", "--strip-all"]
    _link(options, objects, path, ELF)


def link_wasm(objects: Sequence[bytes], path: Path, exports: Sequence[str]) -> None:
    """Link objects to a WebAssembly module with its own memory at `path`.

    Raises:
        KernelError: there is no linker, or it finds an error.
    """
    _link(["--no-entry", *(f"--export={name}" for name in exports)], objects, path, WASM)
