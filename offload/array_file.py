"""Arrays in a file that somebody else may have written: read within bounds, written as a whole."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from headrace.atomic_file import whole_file
from headrace.errors import HeadraceError, ModelFileError
from headrace.loaders.reader import open_regular

MOST_BYTES = 1 << 30  # of the arrays of a file


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a file that `np.load` reads; it appears when it is complete.

    Raises:
        HeadraceError: it cannot be written.
    """
    try:
        with whole_file(path) as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    except OSError as error:
        raise HeadraceError(f"cannot write {path}: {error.strerror or error}") from error


def read_arrays(
    path: Path, kinds: Mapping[str, tuple[str, int]], what: str
) -> dict[str, np.ndarray]:
    """The arrays of a file.

    Args:
        kinds: dtype and dimensions of each array that there must be.
        what: it is, for errors.

    Raises:
        ModelFileError: it is something else (a FIFO is not waited for), or larger than
            `MOST_BYTES`.
        HeadraceError: it cannot be read.
    """
    found, room = dict[str, np.ndarray](), MOST_BYTES
    try:
        with open_regular(path, what) as file, zipfile.ZipFile(file) as archive:
            for name, (dtype, dimensions) in kinds.items():
                with archive.open(f"{name}.npy") as member:
                    version = np.lib.format.read_magic(member)
                    if version != (1, 0):
                        raise ValueError(f"{name} has version {version}")
                    shape, fortran, kind = np.lib.format.read_array_header_1_0(member)
                    size = kind.itemsize
                    for n in shape:
                        size *= n
                    if min(shape, default=0) < 0:
                        raise ValueError(f"{name} has {list(shape)} values")
                    if kind != np.dtype(dtype) or len(shape) != dimensions or fortran:
                        raise ValueError(f"{name} is {kind} {list(shape)}")
                    room -= size
                    if room < 0:
                        raise ValueError(f"its arrays take more than {MOST_BYTES:,} bytes")
                    data = member.read(size)
                    if len(data) != size:
                        raise ValueError(f"{name} is cut short")
                    found[name] = np.frombuffer(data, kind).reshape(shape)
    except HeadraceError:
        raise
    except OSError as error:
        raise HeadraceError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
        raise ModelFileError(f"is no {what} ({error}): record it again", path=path) from error
    except Exception as error:  # what zlib and headers of other things raise
        raise ModelFileError(f"is no {what} ({error}): record it again", path=path) from error
    return found
