"""Arrays in .npy files, one in each."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from headrace.atomic_file import write_whole
from headrace.errors import HeadraceError


def read_array(path: Path, *, mapped: bool = False) -> np.ndarray:
    """The array of a .npy file.

    Args:
        mapped: elements stay in the file until they are used.

    Raises:
        HeadraceError: there is no such file, or no such array in it.
    """
    try:
        found = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except FileNotFoundError:
        raise HeadraceError(f"no file {path}; write inputs with numpy.save") from None
    except (OSError, ValueError, EOFError, MemoryError) as error:
        raise HeadraceError(f"{path} is no .npy file of numbers: {error}") from None
    if not isinstance(found, np.ndarray):
        raise HeadraceError(f"{path} is an archive of arrays: write each with numpy.save")
    if not mapped and not found.dtype.isnative:  # written with the other order of bytes
        found = found.astype(found.dtype.newbyteorder("="))
    array: np.ndarray = found
    return array


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file, whole or not at all; directories above it are made.

    Raises:
        OSError: it cannot be written.
    """
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    write_whole(path, content.getvalue())
