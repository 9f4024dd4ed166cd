"""The kernel cache: what its keys cover, and compiling in other processes."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from headrace.errors import KernelError
from headrace.kernels import probe
from headrace.kernels.table import all_rows, kernel_table
from headrace.targets import workers
from headrace.targets.cache import KernelStore
from headrace.targets.compiler import compile_kernel
from headrace.targets.host import pick_target
from headrace.targets.table import Kernel

TABLE = kernel_table()
BROKEN = """
import os
from headrace.targets.table import Kernel

def bad(args, thread, n_threads):
    return args.nothing

def build(target):
    return bad

def end(target):
    os._exit(3)

def kernel_named(name):
    return Kernel(name, end if name == "ends" else build, (__name__,), None, __name__)
"""


def reached(fn: Callable[..., Any], seen: set[Any]) -> Iterator[str]:
    """Modules of the functions that a kernel inlines."""
    if fn in seen:
        return
    seen.add(fn)
    yield fn.__module__
    cells = [cell.cell_contents for cell in fn.__closure__ or ()]
    names = [fn.__globals__[name] for name in fn.__code__.co_names if name in fn.__globals__]
    for value in (*cells, *names):
        if isinstance(value, types.FunctionType):
            yield from reached(value, seen)


@pytest.mark.parametrize("name", TABLE)
def test_the_key_of_a_kernel_covers_all_of_its_code(name: str) -> None:
    kernel = TABLE[name]
    modules = set(reached(kernel.build(pick_target(None)), set()))
    assert modules <= {*kernel.sources, "headrace.targets.simd"}


@pytest.mark.parametrize("name", TABLE)
def test_another_process_finds_the_same_row(name: str) -> None:
    kernel = TABLE[name]
    assert kernel.owner is not None
    found = importlib.import_module(kernel.owner).kernel_named(name)
    assert (found.name, found.sources, found.owner) == (name, kernel.sources, kernel.owner)


def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> Kernel:
    (tmp_path / "broken_kernels.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(tmp_path)
    row: Kernel = importlib.import_module("broken_kernels").kernel_named(name)
    return row


@pytest.mark.parametrize(("name", "says"), [("bad", "does not compile"), ("ends", "process ended")])
def test_a_kernel_that_fails_is_an_exception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, says: str
) -> None:
    row = broken(tmp_path, monkeypatch, name)
    with pytest.raises(KernelError, match=f"{name} .*{says}"):
        KernelStore(pick_target(None), 2).objects([row])


def program_that_ends(tmp_path: Path) -> str:
    path = tmp_path / "python-of-another-program"
    path.write_text("#!/bin/sh\nexit 0\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(os.name != "posix", reason="a shell script stands for a program")
@pytest.mark.parametrize("executable", ["", "/usr/bin/blender", "/no/such/python", None])
def test_without_another_python_kernels_are_compiled_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executable: str | None
) -> None:
    target, row = pick_target(None), probe.all_kernels()[0]
    expected = KernelStore(target).objects([row])
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path))
    there = program_that_ends(tmp_path) if executable is None else executable
    monkeypatch.setattr(sys, "executable", there)
    store = KernelStore(target)
    assert store.objects([row]) == expected
    assert store.compiled == 1


def test_a_changed_target_is_compiled_for_as_it_is() -> None:
    """activations="f32" takes a copy of a target without its bfloat16 products."""
    target, row = pick_target("x86-64-v3"), TABLE["gemm_q8_0"]
    other = replace(target, gemm_tokens=2)
    code = {
        t.gemm_tokens: made
        for _, t, made in workers.compile_aside([(row, target), (row, other)], 1)
    }
    assert code[2] == compile_kernel(row.build(other), other, name=row.name)
    assert code[2] != code[target.gemm_tokens]


def test_the_program_itself_stays_without_a_compiler(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from headrace.kernels import probe\n"
        "from headrace.targets.cache import KernelStore\n"
        "from headrace.targets.host import pick_target\n"
        "store = KernelStore(pick_target(None), 2)\n"
        "assert store.load(probe.all_kernels()) and store.compiled == 1\n"
        "assert 'numba' not in sys.modules\n"
    )
    environment = os.environ | {"HEADRACE_CACHE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_what_is_not_wanted_any_more_is_stopped() -> None:
    target = pick_target(None)
    pairs = [(TABLE[f"attention_prefill_d{head}"], target) for head in (64, 80, 128, 256)]
    running = workers.compile_aside([*pairs, (TABLE["probe_read"], target)], 2)
    next(running)
    running.close()  # returns when the processes have ended, long before the last kernel


def test_names_are_of_one_kernel_each() -> None:
    assert len(all_rows()) == len(kernel_table())
