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

LINK_LIMIT_S = 600.0  # a model goes into an executable


ELF, WASM, MACHO, PE = "ld.lld", "wasm-ld", "ld64.lld", "lld-link"


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
    """The command that runs one of LLVM's linkers.

    Raises:
        KernelError: there is none; the message says how to install one.
    """
    if path := shutil.which(name):
        return (path,)
    if versioned := _versioned(name):
        return (versioned[0],)
    if name != MACHO and importlib.util.find_spec("ziglang"):
        return (sys.executable, "-m", "ziglang", name)
    other = "" if name == MACHO else ", or `pip install ziglang`"
    raise KernelError(f"no linker {name} here: install Debian's package lld{other}")


def _link(
    options: Sequence[str],
    objects: Sequence[bytes],
    path: Path,
    linker: str,
    files: Mapping[str, str] | None = None,
    more: Sequence[str] = (),
) -> None:
    """Run a linker; `files` are texts that the options name, `more` is what follows the objects."""
    with tempfile.TemporaryDirectory(prefix="headrace-link-") as folder:
        names = [f"{i}.o" for i in range(len(objects))]
        for name, code in zip(names, objects, strict=True):
            Path(folder, name).write_bytes(code)
        for name, text in (files or {}).items():
            Path(folder, name).write_text(text)
        out = [f"/out:{path.absolute()}"] if linker == PE else ["-o", str(path.absolute())]
        command = [*find_linker(linker), *options, *out, *names, *more]
        try:
            done = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=LINK_LIMIT_S
            )
        except subprocess.TimeoutExpired as error:
            raise KernelError(f"{path.name} is not linked after {LINK_LIMIT_S:.0f} s") from error
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


def link_bare(
    objects: Sequence[bytes], path: Path, script: str, symbols: Mapping[str, str]
) -> None:
    """Link objects to a program without a system, at `path`, laid out as a linker script says.

    Raises:
        KernelError: there is no linker, or it finds an error.
    """
    defined = [f"--defsym={name}={value}" for name, value in symbols.items()]
    options = ["-static", "--gc-sections", "--script=board.ld", *defined]
    _link(options, objects, path, ELF, {"board.ld": script})


def link_together(objects: Sequence[bytes]) -> bytes:
    """Object files as one that can be linked to others.

    Raises:
        KernelError: there is no linker, or it finds an error.
    """
    with tempfile.TemporaryDirectory(prefix="headrace-link-") as folder:
        path = Path(folder, "together.o")
        _link(["--relocatable"], objects, path, ELF)
        return path.read_bytes()


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
    script = _PROGRAM.format(base=_BASE, symbol=symbol)
    options = ["-static", "--script=program.ld", "--strip-all"]
    binary = ["--format=binary", str(data.resolve())]
    _link(options, objects, path, ELF, {"program.ld": script}, binary)


def link_shared(objects: Sequence[bytes], path: Path, exports: Sequence[str], triple: str) -> None:
    """Link objects to a shared library at `path` that needs no other and shows `exports` alone.

    Args:
        triple: LLVM's name of architecture and system; the latter decides the library's format.

    Raises:
        KernelError: there is no linker, or it finds an error, such as an undefined symbol.
    """
    architecture = triple.partition("-")[0]
    if "-apple-" in triple:
        options = ["-dylib", "-arch", architecture.replace("aarch64", "arm64")]
        options += ["-platform_version", "macos", "11.0", "11.0", "-install_name", path.name]
        options += [word for name in exports for word in ("-exported_symbol", f"_{name}")]
        options += ["-dead_strip", "-x", "-no_uuid"]
        _link(options, objects, path, MACHO)
    elif "-windows-" in triple:
        options = ["/dll", "/noentry", "/nodefaultlib", "/opt:ref", "/Brepro"]
        options += [f"/export:{name}" for name in exports]
        _link(options, objects, path, PE)
    else:
        options = ["-shared", f"-soname={path.name}", "--hash-style=gnu", "--build-id=none"]
        # 16 KiB pages are what newer ARM systems have; relocations are done at once, then locked.
        options += ["-zmax-page-size=16384", "-zrelro", "-znow", "--strip-all"]
        options += ["--no-undefined", "--gc-sections", "--version-script=exports"]
        shown = "".join(f" {name};" for name in exports)
        _link(options, objects, path, ELF, {"exports": f"{{ global:{shown} local: *; }};"})


def linker_for(triple: str) -> str:
    """The linker that makes shared libraries for a triple's system."""
    return MACHO if "-apple-" in triple else PE if "-windows-" in triple else ELF


def link_wasm(objects: Sequence[bytes], path: Path, exports: Sequence[str]) -> None:
    """Link objects to a WebAssembly module with its own memory at `path`.

    Raises:
        KernelError: there is no linker, or it finds an error.
    """
    _link(["--no-entry", *(f"--export={name}" for name in exports)], objects, path, WASM)
