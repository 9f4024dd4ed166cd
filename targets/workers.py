"""Compile kernels in processes of their own, on all cores.

Numba and what it compiles take some 200 MB that a process never gives back, and an error inside
LLVM may end the process: neither should befall the program that loads a model.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Generator, Sequence
from io import BufferedReader, FileIO
from pathlib import Path
from typing import IO, BinaryIO

from headrace.errors import KernelError
from headrace.targets.table import Kernel
from headrace.targets.target import Target

Pair = tuple[Kernel, Target]
Result = tuple[Kernel, Target, bytes]

_READY = b"ready\n"


def available() -> bool:
    """Is there a Python program to start? Inside another program `sys.executable` may be that."""
    name = Path(sys.executable or "").name.lower()
    return name.startswith(("python", "pypy")) and not getattr(sys, "frozen", False)


def compile_aside(pairs: Sequence[Pair], n_workers: int) -> Generator[Result, None, None]:
    """Object code of kernels for targets, as it comes; the rest is dropped when closed.

    Args:
        pairs: what to compile, rows with an owner; begin with what takes longest.
        n_workers: processes at once.

    Raises:
        KernelError: a kernel does not compile, or a process ended over it.
        OSError: no process could be started.
    """
    todo: queue.SimpleQueue[Pair] = queue.SimpleQueue()
    for pair in pairs:
        todo.put(pair)
    done: queue.SimpleQueue[Result | BaseException] = queue.SimpleQueue()
    children: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(min(n_workers, len(pairs))):
            children.append(_start())
        for child in children:
            threading.Thread(target=_feed, args=(child, todo, done), daemon=True).start()
        for _ in pairs:
            result = _next(done)
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        for child in children:
            child.kill()
        for child in children:
            child.wait()


def _start() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)},
        start_new_session=True,  # Ctrl-C on the terminal is the parent's to handle
    )


def _next(done: queue.SimpleQueue[Result | BaseException]) -> Result | BaseException:
    while True:  # with a limit, so that Ctrl-C comes through on every system
        with contextlib.suppress(queue.Empty):
            return done.get(timeout=0.2)


def _feed(
    child: subprocess.Popen[bytes],
    todo: queue.SimpleQueue[Pair],
    done: queue.SimpleQueue[Result | BaseException],
) -> None:
    assert child.stdin is not None and child.stdout is not None
    try:
        with child.stdin as requests, child.stdout as answers:
            if answers.readline() != _READY:
                raise OSError("the compiler's process did not start")
            while True:
                kernel, target = todo.get_nowait()
                # The target as a value: it may be a changed copy of the one that has its name.
                pickle.dump((kernel.owner, kernel.name, target), requests)
                requests.flush()
                done.put((kernel, target, _answer(answers, kernel, target)))
    except queue.Empty:
        pass
    except BaseException as error:  # raised where the results are waited for
        done.put(error)


def _answer(answers: IO[bytes], kernel: Kernel, target: Target) -> bytes:
    head = answers.readline().split()
    data = answers.read(int(head[1])) if head else b""
    if not head or len(data) < int(head[1]):
        raise KernelError(
            f"kernel {kernel.name} does not compile for {target.name}: the compiler's process ended"
        )
    if head[0] != b"code":
        raise KernelError(data.decode(errors="replace"))
    return data


def _serve(requests: BufferedReader, answers: BinaryIO) -> None:
    from headrace.targets.compiler import compile_kernel

    answers.write(_READY)
    answers.flush()
    while requests.peek(1):
        owner, name, target = pickle.load(requests)
        kind, data = "code", b""
        try:
            kernel = importlib.import_module(owner).kernel_named(name)
            data = compile_kernel(kernel.build(target), target, name=name)
        except (
            Exception
        ) as error:  # also what has nothing to do with the kernel: a folder to dump to
            said = str(error) if isinstance(error, KernelError) else repr(error)
            kind, data = "error", said.encode()
        answers.write(f"{kind} {len(data)}\n".encode() + data)
        answers.flush()


def main() -> None:
    """Compile what stdin asks for to stdout; see `_feed`."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not get between the answers
    with contextlib.suppress(BrokenPipeError):  # nobody waits any more
        _serve(BufferedReader(FileIO(0)), answers)


if __name__ == "__main__":
    main()
