"""Rows of floats in a file that has no name: as many as a text has tokens, none in memory."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np

from headrace.errors import HeadraceError
from headrace.sparse.format import Floats


class RowFile:
    """float32 [rows, width] on the disk, to be read and written by rows.

    Raises:
        HeadraceError: there is no place for it.
    """

    def __init__(self, folder: Path, width: int) -> None:
        self._bytes = 4 * width
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise HeadraceError(
                f"cannot keep hidden states in {folder}: {error.strerror}; set HEADRACE_CACHE to a "
                "directory that can be written"
            ) from error

    def close(self) -> None:
        """It is gone then."""
        self._file.close()

    def read(self, first: int, n: int) -> Floats:
        """Rows from `first` on: float32 [n, width]."""
        data = np.empty((n, self._bytes // 4), np.float32)
        self._read(first, data)
        return data

    def write(self, first: int, rows: Floats) -> None:
        """Put rows from `first` on.

        Raises:
            HeadraceError: the disk does not take them.
        """
        data, at = np.ascontiguousarray(rows, np.float32).reshape(-1).view(np.uint8).data, 0
        try:
            while at < len(data):
                at += os.pwrite(self._file.fileno(), data[at:], first * self._bytes + at)
        except OSError as error:
            raise HeadraceError(f"cannot keep hidden states: {error.strerror}") from error

    def gather(self, indices: np.ndarray, to: Floats) -> None:
        """Read the rows of `indices` to those of `to` [n, width]."""
        found = np.empty(to.shape, np.float32)
        fd, size, data = self._file.fileno(), self._bytes, found.reshape(-1).view(np.uint8).data
        for i, index in enumerate(indices.tolist()):
            if os.preadv(fd, [data[i * size : (i + 1) * size]], index * size) < size:
                self._read(index, found[i])
        to[:] = found

    def add(self, indices: np.ndarray, rows: Floats) -> None:
        """Add to the rows of `indices`, which differ."""
        sums = np.empty(rows.shape, np.float32)
        self.gather(indices, sums)
        sums += rows
        for index, row in zip(indices.tolist(), sums, strict=True):
            self.write(index, row)

    def _read(self, first: int, to: Floats) -> None:
        data, at = to.reshape(-1).view(np.uint8).data, 0
        while at < len(data):
            n = os.preadv(self._file.fileno(), [data[at:]], first * self._bytes + at)
            if n == 0:
                raise HeadraceError("the file of hidden states was truncated")
            at += n
