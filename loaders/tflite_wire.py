"""FlatBuffers (flatbuffers.dev, "Internals") read from a file, with every place checked before use.

The `flatbuffers` package has the wire's numbers, and its own tables believe what a file says.
Only what is asked for is read: weights stay in the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import Any

import numpy as np
from flatbuffers import packer

from headrace.errors import ModelFileError
from headrace.loaders.reader import open_regular

MOST_TABLES = 1 << 16  # of a vector of tables
_BLOCK = 1 << 14
_MOST_BLOCKS = 1 << 10  # that are kept
_IDENTIFIER = 4  # where the root's offset ends and the file's identifier begins


class FlatFile:
    """A file that holds one FlatBuffer.

    Raises:
        ModelNotFoundError: there is no such file.
        ModelFileError: it is no regular file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_regular(path)
        self.size = self._file.seek(0, 2)
        self._blocks: dict[int, bytes] = {}
        # Offsets may lead to the same bytes again and again: a small file must not grow here.
        self._left = 4 * self.size + (1 << 20)

    def close(self) -> None:
        """Close the file; what was read stays."""
        self._file.close()

    def bad(self, message: str, offset: int) -> ModelFileError:
        """That the file is not what it should be."""
        return ModelFileError(f"{message}; export or fetch it again", path=self.path, offset=offset)

    def read(self, offset: int, n_bytes: int, what: str) -> bytes:
        """Bytes of the file.

        Raises:
            ModelFileError: they are outside of it, or the file shrank.
        """
        if not 0 <= offset <= self.size - n_bytes:
            raise self.bad(
                f"{what}: {n_bytes} bytes at {offset} are outside of the file's {self.size}", offset
            )
        self._left -= n_bytes
        if self._left < 0:
            raise self.bad(f"{what}: the file refers to the same bytes too often", offset)
        first, last = offset // _BLOCK, (offset + n_bytes - 1) // _BLOCK
        found = b"".join(self._block(i) for i in range(first, last + 1))
        begin = offset - first * _BLOCK
        found = found[begin : begin + n_bytes]
        if len(found) < n_bytes:
            raise self.bad(f"{what}: the file ends here, and it was longer", offset + len(found))
        return found

    def _block(self, index: int) -> bytes:
        if index not in self._blocks:
            if len(self._blocks) >= _MOST_BLOCKS:
                self._blocks.clear()
            try:
                self._file.seek(index * _BLOCK)
                self._blocks[index] = self._file.read(_BLOCK) or b""
            except OSError as error:
                raise ModelFileError(
                    f"read failed: {error.strerror}. Check the disk", path=self.path,
                    offset=index * _BLOCK,
                ) from error  # fmt: skip
        return self._blocks[index]

    def number(self, kind: Struct, offset: int, what: str) -> Any:
        """A number of the wire (`flatbuffers.packer`)."""
        return kind.unpack(self.read(offset, kind.size, what))[0]

    def root(self, identifier: bytes, what: str) -> Table:
        """The table that a file with this identifier begins with.

        Raises:
            ModelFileError: it has another, or none.
        """
        if self.size < 8 or self.read(_IDENTIFIER, 4, what) != identifier:
            raise self.bad(
                f"it does not have {identifier.decode()!r} at byte {_IDENTIFIER}: this is no "
                f"{what} file", _IDENTIFIER,
            )  # fmt: skip
        return Table.at(self, self.number(packer.uoffset, 0, what), what)


@dataclass(frozen=True, slots=True)
class Table:
    """A table: fields by number, each of which may be missing.

    Attributes:
        begin: where it is.
        what: it is, for errors.
    """

    file: FlatFile
    begin: int
    what: str
    _places: tuple[int, ...]  # of fields, from `begin` on; 0: missing
    _n_bytes: int

    @classmethod
    def at(cls, file: FlatFile, begin: int, what: str) -> Table:
        """The table there.

        Raises:
            ModelFileError: it, or the table of its fields, is outside of the file or impossible.
        """
        what_fields = f"{what}: places of its fields"
        places = begin - file.number(packer.soffset, begin, what)
        n_places = file.number(packer.voffset, places, what_fields)
        n_bytes = file.number(packer.voffset, places + 2, what_fields)
        if n_places < 4 or n_places % 2 or n_bytes < 4:
            raise file.bad(f"{what_fields} take {n_places} bytes for {n_bytes}", places)
        if begin + n_bytes > file.size:
            raise file.bad(f"{what}: its {n_bytes} bytes are not all in the file", begin)
        raw = file.read(places + 4, n_places - 4, what_fields)
        return cls(file, begin, what, tuple(np.frombuffer(raw, "<u2").tolist()), n_bytes)

    def _field(self, field: int, n_bytes: int) -> int | None:
        """Where a field is; None: it is missing."""
        place = self._places[field] if field < len(self._places) else 0
        if place == 0:
            return None
        if not 4 <= place <= self._n_bytes - n_bytes:
            raise self.file.bad(
                f"{self.what}: field {field} of {n_bytes} bytes at {place} is outside of its "
                f"{self._n_bytes}", self.begin,
            )  # fmt: skip
        return self.begin + place

    def number(self, field: int, kind: Struct, default: Any = 0) -> Any:
        """A field that is a number."""
        at = self._field(field, kind.size)
        return default if at is None else self.file.number(kind, at, self.what)

    def _leads(self, field: int) -> int | None:
        at = self._field(field, 4)
        return None if at is None else at + self.file.number(packer.uoffset, at, self.what)

    def table(self, field: int, what: str) -> Table | None:
        """A field that is a table."""
        at = self._leads(field)
        return None if at is None else Table.at(self.file, at, what)

    def place(self, field: int, item: int = 1) -> tuple[int, int] | None:
        """Where the items of a vector begin, and how many there are, all of them in the file."""
        at = self._leads(field)
        if at is None:
            return None
        count = self.file.number(packer.uoffset, at, self.what)
        if count * item > self.file.size - at - 4:
            raise self.file.bad(
                f"{self.what}: {count} items of {item} bytes of field {field} do not fit into the "
                "file", at,
            )  # fmt: skip
        return at + 4, count

    def array(self, field: int, dtype: str, most: int) -> np.ndarray:
        """A vector of numbers; empty where it is missing.

        Raises:
            ModelFileError: it has more than `most`, or is not in the file.
        """
        kind = np.dtype(dtype)
        at, count = self.place(field, kind.itemsize) or (self.begin, 0)
        if count > most:
            raise self.file.bad(
                f"{self.what}: {count} numbers in field {field}, at most {most} expected", at
            )
        return np.frombuffer(self.file.read(at, count * kind.itemsize, self.what), kind)

    def string(self, field: int, most: int = 4096) -> str:
        """A string; empty where it is missing."""
        return self.array(field, "u1", most).tobytes().decode("utf-8", "replace")

    def tables(self, field: int, what: str) -> Iterator[Table]:
        """The tables of a vector."""
        at, count = self.place(field, 4) or (self.begin, 0)
        if count > MOST_TABLES:
            raise self.file.bad(f"{count} of {what}, at most {MOST_TABLES} are read", at)
        for i in range(count):
            here = at + 4 * i
            one = f"{what} {i}"
            yield Table.at(self.file, here + self.file.number(packer.uoffset, here, one), one)
