"""The compiler is optional: what needs it says so."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from headrace.errors import NoCompilerError


@contextlib.contextmanager
def compiler_needed() -> Iterator[None]:
    """Turn a failing import of Numba or llvmlite into an error that says what to do.

    Raises:
        NoCompilerError: one of them is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise NoCompilerError(
            f"kernels cannot be compiled without numba and llvmlite ({error}): `pip install numba "
            "llvmlite`, or give a kernel pack that another machine built (`--kernels`)"
        ) from error
