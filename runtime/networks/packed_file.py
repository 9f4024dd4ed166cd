"""Weights as kernels want them, in a file in the cache, from which they stream.

An ONNX file has weights as the exporter left them. To pack them anew for every run would take
longer than to read them, and would have to go through Python; so that is done once, a tensor (or a
part of it) at a time. The file's name says what it is made of: the model's files with their sizes
and times, the code that packs, the target, and the weights in order. It gets that name when it is
complete. Of all these files those that were used last stay, as many as `MOST_BYTES` hold; those
whose model is gone go when another one is written.

    bytes 0 to 4095     lines of text: "headrace packed weights" and the hash that is in the name,
                        "crc32" with that of all that follows, "of" and the model's path if it fits
    then                the weights, each from a multiple of 4096 on
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
import zlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from headrace import kernels, networks, sparse
from headrace.atomic_file import whole_file
from headrace.errors import HeadraceError
from headrace.folders import cache_root, why_unusable
from headrace.loaders.model_file import TensorInfo
from headrace.loaders.onnx_model import OnnxModel
from headrace.loaders.progress import Progress
from headrace.loaders.reader import open_regular
from headrace.networks.graph import CHUNK_BYTES
from headrace.networks.operation import Weight
from headrace.offload.files import PAGE, stamp_of
from headrace.sizes import format_size

FOLDER, SUFFIX = "networks", ".weights"
SPARE_BYTES = 64 << 20  # of the disk that are left to others
MOST_BYTES = 8 << 30  # of all packed files, but for one that is larger by itself


class PackedFile:
    """The packed weights of a network, in a file that may have to be written yet.

    Args:
        model: whose weights they are; it came as a file.
        weights: by what tells each from others, in the order in which they are read.
        target: of the kernels.

    Attributes:
        path: of the file.
        n_bytes: of the file.
        places: of the weights, by the same keys.

    """

    def __init__(self, model: OnnxModel, weights: Mapping[Any, Weight], target: str) -> None:
        self._weights = dict(weights)
        whose, which = _digests(model, self._weights, target)
        folder = cache_root() / FOLDER
        self.path = folder / f"{whose}-{which}{SUFFIX}"
        self._others = f"{whose[:16]}-*{SUFFIX}"  # what earlier versions of the model left
        self._alike = f"{whose}-"
        self._source = _SOURCE + os.fsencode(model.path.resolve() if model.path else "") + b"\n"
        self._head = f"headrace packed weights {whose}-{which}\n".encode()
        self.places: dict[Any, TensorInfo] = {}
        at = PAGE
        for key, weight in self._weights.items():
            name = f"packed weights {len(self.places)}"
            self.places[key] = TensorInfo(
                name, "I8", (weight.n_bytes,), self.path, at, weight.n_bytes
            )
            at += -(-weight.n_bytes // PAGE) * PAGE
        self.n_bytes = at

    @property
    def is_there(self) -> bool:
        """Whether it has been written; its weights are not looked at."""
        try:
            with open_regular(self.path, "packed weights") as file:
                return self._begins(file)
        except (OSError, HeadraceError):
            return False

    def is_whole(self) -> bool:
        """Whether it is there, and has what was written; it is then used last of all such files."""
        try:
            with open_regular(self.path, "packed weights") as file:
                if not self._begins(file) or file.read(_CRC_BYTES) != _crc_line(file):
                    return False
            os.utime(self.path, ns=(time.time_ns(), self.path.stat().st_mtime_ns))
        except (OSError, HeadraceError):
            return False
        return True

    def _begins(self, file: BinaryIO) -> bool:
        whole = os.fstat(file.fileno()).st_size == self.n_bytes
        return whole and file.read(len(self._head)) == self._head

    def write(self, progress: Progress | None = None) -> None:
        """Write it, and remove what other versions of the model have left.

        Raises:
            HeadraceError: there is no room on the disk, or it cannot be written.
            ModelFileError: weights cannot be read.
        """
        folder = self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob(self._others):
                if not old.name.startswith(self._alike):
                    old.unlink(missing_ok=True)
            _without_models_gone(folder)
            _make_room(folder, self.n_bytes, self.path)
            free = shutil.disk_usage(folder).free
            if free < self.n_bytes + SPARE_BYTES:
                raise HeadraceError(
                    f"weights that are read while the network runs are packed once in {folder}, "
                    f"which takes {format_size(self.n_bytes)} of the disk, and {format_size(free)} "
                    "are free: make room, or set HEADRACE_CACHE to a folder elsewhere"
                )
            with whole_file(self.path) as file:
                file.write(self._head)
                file.flush()
                self._fill(file.fileno(), progress)
                file.seek(len(self._head))
                file.write(_crc_line(file))
                if file.tell() + len(self._source) <= PAGE:
                    file.write(self._source)
                file.flush()
        except OSError as error:
            why = why_unusable(folder) or error.strerror or str(error)
            raise HeadraceError(f"packed weights cannot be written: {why}") from error

    def _fill(self, file: int, progress: Progress | None) -> None:
        done = 0
        os.truncate(file, self.n_bytes)
        for key, weight in self._weights.items():
            begin = self.places[key].offset
            for at, part in weight.parts():
                data = memoryview(part.reshape(-1).view("u1"))
                written = 0
                while written < len(data):
                    written += os.pwrite(file, data[written:], begin + at + written)
                done += len(data)
                if progress is not None:
                    progress(done, self.n_bytes, "packing weights")


_SOURCE = b"of "  # in front of the model's path
_CRC_BYTES = len(b"crc32 01234567\n")


def _crc_line(file: BinaryIO) -> bytes:
    """The second line of a file; where it is read or written goes on as before."""
    crc, at = 0, PAGE
    while part := os.pread(file.fileno(), CHUNK_BYTES, at):
        crc = zlib.crc32(part, crc)
        at += len(part)
    return b"crc32 %08x\n" % crc


def _without_models_gone(folder: Path) -> None:
    """Remove files of models that are not there any more."""
    for one in folder.glob(f"*{SUFFIX}"):
        with contextlib.suppress(OSError, HeadraceError):
            with open_regular(one, "packed weights") as file:
                times = os.fstat(file.fileno())
                lines = file.read(PAGE).split(b"\n")
            os.utime(one, ns=(times.st_atime_ns, times.st_mtime_ns))  # it was not used
            of = lines[2] if len(lines) > 3 else b""
            if of.startswith(_SOURCE) and not os.path.lexists(of.removeprefix(_SOURCE)):
                one.unlink(missing_ok=True)


def _make_room(folder: Path, n_bytes: int, path: Path) -> None:
    """Remove files that were used longest ago, for one of so many bytes.

    Those that a process reads from stay there for it, where the system has such files.
    """
    others = [(one.stat(), one) for one in folder.glob(f"*{SUFFIX}") if one != path]
    taken = n_bytes + sum(found.st_size for found, _ in others)
    for found, one in sorted(others, key=lambda pair: pair[0].st_atime_ns):
        if taken <= MOST_BYTES:
            return
        with contextlib.suppress(PermissionError):
            one.unlink(missing_ok=True)
            taken -= found.st_size


def _digests(model: OnnxModel, weights: Mapping[Any, Weight], target: str) -> tuple[str, str]:
    """Of the model and what packs it, in two halves of which the first is the path; of the rest."""
    assert model.path is not None
    path = model.path.resolve()
    # Archives and image layers give files the times that they had: not that of their change.
    stamps = [(str(one), *stamp_of(one), os.stat(one).st_ctime_ns) for one in model.files]
    which = [(key, weight.n_bytes) for key, weight in weights.items()]
    version = hashlib.sha256(repr((stamps, _code())).encode()).hexdigest()[:16]
    whose = hashlib.sha256(str(path).encode()).hexdigest()[:16]
    return f"{whose}-{version}", hashlib.sha256(repr((target, which)).encode()).hexdigest()[:16]


@cache
def _code() -> str:
    """Hash of all code that may have a part in packing."""
    digest = hashlib.sha256()
    for package in (networks, kernels, sparse):
        for folder in package.__path__:
            for file in sorted(Path(folder).rglob("*.py")):
                digest.update(file.read_bytes())
    return digest.hexdigest()
