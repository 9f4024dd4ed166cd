"""Inputs that a network is calibrated with, out of .npy and .npz files."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headrace.errors import HeadraceError
from headrace.networks.ports import Port

Sample = dict[str, np.ndarray]
_DTYPES: dict[str, np.dtype[Any]] = {
    "FLOAT": np.dtype(np.float32), "INT64": np.dtype(np.int64), "INT32": np.dtype(np.int32),
}  # fmt: skip
_DAMAGED = (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error)


def read_samples(path: Path, ports: Sequence[Port], most: int) -> list[Sample]:
    """Inputs of single calls, at most so many.

    An .npz file has an array for each input, by name; an .npy file is for networks with one. Arrays
    hold one call's input, or several along their first axis: as many as go into one call of what
    the network says, or all by themselves where it has a fixed number.

    Args:
        path: a file, or a folder with such files, which are taken in the order of their names.
        ports: inputs of the network.
        most: calls.

    Raises:
        HeadraceError: there are none, or a file does not fit.
    """
    files = sorted(path.glob("*.np[yz]")) if path.is_dir() else [path]
    if not files:
        raise HeadraceError(
            f"{path} has no .npy or .npz files to calibrate with; write the network's inputs, "
            "prepared as it wants them, with numpy.save"
        )
    found: list[Sample] = []
    for file in files:
        for sample in _of_file(file, ports):
            found.append(sample)
            if len(found) == most:
                return found
    if not found:
        raise HeadraceError(f"the arrays of {path} are empty: there is nothing to calibrate with")
    return found


def _of_file(file: Path, ports: Sequence[Port]) -> Iterator[Sample]:
    arrays = _arrays(file, ports)
    cut = {port.name: _cut(file, port, arrays[port.name]) for port in ports}
    counts = {len(parts) for parts in cut.values()}
    if len(counts) != 1:
        raise HeadraceError(f"{file}: inputs are for different numbers of calls: {sorted(counts)}")
    for i in range(counts.pop()):
        yield {name: parts[i] for name, parts in cut.items()}


def _arrays(file: Path, ports: Sequence[Port]) -> dict[str, np.ndarray]:
    try:
        loaded = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        raise HeadraceError(f"no file or folder {file} to calibrate with") from None
    except _DAMAGED as error:
        raise _no_numbers(file, error) from None
    if isinstance(loaded, np.ndarray):
        if len(ports) != 1:
            names = ", ".join(port.name for port in ports)
            raise HeadraceError(f"{file}: the network takes {names}; write .npz files with these")
        return {ports[0].name: loaded}
    with loaded:
        missing = [port.name for port in ports if port.name not in loaded]
        if missing:
            raise HeadraceError(f"{file} has no array {missing[0]!r}, which the network takes")
        try:
            return {port.name: loaded[port.name] for port in ports}
        except _DAMAGED as error:
            raise _no_numbers(file, error) from None


def _no_numbers(file: Path, error: Exception) -> HeadraceError:
    return HeadraceError(f"{file} is no .npy or .npz file of numbers: {error}")


def _cut(file: Path, port: Port, array: np.ndarray) -> list[np.ndarray]:
    """Arrays for one call each."""
    dtype = _DTYPES.get(port.kind)
    if port.shape is None or dtype is None:
        raise HeadraceError(
            f"input {port.name} is {port.text}: {', '.join(_DTYPES)} are what is calibrated with"
        )
    if array.dtype.kind not in ("iub" if dtype.kind == "i" else "iubf"):
        raise HeadraceError(f"{file} has {array.dtype} numbers for input {port.name}: {port.text}")
    array = np.array(array, dtype, order="C")
    if not np.isfinite(array).all():
        raise HeadraceError(f"{file} has values that are no numbers")
    shape = port.shape
    if not shape and array.ndim < 2:
        return [np.array(one) for one in np.atleast_1d(array)]
    if (array.ndim == len(shape) - 1 and shape[0] in (1, None)) or isinstance(shape[0], str):
        array = array[None] if array.ndim == len(shape) - 1 else array
    fits = array.ndim == len(shape) and all(
        not isinstance(d, int) or d == n for d, n in zip(shape[1:], array.shape[1:], strict=True)
    )
    at_once = max(1, shape[0]) if shape and isinstance(shape[0], int) else 1
    if not shape or not fits or len(array) % at_once:
        raise HeadraceError(
            f"{file} has the shape {list(array.shape)}, and the network takes {port.name}: "
            f"{port.text}"
        )
    return [array[i : i + at_once] for i in range(0, len(array), at_once)]
